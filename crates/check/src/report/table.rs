//! The report as a table for people.

use std::io::{self, Write};

use super::{Report, one_line};
use crate::check::Outcome;
use crate::clause::CLAUSES;

impl Report {
    /// Writes the failures with their requests, then a line for each family; with `all`, a line for each check.
    pub fn table(&self, to: &mut dyn Write, all: bool) -> io::Result<()> {
        for check in &self.checks {
            let failed = matches!(check.outcome, Outcome::Fail(_));
            if all || failed {
                let detail = one_line(check.outcome.detail());
                writeln!(to, "{:<6} {:<44} {detail}", check.outcome.word(), check.id)?;
            }
            if failed {
                writeln!(to, "         clauses: {}", check.clauses.join(", "))?;
                for request in &check.requests {
                    writeln!(to, "         {request}")?;
                }
            }
        }
        if all || self.failed().next().is_some() {
            writeln!(to)?;
        }
        writeln!(to, "{:<14} {:>5} {:>5} {:>5} {:>7}", "family", "pass", "fail", "skip", "unsafe")?;
        for (family, counts) in self.by_family() {
            let (pass, fail) = (counts.pass, counts.fail);
            writeln!(to, "{family:<14} {pass:>5} {fail:>5} {:>5} {:>7}", counts.skip, counts.not_safe)?;
        }
        let counts = self.counts();
        let (pass, fail) = (counts.pass, counts.fail);
        writeln!(to, "{:<14} {pass:>5} {fail:>5} {:>5} {:>7}", "all", counts.skip, counts.not_safe)?;
        let checked = CLAUSES.iter().filter(|clause| self.decides(clause.id)).count();
        let clauses = checked + self.unchecked_clauses().len();
        writeln!(
            to,
            "{}: {}, {checked} of {clauses} clauses checked, {:.1} s, left in {}",
            self.device, self.facts.flags, self.seconds, self.left_in
        )?;
        if let Some(why) = &self.ended_early {
            writeln!(to, "ended early: {why}")?;
        }
        Ok(())
    }

    /// The counts of each family that has checks here.
    pub(super) fn by_family(&self) -> Vec<(crate::Family, super::Counts)> {
        let mut families: Vec<(crate::Family, super::Counts)> = Vec::new();
        for check in &self.checks {
            if families.last().is_none_or(|(family, _)| *family != check.family) {
                families.push((check.family, super::Counts::default()));
            }
            if let Some((_, counts)) = families.last_mut() {
                match check.outcome {
                    Outcome::Pass => counts.pass += 1,
                    Outcome::Fail(_) => counts.fail += 1,
                    Outcome::Skip(_) => counts.skip += 1,
                    Outcome::Unsafe => counts.not_safe += 1,
                }
            }
        }
        families
    }
}
