//! A session's data over its data fd (`vfio.h: VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`, *data_fd*).

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Weak};

use limosa_client::{Chunk, DataStream, Error, Result};
use limosa_protocol::feature::{FeatureMigState, PrecopyInfo};
use limosa_protocol::{Errno, FeatureHeader, FeatureIndex, FeatureOp, State};
use rustix::event::{PollFd, PollFlags};
use zerocopy::IntoBytes;

use crate::device::KernelDevice;
use crate::feature::FEATURE;
use crate::ioctl;
use crate::refusal::Request;

/// `VFIO_MIG_GET_PRECOPY_INFO`.
const GET_PRECOPY_INFO: u8 = 21;

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
        let answer = unsafe { ioctl::call(device.as_fd(), ioctl::vfio(FEATURE), at) };
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
        match unsafe { ioctl::call(self.fd.as_fd(), ioctl::vfio(GET_PRECOPY_INFO), at) } {
            Ok(_) => Ok(info),
            Err(errno) => Err(self.refused(Request::PrecopyInfo, errno)),
        }
    }

    fn transfer_bytes_max(&self) -> usize {
        TRANSFER_BYTES_MAX
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;

    /// A stream over an fd, of a device that is open or closed.
    fn stream(fd: OwnedFd, device: &Weak<OwnedFd>) -> DataFd {
        DataFd { name: "pipe".into(), fd, device: device.clone(), failed: None }
    }

    fn pipe(flags: PipeFlags) -> (DataFd, DataFd) {
        let (reader, writer) = pipe_with(flags | PipeFlags::CLOEXEC).unwrap();
        (stream(reader, &Weak::new()), stream(writer, &Weak::new()))
    }

    #[test]
    fn all_is_written_whatever_the_kernel_takes_at_once() {
        // A pipe takes 64 KiB, and with O_NONBLOCK says EAGAIN then.
        for flags in [PipeFlags::empty(), PipeFlags::NONBLOCK] {
            let (mut reader, mut writer) = pipe(flags);
            let sent: Vec<u8> = (0..3_000_000u32).map(|at| (at % 251) as u8).collect();
            let mut got = Vec::new();
            thread::scope(|scope| {
                scope.spawn(|| writer.write(&sent).unwrap());
                let mut chunk = vec![0; 70_000];
                while got.len() < sent.len() {
                    match reader.read(&mut chunk).unwrap() {
                        Chunk::Data(bytes) => got.extend_from_slice(&chunk[..bytes]),
                        other => panic!("{other:?}"),
                    }
                }
            });
            assert!(got == sent, "{flags:?}");
        }
    }

    #[test]
    fn an_end_is_not_believed_of_a_device_that_is_closed() {
        let (mut reader, writer) = pipe(PipeFlags::empty());
        drop(writer);
        let error = reader.read(&mut [0]).unwrap_err();
        assert!(error.is_refused(Errno::ENODEV), "{error}");
    }

    #[test]
    fn an_end_is_not_believed_of_a_device_that_does_not_tell_its_state() {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        drop(writer);
        let device: Arc<OwnedFd> = Arc::new(std::fs::File::open("/dev/null").unwrap().into());
        let error = stream(reader, &Arc::downgrade(&device)).read(&mut [0]).unwrap_err();
        assert!(
            error.is_refused(Errno::ENOTTY) && error.to_string().contains("GET MIG_DEVICE_STATE"),
            "{error}"
        );
    }

    #[test]
    fn a_write_that_failed_is_the_last() {
        let (mut reader, mut writer) = pipe(PipeFlags::empty());
        assert!(reader.write(b"x").unwrap_err().is_refused(Errno::EBADF));
        assert!(writer.read(&mut [0]).unwrap_err().is_refused(Errno::EBADF));
        drop(reader);
        for _ in 0..2 {
            let error = writer.write(b"x").unwrap_err();
            assert!(error.is_refused(Errno::EPIPE), "{error}");
        }
        assert!(matches!(writer.read(&mut []), Err(Error::Usage { .. })));
        assert!(writer.precopy_info().unwrap_err().is_refused(Errno::ENOTTY));
    }
}
