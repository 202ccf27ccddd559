//! The report as TAP in the kernel's form (`Documentation/dev-tools/ktap.rst`), which its selftests write.

use std::io::{self, Write};

use super::{Report, one_line};
use crate::check::Outcome;

impl Report {
    /// Writes KTAP: one test for each check. Requests of failures are diagnostic lines.
    pub fn tap(&self, to: &mut dyn Write) -> io::Result<()> {
        writeln!(to, "KTAP version 1")?;
        writeln!(to, "1..{}", self.checks.len())?;
        for (number, check) in (1..).zip(&self.checks) {
            // A # begins a directive.
            let detail = one_line(check.outcome.detail()).replace('#', "");
            let id = &check.id;
            match &check.outcome {
                Outcome::Pass => writeln!(to, "ok {number} {id}")?,
                Outcome::Skip(_) | Outcome::Unsafe => writeln!(to, "ok {number} {id} # SKIP {detail}")?,
                Outcome::Fail(_) => {
                    writeln!(to, "# {detail}")?;
                    writeln!(to, "# clauses: {}", check.clauses.join(", "))?;
                    for request in &check.requests {
                        writeln!(to, "# {request}")?;
                    }
                    writeln!(to, "not ok {number} {id}")?;
                }
            }
        }
        let counts = self.counts();
        let skip = counts.skip + counts.not_safe;
        writeln!(
            to,
            "# Totals: pass:{} fail:{} xfail:0 xpass:0 skip:{skip} error:0",
            counts.pass, counts.fail
        )
    }
}
