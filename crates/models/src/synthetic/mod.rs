//! The synthetic device: for tests and measurements of everything that moves devices.
//!
//! Its state is any number of blocks, each a function of a seed, the block's index and a generation
//! that counts how often it changed; it changes blocks while it runs, at a rate. It writes stamped
//! pages into guest memory, each with the next sequence number. After a move the device knows that
//! its state is whole, because every block is checked as it is loaded, and a client can prove that
//! memory is: every page must hold the last write that went to it ([`Window`]).
//!
//! Faults happen on demand ([`ScriptedFault`]). It is a PCI function: the registers are in BAR 0
//! ([`registers`]), BAR 2 shows the state, read-only, and one MSI vector says that the DMA engine
//! turned itself off.

mod blocks;
mod config;
mod dma;
mod faults;
mod load;
mod migration;
mod records;
pub mod registers;
mod save;
mod stamp;

use std::time::Instant;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use limosa_device::pci::{Bar, Function, Identity};
use limosa_device::{Bus, Description, Interrupts, SimpleMigration, SimpleModel};
use limosa_protocol::info::{DeviceFlags, RegionFlags};
use limosa_protocol::{Errno, State, pci_index};

use blocks::Blocks;
pub use config::{ConfigError, SyntheticConfig};
use dma::{Dma, Registers};
pub use dma::{Pattern, Window};
pub use faults::{ScriptedFault, Step};
pub use load::LoadError;
use load::Loader;
use registers::*;
use save::Saver;
pub use stamp::{PAGE_BYTES, Stamp, StampError, verify_page};

/// Region of the registers.
pub const REGISTERS_REGION: u32 = pci_index::BAR0;
/// Region that shows the state.
pub const STATE_REGION: u32 = pci_index::BAR0 + 2;

/// Its PCI identity: an unassigned vendor and device ID, and no class.
pub const IDENTITY: Identity = Identity {
    vendor: 0x4c4d,
    device: 0x5359,
    revision: 1,
    class: 0xff_0000,
    subsystem_vendor: 0x4c4d,
    subsystem: 0,
};

/// The synthetic device.
pub struct Synthetic {
    config: SyntheticConfig,
    /// Shared with the thread that raises the interrupt.
    function: Arc<Mutex<Function>>,
    /// Before [`Model::attach`] there is none.
    bus: Option<Bus>,
    blocks: Blocks,
    scratch: Vec<u8>,
    dirty_rate: u64,
    /// Since when changes are owed, and bytes that were too few for a block.
    dirty_since: Instant,
    dirty_left: u64,
    /// Before [`Model::attach`] there is none.
    dma: Option<Dma>,
    /// Where the device stands, to know which step each call is.
    state: State,
    saver: Option<Saver>,
    loader: Option<Loader>,
    /// Memory of an earlier state, for the next load.
    spare: Option<Vec<u64>>,
    faults: Vec<ScriptedFault>,
}

impl Synthetic {
    /// A device, or the error in its configuration; a state for which there is not enough memory is refused as
    /// well.
    pub fn new(config: SyntheticConfig) -> Result<Synthetic, ConfigError> {
        config.check()?;
        if !blocks::has_room(config.state_bytes) {
            return Err(ConfigError::no_room(config.state_bytes));
        }
        Ok(Synthetic {
            blocks: Blocks::new(config.seed, config.blocks(), config.block_bytes as usize),
            scratch: vec![0; SCRATCH_BYTES],
            dirty_rate: config.dirty_rate,
            dirty_since: Instant::now(),
            dirty_left: 0,
            dma: None,
            state: State::Running,
            saver: None,
            loader: None,
            spare: None,
            faults: config.faults.clone(),
            function: Arc::new(Mutex::new(function(config.state_bytes))),
            bus: None,
            config,
        })
    }

    fn function(&self) -> MutexGuard<'_, Function> {
        self.function.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn config_write(&self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let bus = self.bus.as_ref().ok_or(Errno::EIO)?;
        self.function().config_write(offset, data, &bus.interrupts).map(drop)
    }

