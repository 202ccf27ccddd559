//! What a device author writes: [`Model`], the device, and [`Migration`], how it moves. A device that needs no calls side by
//! side is written as a [`SimpleModel`] instead.

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

/// A device with queues, threads and completions of its own: its regions, its reset, and what it does when they are used.
///
/// The [`Machine`](crate::Machine) calls [`Model::region_read`], [`Model::region_write`] and [`Model::rewired`] from several
/// threads at once, and beside the calls that carry a session's data. [`Model::reset`] and the arcs of [`Migration`] come
/// alone: no other call is under way until they return, and none begins.
pub trait Model: Send + Sync + 'static {
    /// What the device looks like. Called once, before anything else; must not change.
    fn description(&self) -> Description;

    /// Hands the device guest memory and interrupts. Called once, after [`Model::description`].
    fn attach(&self, bus: Bus);

    /// Reads `data.len()` bytes, at least one, of a region that is there. The range lies within the region, and the region
    /// can be read.
    fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno>;

    /// Writes likewise.
    fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno>;

    /// Brings the device to where it was at power-on, from any state. When this fails the device is in ERROR.
    fn reset(&self) -> Result<(), Errno>;

    /// The client wired or unwired vectors of an interrupt index. A PCI function is to be
    /// [settled](crate::pci::Function::settle): whether it holds INTx depends on what else is wired.
    fn rewired(&self, index: u32) {
        let _ = index;
    }

    /// The client has gone. Its mappings and its wiring are gone already, or those of the client that takes over from it are in
    /// their place ([`Machine::hand_over`](crate::Machine::hand_over)); whatever else the device kept for it goes here. The guest
    /// may go on: what it sees of the device stays. The client may still have the files of regions mapped: from here on the device
    /// has others with the same contents, which [`Model::region_file`] gives.
    /// A model that had panicked by then, or panics in here, is told after its next reset.
    fn client_gone(&self) {}

    /// The file behind a region that a client may map, once it is another one than that of the [`Description`]: of the same
    /// size, kind and seals, and at the same offset. `None` while it is that one.
    fn region_file(&self, region: u32) -> Option<Arc<OwnedFd>> {
        let _ = region;
        None
    }

    /// Whether the device can go on with region files of another process ([`Model::adopt_region_file`]). Must not change.
    fn adopts_region_files(&self) -> bool {
        false
    }

    /// The device takes the place of one in another process, whose client may have this file mapped: it is the region's from
    /// now on, and [`Model::region_file`] gives it. Its size, kind and seals were checked. Comes for each region that can be
    /// mapped, in STOP, after the state was loaded. The content of the file must not be changed: the other device may yet go on.
    fn adopt_region_file(&self, region: u32, file: Arc<OwnedFd>) -> Result<(), Errno> {
        let _ = (region, file);
        Err(Errno::ENOTSUP)
    }

    /// Whether the device can go on with the eventfds of regions of another process ([`Model::adopt_ioeventfds`]). Must not
    /// change.
    fn adopts_ioeventfds(&self) -> bool {
        false
    }

    /// The device takes the place of one in another process, whose client may signal these eventfds: they are those of the
    /// region's [`Region::ioeventfds`] from now on, in their order. Registers that shared one share one still. Comes for each
    /// region that has some, in STOP, after the state was loaded. Nothing must be read from them before the device runs: the
    /// other device may yet go on, and what its client signals meanwhile stays in them.
    fn adopt_ioeventfds(&self, region: u32, fds: Vec<Arc<OwnedFd>>) -> Result<(), Errno> {
        let _ = (region, fds);
        Err(Errno::ENOTSUP)
    }

    /// The device's migration, or `None` when it has none. Must not change.
    fn migration(&self) -> Option<&dyn Migration> {
        None
    }
}

/// How a device moves. Each method is an arc of the standard's machine, or carries data of a session; the
/// [`Machine`](crate::Machine) calls them in an order that the standard allows and no other.
///
/// Arcs come alone. [`Migration::save`], [`Migration::load`] and [`Migration::load_into`] come one at a time, beside accesses to
/// regions. [`Migration::precopy_info`] and [`Migration::data_size`] may come at any time.
///
/// Sessions are paired: after a [`Migration::save_begin`] that succeeded comes exactly one [`Migration::save_end`]; after a
/// [`Migration::load_begin`] that succeeded exactly one [`Migration::load_finish`] that succeeds or one
/// [`Migration::load_abort`]. This holds for resets and for faults too; only the reset of a model that panicked is called.
pub trait Migration: Sync {
    /// Which optional states the device has. STOP_COPY is always set. Must not change.
    fn flags(&self) -> MigrationFlags;

