//! What is measured.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use limosa_client::{Device, DeviceExt, DmaMap, DmaMemory};
use limosa_protocol::feature::DmaLoggingRange;
use limosa_protocol::info::{DeviceFlags, DmaMapFlags};
use limosa_protocol::{FeatureIndex, FeatureOp, MigrationFlags, pci_index};
use limosa_vfio_user::client::Options;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use zerocopy::IntoBytes;

use crate::Figure;
use crate::child::own_device;
use crate::device::MARK_REGION;
use crate::floor::Floor;
use crate::measure::{Contender, in_turns};
use crate::rival::Rival;
use crate::streams::streams;

/// Bytes of a message's header and of the fixed parts behind it (`vfio-user.rst`).
pub(crate) const HEADER: usize = 16;
const REGION_ACCESS: usize = 16;
const REPORT: usize = 8 + 24;

pub(crate) const PAGE_BYTES: u64 = 4096;

/// What is measured.
#[derive(Clone, Copy)]
pub enum Subject<'a> {
    /// The bench's own device, which may be written to and marks pages dirty on demand.
    Own,
    /// The device behind a socket.
    Device {
        /// The socket.
        socket: &'a Path,
        /// Opens it.
        connect: &'a dyn Fn() -> anyhow::Result<Box<dyn Device>>,
    },
}

/// One run.
pub(crate) struct Run<'a> {
    pub(crate) device: &'a dyn Device,
    pub(crate) own: bool,
    pub(crate) each: Duration,
    pub(crate) done: &'a mut dyn FnMut(Figure),
}

/// Measures every figure that the device allows, for about `each` a contender, and hands each out
/// as it is done.
///
/// A device with migration is stopped for its data streams; its state is loaded back afterwards.
pub fn run(subject: Subject<'_>, each: Duration, mut done: impl FnMut(Figure)) -> anyhow::Result<()> {
    // A server takes one client at a time, so the rival has been and gone before the device is
    // opened; on a server of its own it takes its turns with the others.
    let (mut rival, beforehand) = match subject {
        Subject::Own => (Some(Rival::on_its_own_server()?), Vec::new()),
        Subject::Device { socket, .. } => (None, beforehand(socket, each)?),
    };
    let own = matches!(subject, Subject::Own);
    // The child is dropped after its client.
    let (_child, device): (_, Box<dyn Device>) = match subject {
        Subject::Own => {
            let (client, child) = own_device(Options::default())?;
            (Some(child), Box::new(client))
        }
        Subject::Device { connect, .. } => (None, connect()?),
    };
    let mut run = Run { device: &*device, own, each, done: &mut done };
    run.accesses(rival.as_mut(), beforehand)?;
    drop(rival);
    if device.migration_flags()?.contains(MigrationFlags::STOP_COPY) {
        streams(&mut run)?;
    }
    if device.probe(FeatureIndex::DMA_LOGGING_START, FeatureOp::SET)? {
        run.reports()?;
    }
    Ok(())
}

/// Where accesses do no harm: the bench's own memory, else the start of a PCI header to read, and its
/// last eight bytes, reserved ones and the interrupt line, to write back as they are.
pub(crate) const HARMLESS: Place = Place { region: pci_index::CONFIG, read_at: 0, write_at: 0x38 };
const OWN: Place = Place { region: 0, read_at: 0, write_at: 0 };

#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) region: u32,
    pub(crate) read_at: u64,
    pub(crate) write_at: u64,
}

/// The rival's eight-byte accesses on the device, read and write.
fn beforehand(socket: &Path, each: Duration) -> anyhow::Result<Vec<crate::Timing>> {
    // A device that it cannot open is measured without it.
    let Ok(mut rival) = Rival::on(socket) else { return Ok(Vec::new()) };
    let Place { region, read_at, write_at } = HARMLESS;
    let mut data = [0; 8];
    if rival.read(region, write_at, &mut data).is_err() {
        return Ok(Vec::new());
    }
    let written = data;
    let mut timings =
        in_turns(&mut [Contender::new("vfio_user", || rival.read(region, read_at, &mut data))], each)?;
    timings.extend(in_turns(
        &mut [Contender::new("vfio_user", || rival.write(region, write_at, &written))],
        each,
    )?);
    Ok(timings)
}

