//! A device of the kernel's. Nothing but the system call lies between a caller and its driver, so accesses are
//! measured beside bare calls on the same fd. What the driver itself takes for its state and its dirty log has
//! no floor.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use anyhow::ensure;
use limosa_client::{Device, DeviceExt, Error};
use limosa_protocol::feature::DmaLoggingRange;
use limosa_protocol::info::DeviceFlags;
use limosa_protocol::{FeatureIndex, FeatureOp, MigrationFlags};
use rustix::io::{pread, pwrite};

use crate::Figure;
use crate::cases::{HARMLESS, PAGE_BYTES, Place};
use crate::measure::{Contender, in_turns};
use crate::streams::whole_state;

const ACCESS_BYTES: usize = 8;

/// Measures every figure that a device of the kernel's allows, for about `each` a contender, and hands each
/// out as it is done. `fd` is the device's own.
///
/// A device with migration is stopped for its data streams; its state is loaded back afterwards.
pub fn run_kernel(
    device: &dyn Device,
    fd: BorrowedFd<'_>,
    each: Duration,
    mut done: impl FnMut(Figure),
) -> anyhow::Result<()> {
    if DeviceFlags::from_bits_retain(device.info()?.flags).contains(DeviceFlags::PCI) {
        accesses(device, fd, each, &mut done)?;
    }
    if device.migration_flags()?.contains(MigrationFlags::STOP_COPY) {
        whole_state(device, false, each, &mut done)?;
    }
    if device.probe(FeatureIndex::DMA_LOGGING_START, FeatureOp::SET)? {
        reports(device, each, &mut done)?;
    }
    Ok(())
}

fn accesses(
    device: &dyn Device,
    fd: BorrowedFd<'_>,
    each: Duration,
    done: &mut dyn FnMut(Figure),
) -> anyhow::Result<()> {
    let Place { region, read_at, write_at } = HARMLESS;
    let start = device.region(region)?.info.offset;
    let (mut ours, mut bare) = ([0; ACCESS_BYTES], [0; ACCESS_BYTES]);
    let mut contenders = [
        Contender::new("limosa", || Ok(device.region_read(region, read_at, &mut ours)?)),
        Contender::new("floor", || {
            ensure!(pread(fd, &mut bare, start + read_at)? == ACCESS_BYTES, "a short read");
            Ok(())
        }),
    ];
    let timings = in_turns(&mut contenders, each)?;
    done(Figure::new("region read", ACCESS_BYTES, timings));

    let mut data = [0; ACCESS_BYTES];
    device.region_read(region, write_at, &mut data)?;
    let mut contenders = [
        Contender::new("limosa", || Ok(device.region_write(region, write_at, &data)?)),
        Contender::new("floor", || {
            ensure!(pwrite(fd, &data, start + write_at)? == ACCESS_BYTES, "a short write");
            Ok(())
        }),
    ];
    let timings = in_turns(&mut contenders, each)?;
    done(Figure::new("region write", ACCESS_BYTES, timings));
    Ok(())
}

/// Reports of the device's own log at 4 KiB pages, of 1 and 64 GiB, with the pages that it happens to write.
/// The kernel wants no mapping to log, so none is made, and no memory pinned.
fn reports(device: &dyn Device, each: Duration, done: &mut dyn FnMut(Figure)) -> anyhow::Result<()> {
    for gib in [1_u64, 64] {
        let span = gib << 30;
        let page = match device.dma_logging_start(PAGE_BYTES, &[DmaLoggingRange { iova: 0, length: span }]) {
            Ok(page) => page,
            // More than it can watch over, or somebody logs already.
            Err(error @ Error::Refused { .. }) => {
                tracing::warn!("no figure for a log of {gib} GiB: {error}");
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let timings = report(device, span, page, each);
        device.dma_logging_stop()?;
        done(Figure {
            what: format!("dirty report, {gib} GiB, as it comes"),
            bytes: span / PAGE_BYTES / 8,
            timings: timings?,
        });
    }
    Ok(())
}

fn report(device: &dyn Device, span: u64, page: u64, each: Duration) -> anyhow::Result<Vec<crate::Timing>> {
    ensure!(page == PAGE_BYTES, "{}: logs pages of {page} bytes, not 4096", device.name());
    let mut bitmap = vec![0_u64; usize::try_from(span / PAGE_BYTES / 64)?];
    let report = || Ok(device.dma_logging_report(0, span, PAGE_BYTES, &mut bitmap)?);
    in_turns(&mut [Contender::new("limosa", report)], each)
}
