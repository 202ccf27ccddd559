//! The traits that a device author implements: [`Model`], the device, and [`Migration`], its migration. A device
//! without concurrent calls implements [`SimpleModel`] instead.

mod description;
mod exclusive;
mod simple;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use limosa_protocol::feature::PrecopyInfo;
use limosa_protocol::{Errno, MigrationFlags};

use crate::Bus;
pub use description::{Description, IoEventFd, Irq, Region, RegionMapping};
pub use exclusive::Exclusive;
pub use simple::{SimpleMigration, SimpleModel};

/// A device with its own queues, threads and completions: its regions, its reset, and its actions on accesses.
///
/// The [`Machine`](crate::Machine) calls [`Model::region_read`], [`Model::region_write`] and [`Model::rewired`] from
/// several threads at once, also during the calls that transfer a session's data. [`Model::reset`] and the arcs of
/// [`Migration`] run exclusively: no other call is in progress until they return, and none begins.
pub trait Model: Send + Sync + 'static {
    /// The device's description. Called once, before anything else; must not change.
    fn description(&self) -> Description;

    /// Gives the device guest memory and interrupts. Called once, after [`Model::description`].
    fn attach(&self, bus: Bus);

    /// Reads `data.len()` bytes (at least one) of an existing region. The range lies within the region, and the
    /// region can be read.
    fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno>;

    /// Writes likewise.
    fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno>;

    /// Returns the device to its power-on state, from any state. If this fails, the device is in ERROR.
    fn reset(&self) -> Result<(), Errno>;

    /// The client wired or unwired vectors of an interrupt index. A device with a PCI function
    /// [settles](crate::pci::Function::settle) it here: whether it asserts INTx depends on the wiring of the other
    /// indexes.
    fn rewired(&self, index: u32) {
        let _ = index;
    }

    /// The client has gone. Its mappings and its wiring are already removed, or replaced by those of the next
    /// client ([`Machine::hand_over`](crate::Machine::hand_over)). Drop anything else that the device kept for the
    /// client. The guest may continue, so the state that it sees stays. The client may still have files of regions
    /// mapped: replace them by new files with the same contents, and return those from [`Model::region_file`]. If the
    /// model has panicked before, or panics in this call, it is told after its next reset.
    fn client_gone(&self) {}

    /// The file behind a mappable region, if it is no longer the one in the [`Description`]: with the same size,
    /// kind and seals, and at the same offset. `None` while it is the original one.
    fn region_file(&self, region: u32) -> Option<Arc<OwnedFd>> {
        let _ = region;
        None
    }

    /// Whether the device can continue with region files of another process ([`Model::adopt_region_file`]). Must
    /// not change.
    fn adopts_region_files(&self) -> bool {
        false
    }

    /// The device replaces one in another process, whose client may have this file mapped: use it for the region
    /// from now on, and return it from [`Model::region_file`]. Its size, kind and seals have been checked. Called for
    /// each mappable region, in STOP, after the state was loaded. Do not change the contents of the file: the other
    /// device may still continue.
    fn adopt_region_file(&self, region: u32, file: Arc<OwnedFd>) -> Result<(), Errno> {
        let _ = (region, file);
        Err(Errno::ENOTSUP)
    }

    /// Whether the device can continue with the eventfds of regions of another process
    /// ([`Model::adopt_ioeventfds`]). Must not change.
    fn adopts_ioeventfds(&self) -> bool {
        false
    }

    /// The device replaces one in another process, whose client may signal these eventfds: use them for the
    /// region's [`Region::ioeventfds`] from now on, in the same order. Registers that shared an eventfd still share it.
    /// Called for each region that has eventfds, in STOP, after the state was loaded. Do not read from them before the
    /// device runs: the other device may still continue, and signals that arrive meanwhile stay in them.
    fn adopt_ioeventfds(&self, region: u32, fds: Vec<Arc<OwnedFd>>) -> Result<(), Errno> {
        let _ = (region, fds);
        Err(Errno::ENOTSUP)
    }

    /// The device's migration, or `None` when it has none. Must not change.
    fn migration(&self) -> Option<&dyn Migration> {
        None
    }
}

/// The migration of a device. Each method is an arc of the standard's state machine, or transfers data of a
/// session; the [`Machine`](crate::Machine) calls them only in an order that the standard allows.
///
/// Arcs run exclusively. [`Migration::save`], [`Migration::load`] and [`Migration::load_into`] are called one at a
/// time, concurrently with accesses to regions. [`Migration::precopy_info`] and [`Migration::data_size`] may be called
/// at any time.
///
/// Sessions are paired: a successful [`Migration::save_begin`] is followed by exactly one [`Migration::save_end`], a
/// successful [`Migration::load_begin`] by exactly one successful [`Migration::load_finish`] or one
/// [`Migration::load_abort`]. This also holds for resets and faults; but after a panic only the reset of the model is
/// called.
pub trait Migration: Sync {
    /// Which optional states the device has. STOP_COPY is always set. Must not change.
    fn flags(&self) -> MigrationFlags;

