//! The report as Markdown, for a mailing list.

use std::io::{self, Write};

use super::{Report, one_line};
use crate::clause::CLAUSES;

impl Report {
    /// Writes Markdown in lines of plain text: counts, failures with their clauses and requests, and what was not checked.
    pub fn markdown(&self, to: &mut dyn Write) -> io::Result<()> {
        let counts = self.counts();
        writeln!(to, "# Conformance of {}\n", self.device)?;
        writeln!(to, "{}. Migration flags: {}.", self.suite, self.facts.flags)?;
        writeln!(to, "Features: {}.\n", or_none(&self.facts.features.join(", ")))?;
        writeln!(
            to,
            "{} passed, {} failed, {} skipped, {} not run because they may cost the device its state.",
            counts.pass, counts.fail, counts.skip, counts.not_safe
        )?;
        writeln!(to, "The device was left in {}.", self.left_in)?;
        if let Some(why) = &self.ended_early {
            writeln!(to, "The suite ended early: {why}.")?;
        }
        writeln!(to, "\n| family | pass | fail | skip | unsafe |\n|---|---|---|---|---|")?;
        for (family, counts) in self.by_family() {
            let (pass, fail, skip, not_safe) = (counts.pass, counts.fail, counts.skip, counts.not_safe);
            writeln!(to, "| {family} | {pass} | {fail} | {skip} | {not_safe} |")?;
        }
        if counts.fail > 0 {
            writeln!(to, "\n## Failures")?;
        }
        for check in self.failed() {
            writeln!(to, "\n### {}\n\n{}.\n", check.id, one_line(check.outcome.detail()))?;
            for id in &check.clauses {
                if let Some(clause) = CLAUSES.iter().find(|clause| clause.id == id) {
                    writeln!(to, "- {}, {}: {}", clause.document, clause.section, clause.words)?;
                }
            }
            if !check.requests.is_empty() {
                writeln!(to, "\n```")?;
                for request in &check.requests {
                    writeln!(to, "{}", one_line(request).replace("```", "'''"))?;
                }
                writeln!(to, "```")?;
            }
        }
        let unchecked = self.unchecked_clauses();
        if !unchecked.is_empty() {
            writeln!(to, "\n## Clauses that were not checked\n")?;
            for (id, why) in unchecked {
                writeln!(to, "- `{id}`: {}", one_line(&why))?;
            }
        }
        Ok(())
    }
}

fn or_none(text: &str) -> &str {
    if text.is_empty() { "none" } else { text }
}