impl Run<'_> {
    fn accesses(
        &mut self,
        mut rival: Option<&mut Rival>,
        beforehand: Vec<crate::Timing>,
    ) -> anyhow::Result<()> {
        let device = self.device;
        let is_pci = DeviceFlags::from_bits_retain(device.info()?.flags).contains(DeviceFlags::PCI);
        let Place { region, read_at, write_at } = match (self.own, is_pci) {
            (true, _) => OWN,
            (false, true) => HARMLESS,
            (false, false) => return Ok(()),
        };
        let sizes: &[usize] = if self.own { &[8, 4096, 65536] } else { &[8] };
        let mut beforehand = beforehand.into_iter();
        for &bytes in sizes {
            let mut floor = Floor::start(HEADER + REGION_ACCESS, HEADER + REGION_ACCESS + bytes)?;
            let (mut ours, mut theirs) = (vec![0; bytes], vec![0; bytes]);
            let mut contenders = vec![
                Contender::new("limosa", || Ok(device.region_read(region, read_at, &mut ours)?)),
                Contender::new("floor", || floor.round_trip()),
            ];
            contenders.extend(
                rival.as_deref_mut().map(|rival| {
                    Contender::new("vfio_user", move || rival.read(region, read_at, &mut theirs))
                }),
            );
            let mut timings = in_turns(&mut contenders, self.each)?;
            timings.extend(beforehand.next());
            drop(contenders);
            (self.done)(Figure::new("region read", bytes, timings));
        }
        for &bytes in sizes {
            let mut floor = Floor::start(HEADER + REGION_ACCESS + bytes, HEADER + REGION_ACCESS)?;
            let mut data = vec![0; bytes];
            device.region_read(region, write_at, &mut data)?;
            let mut contenders = vec![
                Contender::new("limosa", || Ok(device.region_write(region, write_at, &data)?)),
                Contender::new("floor", || floor.round_trip()),
            ];
            contenders.extend(
                rival
                    .as_deref_mut()
                    .map(|rival| Contender::new("vfio_user", || rival.write(region, write_at, &data))),
            );
            let mut timings = in_turns(&mut contenders, self.each)?;
            timings.extend(beforehand.next());
            drop(contenders);
            (self.done)(Figure::new("region write", bytes, timings));
        }
        Ok(())
    }

    /// Dirty reports at 4 KiB pages, of 1 and 64 GiB, with as many dirty pages as can be had: what the
    /// device does by itself, and on the bench's own device none, one in a hundred, all.
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
            let strides: &[(&str, Option<u64>)] = match self.own {
                true => &[("none dirty", None), ("1 % dirty", Some(100)), ("all dirty", Some(1))],
                false => &[("as it comes", None)],
            };
            for (density, stride) in strides {
                let mut floor = Floor::start(HEADER + REPORT, HEADER + REPORT + words * 8)?;
                let mut bitmap = vec![0_u64; words];
                let mut reporting = Contender::new("limosa", || {
                    Ok(device.dma_logging_report(0, span, PAGE_BYTES, &mut bitmap)?)
                });
                if let Some(stride) = *stride {
                    reporting.prepare = Box::new(move || {
                        Ok(device.region_write(MARK_REGION, 0, [0, span, stride].as_bytes())?)
                    });
                }
                let mut contenders = [reporting, Contender::new("floor", || floor.round_trip())];
                let timings = in_turns(&mut contenders, self.each)?;
                drop(contenders);
                let what = format!("dirty report, {gib} GiB, {density}");
                let figure = Figure { what, bytes: (words * 8) as u64, timings };
                if let Some(stride) = *stride {
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
