//! Figures, and the table of them.

use std::io::{self, Write};

use serde::Serialize;

use crate::Timing;

/// One measured operation, with all contenders.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// What was done.
    pub what: String,
    /// Bytes moved by one operation; 0 where time is what counts.
    pub bytes: u64,
    /// The device first, the floor second if there is one, then the other contenders.
    pub timings: Vec<Timing>,
}

impl Figure {
    /// A transfer of this many bytes, and how long it took each contender.
    pub(crate) fn new(what: &str, bytes: usize, timings: Vec<Timing>) -> Figure {
        Figure { what: format!("{what}, {}", size(bytes)), bytes: bytes as u64, timings }
    }

    /// How the device's median compares with the floor's: a time ratio, 1 at best.
    pub fn ratio(&self) -> f64 {
        match self.timings.as_slice() {
            [device, floor, ..] => device.p50_ns as f64 / floor.p50_ns as f64,
            _ => f64::NAN,
        }
    }
}

/// Prints the table: medians, 99th percentiles, throughput, ratios to the floor.
pub fn print(figures: &[Figure], to: &mut dyn Write) -> io::Result<()> {
    print_head(to)?;
    figures.iter().try_for_each(|figure| figure.print(to))
}

/// Prints the table's first line, for figures that are printed as they are done.
pub fn print_head(to: &mut dyn Write) -> io::Result<()> {
    writeln!(to, "{:<38} {:<10} {:>11} {:>11} {:>11} {:>9}", "", "", "median", "99 %", "GiB/s", "x floor")
}

impl Figure {
    /// Prints its lines of the table.
    pub fn print(&self, to: &mut dyn Write) -> io::Result<()> {
        let floor = self.timings.get(1);
        for (row, timing) in self.timings.iter().enumerate() {
            let what = if row == 0 { self.what.as_str() } else { "" };
            let rate = match self.bytes {
                0 => String::new(),
                bytes => format!("{:.2}", bytes as f64 / timing.p50_ns as f64 * 1e9 / f64::from(1 << 30)),
            };
            let ratio = floor.map(|floor| format!("{:.2}", timing.p50_ns as f64 / floor.p50_ns as f64));
            writeln!(
                to,
                "{what:<38} {:<10} {:>8.2} us {:>8.2} us {rate:>11} {:>9}",
                timing.name,
                timing.p50_ns as f64 / 1e3,
                timing.p99_ns as f64 / 1e3,
                ratio.as_deref().unwrap_or("-"),
            )?;
        }
        Ok(())
    }
}

/// A size as people read it.
pub(crate) fn size(bytes: usize) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..0x10_0000 => format!("{} KiB", bytes >> 10),
        _ => format!("{} MiB", bytes >> 20),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_without_a_floor_has_no_ratio() {
        let timing = |name| Timing { name, best_ns: 900, p50_ns: 1000, p99_ns: 2000, operations: 3 };
        let alone = Figure::new("alone", 8, vec![timing("limosa")]);
        let beside = Figure::new("beside", 8, vec![timing("limosa"), timing("floor")]);
        assert!(alone.ratio().is_nan());
        let mut text = Vec::new();
        print(&[alone, beside], &mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        let ends: Vec<_> = text.lines().skip(1).map(|line| line.rsplit(' ').next().unwrap()).collect();
        assert_eq!(ends, ["-", "1.00", "1.00"], "{text}");
    }
}
