//! A report as text: a table with a bar for each phase. Also how times and bytes are printed for people.

use std::fmt;

use limosa_stream::escaped;

use super::Report;

/// Columns of the bars, which fill a line of 80.
const BAR_COLUMNS: u64 = 26;

impl fmt::Display for Report {
    /// A table with a bar for each phase, at most 80 columns wide, and lines that are as long as the names in them. Characters that are not printable are escaped.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<10} {:>9} {:>9} {:>10} {:>10}", "phase", "at", "took", "devices", "memory")?;
        let total = self.total_ns.max(1);
        let column = |ns: u64| (u128::from(ns) * u128::from(BAR_COLUMNS) / u128::from(total)) as usize;
        for phase in &self.phases {
            let from = column(phase.start_ns).min(BAR_COLUMNS as usize - 1);
            let to = column(phase.start_ns + phase.duration_ns).clamp(from + 1, BAR_COLUMNS as usize);
            writeln!(
                f,
                "{:<10} {:>9} {:>9} {:>10} {:>10}  {}{}",
                phase.phase.name(),
                Time(phase.start_ns).to_string(),
                Time(phase.duration_ns).to_string(),
                Bytes(phase.bytes.device_bytes).to_string(),
                Bytes(phase.bytes.memory_bytes).to_string(),
                " ".repeat(from),
                "█".repeat(to - from),
            )?;
        }
        for device in &self.devices {
            let before = Bytes(device.precopy_bytes);
            writeln!(
                f,
                "{}: {}, {before} of it before the stop",
                escaped(&device.name),
                Bytes(device.bytes)
            )?;
        }
        write!(f, "total {}", Time(self.total_ns))?;
        if let Some(downtime) = self.downtime_ns {
            write!(f, ", downtime {}", Time(downtime))?;
            if let Some(predicted) = self.predicted_downtime_ns {
                write!(f, " (predicted {})", Time(predicted))?;
            }
        }
        let bytes = &self.bytes;
        write!(f, "\ndevices {}, memory {}", Bytes(bytes.device_bytes), Bytes(bytes.memory_bytes))?;
        if bytes.zero_bytes > 0 {
            write!(f, " and {} of zeroes", Bytes(bytes.zero_bytes))?;
        }
        if !self.rounds.is_empty() {
            write!(f, "\nrounds {}", self.rounds.len())?;
        }
        if self.buffer_bytes_max > 0 {
            let begins = if self.rounds.is_empty() { "\n" } else { ", " };
            write!(f, "{begins}buffers {}", Bytes(self.buffer_bytes_max))?;
        }
        writeln!(f)?;
        write!(f, "outcome {}", self.outcome.name())?;
        if let Some(why) = &self.why {
            write!(f, ": {}", escaped(why))?;
        }
        writeln!(f)?;
        self.notes.iter().try_for_each(|note| writeln!(f, "note: {}", escaped(note)))
    }
}

/// A time in ns, printed with three digits or so.
pub(super) struct Time(pub(super) u64);

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.0 as f64;
        match self.0 {
            0..10_000 => write!(f, "{:.1} us", value / 1e3),
            10_000..1_000_000 => write!(f, "{:.0} us", value / 1e3),
            1_000_000..1_000_000_000 => write!(f, "{:.1} ms", value / 1e6),
            _ => write!(f, "{:.2} s", value / 1e9),
        }
    }
}

/// A number of bytes, printed with three digits or so.
pub(super) struct Bytes(pub(super) u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.0 as f64;
        match self.0 {
            0..1024 => write!(f, "{} B", self.0),
            1024..1_048_576 => write!(f, "{:.1} KiB", value / 1024.0),
            1_048_576..1_073_741_824 => write!(f, "{:.1} MiB", value / 1_048_576.0),
            1_073_741_824..107_374_182_400 => write!(f, "{:.2} GiB", value / 1_073_741_824.0),
            _ => write!(f, "{:.1} GiB", value / 1_073_741_824.0),
        }
    }
}

/// Bytes a second, printed with three digits or so.
pub(super) struct Rate(pub(super) f64);

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/s", Bytes(self.0 as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{DeviceReport, LimitsReport, Phase, PhaseReport, Side};
    use super::*;
    use limosa_stream::Totals;

    #[test]
    fn the_timeline_prints() {
        let bytes =
            |device_bytes, memory_bytes, zero_bytes| Totals { device_bytes, memory_bytes, zero_bytes };
        let phase = |phase, start_ns, duration_ns, bytes| PhaseReport { phase, start_ns, duration_ns, bytes };
        let report = Report {
            id: "00".into(),
            phases: vec![
                phase(Phase::Handshake, 0, 400_000, bytes(0, 0, 0)),
                phase(Phase::PreCopy, 400_000, 12_000_000, bytes(1 << 20, 1 << 26, 0)),
                phase(Phase::StopCopy, 12_400_000, 3_600_000, bytes(5000, 4096, 0)),
            ],
            devices: vec![DeviceReport {
                name: "uart0".into(),
                bytes: 1 << 20,
                precopy_bytes: 999,
                waiting_bytes_max: 4096,
                spans: vec![],
            }],
            bytes: bytes(1 << 20, 1 << 26, 1 << 30),
            downtime_ns: Some(3_600_000),
            buffer_bytes_max: 3 << 20,
            total_ns: 16_000_000,
            why: Some("the link is gone".into()),
            notes: vec!["all is \u{202e}well\x1b[2J".into()],
            ..Report::nothing(Side::Source, LimitsReport::default())
        };
        let text = report.to_string();
        let expected = "\
phase             at      took    devices     memory
handshake     0.0 us    400 us        0 B        0 B  █
pre-copy      400 us   12.0 ms    1.0 MiB   64.0 MiB  ████████████████████
stop-copy    12.4 ms    3.6 ms    4.9 KiB    4.0 KiB                      ██████
uart0: 1.0 MiB, 999 B of it before the stop
total 16.0 ms, downtime 3.6 ms
devices 1.0 MiB, memory 64.0 MiB and 1.00 GiB of zeroes
buffers 3.0 MiB
outcome undone: the link is gone
note: all is \\u{202e}well\\u{1b}[2J
";
        assert_eq!(text, expected);
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!((&json["outcome"], &json["why"]), (&"undone".into(), &"the link is gone".into()));
        assert_eq!(json["phases"][1]["phase"], "pre_copy");
        assert_eq!(json["phases"][1]["memory_bytes"], 1 << 26);
        assert_eq!(json["device_bytes"], 1 << 20);
        assert_eq!(json["downtime_ns"], 3_600_000);
        assert_eq!(json["buffer_bytes_max"], 3 << 20);
        assert_eq!(json["devices"][0]["waiting_bytes_max"], 4096);
    }

    #[test]
    fn the_timeline_was_wider_than_a_terminal() {
        let (bytes, time) = ((1 << 30) - 1, 1_000_000_000_000);
        let totals = Totals { device_bytes: bytes, memory_bytes: bytes, zero_bytes: 1 << 40 };
        let phase = |phase| PhaseReport { phase, start_ns: time, duration_ns: time, bytes: totals };
        let report = Report {
            phases: vec![phase(Phase::Handshake), phase(Phase::StopCopy)],
            bytes: totals,
            downtime_ns: Some(time),
            predicted_downtime_ns: Some(time),
            buffer_bytes_max: bytes,
            total_ns: 2 * time,
            ..Report::nothing(Side::Source, LimitsReport::default())
        };
        let text = report.to_string();
        let widest = text.lines().map(|line| line.chars().count()).max();
        assert_eq!(widest, Some(80), "{text}");
    }
}
