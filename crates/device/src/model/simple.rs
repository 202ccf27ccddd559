//! [`SimpleModel`]: a device whose calls come one at a time, and [`SimpleMigration`], how it moves. [`Exclusive`] makes a
//! [`Model`](super::Model) of it.
//!
//! [`Exclusive`]: super::Exclusive

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use limosa_protocol::feature::PrecopyInfo;
use limosa_protocol::{Errno, MigrationFlags};

use super::{Description, Fault, Save};
use crate::Bus;

/// A device: its regions, its reset, and what it does when they are used.
///
/// Calls come one at a time. A model may have threads of its own; they reach guest memory and interrupts through the [`Bus`].
pub trait SimpleModel: Send + 'static {
    /// What the device looks like. Called once, before anything else; must not change.
    fn description(&self) -> Description;

    /// Hands the device its way out: guest memory and interrupts. Called once, after
    /// [`SimpleModel::description`].
    fn attach(&mut self, bus: Bus);

    /// Reads `data.len()` bytes, at least one, of a region that is there. The range lies within
    /// the region, and the region can be read.
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno>;

    /// Writes likewise.
    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno>;

    /// Brings the device to where it was at power-on, from any state. When this fails the device
    /// is in ERROR.
    fn reset(&mut self) -> Result<(), Errno>;

    /// The client wired or unwired vectors of an interrupt index. A PCI function is to be
    /// [settled](crate::pci::Function::settle): whether it holds INTx depends on what else is wired.
    fn rewired(&mut self, index: u32) {
        let _ = index;
    }

    /// The client has gone ([`Model::client_gone`](super::Model::client_gone)).
    fn client_gone(&mut self) {}

    /// See [`Model::region_file`](super::Model::region_file).
    fn region_file(&self, region: u32) -> Option<Arc<OwnedFd>> {
        let _ = region;
        None
    }

    /// See [`Model::adopts_region_files`](super::Model::adopts_region_files).
    fn adopts_region_files(&self) -> bool {
        false
    }

    /// See [`Model::adopt_region_file`](super::Model::adopt_region_file).
    fn adopt_region_file(&mut self, region: u32, file: Arc<OwnedFd>) -> Result<(), Errno> {
        let _ = (region, file);
        Err(Errno::ENOTSUP)
    }

    /// See [`Model::adopts_ioeventfds`](super::Model::adopts_ioeventfds).
    fn adopts_ioeventfds(&self) -> bool {
        false
    }

    /// See [`Model::adopt_ioeventfds`](super::Model::adopt_ioeventfds).
    fn adopt_ioeventfds(&mut self, region: u32, fds: Vec<Arc<OwnedFd>>) -> Result<(), Errno> {
        let _ = (region, fds);
        Err(Errno::ENOTSUP)
    }

    /// The device's migration, or `None` when it has none. Must not change.
    fn migration(&mut self) -> Option<&mut dyn SimpleMigration> {
        None
    }
}

/// How a device moves. Each method is an arc of the standard's machine, or what flows in a session;
/// the [`Machine`](crate::Machine) calls them in an order that the standard allows and no other.
///
/// Sessions are paired: after a [`SimpleMigration::save_begin`] that succeeded comes exactly one
/// [`SimpleMigration::save_end`]; after a [`SimpleMigration::load_begin`] that succeeded exactly one
/// [`SimpleMigration::load_finish`] that succeeds or one [`SimpleMigration::load_abort`]. This holds for
/// resets and for faults too; only a model that panics is asked for nothing but its reset.
pub trait SimpleMigration {
    /// Which optional states the device has. STOP_COPY is always set. Must not change.
    fn flags(&self) -> MigrationFlags;

