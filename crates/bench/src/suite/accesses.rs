//! Region accesses, each compared with its carrier: a bare request over a socket, or a bare system call on the same fd.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{MutexGuard, PoisonError};

use anyhow::ensure;
use limosa_protocol::info::DeviceFlags;
use rustix::io::{pread, pwrite};

use super::{Context, Step};
use crate::cases::{HARMLESS, HEADER, Place, REGION_ACCESS};
use crate::document::Measure;
use crate::floor::Floor;
use crate::samples::{Baseline, timed};

const BYTES: usize = 8;

/// Of a PCI device: the start of its header is read, and its last bytes are written back as they are.
pub(super) fn steps(context: &Context) -> Vec<Step> {
    let info = context.device.info();
    let is_pci = info.is_ok_and(|info| DeviceFlags::from_bits_retain(info.flags).contains(DeviceFlags::PCI));
    match (is_pci, context.target.in_use) {
        (true, false) => vec![Step::new("region read, 8 B", read), Step::new("region write, 8 B", write)],
        (true, true) => vec![Step::new("region read, 8 B", read)],
        (false, _) => {
            release(context);
            Vec::new()
        }
    }
}

/// The fd of a kernel device.
fn fd(context: &Context) -> Option<MutexGuard<'_, Option<OwnedFd>>> {
    Some(context.target.fd.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Closes that fd, so that only the device's own fd keeps it open.
fn release(context: &Context) {
    if let Some(mut fd) = fd(context) {
        *fd = None;
    }
}

fn read(context: &Context, id: &str) -> anyhow::Result<Measure> {
    let Place { region, read_at, .. } = HARMLESS;
    let mut floor = floor(context, HEADER + REGION_ACCESS, HEADER + REGION_ACCESS + BYTES)?;
    let (mut data, mut bare) = ([0; BYTES], [0; BYTES]);
    let fd = fd(context);
    let mut call;
    let baseline = match fd.as_ref().and_then(|fd| fd.as_ref()) {
        Some(fd) => {
            let at = context.device.region(region)?.info.offset + read_at;
            call = move || {
                ensure!(pread(fd.as_fd(), &mut bare, at)? == BYTES, "a short read");
                Ok(())
            };
            Some(Baseline { name: "pread", run: &mut call })
        }
        None => None,
    };
    let operation = || Ok(timed(0, || context.device.region_read(region, read_at, &mut data))?.1);
    let measured = match baseline {
        Some(baseline) => context.sampler.run_beside(id, Some(baseline), operation),
        None => context.sampler.run(id, floor.as_mut(), operation),
    };
    drop(fd);
    if context.target.in_use {
        release(context);
    }
    measured
}

fn write(context: &Context, id: &str) -> anyhow::Result<Measure> {
    let Place { region, write_at, .. } = HARMLESS;
    let mut floor = floor(context, HEADER + REGION_ACCESS + BYTES, HEADER + REGION_ACCESS)?;
    let mut data = [0; BYTES];
    context.device.region_read(region, write_at, &mut data)?;
    let fd = fd(context);
    let mut call;
    let baseline = match fd.as_ref().and_then(|fd| fd.as_ref()) {
        Some(fd) => {
            let at = context.device.region(region)?.info.offset + write_at;
            call = move || {
                ensure!(pwrite(fd.as_fd(), &data, at)? == BYTES, "a short write");
                Ok(())
            };
            Some(Baseline { name: "pwrite", run: &mut call })
        }
        None => None,
    };
    let operation = || Ok(timed(0, || context.device.region_write(region, write_at, &data))?.1);
    let measured = match baseline {
        Some(baseline) => context.sampler.run_beside(id, Some(baseline), operation),
        None => context.sampler.run(id, floor.as_mut(), operation),
    };
    drop(fd);
    // No other measure uses it.
    release(context);
    measured
}

/// A floor of these sizes, if the device is behind a socket.
pub(super) fn floor(context: &Context, request: usize, reply: usize) -> anyhow::Result<Option<Floor>> {
    context.has_floor().then(|| Floor::start(request, reply)).transpose()
}
