//! The demo's guest, its DMA part: guest memory in a memfd that the synthetic device writes to, and
//! the proof that every page arrived.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use anyhow::{Context, bail, ensure};
use limosa_client::{Device, DmaMap, DmaMemory};
use limosa_migrate::Cancel;
use limosa_models::synthetic::registers::{
    BAD_BLOCKS, DMA_BASE, DMA_CONTROL, DMA_FAILED, DMA_PAGES, DMA_SEQUENCE, SEED,
};
use limosa_models::synthetic::{PAGE_BYTES, Pattern, REGISTERS_REGION, Window};
use limosa_protocol::info::DmaMapFlags;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

/// Guest memory at address 0.
pub struct GuestMemory {
    pub file: File,
    pub bytes: u64,
}

impl GuestMemory {
    pub fn new(name: &str, bytes: u64) -> anyhow::Result<GuestMemory> {
        let fd = memfd_create(name, MemfdFlags::CLOEXEC).context("cannot make guest memory")?;
        ftruncate(&fd, bytes).with_context(|| format!("cannot make {bytes} bytes of guest memory"))?;
        Ok(GuestMemory { file: fd.into(), bytes })
    }

    /// Gives it to a device.
    pub fn map(&self, device: &dyn Device) -> anyhow::Result<()> {
        let memory = DmaMemory::File { fd: self.file.as_fd(), offset: 0 };
        let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
        Ok(device.dma_map(&DmaMap { iova: 0, size: self.bytes, flags, memory })?)
    }
}

pub fn register(device: &dyn Device, at: u64) -> anyhow::Result<u64> {
    let mut value = [0; 8];
    device.region_read(REGISTERS_REGION, at, &mut value)?;
    Ok(u64::from_le_bytes(value))
}

fn set_register(device: &dyn Device, at: u64, value: u64) -> anyhow::Result<()> {
    Ok(device.region_write(REGISTERS_REGION, at, &value.to_le_bytes())?)
}

/// Lets the device write to all of the memory.
pub fn start(device: &dyn Device, memory: &GuestMemory) -> anyhow::Result<()> {
    set_register(device, DMA_BASE, 0)?;
    set_register(device, DMA_PAGES, memory.bytes / PAGE_BYTES as u64)?;
    set_register(device, DMA_CONTROL, 1)
}

/// Polls, as a driver would, until the device has done this many more writes.
pub fn wait_for(device: &dyn Device, more: u64, cancel: &Cancel) -> anyhow::Result<()> {
    let target = register(device, DMA_SEQUENCE)? + more;
    while register(device, DMA_SEQUENCE)? < target {
        ensure!(!cancel.is_cancelled());
        ensure!(register(device, DMA_FAILED)? == 0, "{}: a DMA write failed", device.name());
    }
    Ok(())
}

/// Stops the device's writing and checks each page of the memory; how many writes there were.
pub fn verify(device: &dyn Device, memory: &GuestMemory) -> anyhow::Result<u64> {
    // Once the register is written, nothing is under way.
    set_register(device, DMA_CONTROL, 0)?;
    ensure!(register(device, DMA_FAILED)? == 0, "{}: a DMA write failed", device.name());
    let bad = register(device, BAD_BLOCKS)?;
    ensure!(bad == 0, "{}: {bad} blocks of its state are damaged", device.name());

    let writes = register(device, DMA_SEQUENCE)?;
    let pages = memory.bytes / PAGE_BYTES as u64;
    let window = Window { seed: register(device, SEED)?, pages, pattern: Pattern::Random };
    let mut page = [0; PAGE_BYTES];
    for (index, expected) in (0..).zip(window.expected(writes)) {
        memory.file.read_exact_at(&mut page, index * PAGE_BYTES as u64).context("reading guest memory")?;
        if let Err(what) = window.check(index, expected, &page) {
            bail!("guest memory: {what}");
        }
    }
    Ok(writes)
}
