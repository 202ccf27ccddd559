//! `limosa demo`: two devices that are in use move to other servers, and every byte is verified.
//!
//! Four server processes, a serial port and a synthetic device on each end; this process is their
//! VMM. It is also the guest: one thread talks through the serial port all the time, and the
//! synthetic device writes stamped pages into guest memory. Source and destination have guest memory
//! of their own, so pages have to move as well.

mod dma;
mod serial;
mod servers;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, ensure};
use limosa_client::{Device, DeviceExt};
use limosa_migrate::{
    Cancel, Destination, FilePages, Ledger, Memory, MemoryRegion, MovedDevice, Options, Outcome, Received,
    Report, Source, Vmm, move_local,
};
use limosa_protocol::State;
use serde::Serialize;

use crate::args;
use crate::exit::{self, Code};
use crate::output::{self, Output};
use crate::progress::Progress;
use crate::signals;
use dma::GuestMemory;
use serial::{Count, Serial};
use servers::Server;

/// Bytes through the serial port before the move, and again after it.
const SERIAL_BYTES: u64 = 2000;
/// Pages written by the synthetic device before the move, and again after it.
const DMA_WRITES: u64 = 4096;
/// How fast it writes them, and changes its own state, in bytes a second.
const DMA_RATE: u64 = 128 << 20;
const DIRTY_RATE: u64 = 16 << 20;

#[derive(Serialize)]
struct Demo {
    verified: bool,
    downtime_ns: u64,
    total_ns: u64,
    device_bytes: u64,
    memory_bytes: u64,
    serial_bytes: u64,
    /// Bytes that were in the serial port's FIFO when it moved.
    serial_bytes_in_flight: u64,
    dma_writes: u64,
    pages_verified: u64,
    report: Report,
}

/// One end: the devices and the memory.
struct End {
    serial: Arc<dyn Device>,
    synthetic: Arc<dyn Device>,
    memory: GuestMemory,
    // Dropped last: the servers outlive their clients.
    servers: [Server; 2],
}

impl End {
    fn start(folder: &Path, name: &str, args: &args::Demo, limit: Duration) -> anyhow::Result<End> {
        let options = [
            format!("state={}", args.state_size),
            format!("dirty-rate={DIRTY_RATE}"),
            format!("dma-rate={DMA_RATE}"),
            "dma-pattern=random".into(),
        ];
        let servers = [
            Server::start(folder, &format!("serial-{name}.sock"), "uart", &[])?,
            Server::start(folder, &format!("dma-{name}.sock"), "synthetic", &options)?,
        ];
        let serial = Arc::new(servers[0].connect("serial", limit)?);
        let synthetic = Arc::new(servers[1].connect("dma", limit)?);
        let memory = GuestMemory::new(name, args.memory)?;
        memory.map(&*synthetic)?;
        Ok(End { serial, synthetic, memory, servers })
    }

    fn devices(&self) -> [MovedDevice<'_>; 2] {
        let named = |device, kind: &str| MovedDevice::new(device).with_kind(Some(kind.into()));
        [named(&*self.serial, "uart"), named(&*self.synthetic, "synthetic")]
    }
}

/// The guest's vCPU, as the engine stops and starts it.
struct Guest<'a> {
    serial: &'a Serial,
    destination: &'a End,
    /// At the stop.
    stopped_at: Mutex<Option<Count>>,
}

impl Vmm for Guest<'_> {
    fn stop(&self) -> Result<(), String> {
        *self.stopped_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(self.serial.park());
        Ok(())
    }

    fn resume(&self) {
        self.serial.unpark(None);
    }

    fn start(&self) {
        self.serial.unpark(Some(Arc::clone(&self.destination.serial)));
    }
}

pub fn run(args: &args::Demo, limit: Duration, out: &Output) -> anyhow::Result<()> {
    ensure!(
        args.memory > 0 && args.memory.is_multiple_of(4096),
        "--memory {}: expected a multiple of 4096 above 0",
        args.memory
    );
    // From here on a signal ends the demo, not the process: its servers and its folder go with it.
    let cancel = signals::cancel()?;
    let done = demonstrate(args, limit, &cancel, out);
    match cancel.is_cancelled() && done.is_err() {
        true => Err(exit::error(Code::Cancelled, "cancelled: the demo's servers have ended")),
        false => done,
    }
}

