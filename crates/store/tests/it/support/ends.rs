//! Ends with a device and memory.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use limosa_client::{Device, DmaMap, DmaMemory};
use limosa_device::{Loopback, Machine};
use limosa_migrate::{
    AfterLoad, AfterSave, Cancel, Decision, Destination, FilePages, GuestPages, InDoubt, Ledger, Memory,
    MemoryRegion, MovedDevice, Options, Outcome, Received, SnapshotSource, SnapshotTarget, Source,
};
use limosa_models::synthetic::{Synthetic, SyntheticConfig};
use limosa_protocol::info::DmaMapFlags;
use limosa_testing::memfd;

/// More than a reader of an object has ahead of what it loads (eight ranges of 4 MiB), so that a server can go away meanwhile.
const MEMORY_BYTES: u64 = 40 << 20;

/// Guest memory that does something when it is read or written for the first time behind an offset.
pub struct Memory24 {
    pub file: File,
    pages: FilePages,
    at: AtomicU64,
    act: Box<dyn Fn() + Send + Sync>,
}

impl Memory24 {
    fn pass(&self, end: u64) {
        let at = self.at.load(Ordering::Relaxed);
        if end > at && self.at.swap(u64::MAX, Ordering::Relaxed) != u64::MAX {
            (self.act)();
        }
    }
}

impl GuestPages for Memory24 {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.pass(offset + into.len() as u64);
        self.pages.read(offset, into)
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.pass(offset + from.len() as u64);
        self.pages.write(offset, from)
    }
}

/// A device with memory.
pub struct End {
    pub device: Loopback,
    pub memory: Memory24,
    pub options: Options,
}

impl End {
    /// `seed` 0 is an end that is idle; others have contents of their own.
    pub fn new(seed: u64) -> End {
        let config: SyntheticConfig = format!("state=1M,block=64K,seed={}", seed.max(1)).parse().unwrap();
        let machine = Machine::simple(Synthetic::new(config).unwrap());
        let device = Loopback::new("card", Arc::clone(&machine));
        let file = memfd(MEMORY_BYTES);
        let memory = DmaMemory::File { fd: file.as_fd(), offset: 0 };
        let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
        device.dma_map(&DmaMap { iova: 0, size: MEMORY_BYTES, flags, memory }).unwrap();
        let pages = FilePages::new(file.try_clone().unwrap(), 0);
        if seed > 0 {
            // The last MiB was never touched.
            let contents: Vec<u8> =
                (0..MEMORY_BYTES / 8 - (1 << 17)).flat_map(|word| (word * 8 + seed).to_le_bytes()).collect();
            pages.write(0, &contents).unwrap();
        }
        let memory = Memory24 { file, pages, at: AtomicU64::new(u64::MAX), act: Box::new(|| {}) };
        let options = Options::default().with_silence_max(Duration::from_secs(20));
        End { device, memory, options }
    }

    /// Does this when memory behind that offset is read or written for the first time.
    pub fn when_at(mut self, offset: u64, act: impl Fn() + Send + Sync + 'static) -> End {
        self.memory.at = AtomicU64::new(offset);
        self.memory.act = Box::new(act);
        self
    }

    pub fn contents(&self) -> Vec<u8> {
        let mut all = vec![0; MEMORY_BYTES as usize];
        self.memory.pages.read(0, &mut all).unwrap();
        all
    }

    fn region(&self) -> MemoryRegion<'_> {
        MemoryRegion { id: 0, iova: 0, size: MEMORY_BYTES, pages: &self.memory }
    }

    fn as_source(&self, cancel: Option<&Cancel>, act: impl FnOnce(Source<'_>) -> Outcome) -> Outcome {
        let devices = [MovedDevice::new(&self.device)];
        let source = Source::new(&devices, &self.options).with_memory(Memory::stopped(vec![self.region()]));
        act(source.with_cancel(cancel))
    }

    pub fn save(&self, to: &dyn SnapshotTarget, after: AfterSave, cancel: Option<&Cancel>) -> Outcome {
        self.as_source(cancel, |source| source.save(to, after))
    }

    /// Acts on what became of a save in doubt.
    pub fn decide(&self, decision: Decision, doubt: InDoubt) -> Outcome {
        self.as_source(None, |source| source.decide(decision, doubt))
    }

    pub fn load(&self, from: &dyn SnapshotSource, after: AfterLoad) -> Received {
        let (ledger, memory) = (Ledger::new(), [self.region()]);
        let devices = [MovedDevice::new(&self.device)];
        Destination::new(&devices, &ledger, &self.options).with_memory(&memory).load(from, after)
    }
}
