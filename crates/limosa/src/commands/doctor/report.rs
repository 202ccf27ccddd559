//! [`Report`]: everything that the doctor found, as text and as JSON.

use std::io::{self, Write};

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use super::device::measure::Measured;
use super::estimate::Estimate;
use super::finding::{Finding, Kind, Level};
use crate::exit::{self, Code};

/// Facts in the order in which they are printed.
#[derive(Clone, Debug, Default)]
pub struct Facts(pub Vec<(&'static str, String)>);

impl Facts {
    pub fn add(&mut self, name: &'static str, value: impl Into<String>) {
        self.0.push((name, value.into()));
    }
}

impl Serialize for Facts {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, value) in &self.0 {
            map.serialize_entry(&name.replace([' ', '-'], "_"), value)?;
        }
        map.end()
    }
}

/// The facts of a device.
#[derive(Debug, Serialize)]
pub struct DeviceReport {
    pub device: String,
    pub facts: Facts,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub measured: Option<Measured>,
}

/// The overall result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Ready,
    Warnings,
    NotReady,
}

#[derive(Debug, Serialize)]
pub struct Report {
    pub verdict: Verdict,
    pub machine: Facts,
    pub devices: Vec<DeviceReport>,
    pub estimates: Vec<Estimate>,
    /// The worst first.
    pub findings: Vec<Finding>,
}

impl Report {
    pub fn new(
        machine: Facts,
        devices: Vec<DeviceReport>,
        estimates: Vec<Estimate>,
        mut findings: Vec<Finding>,
    ) -> Report {
        findings.sort_by_key(|finding| std::cmp::Reverse(finding.level));
        let verdict = match findings.first().map(|finding| finding.level) {
            Some(Level::Blocker) => Verdict::NotReady,
            Some(Level::Warning) => Verdict::Warnings,
            Some(Level::Note) | None => Verdict::Ready,
        };
        Report { verdict, machine, devices, estimates, findings }
    }

    /// Whether this was found.
    pub fn has(&self, kind: &Kind) -> bool {
        self.findings.iter().any(|finding| finding.id == kind.id)
    }

    fn of(&self, level: Level) -> usize {
        self.findings.iter().filter(|finding| finding.level == level).count()
    }

    /// The exit code, as an error where it is not 0.
    pub fn judge(&self) -> anyhow::Result<()> {
        let count = |level: Level| match self.of(level) {
            1 => format!("1 {}", level.name()),
            count => format!("{count} {}s", level.name()),
        };
        match self.verdict {
            Verdict::Ready => Ok(()),
            Verdict::Warnings => {
                Err(exit::error(Code::Noteworthy, format!("ready, with {}", count(Level::Warning))))
            }
            Verdict::NotReady => {
                Err(exit::error(Code::NotReady, format!("not ready: {}", count(Level::Blocker))))
            }
        }
    }

    pub fn print(&self, to: &mut dyn Write) -> io::Result<()> {
        writeln!(to, "machine")?;
        facts(&self.machine, to)?;
        for device in &self.devices {
            writeln!(to, "{}", device.device)?;
            facts(&device.facts, to)?;
            if let Some(measured) = &device.measured {
                measured.print(to)?;
            }
        }
        if let [first, ..] = &self.estimates[..] {
            writeln!(to, "downtime of {} ({})", first.device, first.basis())?;
            self.estimates.iter().try_for_each(|estimate| estimate.print(to))?;
        }
        for finding in &self.findings {
            writeln!(to)?;
            writeln!(to, "{} {} ({})", finding.level.name(), finding.id, finding.subject)?;
            writeln!(to, "  {}", finding.what)?;
            writeln!(to, "  to do: {}", finding.remedy)?;
        }
        let verdict = match self.verdict {
            Verdict::Ready => "ready",
            Verdict::Warnings => "ready, with warnings",
            Verdict::NotReady => "not ready",
        };
        writeln!(to, "\n{verdict}; docs/doctor.md describes each finding")
    }
}

fn facts(facts: &Facts, to: &mut dyn Write) -> io::Result<()> {
    facts.0.iter().try_for_each(|(name, value)| writeln!(to, "  {name:<20} {value}"))
}
