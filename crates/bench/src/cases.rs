//! The transport compared with the floor: accesses, streams and reports of the bench's own device, whose server is
//! another process.

use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context, ensure};
use limosa_client::{Device, DeviceExt, DmaMap, DmaMemory};
use limosa_protocol::feature::DmaLoggingRange;
use limosa_protocol::info::DmaMapFlags;
use limosa_protocol::pci_index;
use limosa_vfio_user::client::Options;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use zerocopy::IntoBytes;

use crate::Figure;
use crate::child::own_device;
use crate::device::MARK_REGION;
use crate::floor::Floor;
use crate::rival::Rival;
use crate::streams::streams;
use crate::turns::{Contender, in_turns};

/// Bytes of a message's header and of the fixed parts behind it (`vfio-user.rst`).
pub(crate) const HEADER: usize = 16;
pub(crate) const REGION_ACCESS: usize = 16;
pub(crate) const REPORT: usize = 8 + 24;

pub(crate) const PAGE_BYTES: u64 = 4096;

/// One run.
pub(crate) struct Run<'a> {
    pub(crate) device: &'a dyn Device,
    pub(crate) each: Duration,
    pub(crate) done: &'a mut dyn FnMut(Figure),
}

/// Measures the bench's own device, which may be written to and marks pages dirty on demand, for about `each` for every
/// contender, and passes each figure when it is done.
pub fn run(each: Duration, mut done: impl FnMut(Figure)) -> anyhow::Result<()> {
    let mut rival = Rival::on_its_own_server()?;
    let (client, child) = own_device(Options::default())?;
    // The child is dropped after its client.
    let (_child, device) = (child, client);
    let mut run = Run { device: &device, each, done: &mut done };
    run.accesses(&mut rival)?;
    drop(rival);
    streams(&mut run)?;
    run.reports()
}

/// Places where accesses are harmless: the bench's own memory; else the start of a PCI header, which is read, and its last
/// eight bytes (reserved ones and the interrupt line), which are written back unchanged.
pub(crate) const HARMLESS: Place = Place { region: pci_index::CONFIG, read_at: 0, write_at: 0x38 };
const OWN: Place = Place { region: 0, read_at: 0, write_at: 0 };

#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) region: u32,
    pub(crate) read_at: u64,
    pub(crate) write_at: u64,
}

impl Run<'_> {
    fn accesses(&mut self, rival: &mut Rival) -> anyhow::Result<()> {
        let device = self.device;
        let Place { region, read_at, write_at } = OWN;
        for bytes in [8, 4096, 65536] {
            let mut floor = Floor::start(HEADER + REGION_ACCESS, HEADER + REGION_ACCESS + bytes)?;
            let (mut ours, mut theirs) = (vec![0; bytes], vec![0; bytes]);
            let contenders = &mut [
                Contender::new("limosa", || Ok(device.region_read(region, read_at, &mut ours)?)),
                Contender::new("floor", || floor.round_trip()),
                Contender::new("vfio_user", || rival.read(region, read_at, &mut theirs)),
            ];
            let timings = in_turns(contenders, self.each)?;
            (self.done)(Figure::new("region read", bytes, timings));
        }
        for bytes in [8, 4096, 65536] {
            let mut floor = Floor::start(HEADER + REGION_ACCESS + bytes, HEADER + REGION_ACCESS)?;
            let mut data = vec![0; bytes];
            device.region_read(region, write_at, &mut data)?;
            let contenders = &mut [
                Contender::new("limosa", || Ok(device.region_write(region, write_at, &data)?)),
                Contender::new("floor", || floor.round_trip()),
                Contender::new("vfio_user", || rival.write(region, write_at, &data)),
            ];
            let timings = in_turns(contenders, self.each)?;
            (self.done)(Figure::new("region write", bytes, timings));
        }
        Ok(())
    }

    /// Dirty reports at 4 KiB pages, of 1 and 64 GiB, with no page dirty, one in a hundred, all.
    fn reports(&mut self) -> anyhow::Result<()> {
        let device = self.device;
        for gib in [1_u64, 64] {
            let span = gib << 30;
            let memory =
                memfd_create("limosa-bench", MemfdFlags::CLOEXEC).context("cannot make guest memory")?;
            ftruncate(&memory, span).context("cannot size guest memory")?;
            // Sparse: no page of it is ever touched.
            let memory = DmaMemory::File { fd: memory.as_fd(), offset: 0 };
            let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
            device.dma_map(&DmaMap { iova: 0, size: span, flags, memory })?;
            let page = device.dma_logging_start(PAGE_BYTES, &[DmaLoggingRange { iova: 0, length: span }])?;
            ensure!(page == PAGE_BYTES, "{}: logs pages of {page} bytes, not 4096", device.name());

            let words = usize::try_from(span / PAGE_BYTES / 64)?;
            for (density, stride) in [("none dirty", None), ("1 % dirty", Some(100)), ("all dirty", Some(1))]
            {
                let mut floor = Floor::start(HEADER + REPORT, HEADER + REPORT + words * 8)?;
                let mut bitmap = vec![0_u64; words];
                let mut reporting = Contender::new("limosa", || {
                    Ok(device.dma_logging_report(0, span, PAGE_BYTES, &mut bitmap)?)
                });
                if let Some(stride) = stride {
                    reporting.prepare = Box::new(move || {
                        Ok(device.region_write(MARK_REGION, 0, [0, span, stride].as_bytes())?)
                    });
                }
                let mut contenders = [reporting, Contender::new("floor", || floor.round_trip())];
                let timings = in_turns(&mut contenders, self.each)?;
                drop(contenders);
                let what = format!("dirty report, {gib} GiB, {density}");
                let figure = Figure { what, bytes: (words * 8) as u64, timings };
                if let Some(stride) = stride {
                    let dirty: u64 = bitmap.iter().map(|word| u64::from(word.count_ones())).sum();
                    let expected = (span / PAGE_BYTES).div_ceil(stride);
                    ensure!(dirty == expected, "{} dirty pages reported, {expected} marked", dirty);
                }
                (self.done)(figure);
            }
            device.dma_logging_stop()?;
            device.dma_unmap(0, span, None)?;
        }
        Ok(())
    }
}
