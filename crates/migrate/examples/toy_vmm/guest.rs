//! The guest: memory, a vCPU, and the log of what the vCPU writes.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use limosa_migrate::{DirtyLog, FilePages, GuestPages, PAGE_BYTES};
use limosa_protocol::bitmap::{DirtyBitmap, words_for};

use crate::devices::Devices;
use crate::{Result, lock};

/// Pages of guest memory. The vCPU writes to the lower half, a device by DMA to the upper one.
pub const PAGES: u64 = 4096;
pub const VCPU_PAGES: u64 = PAGES / 2;
/// The part of the machine that is not a device.
pub struct Guest {
    /// A memfd: the devices' servers map the same pages.
    pub memory: FilePages,
    vcpu: Mutex<Vcpu>,
    /// How many threads wait for the vCPU, which yields to them between two steps: the mutex alone is not fair.
    wanted: AtomicU32,
    /// The vCPU may run, or the process ends.
    changed: Condvar,
    pub log: Log,
}

/// The vCPU's registers, and whether it runs.
#[derive(Default)]
pub struct Vcpu {
    pub count: u64,
    runs: bool,
    /// How long it rests after each step, in order to dirty less.
    pub rest: Duration,
}

/// Which pages the vCPU wrote since the last harvest. With KVM this is `KVM_GET_DIRTY_LOG`, or the dirty ring.
pub struct Log {
    is_on: AtomicBool,
    dirty: DirtyBitmap,
}

impl Guest {
    /// A guest that does not run yet, in this memory.
    pub fn new(memory: &File) -> Result<Guest> {
        Ok(Guest {
            memory: FilePages::new(memory.try_clone()?, 0),
            vcpu: Mutex::default(),
            wanted: AtomicU32::new(0),
            changed: Condvar::new(),
            log: Log { is_on: AtomicBool::new(false), dirty: DirtyBitmap::new(PAGES)? },
        })
    }

    pub fn vcpu(&self) -> MutexGuard<'_, Vcpu> {
        self.wanted.fetch_add(1, Ordering::AcqRel);
        let vcpu = lock(&self.vcpu);
        self.wanted.fetch_sub(1, Ordering::AcqRel);
        vcpu
    }

    /// What the vCPU's thread does: it counts, leaves each number in the page that is its turn, and rings both devices.
    pub fn run(&self, devices: &Devices) -> Result<()> {
        loop {
            // A step is done under the lock. A thread that stops the vCPU takes the lock, and so waits for the step's end.
            while self.wanted.load(Ordering::Acquire) > 0 {
                std::thread::yield_now();
            }
            let mut vcpu = lock(&self.vcpu);
            while !vcpu.runs {
                vcpu = self.changed.wait(vcpu).unwrap_or_else(PoisonError::into_inner);
            }
            vcpu.count += 1;
            let page = vcpu.count % VCPU_PAGES;
            self.memory.write(page * PAGE_BYTES, &vcpu.count.to_le_bytes())?;
            // The mark comes after the write: a harvest in between leaves the mark for the next one. The other way
            // round the harvest could take the mark, the engine read the page, and the write be lost.
            if self.log.is_on.load(Ordering::Acquire) {
                self.log.dirty.set(page);
            }
            devices.ring(vcpu.count)?;
            let rest = vcpu.rest;
            drop(vcpu);
            if !rest.is_zero() {
                std::thread::sleep(rest);
            }
        }
    }

    pub fn set_running(&self, runs: bool) {
        self.vcpu().runs = runs;
        self.changed.notify_all();
    }

    /// Checks that each page holds the last number that the vCPU left there. The vCPU must not run.
    pub fn check(&self) -> Result<()> {
        let count = self.vcpu().count;
        for page in 0..VCPU_PAGES {
            let mut found = [0; 8];
            self.memory.read(page * PAGE_BYTES, &mut found)?;
            let last = (count.saturating_sub(VCPU_PAGES - 1)..=count)
                .rev()
                .find(|number| number % VCPU_PAGES == page);
            let (found, expected) = (u64::from_le_bytes(found), last.unwrap_or(0));
            if found != expected {
                return Err(format!("page {page} holds {found}, not {expected}").into());
            }
        }
        Ok(())
    }

    pub fn checksum(&self) -> io::Result<u64> {
        let mut bytes = vec![0; (PAGES * PAGE_BYTES) as usize];
        self.memory.read(0, &mut bytes)?;
        let words = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
        Ok(words.fold(0xcbf2_9ce4_8422_2325, |hash, word| {
            (hash ^ word).wrapping_mul(0x0100_0000_01b3).rotate_left(23)
        }))
    }
}

/// The engine's handle to the log. Its calls are all that the engine needs of KVM.
pub struct LogHandle<'a>(pub &'a Log);

impl DirtyLog for LogHandle<'_> {
    fn start(&mut self) -> io::Result<()> {
        self.0.dirty.clear();
        self.0.is_on.store(true, Ordering::Release);
        Ok(())
    }

    fn harvest(&mut self, _region: usize, dirty: &DirtyBitmap) -> io::Result<()> {
        let mut words = vec![0; words_for(PAGES)];
        self.0.dirty.harvest(0, PAGES, &mut words);
        dirty.or_words(0, &words, PAGES);
        Ok(())
    }

    fn stop(&mut self) {
        self.0.is_on.store(false, Ordering::Release);
    }
}
