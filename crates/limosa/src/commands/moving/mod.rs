//! The commands that move devices: `limosa migrate`, `send`, `receive`, `save`, `load`; here the code that they share.

mod ended;
mod migrate;
mod receive;
mod send;
mod snapshot;

use std::time::Duration;

use limosa_migrate::{
    Cancel, Destination, FilePages, FingerprintLog, Ledger, Memory, MemoryRegion, MovedDevice, Observer,
    Options, Source, Vmm, WhenStalled,
};

use crate::args;
use crate::endpoint::Endpoint;
use crate::memory::SourcePages;
use crate::signals;

pub use migrate::migrate;
pub use receive::receive;
pub use send::send;
pub use snapshot::{load, save};

/// How long a source in doubt waits before it asks again.
const ASK_EVERY: Duration = Duration::from_millis(500);

/// Ctrl-C calls a move off instead of tearing it apart.
pub fn cancel_on_signal() -> anyhow::Result<Cancel> {
    signals::cancel()
}

fn options(moving: &args::Moving) -> Options {
    let mut options = moving.stop_limits.limit(Options::default().with_precopy(!moving.no_precopy));
    let convergence = &mut options.convergence;
    if let Some(limit) = moving.downtime_limit {
        (convergence.downtime_goal, convergence.when_stalled) = (limit, WhenStalled::Abort);
    }
    convergence.when_stalled = match moving.when_stalled {
        Some(args::WhenStalled::KeepTrying) => WhenStalled::KeepTrying,
        Some(args::WhenStalled::SwitchOver) => WhenStalled::SwitchOver,
        Some(args::WhenStalled::Abort) => WhenStalled::Abort,
        None => convergence.when_stalled,
    };
    options
}

/// With the time limits of a link that may be lost, and the trust in its peer.
fn over_link(options: Options, link: &args::Link) -> Options {
    link.checksums
        .of(options)
        .with_silence_max(link.silence)
        .with_commit_max(link.silence)
        .with_unauthenticated_peers(link.tls.insecure)
}

/// The pages and the log are separate so that both outlive what is made of them.
fn memory<'a>(
    endpoint: &Endpoint,
    pages: &'a SourcePages,
    log: &'a mut Option<FingerprintLog<'a, FilePages>>,
) -> Memory<'a> {
    let regions = pages.regions(endpoint.memory());
    match log {
        Some(log) => Memory::logged(regions, log),
        // The user has said that the guest stands still, or that there is none.
        None => Memory::stopped(regions),
    }
}

fn source<'a>(
    devices: &'a [MovedDevice<'a>],
    memory: Memory<'a>,
    vmm: &'a dyn Vmm,
    observer: &'a dyn Observer,
    options: &'a Options,
    cancel: &'a Cancel,
) -> Source<'a> {
    Source::new(devices, options)
        .with_memory(memory)
        .with_vmm(vmm)
        .with_observer(observer)
        .with_cancel(Some(cancel))
}

fn destination<'a>(
    devices: &'a [MovedDevice<'a>],
    memory: &'a [MemoryRegion<'a>],
    vmm: &'a dyn Vmm,
    observer: &'a dyn Observer,
    options: &'a Options,
    cancel: &'a Cancel,
    ledger: &'a Ledger,
) -> Destination<'a> {
    Destination::new(devices, ledger, options)
        .with_memory(memory)
        .with_vmm(vmm)
        .with_observer(observer)
        .with_cancel(Some(cancel))
}
