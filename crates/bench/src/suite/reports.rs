//! Reports of the device's own dirty log at 4 KiB pages, by span, with the pages that the device happens to write. How many those
//! are is noted.

use std::os::fd::AsFd;

use anyhow::{Context as _, ensure};
use limosa_client::{DeviceExt, DmaMap, DmaMemory};
use limosa_protocol::feature::DmaLoggingRange;
use limosa_protocol::info::DmaMapFlags;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::accesses::floor;
use super::{Context, Step};
use crate::cases::{HEADER, PAGE_BYTES, REPORT};
use crate::document::Measure;
use crate::samples::timed;

/// Spans in bytes, and how they are called.
const SPANS: [(u64, &str); 3] = [(16 << 20, "16 MiB"), (1 << 30, "1 GiB"), (64 << 30, "64 GiB")];

pub(super) fn steps(_: &Context) -> Vec<Step> {
    let step = |(span, name)| {
        Step::new(format!("dirty report of {name}"), move |context: &Context, id: &str| {
            if !context.has_floor() {
                // The kernel wants no mapping to log, so none is made, and no memory pinned.
                return logged(context, id, span);
            }
            let memory =
                memfd_create("limosa-bench", MemfdFlags::CLOEXEC).context("cannot make guest memory")?;
            // Sparse: no page of it is touched here.
            ftruncate(&memory, span).context("cannot size guest memory")?;
            let memory = DmaMemory::File { fd: memory.as_fd(), offset: 0 };
            let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
            context.device.dma_map(&DmaMap { iova: 0, size: span, flags, memory })?;
            let measured = logged(context, id, span);
            let unmapped = context.device.dma_unmap(0, span, None);
            let measured = measured?;
            unmapped?;
            Ok(measured)
        })
    };
    SPANS.into_iter().map(step).collect()
}

fn logged(context: &Context, id: &str, span: u64) -> anyhow::Result<Measure> {
    let device = &context.device;
    let page = device.dma_logging_start(PAGE_BYTES, &[DmaLoggingRange { iova: 0, length: span }])?;
    let measured = reported(context, id, span, page);
    let stopped = device.dma_logging_stop();
    let measured = measured?;
    stopped?;
    Ok(measured)
}

fn reported(context: &Context, id: &str, span: u64, page: u64) -> anyhow::Result<Measure> {
    ensure!(page == PAGE_BYTES, "it logs pages of {page} bytes, not {PAGE_BYTES}");
    let words = usize::try_from(span / PAGE_BYTES / 64)?;
    let mut floor = floor(context, HEADER + REPORT, HEADER + REPORT + words * 8)?;
    let (mut bitmap, mut dirty) = (vec![0_u64; words], 0_u64);
    let measure = context.sampler.run(id, floor.as_mut(), || {
        let bytes = (words * 8) as u64;
        let ((), took) =
            timed(bytes, || context.device.dma_logging_report(0, span, PAGE_BYTES, &mut bitmap))?;
        dirty += bitmap.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
        Ok(took)
    })?;
    // What is warmed up with is not among the samples, and its pages are few.
    let each = dirty / measure.samples.max(1);
    let dirty = format!("{each} of {} pages dirty in each", span / PAGE_BYTES);
    let note = measure.note.map_or(dirty.clone(), |note| format!("{note}, {dirty}"));
    Ok(Measure { note: Some(note), ..measure })
}
