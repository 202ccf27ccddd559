//! Regions: their information (`vfio.h: VFIO_DEVICE_GET_REGION_INFO`, with its capability chain), and access to them
//! with pread and pwrite on the device fd.

use std::sync::PoisonError;

use limosa_client::{Error, ForeignFd, Region, Result};
use limosa_protocol::capability::mappable;
use limosa_protocol::info::RegionInfo;
use limosa_protocol::{Errno, range};
use zerocopy::{FromBytes, IntoBytes};

use crate::device::KernelDevice;
use crate::ioctl;
use crate::refusal::Request;

/// `VFIO_DEVICE_GET_REGION_INFO`.
const GET_REGION_INFO: u8 = 8;

/// What there is room for at first: the structure alone. Most regions have no capabilities; where there are some,
/// the kernel says how long they are.
const INFO_BYTES: usize = size_of::<RegionInfo>();

/// The largest buffer for a region's information: room for more than two thousand areas that can be mapped.
const INFO_BYTES_MAX: usize = 64 << 10;

/// How often to offer more room. The kernel names the size that it needs by the second request.
const ROUNDS_MAX: usize = 4;

impl KernelDevice {
    pub(crate) fn region_info(&self, index: u32) -> Result<Region> {
        let request = Request::GetRegionInfo(index);
        let mut bytes = INFO_BYTES;
        for _ in 0..ROUNDS_MAX {
            // Of words, as what is in it has to be aligned.
            let mut argument = vec![0u64; bytes.div_ceil(8)];
            let ask = RegionInfo { argsz: bytes as u32, index, ..RegionInfo::default() };
            argument.as_mut_bytes()[..size_of::<RegionInfo>()].copy_from_slice(ask.as_bytes());
            let at = argument.as_mut_ptr().cast();
            // SAFETY: a `struct vfio_region_info` with room for capabilities, argsz bytes in all, without pointers.
            let answer = unsafe { ioctl::call(self.device_fd(), ioctl::vfio(GET_REGION_INFO), at) };
            answer.map_err(|errno| request.refused(self.name_str(), errno))?;
            let all = &argument.as_bytes()[..bytes];
            let (info, _) = RegionInfo::read_from_prefix(all).expect("there is room for it");
            let need = info.argsz as usize;
            if need > bytes {
                if need > INFO_BYTES_MAX {
                    return Err(self.misbehaved(format!(
                        "{request}: its capabilities take {need} bytes, more than the {INFO_BYTES_MAX} expected"
                    )));
                }
                bytes = need;
                continue;
            }
            let mappable = mappable(&info, all)
                .map_err(|error| self.misbehaved(format!("{request}: its capability chain has {error}")))?;
            let fd = if mappable.is_empty() { None } else { Some(self.duplicate(request)?) };
            self.regions.write().unwrap_or_else(PoisonError::into_inner).insert(index, info);
            return Ok(Region { info, mappable, fd: fd.map(ForeignFd::harmless) });
        }
        Err(self.misbehaved(format!("{request}: it wants more room each time it is asked")))
    }

    /// Where in the device fd these bytes of a region are.
    fn position(&self, request: Request, index: u32, offset: u64, bytes: usize) -> Result<u64> {
        let known = self.regions.read().unwrap_or_else(PoisonError::into_inner).get(&index).copied();
        let info = match known {
            Some(info) => info,
            None => self.region_info(index)?.info,
        };
        // The regions lie one after the other in the fd: beyond the end of one is another.
        if !range::contains((0, info.size), (offset, bytes as u64)) {
            let what = format!("{request}: {bytes} bytes at {offset:#x}, and it has {:#x}", info.size);
            return Err(self.usage(what));
        }
        info.offset
            .checked_add(offset)
            .ok_or_else(|| self.misbehaved(format!("{request}: it ends beyond 2^64")))
    }

    pub(crate) fn pread(&self, index: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        let request = Request::RegionRead(index);
        if data.is_empty() {
            return Ok(());
        }
        let at = self.position(request, index, offset, data.len())?;
        let bytes = data.len();
        match rustix::io::retry_on_intr(|| rustix::io::pread(self.device_fd(), &mut *data, at)) {
            Ok(done) if done == bytes => Ok(()),
            Ok(done) => Err(self.cut_short(request, offset, done, bytes)),
            Err(error) => Err(request.refused(self.name_str(), ioctl::errno(error))),
        }
    }

    pub(crate) fn pwrite(&self, index: u32, offset: u64, data: &[u8]) -> Result<()> {
        let request = Request::RegionWrite(index);
        if data.is_empty() {
            return Ok(());
        }
        let at = self.position(request, index, offset, data.len())?;
        match rustix::io::retry_on_intr(|| rustix::io::pwrite(self.device_fd(), data, at)) {
            Ok(done) if done == data.len() => Ok(()),
            Ok(done) => Err(self.cut_short(request, offset, done, data.len())),
            Err(error) => Err(request.refused(self.name_str(), ioctl::errno(error))),
        }
    }

    /// Not tried again from there: an access to a register is done once.
    fn cut_short(&self, request: Request, offset: u64, done: usize, bytes: usize) -> Error {
        Error::Refused {
            device: self.name_str().into(),
            request: format!("{request} ({bytes} bytes at {offset:#x})"),
            errno: Errno::EIO,
            hint: format!("the device did {done} bytes of it").into(),
        }
    }
}
