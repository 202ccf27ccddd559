//! The synthetic device writes stamped pages into memory on its own, and says by a message that it is done.

use limosa_models::synthetic::{IDENTITY, Pattern, Window, registers as at};

use crate::jobs::{Job, look_until};
use crate::memory::Memory;
use crate::os::Shared;
use crate::pci::Function;

const PAGE_BYTES: usize = 4096;
/// Pages of the window, and of a round: neither divides the other.
const WINDOW_PAGES: u64 = 96;
const ROUND_PAGES: u64 = 64;
/// So that a round takes a while.
const RATE: u64 = 8 << 20;
/// Where the message goes, behind the window.
const MESSAGE: usize = 128 * PAGE_BYTES;
const MESSAGE_DATA: u16 = 0x1de;

pub(crate) struct Dma {
    device: Shared,
    memory: Memory,
    seed: u64,
}

impl Dma {
    pub(crate) fn find() -> Result<Dma, String> {
        let function = Function::find(u32::from(IDENTITY.device) << 16 | u32::from(IDENTITY.vendor))?;
        let memory = Memory::new()?;
        // MSI with 64-bit addresses, which the synthetic device has.
        let msi = function.capability(5)?;
        let address = memory.iova(MESSAGE);
        function.write(msi + 4, address as u32)?;
        function.write(msi + 8, (address >> 32) as u32)?;
        function.write_u16(msi + 12, MESSAGE_DATA)?;
        function.write_u16(msi + 2, 1)?;
        let device = function.bar(0, at::BAR_BYTES as usize)?;
        let values = [
            (at::DMA_CONTROL, 0),
            (at::DMA_BASE, memory.iova(0)),
            (at::DMA_PAGES, WINDOW_PAGES),
            (at::DMA_PATTERN, Pattern::Sequential.raw()),
            (at::DMA_RATE, RATE),
        ];
        for (register, value) in values {
            device.write_u64(register as usize, value);
        }
        let seed = device.read_u64(at::SEED as usize);
        Ok(Dma { device, memory, seed })
    }

    fn register(&self, register: u64) -> u64 {
        self.device.read_u64(register as usize)
    }
}

impl Job for Dma {
    fn round(&mut self, round: u64) -> Result<(), String> {
        let page = self.memory.page;
        page.write_u32(MESSAGE, 0);
        let writes = (round + 1) * ROUND_PAGES;
        self.device.write_u64(at::DMA_LIMIT as usize, writes);
        self.device.write_u64(at::DMA_CONTROL as usize, 1);
        let told =
            look_until("the message of the last write", || page.read_u32(MESSAGE) == u32::from(MESSAGE_DATA));
        let found =
            [at::DMA_SEQUENCE, at::DMA_CONTROL, at::DMA_FAILED].map(|register| self.register(register));
        told.map_err(|error| format!("{error}; sequence, control and failure are {found:?}"))?;
        if found != [writes, 0, 0] {
            return Err(format!("sequence, control and failure are {found:?} after {writes} writes"));
        }
        let window = Window { seed: self.seed, pages: WINDOW_PAGES, pattern: Pattern::Sequential };
        for (index, expected) in (0..).zip(window.expected(writes)) {
            window.check(index, expected, &page.copy(index as usize * PAGE_BYTES, PAGE_BYTES))?;
        }
        Ok(())
    }
}
