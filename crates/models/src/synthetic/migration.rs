//! How the synthetic device moves: the arcs, with the faults that are scripted for them, and its
//! sessions.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use limosa_device::{Fault, Save, SimpleMigration};
use limosa_protocol::feature::PrecopyInfo;
use limosa_protocol::{Errno, MigrationFlags, State};
use prost::Message;

use super::blocks::has_room;
use super::load::{LoadError, Loader};
use super::records::{Identity, KIND, RECORD_BYTES, Record, Rest, VERSION};
use super::save::Saver;
use super::{ScriptedFault, Step, Synthetic};

impl Synthetic {
    /// Begins a step: what is scripted for it happens.
    fn step(&mut self, to: State) -> Result<(), Fault> {
        let step = Step { from: self.state, to };
        for fault in &mut self.faults {
            match fault {
                ScriptedFault::Stall(at, ms) if *at == step => {
                    tracing::debug!(%step, ms, "stalls as scripted");
                    stall(Duration::from_millis(*ms));
                }
                ScriptedFault::Fail(at, times) if *at == step && *times > 0 => {
                    *times -= 1;
                    return Err(Fault::Refused(Errno::EBUSY));
                }
                _ => {}
            }
        }
        let breaks = |fault: &ScriptedFault| matches!(fault, ScriptedFault::Error(at) if *at == step);
        if let Some(at) = self.faults.iter().position(breaks) {
            self.faults.remove(at);
            return Err(Fault::Broken(Errno::EIO));
        }
        Ok(())
    }

    /// How many blocks are saved in pre-copy.
    fn share(&self) -> usize {
        if !self.config.pre_copy {
            return 0;
        }
        (self.blocks.count() as u128 * u128::from(self.config.precopy_percent) / 100) as usize
    }

    fn identity(&self) -> Vec<u8> {
        let identity = Identity {
            kind: KIND.into(),
            version: VERSION,
            state_bytes: self.config.state_bytes,
            block_bytes: self.config.block_bytes,
            seed: self.blocks.seed,
        };
        Record::section(|bytes, crc| Record::Identity { bytes, crc }, &identity.encode_to_vec())
    }

    fn rest(&self) -> Vec<u8> {
        let dma = self.dma.as_ref().map(super::Dma::registers).unwrap_or_default();
        let rest = Rest {
            checksum: self.blocks.checksum(),
            dirtied: self.blocks.dirtied,
            cursor: self.blocks.cursor as u64,
            dirty_rate: self.dirty_rate,
            dma_base: dma.base,
            dma_pages: dma.pages,
            dma_pattern: dma.pattern.raw(),
            dma_rate: dma.rate,
            dma_limit: dma.limit,
            dma_sequence: dma.sequence,
            dma_enabled: dma.enabled,
            dma_failed: dma.failed,
            scratch: self.scratch.clone(),
            function: Some(self.function().state(&self.interrupts())),
        };
        Record::section(|bytes, crc| Record::Rest { bytes, crc }, &rest.encode_to_vec())
    }

    fn refuse(error: &LoadError) -> Errno {
        tracing::warn!(%error, "state refused");
        error.errno()
    }
}

/// Takes its time.
fn stall(time: Duration) {
    let (never, nothing) = (Mutex::new(()), Condvar::new());
    let until = Instant::now() + time;
    let mut guard = never.lock().unwrap_or_else(PoisonError::into_inner);
    while let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
        guard = nothing.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0;
    }
}

impl SimpleMigration for Synthetic {
    fn flags(&self) -> MigrationFlags {
        self.config.flags()
    }

    fn quiesce_p2p(&mut self) -> Result<(), Fault> {
        let to = if self.state == State::PreCopy { State::PreCopyP2p } else { State::RunningP2p };
        self.step(to)?;
        self.state = to;
        Ok(())
    }

    fn resume_p2p(&mut self) -> Result<(), Fault> {
        let to = if self.state == State::PreCopyP2p { State::PreCopy } else { State::Running };
        self.step(to)?;
        self.state = to;
        Ok(())
    }

    fn stop(&mut self) -> Result<(), Fault> {
        let to = if self.saver.is_some() { State::StopCopy } else { State::Stop };
        self.step(to)?;
        self.dma().map_err(Fault::Broken)?.set_running(false);
        self.catch_up();
        self.state = to;
        Ok(())
    }

