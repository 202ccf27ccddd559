//! The report as JUnit's XML, which build servers read.

use std::io::{self, Write};

use super::Report;
use crate::check::Outcome;

/// Text for an attribute or an element: what XML 1.0 cannot hold is replaced.
fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\n' | '\t' => escaped.push(letter),
            letter if letter < ' ' || matches!(letter, '\u{7f}' | '\u{fffe}' | '\u{ffff}') => {
                escaped.push('\u{fffd}')
            }
            letter => escaped.push(letter),
        }
    }
    escaped
}

impl Report {
    /// Writes JUnit's XML: a suite for each family, a case for each check.
    pub fn junit(&self, to: &mut dyn Write) -> io::Result<()> {
        let counts = self.counts();
        let skipped = counts.skip + counts.not_safe;
        writeln!(to, r#"<?xml version="1.0" encoding="UTF-8"?>"#)?;
        writeln!(
            to,
            r#"<testsuites name="{}" tests="{}" failures="{}" skipped="{skipped}" time="{:.3}">"#,
            escape(&self.suite),
            self.checks.len(),
            counts.fail,
            self.seconds
        )?;
        for (family, counts) in self.by_family() {
            let tests = counts.pass + counts.fail + counts.skip + counts.not_safe;
            let skipped = counts.skip + counts.not_safe;
            writeln!(
                to,
                r#"  <testsuite name="{family}" tests="{tests}" failures="{}" skipped="{skipped}">"#,
                counts.fail
            )?;
            for check in self.checks.iter().filter(|check| check.family == family) {
                let (id, device) = (escape(&check.id), escape(&self.device));
                let time = check.milliseconds / 1e3;
                write!(to, r#"    <testcase name="{id}" classname="{device}" time="{time:.3}""#)?;
                let detail = escape(check.outcome.detail());
                match &check.outcome {
                    Outcome::Pass => writeln!(to, "/>")?,
                    Outcome::Skip(_) | Outcome::Unsafe => {
                        writeln!(to, r#"><skipped message="{detail}"/></testcase>"#)?;
                    }
                    Outcome::Fail(_) => {
                        let requests = escape(&check.requests.join("\n"));
                        writeln!(to, r#"><failure message="{detail}">{requests}</failure></testcase>"#)?;
                    }
                }
            }
            writeln!(to, "  </testsuite>")?;
        }
        writeln!(to, "</testsuites>")
    }
}