fn demonstrate(args: &args::Demo, limit: Duration, cancel: &Cancel, out: &Output) -> anyhow::Result<()> {
    let folder = tempfile::Builder::new()
        .prefix("limosa-demo-")
        .disable_cleanup(args.keep)
        .tempdir()
        .context("cannot make a folder for the sockets")?;
    let source = End::start(folder.path(), "source", args, limit)?;
    let destination = End::start(folder.path(), "destination", args, limit)?;
    ensure!(!cancel.is_cancelled());
    let say = |line: &dyn Fn() -> String| {
        // Continue for the readers of the rest.
        let _ = out.text(|to| writeln!(to, "{}", line()));
    };
    say(&|| {
        format!(
            "servers    {}\ndevices    on each end a 16550A and a DMA device with {} of state",
            pids(&source, &destination),
            output::bytes(args.state_size)
        )
    });

    let serial = Serial::start(Arc::clone(&source.serial))?;
    dma::start(&*source.synthetic, &source.memory)?;
    serial.wait_for(SERIAL_BYTES).context("before the move")?;
    dma::wait_for(&*source.synthetic, DMA_WRITES, cancel)?;
    say(&|| {
        format!(
            "guest      talks over the serial port\n\
             dma        the device writes {}/s into {} of guest memory",
            output::bytes(DMA_RATE),
            output::bytes(args.memory)
        )
    });

    let guest = Guest { serial: &serial, destination: &destination, stopped_at: Mutex::new(None) };
    let report = migrate(&source, &destination, &guest, cancel, out)?;
    let stopped_at = guest.stopped_at.into_inner().unwrap_or_else(PoisonError::into_inner);
    let in_flight = stopped_at.map_or(0, |count| count.sent - count.received);

    serial.wait_for(SERIAL_BYTES).context("after the move")?;
    dma::wait_for(&*destination.synthetic, DMA_WRITES, cancel)?;
    let count = serial.finish().context("after the move")?;
    ensure!(count.sent == count.received, "{} bytes were sent, {} came back", count.sent, count.received);
    for device in [&source.serial, &source.synthetic] {
        let state = device.state()?;
        ensure!(state == State::Stop, "{}: the source is in {state}, STOP is expected", device.name());
    }
    let dma_writes = dma::verify(&*destination.synthetic, &destination.memory)?;
    let demo = Demo {
        verified: true,
        downtime_ns: report.downtime_ns.context("the move reported no downtime")?,
        total_ns: report.total_ns,
        device_bytes: report.bytes.device_bytes,
        memory_bytes: report.bytes.memory_bytes,
        serial_bytes: count.received,
        serial_bytes_in_flight: in_flight,
        dma_writes,
        pages_verified: args.memory / 4096,
        report,
    };
    out.result(&demo, |to| {
        write!(to, "\n{}\n", demo.report)?;
        writeln!(
            to,
            "verified   {} serial bytes in order, {} of them in the FIFO during the move",
            demo.serial_bytes, demo.serial_bytes_in_flight
        )?;
        writeln!(
            to,
            "verified   {} pages of guest memory after {} DMA writes\n\
             verified   every block of the DMA device's state",
            demo.pages_verified, demo.dma_writes
        )
    })
}

fn migrate(
    source: &End,
    destination: &End,
    guest: &Guest<'_>,
    cancel: &Cancel,
    out: &Output,
) -> anyhow::Result<Report> {
    let progress = Progress::new(out, || None);
    let pages = |memory: &GuestMemory| anyhow::Ok(FilePages::new(memory.file.try_clone()?, 0));
    let (source_pages, destination_pages) = (pages(&source.memory)?, pages(&destination.memory)?);
    let region = |pages| MemoryRegion { id: 0, iova: 0, size: source.memory.bytes, pages };
    let options = Options::default();
    let (from, to) = (source.devices(), destination.devices());
    let (outcome, received) = move_local(
        Source::new(&from, &options)
            .with_memory(Memory::stopped(vec![region(&source_pages)]))
            .with_vmm(guest)
            .with_observer(&progress)
            .with_cancel(Some(cancel)),
        Destination::new(&to, &Ledger::new(), &options)
            .with_memory(&[region(&destination_pages)])
            .with_vmm(guest)
            .with_observer(&limosa_migrate::Nobody),
    );
    match (outcome, received) {
        (Outcome::Moved(report), Received::Runs(_)) => Ok(report),
        (Outcome::Undone { why, .. }, _) => Err(why.into()),
        (outcome, received) => anyhow::bail!("the move ended unexpectedly: {outcome:?}, {received:?}"),
    }
}

fn pids(source: &End, destination: &End) -> String {
    let all = source.servers.iter().chain(&destination.servers).map(|server| server.pid().to_string());
    all.collect::<Vec<_>>().join(", ")
}
