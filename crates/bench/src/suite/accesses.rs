//! Region accesses, beside the bare request or system call that carries them.

use std::os::fd::AsFd;

use anyhow::{Context as _, ensure};
use limosa_protocol::info::DeviceFlags;
use rustix::io::{pread, pwrite};

use super::{Context, Step, take_fd};
use crate::cases::{HARMLESS, HEADER, Place, REGION_ACCESS};
use crate::document::{Beside, Measure};
use crate::floor::Floor;
use crate::samples::timed;

const BYTES: usize = 8;

/// Of a PCI device: the start of its header is read, and its last bytes are written back as they are.
pub(super) fn steps(context: &Context) -> Vec<Step> {
    let is_pci = context
        .device
        .info()
        .is_ok_and(|info| DeviceFlags::from_bits_retain(info.flags).contains(DeviceFlags::PCI));
    if !is_pci {
        return Vec::new();
    }
    let mut steps = vec![Step::new("region read, 8 B", read)];
    if !context.target.in_use {
        steps.push(Step::new("region write, 8 B", write));
    }
    if !context.has_floor() {
        steps.push(Step::new("pread and pwrite, 8 B", bare));
    }
    steps
}

fn read(context: &Context, id: &str) -> anyhow::Result<Measure> {
    let Place { region, read_at, .. } = HARMLESS;
    let mut floor = floor(context, HEADER + REGION_ACCESS, HEADER + REGION_ACCESS + BYTES)?;
    let mut data = [0; BYTES];
    context.sampler.run(id, floor.as_mut(), || {
        Ok(timed(0, || context.device.region_read(region, read_at, &mut data))?.1)
    })
}

fn write(context: &Context, id: &str) -> anyhow::Result<Measure> {
    let Place { region, write_at, .. } = HARMLESS;
    let mut floor = floor(context, HEADER + REGION_ACCESS + BYTES, HEADER + REGION_ACCESS)?;
    let mut data = [0; BYTES];
    context.device.region_read(region, write_at, &mut data)?;
    context
        .sampler
        .run(id, floor.as_mut(), || Ok(timed(0, || context.device.region_write(region, write_at, &data))?.1))
}

/// What lies between a caller and the kernel's driver: bare calls on the same fd, one write after each read.
fn bare(context: &Context, id: &str) -> anyhow::Result<Measure> {
    let fd = take_fd(&context.target).context("its fd was used up")?;
    let Place { region, read_at, write_at } = HARMLESS;
    let start = context.device.region(region)?.info.offset;
    let mut data = [0; BYTES];
    ensure!(pread(fd.as_fd(), &mut data, start + write_at)? == BYTES, "a short read");
    let (mut same, mut writes) = ([0; BYTES], Vec::new());
    let measure = context.sampler.run(id, None, || {
        let (read, took) = timed(0, || pread(fd.as_fd(), &mut same, start + read_at))?;
        if !context.target.in_use {
            let (written, wrote) = timed(0, || pwrite(fd.as_fd(), &data, start + write_at))?;
            ensure!(written == BYTES, "a short write");
            writes.push(wrote.time.as_nanos() as u64);
        }
        ensure!(read == BYTES, "a short read");
        Ok(took)
    })?;
    writes.sort_unstable();
    let of_writes = writes.get(writes.len() / 2).map(|p50_ns| Beside {
        name: "pwrite".into(),
        p50_ns: *p50_ns,
        samples: writes.len() as u64,
    });
    Ok(Measure { beside: of_writes, ..measure })
}

/// A floor of these sizes, where a socket lies between.
pub(super) fn floor(context: &Context, request: usize, reply: usize) -> anyhow::Result<Option<Floor>> {
    context.has_floor().then(|| Floor::start(request, reply)).transpose()
}
