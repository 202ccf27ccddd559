//! The machine that walks arcs over a model. SEAM.

use std::sync::Arc;

use limosa_client::Refers;
use limosa_protocol::feature::PrecopyInfo;
use limosa_protocol::{Errno, FeatureCall, State};

use crate::{Bus, Description, Model, Save};

/// A device that is ready to be used: a model, its memory and interrupts, its state and session.
/// Every call may come from any thread; calls on the model are serialized.
pub struct Machine {}

/// Names a data session; a later session has another id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SessionId(pub u64);

/// What a FEATURE request did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FeatureDone {
    /// Bytes of payload filled in.
    pub payload_bytes: usize,
    /// The session that opened.
    pub opened: Option<SessionId>,
}

impl Machine {
    /// Makes the model ready, in RUNNING.
    pub fn new(_model: Box<dyn Model>) -> Arc<Machine> {
        todo!()
    }
    /// Its way out.
    pub fn bus(&self) -> &Bus {
        todo!()
    }
    /// What it looks like.
    pub fn description(&self) -> &Description {
        todo!()
    }
    /// Reads a region: EINVAL outside it, or when it cannot be read.
    pub fn region_read(&self, _region: u32, _offset: u64, _data: &mut [u8]) -> Result<(), Errno> {
        todo!()
    }
    /// Writes a region likewise.
    pub fn region_write(&self, _region: u32, _offset: u64, _data: &[u8]) -> Result<(), Errno> {
        todo!()
    }
    /// Resets to RUNNING from any state.
    pub fn reset(&self) -> Result<(), Errno> {
        todo!()
    }
    /// The state.
    pub fn state(&self) -> State {
        todo!()
    }
    /// Performs a FEATURE request that passed [`limosa_protocol::FeatureHeader::call`]. `payload` is in and out; a
    /// REPORT wants `Refers::Bitmap`, a START `Refers::In` (whole [`limosa_protocol::feature::DmaLoggingRange`]s).
    pub fn feature(
        &self,
        _call: FeatureCall,
        _payload: &mut [u8],
        _refers: Refers<'_>,
    ) -> Result<FeatureDone, Errno> {
        todo!()
    }
    /// The open session.
    pub fn session(&self) -> Option<SessionId> {
        todo!()
    }
    /// Lends the next bytes of a saving session to `take`: ENODEV when it has ended, EBADF in RESUMING.
    pub fn data_read<R>(
        &self,
        _session: SessionId,
        _bytes_max: usize,
        _take: impl FnOnce(Save<'_>) -> R,
    ) -> Result<R, Errno> {
        todo!()
    }
    /// Takes the next bytes of a RESUMING session: ENODEV, EBADF.
    pub fn data_write(&self, _session: SessionId, _chunk: &[u8]) -> Result<(), Errno> {
        todo!()
    }
    /// Lets `fill` put the next `bytes` bytes straight into the model's staging memory, or into `spare` when the model
    /// lends none. `fill` is called exactly once whatever the outcome is, with pieces that add up to `bytes`... see impl.
    pub fn data_fill<E>(
        &self,
        _session: SessionId,
        _bytes: usize,
        _spare: &mut Vec<u8>,
        _fill: impl FnMut(&mut [u8]) -> Result<(), E>,
    ) -> Result<Result<(), Errno>, E> {
        todo!()
    }
    /// Pre-copy info: EINVAL outside pre-copy states, ENODEV for an old session.
    pub fn precopy_info(&self, _session: SessionId) -> Result<PrecopyInfo, Errno> {
        todo!()
    }
    /// The client went away: mappings and wiring go, logging stops; state and session stay.
    pub fn client_gone(&self) {
        todo!()
    }
}
