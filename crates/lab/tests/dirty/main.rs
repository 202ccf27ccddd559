//! Address spaces of the kernel's, and the dirty pages that are logged in them: by the page tables of an IOMMU, by
//! containers, by devices; and moves that live by these logs.

mod container;
mod device;
mod host_memory;
mod mapping;
mod mock_iommu;
mod moves;
mod page_tables;

use std::fs::File;
use std::os::fd::AsFd;

use limosa_client::{DirtySource, DmaMap, DmaMemory};
use limosa_protocol::info::DmaMapFlags;
use limosa_testing::memfd;

const PAGE: u64 = 4096;

fn file(memory: &File, iova: u64, size: u64) -> DmaMap<'_> {
    let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
    DmaMap { iova, size, flags, memory: DmaMemory::File { fd: memory.as_fd(), offset: 0 } }
}

/// The pages of a report, by number from `iova` on.
fn report(source: &dyn DirtySource, iova: u64, pages: u64) -> Vec<u64> {
    let mut words = vec![0; pages.div_ceil(64) as usize];
    source.report(iova, pages * PAGE, PAGE, &mut words).unwrap();
    set(&words)
}

fn set(words: &[u64]) -> Vec<u64> {
    (0..words.len() as u64 * 64).filter(|bit| words[(bit / 64) as usize] >> (bit % 64) & 1 == 1).collect()
}