    fn interrupts(&self) -> Interrupts {
        self.bus.as_ref().map(|bus| bus.interrupts.clone()).unwrap_or_default()
    }

    fn power_on_dma(&self) -> Registers {
        Registers { pattern: self.config.dma_pattern, rate: self.config.dma_rate, ..Registers::default() }
    }

    fn dma(&self) -> Result<&Dma, Errno> {
        self.dma.as_ref().ok_or(Errno::EIO)
    }

    /// Changes what the rate says should have changed by now. The device has no thread for this:
    /// nobody can tell when a block changed that nobody looked at.
    fn catch_up(&mut self) {
        let now = Instant::now();
        if self.state.is_running() && self.dirty_rate > 0 {
            let past = now.duration_since(self.dirty_since).as_nanos();
            let bytes = past.saturating_mul(u128::from(self.dirty_rate)) / 1_000_000_000;
            let bytes = u64::try_from(bytes).unwrap_or(u64::MAX).saturating_add(self.dirty_left);
            let block = u64::from(self.config.block_bytes);
            self.dirty_left = bytes % block;
            self.dirty(bytes / block);
        }
        self.dirty_since = now;
    }

    fn dirty(&mut self, changes: u64) {
        let kept = self.saver.as_ref().and_then(|saver| saver.in_flight(&self.blocks));
        let saver = &mut self.saver;
        self.blocks.dirty(changes, kept, |index| {
            if let Some(saver) = saver {
                saver.changed(index);
            }
        });
    }

    fn register(&mut self, at: u64) -> u64 {
        let dma = self.dma.as_ref().map(Dma::registers).unwrap_or_default();
        match at {
            IDENT => IDENT_VALUE,
            STATE_BYTES => self.config.state_bytes,
            BLOCK_BYTES => u64::from(self.config.block_bytes),
            SEED => self.blocks.seed,
            DIRTIED => {
                self.catch_up();
                self.blocks.dirtied
            }
            CHECKSUM => {
                self.catch_up();
                self.blocks.checksum()
            }
            DIRTY_RATE => self.dirty_rate,
            BAD_BLOCKS => self.blocks.bad(),
            DMA_BASE => dma.base,
            DMA_PAGES => dma.pages,
            DMA_PATTERN => dma.pattern.raw(),
            DMA_LIMIT => dma.limit,
            DMA_RATE => dma.rate,
            DMA_CONTROL => dma.enabled.into(),
            DMA_SEQUENCE => dma.sequence,
            DMA_FAILED => dma.failed.into(),
            _ => 0,
        }
    }

    fn set_register(&mut self, at: u64, value: u64) -> Result<(), Errno> {
        let again = |dma: &mut Registers| (dma.sequence, dma.failed) = (0, false);
        match at {
            DIRTY => {
                self.catch_up();
                self.dirty(value);
            }
            DIRTY_RATE => {
                self.catch_up();
                self.dirty_rate = value;
            }
            REINIT => {
                if let Some(saver) = self.saver.as_mut().filter(|_| value != 0) {
                    saver.reinit();
                }
            }
            DMA_BASE => self.dma()?.change(|dma| {
                dma.base = value;
                again(dma);
            })?,
            DMA_PAGES => self.dma()?.change(|dma| {
                dma.pages = value;
                again(dma);
            })?,
            DMA_PATTERN => {
                let pattern = Pattern::from_raw(value).ok_or(Errno::EINVAL)?;
                self.dma()?.change(|dma| {
                    dma.pattern = pattern;
                    again(dma);
                })?;
            }
            DMA_LIMIT => self.dma()?.change(|dma| dma.limit = value)?,
            DMA_RATE => self.dma()?.set_rate(value),
            DMA_CONTROL => self.dma()?.enable(value & 1 != 0)?,
            _ => {}
        }
        Ok(())
    }

    fn scratch_range(&self, offset: u64, bytes: usize) -> Option<std::ops::Range<usize>> {
        let from = offset.checked_sub(SCRATCH)? as usize;
        (from + bytes <= SCRATCH_BYTES).then(|| from..from + bytes)
    }
}

