//! The test device copies memory and sends the messages of its vectors.

use limosa_qemu_lab::{TestDevice, registers as at};

use crate::jobs::{Job, look_until};
use crate::memory::Memory;
use crate::os::Shared;
use crate::pci::Function;

const PAGE_BYTES: usize = 4096;
/// A page to copy, the pages to copy it to, and a page with a word for each vector.
const SOURCE: usize = 0;
const TARGETS: usize = PAGE_BYTES;
const TARGET_PAGES: u64 = 32;
const WORDS: usize = (1 + TARGET_PAGES as usize) * PAGE_BYTES;

pub(crate) struct Messages {
    function: Function,
    control: u64,
    device: Shared,
    table: Shared,
    memory: Memory,
}

impl Messages {
    pub(crate) fn find() -> Result<Messages, String> {
        let function = Function::find(TestDevice::IDENTITY)?;
        let control = function.capability(0x11)? + 2;
        let (device, table) = (function.bar(0, PAGE_BYTES)?, function.bar(4, PAGE_BYTES)?);
        let job = Messages { function, control, device, table, memory: Memory::new()? };
        for vector in 0..TestDevice::VECTORS {
            for (at, word) in (0..).step_by(4).zip(job.entry(vector)) {
                job.table.write_u32(16 * usize::from(vector) + at, word);
            }
        }
        job.function.write_u16(job.control, 0x8000)?;
        Ok(job)
    }

    /// A vector's entry in the table, not masked.
    fn entry(&self, vector: u16) -> [u32; 4] {
        let address = self.memory.iova(word(vector));
        [address as u32, (address >> 32) as u32, data(vector), 0]
    }

    fn send(&self, vector: u16) {
        self.memory.page.write_u32(word(vector), 0);
        self.device.write_u64(at::COMMAND as usize, at::MESSAGE + u64::from(vector));
    }

    fn arrives(&self, vector: u16) -> Result<(), String> {
        let page = self.memory.page;
        look_until(&format!("the message of vector {vector}"), || page.read_u32(word(vector)) == data(vector))
    }

    fn copies(&self, round: u64) -> Result<(), String> {
        let page = self.memory.page;
        let content = |round: u64, at: usize| round.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ at as u64;
        for offset in (0..PAGE_BYTES).step_by(8) {
            page.write_u64(SOURCE + offset, content(round, offset));
        }
        let target = |round: u64| TARGETS + (round % TARGET_PAGES) as usize * PAGE_BYTES;
        self.device.write_u64(at::DMA_SOURCE as usize, self.memory.iova(SOURCE));
        self.device.write_u64(at::DMA_TARGET as usize, self.memory.iova(target(round)));
        self.device.write_u64(at::DMA_BYTES as usize, PAGE_BYTES as u64);
        self.device.write_u64(at::COMMAND as usize, at::COPY);
        let status = self.device.read_u64(at::STATUS as usize);
        if status != 0 {
            return Err(format!("a copy ended with errno {status}"));
        }
        // All that was copied so far, not only the last.
        for past in round.saturating_sub(TARGET_PAGES - 1)..=round {
            let wrong = (0..PAGE_BYTES)
                .step_by(8)
                .find(|offset| page.read_u64(target(past) + offset) != content(past, *offset));
            if let Some(offset) = wrong {
                return Err(format!("the copy of round {past} is wrong at byte {offset}"));
            }
        }
        Ok(())
    }
}

impl Job for Messages {
    fn round(&mut self, round: u64) -> Result<(), String> {
        let before = self.device.read_u64(at::SCRATCH as usize);
        self.device.write_u64(at::SCRATCH as usize, round + 1);
        if before != round {
            return Err(format!("scratch memory was {before}"));
        }
        for vector in 0..TestDevice::VECTORS {
            let entry = [0, 4, 8, 12].map(|at| self.table.read_u32(16 * usize::from(vector) + at));
            if entry != self.entry(vector) {
                return Err(format!("entry {vector} of the table is {entry:x?}"));
            }
        }
        let control = self.function.read(self.control - 2)? >> 16;
        if control & 0xc000 != 0x8000 {
            return Err(format!("MSI-X is off: {control:#x}"));
        }
        self.copies(round)?;
        (0..TestDevice::VECTORS).for_each(|vector| self.send(vector));
        (0..TestDevice::VECTORS).try_for_each(|vector| self.arrives(vector))?;
        // One that is masked waits.
        let masked = (round % u64::from(TestDevice::VECTORS)) as u16;
        self.table.write_u32(16 * usize::from(masked) + 12, 1);
        self.send(masked);
        self.table.write_u32(16 * usize::from(masked) + 12, 0);
        self.arrives(masked)
    }
}

/// Where a vector's message goes.
fn word(vector: u16) -> usize {
    WORDS + 64 * usize::from(vector)
}

fn data(vector: u16) -> u32 {
    0x1_0001 * (u32::from(vector) + 1)
}