    /// RUNNING to RUNNING_P2P, and PRE_COPY to PRE_COPY_P2P: start no more peer-to-peer DMA, and complete the DMA in
    /// progress. Only called with [`MigrationFlags::P2P`].
    fn quiesce_p2p(&self) -> Result<(), Fault> {
        Ok(())
    }

    /// The reverse arc of [`Migration::quiesce_p2p`].
    fn resume_p2p(&self) -> Result<(), Fault> {
        Ok(())
    }

    /// To STOP or STOP_COPY from a state that runs: when this returns, the device changes neither itself nor anything
    /// outside, and has no request in progress. Requests in flight have been completed, or are part of the state. A
    /// device with [`MigrationFlags::P2P`] was quiesced before.
    ///
    /// If requests cannot be completed by `until`, return [`Fault::Refused`] with ETIMEDOUT; the device keeps running.
    fn stop(&self, until: Instant) -> Result<(), Fault>;

    /// Back to a running state: from STOP, or after [`Migration::save_final`] refused. A device with
    /// [`MigrationFlags::P2P`] starts no peer-to-peer DMA until [`Migration::resume_p2p`].
    fn start(&self) -> Result<(), Fault>;

    /// Opens a saving session: on entering PRE_COPY or PRE_COPY_P2P, or STOP_COPY from STOP.
    fn save_begin(&self) -> Result<(), Fault>;

    /// Passes the next bytes of the saving session, at most `bytes_max` (which is at least 1), to `take`, which has
    /// to be called exactly once unless this fails. `stopped` says that the state is STOP_COPY, in which
    /// [`Save::NothingForNow`] is not allowed; otherwise it is a pre-copy state, in which [`Save::End`] is not.
    ///
    /// The bytes are borrowed, so that a device with its state in memory need not copy it. They count as read once this
    /// returns. `take` does not block.
    fn save(&self, bytes_max: usize, stopped: bool, take: &mut dyn FnMut(Save<'_>)) -> Result<(), Errno>;

    /// PRE_COPY* to STOP_COPY: the session continues; unread pre-copy data, and changes since, are read from now
    /// on. [`Migration::stop`] was called before. If this refuses, [`Migration::start`] follows and the state stays a
    /// pre-copy state.
    fn save_final(&self) -> Result<(), Fault> {
        Ok(())
    }

    /// The saving session ends, whether or not it was read to its end: the device leaves the state, is reset or
    /// broken.
    fn save_end(&self);

    /// Whether the device can report initial bytes again (`vfio.h: VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2`). Must
    /// not change.
    fn has_precopy_reinit(&self) -> bool {
        false
    }

    /// Estimates for pre-copy. Only called in pre-copy states; `argsz` is filled in by the caller. `reinit` says that
    /// the client opted in to [`PrecopyFlags::REINIT`](limosa_protocol::feature::PrecopyFlags::REINIT); without it the
    /// initial bytes must never grow again, and the caller clears all flags.
    fn precopy_info(&self, reinit: bool) -> PrecopyInfo {
        let _ = reinit;
        PrecopyInfo::default()
    }

    /// Estimate of the bytes of stop-copy, in any state.
    fn data_size(&self) -> u64;

    /// STOP to RESUMING.
    fn load_begin(&self) -> Result<(), Fault>;

    /// The next bytes of the state to load. Only staging memory may change before [`Migration::load_finish`]. After an
    /// error there are no more bytes, and the session cannot be finished: it needs a reset.
    fn load(&self, chunk: &[u8]) -> Result<(), Errno>;

    /// Passes staging memory of up to `bytes_max` bytes to `fill`, which receives the next bytes directly into it
    /// and returns their number; these count as loaded. Return `None`, without calling `fill`, to get the bytes through
    /// [`Migration::load`]. `fill` does not block, and returns 0 if no data has arrived.
    fn load_into(
        &self,
        bytes_max: usize,
        fill: &mut dyn FnMut(&mut [u8]) -> usize,
    ) -> Option<Result<(), Errno>> {
        let _ = (bytes_max, fill);
        None
    }

    /// RESUMING to STOP: validates all loaded data, then makes it the device's state. A refusal leaves the device
    /// as it was before the session, in RESUMING.
    fn load_finish(&self) -> Result<(), Fault>;

    /// A load session ends without [`Migration::load_finish`]: by a reset, or because that broke the device.
    fn load_abort(&self);
}

/// The data that [`Migration::save`] passes.
#[derive(Debug)]
pub enum Save<'a> {
    /// The next bytes, not empty.
    Data(&'a [u8]),
    /// Nothing for now.
    NothingForNow,
    /// All data has been read.
    End,
}

/// Why an arc failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The device is as it was before the arc; the machine stays on the arc's first state.
    #[error("refused: {0}")]
    Refused(Errno),
    /// The device can neither take the arc nor go back: it is in ERROR until it is reset.
    #[error("broken: {0}")]
    Broken(Errno),
}

impl Fault {
    /// The errno for the client.
    pub fn errno(self) -> Errno {
        match self {
            Fault::Refused(errno) | Fault::Broken(errno) => errno,
        }
    }
}
