//! [`SimpleModel`]: a device that gets one call at a time, and [`SimpleMigration`], its migration. [`Exclusive`]
//! turns it into a [`Model`](super::Model).
//!
//! [`Exclusive`]: super::Exclusive

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use limosa_protocol::feature::PrecopyInfo;
use limosa_protocol::{Errno, MigrationFlags};

use super::{Description, Fault, Save};
use crate::Bus;

/// A device: its regions, its reset, and its actions on accesses.
///
/// It gets one call at a time. A model may have its own threads; they access guest memory and interrupts through the
/// [`Bus`].
pub trait SimpleModel: Send + 'static {
    /// The device's description. Called once, before anything else; must not change.
    fn description(&self) -> Description;

    /// Gives the device guest memory and interrupts. Called once, after [`SimpleModel::description`].
    fn attach(&mut self, bus: Bus);

    /// Reads `data.len()` bytes (at least one) of an existing region. The range lies within the region, and the
    /// region can be read.
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno>;

    /// Writes likewise.
    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno>;

    /// Returns the device to its power-on state, from any state. If this fails, the device is in ERROR.
    fn reset(&mut self) -> Result<(), Errno>;

    /// The client wired or unwired vectors of an interrupt index. A device with a PCI function
    /// [settles](crate::pci::Function::settle) it here: whether it asserts INTx depends on the wiring of the other
    /// indexes.
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

/// The migration of a device. Each method is an arc of the standard's state machine, or transfers data of a
/// session; the [`Machine`](crate::Machine) calls them only in an order that the standard allows.
///
/// Sessions are paired: a successful [`SimpleMigration::save_begin`] is followed by exactly one
/// [`SimpleMigration::save_end`], a successful [`SimpleMigration::load_begin`] by exactly one successful
/// [`SimpleMigration::load_finish`] or one [`SimpleMigration::load_abort`]. This also holds for resets and faults; but
/// after a panic only the reset of the model is called.
pub trait SimpleMigration {
    /// Which optional states the device has. STOP_COPY is always set. Must not change.
    fn flags(&self) -> MigrationFlags;

    /// RUNNING to RUNNING_P2P, and PRE_COPY to PRE_COPY_P2P: start no more peer-to-peer DMA, and complete the DMA in
    /// progress. Only called with [`MigrationFlags::P2P`].
    fn quiesce_p2p(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    /// The reverse arc of [`SimpleMigration::quiesce_p2p`].
    fn resume_p2p(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    /// To STOP or STOP_COPY from a state that runs: when this returns, the device changes neither itself nor anything
    /// outside, and has no request in progress. A device with [`MigrationFlags::P2P`] was quiesced before.
    fn stop(&mut self) -> Result<(), Fault>;

    /// The same for a device that has to wait for requests in flight: if they cannot be completed by `until`,
    /// refuse with ETIMEDOUT; the device keeps running.
    fn stop_until(&mut self, until: Instant) -> Result<(), Fault> {
        let _ = until;
        self.stop()
    }

    /// Back to a running state: from STOP, or after [`SimpleMigration::save_final`] refused. A device with
    /// [`MigrationFlags::P2P`] starts no peer-to-peer DMA until [`SimpleMigration::resume_p2p`].
    fn start(&mut self) -> Result<(), Fault>;

    /// Opens a saving session: on entering PRE_COPY or PRE_COPY_P2P, or STOP_COPY from STOP.
    fn save_begin(&mut self) -> Result<(), Fault>;

    /// The next bytes of the saving session, at most `bytes_max` (which is at least 1). `stopped` says that the
    /// state is STOP_COPY, in which [`Save::NothingForNow`] is not allowed; otherwise it is a pre-copy state, in which
    /// [`Save::End`] is not.
    ///
    /// The bytes are borrowed, so that a device with its state in memory need not copy it. They count as read once this
    /// returns.
    fn save(&mut self, bytes_max: usize, stopped: bool) -> Result<Save<'_>, Errno>;

    /// PRE_COPY* to STOP_COPY: the session continues; unread pre-copy data, and changes since, are read from now
    /// on. [`SimpleMigration::stop`] was called before. If this refuses, [`SimpleMigration::start`] follows and the
    /// state stays a pre-copy state.
    fn save_final(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    /// The saving session ends, whether or not it was read to its end: the device leaves the state, is reset or
    /// broken.
    fn save_end(&mut self);

    /// Whether the device can report initial bytes again (`vfio.h: VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2`). Must
    /// not change.
    fn has_precopy_reinit(&self) -> bool {
        false
    }

    /// Estimates for pre-copy. Only called in pre-copy states; `argsz` is filled in by the caller. `reinit` says that
    /// the client opted in to [`PrecopyFlags::REINIT`](limosa_protocol::feature::PrecopyFlags::REINIT); without it the
    /// initial bytes must never grow again, and the caller clears all flags.
    fn precopy_info(&mut self, reinit: bool) -> PrecopyInfo {
        let _ = reinit;
        PrecopyInfo::default()
    }

    /// Estimate of the bytes of stop-copy, in any state.
    fn data_size(&self) -> u64;

    /// STOP to RESUMING.
    fn load_begin(&mut self) -> Result<(), Fault>;

    /// The next bytes of the state to load. Only staging memory may change before [`SimpleMigration::load_finish`].
    /// After an error there are no more bytes, and the session cannot be finished: it needs a reset.
    fn load(&mut self, chunk: &[u8]) -> Result<(), Errno>;

    /// Staging memory of up to `bytes_max` bytes to receive the next bytes directly, or `None` to get them through
    /// [`SimpleMigration::load`]. Followed by [`SimpleMigration::load_filled`], unless receiving fails: then the
    /// session cannot be finished, and needs a reset. The slice may be longer than `bytes_max`; an empty slice counts
    /// as `None`.
    fn load_space(&mut self, bytes_max: usize) -> Option<&mut [u8]> {
        let _ = bytes_max;
        None
    }

    /// The first `bytes` bytes of the last [`SimpleMigration::load_space`] are filled.
    fn load_filled(&mut self, bytes: usize) -> Result<(), Errno> {
        let _ = bytes;
        Err(Errno::EINVAL)
    }

    /// RESUMING to STOP: validates all loaded data, then makes it the device's state. A refusal leaves the device
    /// as it was before the session, in RESUMING.
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