    fn start(&mut self) -> Result<(), Fault> {
        let to = if self.config.p2p { State::RunningP2p } else { State::Running };
        self.step(to)?;
        self.dma().map_err(Fault::Broken)?.set_running(true);
        self.state = to;
        // Nothing is owed for the time that it stood still.
        self.dirty_since = Instant::now();
        Ok(())
    }

    fn save_begin(&mut self) -> Result<(), Fault> {
        let to = match self.state {
            State::Running => State::PreCopy,
            State::RunningP2p => State::PreCopyP2p,
            _ => State::StopCopy,
        };
        self.step(to)?;
        self.catch_up();
        self.saver = Some(Saver::new(&self.blocks, self.share(), self.identity(), &self.config.faults));
        self.state = to;
        Ok(())
    }

    fn save(&mut self, bytes_max: usize, stopped: bool) -> Result<Save<'_>, Errno> {
        self.catch_up();
        // Made only when it is lent; the borrow needs it before.
        let wanted = self.saver.as_ref().is_some_and(|saver| stopped && saver.rest_is_next());
        let rest = if wanted { self.rest() } else { Vec::new() };
        let saver = self.saver.as_mut().ok_or(Errno::EIO)?;
        Ok(saver.save(&self.blocks, bytes_max, stopped, rest))
    }

    fn save_end(&mut self) {
        let to = match self.state {
            State::PreCopy => State::Running,
            State::PreCopyP2p => State::RunningP2p,
            _ => State::Stop,
        };
        // No fault but a stall can be scripted for this step.
        let _ = self.step(to);
        self.saver = None;
        self.state = to;
    }

    fn precopy_info(&mut self, reinit: bool) -> PrecopyInfo {
        self.catch_up();
        let block_bytes = self.blocks.block_bytes();
        self.saver.as_mut().map(|saver| saver.info(block_bytes, reinit)).unwrap_or_default()
    }

    fn has_precopy_reinit(&self) -> bool {
        true
    }

    fn data_size(&self) -> u64 {
        let blocks = match &self.saver {
            Some(saver) => saver.left_bytes(self.blocks.block_bytes()),
            None => self.config.state_bytes,
        };
        blocks + (self.identity().len() + RECORD_BYTES + self.rest().len()) as u64
    }

    fn load_begin(&mut self) -> Result<(), Fault> {
        if self.spare.is_none() && !has_room(self.config.state_bytes) {
            return Err(Fault::Refused(Errno::ENOMEM));
        }
        self.step(State::Resuming)?;
        let (count, block_bytes) = (self.blocks.count(), self.blocks.block_bytes());
        self.loader = Some(Loader::new(count, block_bytes, self.config.verify, self.spare.take()));
        self.state = State::Resuming;
        Ok(())
    }

    fn load(&mut self, mut chunk: &[u8]) -> Result<(), Errno> {
        while !chunk.is_empty() {
            let Some(space) = self.load_space(chunk.len()) else {
                return self.load_filled(chunk.len());
            };
            let bytes = space.len();
            space.copy_from_slice(&chunk[..bytes]);
            self.load_filled(bytes)?;
            chunk = &chunk[bytes..];
        }
        Ok(())
    }

    fn load_space(&mut self, bytes_max: usize) -> Option<&mut [u8]> {
        self.loader.as_mut()?.space(bytes_max)
    }

    fn load_filled(&mut self, bytes: usize) -> Result<(), Errno> {
        let loader = self.loader.as_mut().ok_or(Errno::EIO)?;
        loader.filled(bytes).map_err(|error| Synthetic::refuse(&error))
    }

    fn load_finish(&mut self) -> Result<(), Fault> {
        self.step(State::Stop)?;
        let bus = self.bus.clone().ok_or(Fault::Broken(Errno::EIO))?;
        let function = self.function().clone();
        let loader = self.loader.as_mut().ok_or(Fault::Broken(Errno::EIO))?;
        let loaded = loader.finish(&function).map_err(|error| Fault::Refused(Synthetic::refuse(&error)))?;
        self.dma().map_err(Fault::Broken)?.replace(loaded.blocks.seed, loaded.dma, false);
        self.spare = Some(std::mem::replace(&mut self.blocks, loaded.blocks).into_words());
        self.dirty_rate = loaded.dirty_rate;
        self.dirty_left = 0;
        self.scratch = loaded.scratch;
        *self.function() = loaded.function;
        self.function().settle(&bus.interrupts);
        self.loader = None;
        self.state = State::Stop;
        Ok(())
    }

    fn load_abort(&mut self) {
        self.spare = self.loader.take().map(Loader::into_staging);
    }
}