    /// RUNNING to RUNNING_P2P, and PRE_COPY to PRE_COPY_P2P: start no more peer-to-peer DMA, and
    /// complete what is under way. Only called with [`MigrationFlags::P2P`].
    fn quiesce_p2p(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    /// The way back.
    fn resume_p2p(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    /// To STOP or STOP_COPY from a state that runs: when this returns, the device changes neither
    /// itself nor anything outside, and has nothing under way. A device with
    /// [`MigrationFlags::P2P`] was quiesced before.
    fn stop(&mut self) -> Result<(), Fault>;

    /// The same for a device that has to wait for what is in flight: what cannot be completed by `until` is refused with
    /// ETIMEDOUT, and the device runs on.
    fn stop_until(&mut self, until: Instant) -> Result<(), Fault> {
        let _ = until;
        self.stop()
    }

    /// Back to a state that runs: from STOP, or when [`SimpleMigration::save_final`] refused. A device
    /// with [`MigrationFlags::P2P`] still holds back peer-to-peer DMA, until
    /// [`SimpleMigration::resume_p2p`].
    fn start(&mut self) -> Result<(), Fault>;

    /// Opens a saving session: on entering PRE_COPY or PRE_COPY_P2P, or STOP_COPY from STOP.
    fn save_begin(&mut self) -> Result<(), Fault>;

    /// The next bytes of the saving session, at most `bytes_max` (at least 1) of them. `stopped`
    /// says that the state is STOP_COPY, in which [`Save::NothingForNow`] is not allowed;
    /// otherwise it is a pre-copy state, in which [`Save::End`] is not.
    ///
    /// The bytes are lent, so that a device whose state lies in memory need not copy it. They
    /// count as read once this returns.
    fn save(&mut self, bytes_max: usize, stopped: bool) -> Result<Save<'_>, Errno>;

    /// PRE_COPY* to STOP_COPY: the session goes on; what was not read of the pre-copy data, and
    /// what changed since, is to be read now. [`SimpleMigration::stop`] was called before; when this
    /// refuses, [`SimpleMigration::start`] follows and the state stays a pre-copy state.
    fn save_final(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    /// The saving session ends, read to its end or not: the state is left, the device reset or
    /// broken.
    fn save_end(&mut self);

    /// Whether the device can report its initial bytes anew (`vfio.h:
    /// VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2`). Must not change.
    fn has_precopy_reinit(&self) -> bool {
        false
    }

    /// Estimates for pre-copy. Only called in pre-copy states; `argsz` is filled in by the caller.
    /// `reinit` says that the client opted in to
    /// [`PrecopyFlags::REINIT`](limosa_protocol::feature::PrecopyFlags::REINIT); without it the
    /// initial bytes must never grow again, and flags that are set are cleared.
    fn precopy_info(&mut self, reinit: bool) -> PrecopyInfo {
        let _ = reinit;
        PrecopyInfo::default()
    }

    /// Estimate of the bytes that stop-copy will need, in any state.
    fn data_size(&self) -> u64;

    /// STOP to RESUMING.
    fn load_begin(&mut self) -> Result<(), Fault>;

    /// The next bytes of the state to load. Nothing but staging memory may change before
    /// [`SimpleMigration::load_finish`]. After an error no more bytes come, and the session cannot be
    /// finished: it waits for a reset.
    fn load(&mut self, chunk: &[u8]) -> Result<(), Errno>;

    /// Staging memory of up to `bytes_max` bytes to receive the next bytes in directly, or `None`
    /// to have them handed to [`SimpleMigration::load`]. Followed by [`SimpleMigration::load_filled`], unless
    /// receiving fails: then the session cannot be finished, and waits for a reset. More than
    /// `bytes_max` bytes may be lent; an empty slice counts as `None`.
    fn load_space(&mut self, bytes_max: usize) -> Option<&mut [u8]> {
        let _ = bytes_max;
        None
    }

    /// The first `bytes` bytes of the last [`SimpleMigration::load_space`] are filled.
    fn load_filled(&mut self, bytes: usize) -> Result<(), Errno> {
        let _ = bytes;
        Err(Errno::EINVAL)
    }

    /// RESUMING to STOP: validates all that was loaded, then makes it the device's state. Refusing
    /// leaves the device as it was before the session, in RESUMING.
    fn load_finish(&mut self) -> Result<(), Fault>;

    /// A load session ends without [`SimpleMigration::load_finish`]: by a reset, or because that broke
    /// the device.
    fn load_abort(&mut self);
}

impl<M: SimpleModel + ?Sized> SimpleModel for Box<M> {
    fn description(&self) -> Description {
        (**self).description()
    }

    fn attach(&mut self, bus: Bus) {
        (**self).attach(bus);
    }

    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        (**self).region_read(region, offset, data)
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        (**self).region_write(region, offset, data)
    }

    fn reset(&mut self) -> Result<(), Errno> {
        (**self).reset()
    }

    fn rewired(&mut self, index: u32) {
        (**self).rewired(index);
    }

    fn client_gone(&mut self) {
        (**self).client_gone();
    }

    fn region_file(&self, region: u32) -> Option<Arc<OwnedFd>> {
        (**self).region_file(region)
    }

    fn adopts_region_files(&self) -> bool {
        (**self).adopts_region_files()
    }

    fn adopt_region_file(&mut self, region: u32, file: Arc<OwnedFd>) -> Result<(), Errno> {
        (**self).adopt_region_file(region, file)
    }

    fn adopts_ioeventfds(&self) -> bool {
        (**self).adopts_ioeventfds()
    }

    fn adopt_ioeventfds(&mut self, region: u32, fds: Vec<Arc<OwnedFd>>) -> Result<(), Errno> {
        (**self).adopt_ioeventfds(region, fds)
    }

    fn migration(&mut self) -> Option<&mut dyn SimpleMigration> {
        (**self).migration()
    }
}
