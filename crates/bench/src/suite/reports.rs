//! Reports of the device's own dirty log at 4 KiB pages, by span and by density. For most devices the density is that of the pages that
//! they happen to write, and is noted. Limosa's synthetic device writes a chosen number of pages.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use limosa_client::{DeviceExt, DmaMap, DmaMemory};
use limosa_models::synthetic::{REGISTERS_REGION, registers};
use limosa_protocol::feature::DmaLoggingRange;
use limosa_protocol::info::DmaMapFlags;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::accesses::floor;
use super::{Context, Step};
use crate::cases::{HEADER, PAGE_BYTES, REPORT};
use crate::document::Measure;
use crate::samples::timed;

/// Spans in bytes, and their names.
const SPANS: [(u64, &str); 3] = [(16 << 20, "16 MiB"), (1 << 30, "1 GiB"), (64 << 30, "64 GiB")];

/// The span whose pages the synthetic device writes, and the shares of it, in hundredths.
const WRITTEN: (u64, &str) = SPANS[0];
const DENSITIES: [u64; 3] = [1, 10, 100];

/// The IDENT register of the synthetic device.
const IDENT: &[u8; 8] = b"LIMOSASY";

/// How long it may take to write them.
const WRITE_MAX: Duration = Duration::from_secs(5);

pub(super) fn steps(context: &Context) -> Vec<Step> {
    let mut steps: Vec<Step> = SPANS
        .into_iter()
        .map(|(span, name)| {
            Step::new(format!("dirty report of {name}"), move |context, id| mapped(context, id, span, 0))
        })
        .collect();
    let mut ident = [0; 8];
    let read = context.device.region_read(REGISTERS_REGION, registers::IDENT, &mut ident);
    // It writes to mapped memory, which the bench maps only for a device behind a socket.
    if context.has_floor() && read.is_ok() && ident == *IDENT {
        let (span, name) = WRITTEN;
        steps.extend(DENSITIES.map(|percent| {
            let id = format!("dirty report of {name}, {percent} % dirty");
            Step::new(id, move |context, id| mapped(context, id, span, percent))
        }));
    }
    steps
}

/// A report with memory behind the span, where that is needed.
fn mapped(context: &Context, id: &str, span: u64, percent: u64) -> anyhow::Result<Measure> {
    if !context.has_floor() {
        // The kernel needs no mapping for a log, so no memory is mapped and pinned.
        return logged(context, id, span, percent);
    }
    let memory = memfd_create("limosa-bench", MemfdFlags::CLOEXEC).context("cannot make guest memory")?;
    // Sparse: no page of it is touched here.
    ftruncate(&memory, span).context("cannot size guest memory")?;
    let memory = DmaMemory::File { fd: memory.as_fd(), offset: 0 };
    let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
    context.device.dma_map(&DmaMap { iova: 0, size: span, flags, memory })?;
    let measured = logged(context, id, span, percent);
    let unmapped = context.device.dma_unmap(0, span, None);
    let measured = measured?;
    unmapped?;
    Ok(measured)
}

/// Has the synthetic device write the first pages of its memory, once each.
fn write(context: &Context, pages: u64) -> anyhow::Result<()> {
    let device = &context.device;
    let set =
        |register: u64, value: u64| device.region_write(REGISTERS_REGION, register, &value.to_le_bytes());
    let get = |register: u64| -> anyhow::Result<u64> {
        let mut value = [0; 8];
        device.region_read(REGISTERS_REGION, register, &mut value)?;
        Ok(u64::from_le_bytes(value))
    };
    for (register, value) in [
        (registers::DMA_CONTROL, 0),
        (registers::DMA_BASE, 0),
        (registers::DMA_PAGES, pages),
        (registers::DMA_PATTERN, 0),
        (registers::DMA_LIMIT, pages),
        (registers::DMA_RATE, 0),
        (registers::DMA_CONTROL, 1),
    ] {
        set(register, value)?;
    }
    let began = Instant::now();
    while get(registers::DMA_CONTROL)? != 0 {
        ensure!(
            began.elapsed() < WRITE_MAX,
            "the device has not written its {pages} pages within {WRITE_MAX:?}"
        );
    }
    ensure!(get(registers::DMA_FAILED)? == 0, "a DMA write of the device failed");
    Ok(())
}

fn logged(context: &Context, id: &str, span: u64, percent: u64) -> anyhow::Result<Measure> {
    let device = &context.device;
    let page = device.dma_logging_start(PAGE_BYTES, &[DmaLoggingRange { iova: 0, length: span }])?;
    let measured = reported(context, id, span, page, percent);
    let stopped = device.dma_logging_stop();
    let measured = measured?;
    stopped?;
    Ok(measured)
}

fn reported(context: &Context, id: &str, span: u64, page: u64, percent: u64) -> anyhow::Result<Measure> {
    ensure!(page == PAGE_BYTES, "it logs pages of {page} bytes, not {PAGE_BYTES}");
    let words = usize::try_from(span / PAGE_BYTES / 64)?;
    let mut floor = floor(context, HEADER + REPORT, HEADER + REPORT + words * 8)?;
    let (mut bitmap, mut dirty) = (vec![0_u64; words], 0_u64);
    let measure = context.sampler.run(id, floor.as_mut(), || {
        let bytes = (words * 8) as u64;
        if percent > 0 {
            write(context, (span / PAGE_BYTES * percent).div_ceil(100))?;
        }
        let ((), took) =
            timed(bytes, || context.device.dma_logging_report(0, span, PAGE_BYTES, &mut bitmap))?;
        dirty = bitmap.iter().map(|word| u64::from(word.count_ones())).sum();
        Ok(took)
    })?;
    let dirty = format!("{dirty} of {} pages dirty", span / PAGE_BYTES);
    let note = measure.note.map_or(dirty.clone(), |note| format!("{note}, {dirty}"));
    Ok(Measure { note: Some(note), ..measure })
}