    /// RUNNING to RUNNING_P2P, and PRE_COPY to PRE_COPY_P2P: start no more peer-to-peer DMA, and complete what is under way.
    /// Only called with [`MigrationFlags::P2P`].
    fn quiesce_p2p(&self) -> Result<(), Fault> {
        Ok(())
    }

    /// The way back.
    fn resume_p2p(&self) -> Result<(), Fault> {
        Ok(())
    }

    /// To STOP or STOP_COPY from a state that runs: when this returns, the device changes neither itself nor anything
    /// outside, and has nothing under way. What was in flight has been completed, or is part of the state. A device with
    /// [`MigrationFlags::P2P`] was quiesced before.
    ///
    /// What cannot be completed by `until` is refused: [`Fault::Refused`] with ETIMEDOUT, and the device runs on.
    fn stop(&self, until: Instant) -> Result<(), Fault>;

    /// Back to a state that runs: from STOP, or when [`Migration::save_final`] refused. A device with
    /// [`MigrationFlags::P2P`] still holds back peer-to-peer DMA, until [`Migration::resume_p2p`].
    fn start(&self) -> Result<(), Fault>;

    /// Opens a saving session: on entering PRE_COPY or PRE_COPY_P2P, or STOP_COPY from STOP.
    fn save_begin(&self) -> Result<(), Fault>;

    /// Lends the next bytes of the saving session, at most `bytes_max` (at least 1) of them, to `take`, which is called exactly
    /// once unless this fails. `stopped` says that the state is STOP_COPY, in which [`Save::NothingForNow`] is not allowed;
    /// otherwise it is a pre-copy state, in which [`Save::End`] is not.
    ///
    /// The bytes are lent, so that a device whose state lies in memory need not copy it. They count as read once this returns.
    /// `take` waits for nobody.
    fn save(&self, bytes_max: usize, stopped: bool, take: &mut dyn FnMut(Save<'_>)) -> Result<(), Errno>;

    /// PRE_COPY* to STOP_COPY: the session goes on; what was not read of the pre-copy data, and what changed since, is to be
    /// read now. [`Migration::stop`] was called before; when this refuses, [`Migration::start`] follows and the state stays a
    /// pre-copy state.
    fn save_final(&self) -> Result<(), Fault> {
        Ok(())
    }

    /// The saving session ends, read to its end or not: the state is left, the device reset or broken.
    fn save_end(&self);

    /// Whether the device can report its initial bytes anew (`vfio.h: VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2`). Must not
    /// change.
    fn has_precopy_reinit(&self) -> bool {
        false
    }

    /// Estimates for pre-copy. Only called in pre-copy states; `argsz` is filled in by the caller. `reinit` says that the
    /// client opted in to [`PrecopyFlags::REINIT`](limosa_protocol::feature::PrecopyFlags::REINIT); without it the initial bytes
    /// must never grow again, and flags that are set are cleared.
    fn precopy_info(&self, reinit: bool) -> PrecopyInfo {
        let _ = reinit;
        PrecopyInfo::default()
    }

    /// Estimate of the bytes that stop-copy will need, in any state.
    fn data_size(&self) -> u64;

    /// STOP to RESUMING.
    fn load_begin(&self) -> Result<(), Fault>;

    /// The next bytes of the state to load. Nothing but staging memory may change before [`Migration::load_finish`]. After an
    /// error no more bytes come, and the session cannot be finished: it waits for a reset.
    fn load(&self, chunk: &[u8]) -> Result<(), Errno>;

    /// Lends staging memory of up to `bytes_max` bytes to `fill`, which receives the next bytes straight into it and returns
    /// how many it did; these count as loaded. `None`, without a call of `fill`, to have the bytes handed to
    /// [`Migration::load`]. `fill` waits for nobody, and returns 0 when nothing has come.
    fn load_into(
        &self,
        bytes_max: usize,
        fill: &mut dyn FnMut(&mut [u8]) -> usize,
    ) -> Option<Result<(), Errno>> {
        let _ = (bytes_max, fill);
        None
    }

    /// RESUMING to STOP: validates all that was loaded, then makes it the device's state. Refusing leaves the device as it was
    /// before the session, in RESUMING.
    fn load_finish(&self) -> Result<(), Fault>;

    /// A load session ends without [`Migration::load_finish`]: by a reset, or because that broke the device.
    fn load_abort(&self);
}

/// What [`Migration::save`] lends.
#[derive(Debug)]
pub enum Save<'a> {
    /// The next bytes, not empty.
    Data(&'a [u8]),
    /// Nothing for now.
    NothingForNow,
    /// All has been read.
    End,
}

/// Why an arc failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The device is as it was before the arc; the machine stays on the arc's first state.
    #[error("refused: {0}")]
    Refused(Errno),
    /// The device can neither take the arc nor go back: ERROR, until it is reset.
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