/// The PCI function. A BAR has a power of two of bytes, and the state need not.
fn function(state_bytes: u64) -> Function {
    let state = state_bytes.next_power_of_two();
    Function::builder(IDENTITY)
        .bar(REGISTERS_REGION as usize, Bar::Memory32 { bytes: BAR_BYTES, prefetchable: false })
        .bar(STATE_REGION as usize, Bar::Memory64 { bytes: state, prefetchable: true })
        .power_management()
        .msi(1)
        .build()
}

impl SimpleModel for Synthetic {
    fn description(&self) -> Description {
        let function = self.function();
        let mut regions = function.regions();
        regions[STATE_REGION as usize].flags = RegionFlags::READ;
        Description { flags: Some(DeviceFlags::RESET | DeviceFlags::PCI), regions, irqs: function.irqs() }
    }

    fn attach(&mut self, bus: Bus) {
        let function = Arc::clone(&self.function);
        match Dma::new(bus.clone(), function, self.config.seed, self.power_on_dma()) {
            Ok(dma) => self.dma = Some(dma),
            Err(error) => tracing::error!(%error, "no thread for DMA: the engine cannot be used"),
        }
        self.bus = Some(bus);
    }

    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        if region == pci_index::CONFIG {
            return self.function().config_read(offset, data);
        }
        if region == STATE_REGION {
            self.catch_up();
            let state = self.blocks.bytes().get(offset as usize..).unwrap_or_default();
            let there = state.len().min(data.len());
            data[..there].copy_from_slice(&state[..there]);
            data[there..].fill(0);
            return Ok(());
        }
        if let Some(range) = self.scratch_range(offset, data.len()) {
            data.copy_from_slice(&self.scratch[range]);
            return Ok(());
        }
        let mut at = offset;
        let mut left = data;
        while !left.is_empty() {
            let within = (at % 8) as usize;
            let bytes = left.len().min(8 - within);
            let (now, later) = left.split_at_mut(bytes);
            match self.scratch_range(at, bytes) {
                Some(range) => now.copy_from_slice(&self.scratch[range]),
                None => {
                    let register = self.register(at - within as u64).to_le_bytes();
                    now.copy_from_slice(&register[within..within + bytes]);
                }
            }
            (at, left) = (at + bytes as u64, later);
        }
        Ok(())
    }

    /// Configuration space takes any write. Registers: EBUSY unless the device runs; EINVAL for an access that is not an aligned one of 4 or 8
    /// bytes, except to scratch memory, which takes any within it.
    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        if region == pci_index::CONFIG {
            return self.config_write(offset, data);
        }
        if !self.state.is_running() {
            return Err(Errno::EBUSY);
        }
        if let Some(range) = self.scratch_range(offset, data.len()) {
            self.scratch[range].copy_from_slice(data);
            return Ok(());
        }
        let within = (offset % 8) as usize;
        if !matches!((data.len(), within), (8, 0) | (4, 0 | 4)) {
            return Err(Errno::EINVAL);
        }
        let at = offset - within as u64;
        let mut value = self.register(at).to_le_bytes();
        value[within..within + data.len()].copy_from_slice(data);
        self.set_register(at, u64::from_le_bytes(value))
    }

    fn reset(&mut self) -> Result<(), Errno> {
        self.dma()?.replace(self.config.seed, self.power_on_dma(), true);
        if let Some(bus) = &self.bus {
            self.function().reset(&bus.interrupts);
        }
        self.blocks.reset(self.config.seed);
        self.scratch.fill(0);
        (self.dirty_rate, self.dirty_left) = (self.config.dirty_rate, 0);
        self.dirty_since = Instant::now();
        (self.saver, self.loader) = (None, None);
        self.state = State::Running;
        Ok(())
    }

    fn rewired(&mut self, _index: u32) {
        let interrupts = self.interrupts();
        self.function().settle(&interrupts);
    }

    fn migration(&mut self) -> Option<&mut dyn SimpleMigration> {
        Some(self)
    }
}
