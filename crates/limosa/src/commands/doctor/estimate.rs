//! [`Estimate`]: the downtime of a device at the speed of a link, from the size that it reports or from a measurement.

use std::io::{self, Write};

use serde::Serialize;

use super::device::Looked;
use super::device::measure::time;
use crate::args::Rate;
use crate::output;

/// Speeds for which it is estimated unless others are given.
const USUAL: [Rate; 4] = [Rate::gbit(1), Rate::gbit(10), Rate::gbit(25), Rate::gbit(100)];

/// One line of it.
#[derive(Clone, Debug, Serialize)]
pub struct Estimate {
    pub device: String,
    pub bytes_per_second: u64,
    /// The state that is moved while the device is stopped.
    pub state_bytes: u64,
    /// Whether that is an upper bound: no pre-copy was played.
    pub at_most: bool,
    /// That much over the link.
    pub transfer_ns: u64,
    /// If they were measured: the arcs to STOP_COPY, the reads, the arcs to RUNNING.
    pub stop_ns: Option<u64>,
    pub read_ns: Option<u64>,
    pub start_ns: Option<u64>,
    /// All together: data is read while it is sent.
    pub downtime_ns: u64,
}

/// An estimate for each speed; none where no size is known.
pub fn of(looked: &Looked, rates: &[Rate]) -> Vec<Estimate> {
    let measured = looked.report.measured.as_ref();
    let said = looked.known.stop_copy_bytes;
    let Some(state_bytes) = measured
        // If the state was not read to its end, its size is the one that the device reports.
        .map(|measured| {
            if measured.to_the_end { measured.stop_bytes } else { measured.stop_bytes.max(said.unwrap_or(0)) }
        })
        .or(said)
    else {
        return Vec::new();
    };
    let rates = if rates.is_empty() { &USUAL[..] } else { rates };
    let read_ns = measured.map(|measured| {
        let part = measured.stop_bytes.max(1) as f64;
        (measured.read_ns as f64 * (state_bytes.max(1) as f64 / part)) as u64
    });
    let (stop_ns, start_ns) =
        (measured.map(|measured| measured.stop_ns), measured.map(|measured| measured.start_ns));
    let estimate = |rate: &Rate| {
        let transfer_ns = (state_bytes as f64 / rate.bytes_per_second as f64 * 1e9) as u64;
        let data = transfer_ns.max(read_ns.unwrap_or(0));
        Estimate {
            device: looked.name().into(),
            bytes_per_second: rate.bytes_per_second,
            state_bytes,
            at_most: measured.is_none(),
            transfer_ns,
            stop_ns,
            read_ns,
            start_ns,
            downtime_ns: data.saturating_add(stop_ns.unwrap_or(0)).saturating_add(start_ns.unwrap_or(0)),
        }
    };
    rates.iter().map(estimate).collect()
}

impl Estimate {
    /// The source of the numbers, in words.
    pub fn basis(&self) -> &'static str {
        match self.at_most {
            true => "all of its state, and its arcs not counted: --measure finds out",
            false => {
                "measured: its arcs, and what is left after pre-copy; without loading, memory and the engine"
            }
        }
    }

    pub fn print(&self, to: &mut dyn Write) -> io::Result<()> {
        let gbit = self.bytes_per_second as f64 / 125e6;
        write!(to, "  at {gbit:>6.1} Gbit/s     {:>13}", time(self.downtime_ns))?;
        write!(to, "  {} over the link {}", output::bytes(self.state_bytes), time(self.transfer_ns))?;
        if let (Some(stop), Some(read), Some(start)) = (self.stop_ns, self.read_ns, self.start_ns) {
            write!(to, ", stop {}, reads {}, start {}", time(stop), time(read), time(start))?;
        }
        writeln!(to)
    }
}

#[cfg(test)]
mod tests {
    use super::super::device::Known;
    use super::super::device::measure::Measured;
    use super::super::report::{DeviceReport, Facts};
    use super::*;

    fn looked(said: Option<u64>, measured: Option<Measured>) -> Looked {
        let report = DeviceReport { device: "a".into(), facts: Facts::default(), measured };
        let known = Known { stop_copy_bytes: said, ..Known::default() };
        Looked { report, findings: Vec::new(), device: None, known }
    }

    #[test]
    fn a_size_and_a_speed_make_a_downtime() {
        let lines = of(&looked(Some(125_000_000), None), &[Rate::gbit(1), Rate::gbit(10)]);
        let downtimes: Vec<_> = lines.iter().map(|line| line.downtime_ns).collect();
        assert_eq!(downtimes, [1_000_000_000, 100_000_000]);
        assert!(lines.iter().all(|line| line.at_most));
        assert!(of(&looked(None, None), &[]).is_empty());
        assert_eq!(of(&looked(Some(0), None), &[]).len(), USUAL.len());
    }

    #[test]
    fn what_was_measured_counts_and_reads_run_beside_the_link() {
        let measured = Measured {
            stop_ns: 1000,
            start_ns: 500,
            stop_bytes: 1250,
            read_ns: 300,
            to_the_end: true,
            ..Measured::default()
        };
        let fast = &of(&looked(Some(9999), Some(measured.clone())), &[Rate::gbit(100)])[0];
        assert_eq!((fast.state_bytes, fast.transfer_ns, fast.downtime_ns), (1250, 100, 1800));
        let slow = &of(&looked(None, Some(measured.clone())), &[Rate::gbit(1)])[0];
        assert_eq!((slow.transfer_ns, slow.downtime_ns), (10_000, 11_500));
        // Half of it was read.
        let cut = Measured { to_the_end: false, ..measured };
        let cut = &of(&looked(Some(2500), Some(cut)), &[Rate::gbit(100)])[0];
        assert_eq!((cut.state_bytes, cut.read_ns, cut.downtime_ns), (2500, Some(600), 2100));
    }
}
