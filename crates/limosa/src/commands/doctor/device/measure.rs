//! The arcs of a stop, measured: the source of a move without a destination. The device runs again afterwards.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use limosa_client::{Chunk, DataStream, Device, DeviceExt, Result};
use limosa_protocol::{MigrationFlags, State, fsm};
use serde::Serialize;

use crate::output;

/// How long pre-copy is played.
const PRE_COPY_MAX: Duration = Duration::from_secs(1);
/// How long the data of a stopped device is read.
const READ_MAX: Duration = Duration::from_secs(2);
/// Bytes of one read.
const CHUNK_BYTES: usize = 1 << 20;

/// A measured stop.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Measured {
    /// The arcs in their order, each with its time in ns.
    pub arcs: Vec<ArcTime>,
    /// From the running device to STOP_COPY, in ns.
    pub stop_ns: u64,
    /// From STOP to RUNNING, in ns.
    pub start_ns: u64,
    /// The data of pre-copy, in bytes.
    pub precopy_bytes: u64,
    /// The data of the stopped device in bytes, and the time of its reads in ns.
    pub stop_bytes: u64,
    pub read_ns: u64,
    /// Whether it was read to its end.
    pub to_the_end: bool,
}

/// One arc.
#[derive(Clone, Debug, Serialize)]
pub struct ArcTime {
    pub arc: String,
    pub ns: u64,
}

/// The end of a measurement.
#[derive(Debug, Default)]
pub struct Outcome {
    pub measured: Option<Measured>,
    /// Why it is not complete.
    pub failed: Option<String>,
    /// Why the device does not run.
    pub not_restored: Option<String>,
}

/// Measures a device that runs.
pub fn measure(device: &dyn Device, flags: MigrationFlags, cancel: &AtomicBool) -> Outcome {
    let mut walk = Walk { device, flags, at: State::Running, measured: Measured::default(), stream: None };
    let walked = walk.source(cancel);
    let mut outcome = Outcome::default();
    let back = match &walked {
        Ok(()) => walk.run_again(),
        // It cannot be driven from here any more. Its server lets it run again when this client is gone.
        Err(error) if error.is_connection_lost() => {
            outcome.not_restored = Some("in which state it is now is not known".into());
            outcome.failed = Some(error.to_string());
            return outcome;
        }
        // Only the device knows in which state it stopped.
        Err(_) => device.set_state(State::Running).map(drop),
    };
    match walked {
        Ok(()) => outcome.measured = Some(walk.measured),
        Err(error) => outcome.failed = Some(error.to_string()),
    }
    outcome.not_restored = match back.and_then(|()| device.state()) {
        Ok(State::Running) => None,
        Ok(state) => Some(format!("it is in {state}")),
        Err(error) => Some(error.to_string()),
    };
    outcome
}

struct Walk<'a> {
    device: &'a dyn Device,
    flags: MigrationFlags,
    at: State,
    measured: Measured,
    stream: Option<Box<dyn DataStream>>,
}

impl Walk<'_> {
    /// Arc by arc to a state; how long that took in ns.
    fn to(&mut self, to: State) -> Result<u64> {
        let path = fsm::path(self.flags, self.at, to).map_err(|refusal| limosa_client::Error::Usage {
            device: self.device.name().into(),
            what: format!("no way from {} to {to}: {refusal:?}", self.at),
        })?;
        let mut whole = 0;
        for arc in path.arcs() {
            let began = Instant::now();
            let stream = self.device.set_state(arc.to)?;
            let ns = began.elapsed().as_nanos() as u64;
            self.stream = stream.or(self.stream.take());
            self.at = arc.to;
            self.measured.arcs.push(ArcTime { arc: format!("{}>{}", arc.from, arc.to), ns });
            whole += ns;
        }
        Ok(whole)
    }

    fn source(&mut self, cancel: &AtomicBool) -> Result<()> {
        if self.flags.contains(MigrationFlags::PRE_COPY) {
            self.to(State::PreCopy)?;
            self.measured.precopy_bytes = self.read(PRE_COPY_MAX, cancel)?.0;
        }
        self.measured.stop_ns = self.to(State::StopCopy)?;
        let began = Instant::now();
        let (bytes, to_the_end) = self.read(READ_MAX, cancel)?;
        self.measured.read_ns = began.elapsed().as_nanos() as u64;
        (self.measured.stop_bytes, self.measured.to_the_end) = (bytes, to_the_end);
        Ok(())
    }

    /// Reads until there is no more data for now. Returns the number of bytes, and whether the end was reached.
    fn read(&mut self, most: Duration, cancel: &AtomicBool) -> Result<(u64, bool)> {
        let Some(stream) = &mut self.stream else {
            let (device, state) = (self.device.name().to_owned(), self.at);
            return Err(limosa_client::Error::Misbehaved {
                device,
                what: format!("{state} opened no session"),
            });
        };
        let (mut chunk, mut bytes, began) = (vec![0; CHUNK_BYTES], 0, Instant::now());
        while began.elapsed() < most && !cancel.load(Ordering::Relaxed) {
            match stream.read(&mut chunk)? {
                Chunk::Data(read) => bytes += read as u64,
                Chunk::NothingForNow | Chunk::End => return Ok((bytes, true)),
            }
        }
        Ok((bytes, false))
    }

    fn run_again(&mut self) -> Result<()> {
        self.stream = None;
        self.to(State::Stop)?;
        self.measured.start_ns = self.to(State::Running)?;
        Ok(())
    }
}

impl Measured {
    pub fn print(&self, to: &mut dyn Write) -> io::Result<()> {
        for ArcTime { arc, ns } in &self.arcs {
            writeln!(to, "  {arc:<28} {:>12}", time(*ns))?;
        }
        let more = if self.to_the_end { "" } else { ", and more" };
        let (stop, before) = (output::bytes(self.stop_bytes), output::bytes(self.precopy_bytes));
        let read = time(self.read_ns);
        writeln!(to, "  {before} in pre-copy, then {stop} in {read}{more}")
    }
}

/// A time in ns, for people.
pub fn time(ns: u64) -> String {
    format!("{:.3} ms", ns as f64 / 1e6)
}
