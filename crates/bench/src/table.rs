//! Figures, and the table of them.

use std::io::{self, Write};

use serde::Serialize;

use crate::Timing;

/// One thing measured, with all who took part.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// What was done.
    pub what: String,
    /// Bytes moved by one operation; 0 where time is what counts.
    pub bytes: u64,
    /// The device first, the floor second, then whoever else could do it.
    pub timings: Vec<Timing>,
}

impl Figure {
    /// What moved so many bytes, and how long that took each contender.
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
    writeln!(to, "{:<38} {:<10} {:>11} {:>11} {:>11} {:>9}", "", "", "median", "99 %", "GiB/s", "x floor")?;
    for figure in figures {
        let floor = figure.timings.get(1).map_or(0, |floor| floor.p50_ns);
        for (row, timing) in figure.timings.iter().enumerate() {
            let what = if row == 0 { figure.what.as_str() } else { "" };
            let rate = match figure.bytes {
                0 => String::new(),
                bytes => format!("{:.2}", bytes as f64 / timing.p50_ns as f64 * 1e9 / f64::from(1 << 30)),
            };
            writeln!(
                to,
                "{what:<38} {:<10} {:>8.2} us {:>8.2} us {rate:>11} {:>9.2}",
                timing.name,
                timing.p50_ns as f64 / 1e3,
                timing.p99_ns as f64 / 1e3,
                timing.p50_ns as f64 / floor as f64,
            )?;
        }
    }
    Ok(())
}

/// A size as people read it.
pub(crate) fn size(bytes: usize) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..0x10_0000 => format!("{} KiB", bytes >> 10),
        _ => format!("{} MiB", bytes >> 20),
    }
}
