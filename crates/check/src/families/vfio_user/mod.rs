//! The messages of a vfio-user server (`vfio-user.rst`), tested by a raw peer. Other families use a server through a client,
//! which never sends the messages tested here. No client is connected meanwhile.

mod dma;
mod fds;
mod framing;
mod info;
mod irqs;
mod migration;
mod reconnect;
mod refusals;
mod region;
mod version;

use std::os::fd::OwnedFd;

use limosa_vfio_user::codec::{Command, DmaMapMessage, DmaUnmapMessage};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use zerocopy::IntoBytes;

use crate::check::{Check, Family, Needs, Stop, Verdict};
use crate::trial::Trial;
use crate::wire::{Answer, Raw};

pub(super) fn checks() -> Vec<Check> {
    let parts = [
        framing::checks(),
        refusals::checks(),
        version::checks(),
        fds::checks(),
        info::checks(),
        dma::checks(),
        irqs::checks(),
        region::checks(),
        migration::checks(),
        reconnect::checks(),
    ];
    parts.into_iter().flatten().collect()
}

/// A check on a connection with a version.
fn on_connection(
    id: &'static str,
    needs: Needs,
    clauses: &[&'static str],
    body: fn(&Trial, &mut Raw) -> Verdict,
) -> Check {
    Check::new(Family::VfioUser, id, needs | Needs::WIRE, clauses, move |t| {
        let mut raw = Raw::open(t)?;
        body(t, &mut raw)
    })
}

/// A check that makes its connections itself.
fn on_wire(id: &'static str, needs: Needs, clauses: &[&'static str], body: fn(&Trial) -> Verdict) -> Check {
    Check::new(Family::VfioUser, id, needs | Needs::WIRE, clauses, move |t| body(t))
}

/// A lack of resources on this host is not a failure of the device.
fn host<T>(made: rustix::io::Result<T>) -> Result<T, Stop> {
    made.map_err(|errno| Stop::Skip(format!("this host does not give the suite what it takes: {errno}")))
}

/// A memfd of this size, in bytes.
fn memory(bytes: u64) -> Result<OwnedFd, Stop> {
    let fd = host(memfd_create("limosa-check", MemfdFlags::CLOEXEC))?;
    host(ftruncate(&fd, bytes))?;
    Ok(fd)
}

fn event() -> Result<OwnedFd, Stop> {
    host(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK))
}

/// Whether this fd is ready before the check's time is up.
fn becomes_ready(t: &Trial, fd: &OwnedFd, what: PollFlags) -> Result<bool, Stop> {
    let left = t.until.saturating_duration_since(std::time::Instant::now());
    let limit = Timespec::try_from(left).map_err(|error| Stop::Fail(error.to_string()))?;
    Ok(host(poll(&mut [PollFd::new(fd, what)], Some(&limit)))? > 0)
}

/// Whether it is ready now.
fn is_ready(fd: &OwnedFd, what: PollFlags) -> Result<bool, Stop> {
    Ok(host(poll(&mut [PollFd::new(fd, what)], Some(&Timespec::default())))? > 0)
}

/// Where the checks map memory.
const IOVA: u64 = 0x4000_0000;
/// A page, and the size of most mappings.
const PAGE: u64 = 4096;

fn map(iova: u64, size: u64) -> DmaMapMessage {
    DmaMapMessage { argsz: DmaMapMessage::BYTES as u32, flags: 3, offset: 0, address: iova, size }
}

fn unmap(iova: u64, size: u64) -> DmaUnmapMessage {
    DmaUnmapMessage { argsz: DmaUnmapMessage::BYTES as u32, flags: 0, address: iova, size }
}

/// Requests a mapping that is accessed by messages.
fn ask_map(raw: &mut Raw, iova: u64, size: u64) -> Result<Answer, Stop> {
    raw.ask(Command::DMA_MAP, map(iova, size).as_bytes())
}

fn ask_unmap(raw: &mut Raw, iova: u64, size: u64) -> Result<Answer, Stop> {
    raw.ask(Command::DMA_UNMAP, unmap(iova, size).as_bytes())
}

/// Maps, and checks that it succeeds.
fn mapped(raw: &mut Raw, iova: u64, size: u64) -> Verdict {
    ask_map(raw, iova, size)?.done(&format!("DMA_MAP of {size:#x} bytes at {iova:#x}")).map(drop)
}
