//! What a device author writes: [`Model`], the device, and [`Migration`], how it moves.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use limosa_protocol::feature::PrecopyInfo;
use limosa_protocol::info::{DeviceFlags, IrqFlags, RegionFlags};
use limosa_protocol::{Errno, MigrationFlags};

use crate::Bus;

/// A device: its regions, its reset, and what it does when they are used.
///
/// Calls come one at a time, under the [`Machine`](crate::Machine)'s lock. A model may have
/// threads of its own; they reach guest memory and interrupts through the [`Bus`].
pub trait Model: Send + 'static {
    /// What the device looks like. Called once, before anything else; must not change.
    fn description(&self) -> Description;

    /// Hands the device its way out: guest memory and interrupts. Called once, after
    /// [`Model::description`].
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

    /// The device's migration, or `None` when it has none.
    fn migration(&mut self) -> Option<&mut dyn Migration> {
        None
    }
}

/// How a device moves. Each method is an arc of the standard's machine, or what flows in a session;
/// the [`Machine`](crate::Machine) calls them in an order that the standard allows and no other.
///
/// Sessions are paired: after a [`Migration::save_begin`] that succeeded comes exactly one
/// [`Migration::save_end`]; after a [`Migration::load_begin`] that succeeded exactly one
/// [`Migration::load_finish`] that succeeds or one [`Migration::load_abort`]. This holds for
/// resets and for faults too; only a model that panics is asked for nothing but its reset.
pub trait Migration {
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

    /// Back to a state that runs: from STOP, or when [`Migration::save_final`] refused. A device
    /// with [`MigrationFlags::P2P`] still holds back peer-to-peer DMA, until
    /// [`Migration::resume_p2p`].
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
    /// what changed since, is to be read now. [`Migration::stop`] was called before; when this
    /// refuses, [`Migration::start`] follows and the state stays a pre-copy state.
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
    /// [`Migration::load_finish`]. After an error no more bytes come, and the session cannot be
    /// finished: it waits for a reset.
    fn load(&mut self, chunk: &[u8]) -> Result<(), Errno>;

    /// Staging memory of up to `bytes_max` bytes to receive the next bytes in directly, or `None`
    /// to have them handed to [`Migration::load`]. Followed by [`Migration::load_filled`], unless
    /// receiving fails: then the session cannot be finished, and waits for a reset. More than
    /// `bytes_max` bytes may be lent; an empty slice counts as `None`.
    fn load_space(&mut self, bytes_max: usize) -> Option<&mut [u8]> {
        let _ = bytes_max;
        None
    }

    /// The first `bytes` bytes of the last [`Migration::load_space`] are filled.
    fn load_filled(&mut self, bytes: usize) -> Result<(), Errno> {
        let _ = bytes;
        Err(Errno::EINVAL)
    }

    /// RESUMING to STOP: validates all that was loaded, then makes it the device's state. Refusing
    /// leaves the device as it was before the session, in RESUMING.
    fn load_finish(&mut self) -> Result<(), Fault>;

    /// A load session ends without [`Migration::load_finish`]: by a reset, or because that broke
    /// the device.
    fn load_abort(&mut self);
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

/// What a device looks like to its client.
#[derive(Clone, Debug, Default)]
pub struct Description {
    /// RESET and PCI, mostly.
    pub flags: Option<DeviceFlags>,
    /// The regions, by index; [`Region::default`] for one that is not there.
    pub regions: Vec<Region>,
    /// The interrupts, by index; [`Irq::default`] for one that is not there.
    pub irqs: Vec<Irq>,
}

/// A region.
#[derive(Clone, Debug)]
pub struct Region {
    /// READ and WRITE; MMAP and CAPS are derived from `mapping`.
    pub flags: RegionFlags,
    /// Bytes; 0 for none.
    pub size: u64,
    /// The memory behind the region, where a client may map some of it.
    pub mapping: Option<RegionMapping>,
    /// Writes that a client may signal through an eventfd instead of a message.
    pub ioeventfds: Vec<IoEventFd>,
}

impl Default for Region {
    fn default() -> Region {
        Region { flags: RegionFlags::empty(), size: 0, mapping: None, ioeventfds: Vec::new() }
    }
}

/// Memory behind a region.
#[derive(Clone, Debug)]
pub struct RegionMapping {
    /// The file to map.
    pub fd: Arc<OwnedFd>,
    /// Where the region starts in it, in bytes; page-aligned.
    pub offset: u64,
    /// The parts that may be mapped, as (offset within the region, bytes), page-aligned; empty for
    /// all of the region.
    pub areas: Vec<(u64, u64)>,
}

/// A register whose writes are signalled through an eventfd (vfio-user's `DEVICE_GET_REGION_IO_FDS`).
#[derive(Clone, Debug)]
pub struct IoEventFd {
    /// Within the region, in bytes.
    pub offset: u64,
    /// Bytes written: 1, 2, 4 or 8.
    pub size: u64,
    /// The eventfd; the model waits on it.
    pub fd: Arc<OwnedFd>,
    /// Signal only when this value is written.
    pub datamatch: Option<u64>,
}

/// An interrupt index.
#[derive(Clone, Copy, Debug)]
pub struct Irq {
    /// EVENTFD and the rest.
    pub flags: IrqFlags,
    /// Vectors.
    pub count: u32,
}

impl Default for Irq {
    fn default() -> Irq {
        Irq { flags: IrqFlags::empty(), count: 0 }
    }
}
