//! A session's data over its data fd (`vfio.h: VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`, *data_fd*).

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Weak};

use limosa_client::{Chunk, DataStream, Error, Result};
use limosa_protocol::feature::{FeatureMigState, PrecopyInfo};
use limosa_protocol::{Errno, FeatureHeader, FeatureIndex, FeatureOp, State};
use rustix::event::{PollFd, PollFlags};
use zerocopy::IntoBytes;

use crate::device::KernelDevice;
use crate::ioctl;
use crate::refusal::Request;

/// The most that one read or write moves. A driver has its own pace below it.
const TRANSFER_BYTES_MAX: usize = 1 << 20;

/// The data fd of one session.
pub(crate) struct DataFd {
    name: Arc<str>,
    fd: OwnedFd,
    /// To ask for the state. Not held, so that a stream that outlives its device does not keep it open.
    device: Weak<OwnedFd>,
    /// The errno of a write that failed.
    failed: Option<Errno>,
}

impl DataFd {
    pub fn new(device: &KernelDevice, fd: OwnedFd) -> DataFd {
        DataFd { name: device.name_arc(), fd, device: device.downgraded(), failed: None }
    }

    fn refused(&self, request: Request, errno: Errno) -> Error {
        request.refused(&self.name, errno)
    }

    /// One read. The kernel's drivers do not all keep to ENOMSG in pre-copy, so 0 may mean either.
    fn read_once(&self, data: &mut [u8]) -> Result<Option<Chunk>> {
        loop {
            return match rustix::io::read(&self.fd, &mut *data) {
                Ok(0) => Ok(None),
                Ok(bytes) => Ok(Some(Chunk::Data(bytes))),
                Err(rustix::io::Errno::NOMSG) => Ok(Some(Chunk::NothingForNow)),
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::AGAIN) => {
                    self.wait(Request::DataRead, PollFlags::IN)?;
                    continue;
                }
                Err(error) => Err(self.refused(Request::DataRead, ioctl::errno(error))),
            };
        }
    }

    /// Sleeps until the fd is ready. It is without O_NONBLOCK, as the kernel opens it, unless somebody has set
    /// that since.
    fn wait(&self, request: Request, flags: PollFlags) -> Result<()> {
        match rustix::event::poll(&mut [PollFd::new(&self.fd, flags)], None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(self.refused(request, ioctl::errno(error))),
        }
    }

    /// The state of the device; `None` when it is closed.
    fn state(&self) -> Result<Option<State>> {
        let Some(device) = self.device.upgrade() else { return Ok(None) };
        let asked = Request::Feature(FeatureOp::GET, FeatureIndex::MIG_DEVICE_STATE);
        let payload = FeatureMigState::default();
        let header =
            FeatureHeader::new(FeatureIndex::MIG_DEVICE_STATE, FeatureOp::GET, size_of_val(&payload) as u32);
        let mut argument = [header.argsz, header.flags, 0, 0];
        let at = argument.as_mut_ptr().cast();
        // SAFETY: a `struct vfio_device_feature` with room for a `struct vfio_device_feature_mig_state`, as argsz says;
        // there are no pointers in it.
        let answer = unsafe { ioctl::call(device.as_fd(), ioctl::vfio(17), at) };
        answer.map_err(|errno| self.refused(asked, errno))?;
        Ok(State::from_raw(argument[2]))
    }
}

impl DataStream for DataFd {
    fn read(&mut self, data: &mut [u8]) -> Result<Chunk> {
        if data.is_empty() {
            let what = format!("{} into an empty buffer", Request::DataRead);
            return Err(Error::Usage { device: self.name.to_string(), what });
        }
        if let Some(chunk) = self.read_once(data)? {
            return Ok(chunk);
        }
        // Only in STOP_COPY is nothing more the end; mtty says it in pre-copy as well. The state may have changed
        // since that read, so that the end is believed of a read that began in STOP_COPY.
        match self.state()? {
            Some(state) if state.is_pre_copy() => Ok(Chunk::NothingForNow),
            Some(State::StopCopy) => Ok(self.read_once(data)?.unwrap_or(Chunk::End)),
            _ => Err(self.refused(Request::DataRead, Errno::ENODEV)),
        }
    }

    fn write(&mut self, data: &[u8]) -> Result<()> {
        // How much of it was taken is not known, so what follows would be out of place.
        if let Some(errno) = self.failed {
            return Err(self.refused(Request::DataWrite, errno));
        }
        let mut left = data;
        while !left.is_empty() {
            match rustix::io::write(&self.fd, &left[..left.len().min(TRANSFER_BYTES_MAX)]) {
                Ok(0) => {
                    self.failed = Some(Errno::EIO);
                    let what = format!("{} of {} bytes took none", Request::DataWrite, left.len());
                    return Err(Error::Misbehaved { device: self.name.to_string(), what });
                }
                Ok(bytes) => left = left.get(bytes..).unwrap_or_default(),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => self.wait(Request::DataWrite, PollFlags::OUT)?,
                Err(error) => {
                    let errno = ioctl::errno(error);
                    self.failed = Some(errno);
                    return Err(self.refused(Request::DataWrite, errno));
                }
            }
        }
        Ok(())
    }

    fn precopy_info(&mut self) -> Result<PrecopyInfo> {
        let mut info = PrecopyInfo { argsz: size_of::<PrecopyInfo>() as u32, ..PrecopyInfo::default() };
        let at = info.as_mut_bytes().as_mut_ptr().cast();
        // SAFETY: a `struct vfio_precopy_info` of argsz bytes, without pointers.
        match unsafe { ioctl::call(self.fd.as_fd(), ioctl::vfio(21), at) } {
            Ok(_) => Ok(info),
            Err(errno) => Err(self.refused(Request::PrecopyInfo, errno)),
        }
    }

    fn transfer_bytes_max(&self) -> usize {
        TRANSFER_BYTES_MAX
    }
}
