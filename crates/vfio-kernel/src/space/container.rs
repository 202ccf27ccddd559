//! An address space of a container's with the type1 IOMMU (`vfio.h: VFIO_GROUP_SET_CONTAINER`, `VFIO_SET_IOMMU`,
//! `VFIO_IOMMU_MAP_DMA`).

mod dirty;
mod log;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use limosa_client::{Error, Result};
use limosa_protocol::Errno;
use limosa_protocol::capability::{IommuCapability, IommuInfo, IommuInfoFlags, IommuMigration, capabilities};
use rustix::fd::RawFd;
use zerocopy::{FromBytes, IntoBytes};

use super::intervals::Span;
use super::mappings::{IN_PART, Mapping, Mappings, NOTHING_THERE, unmap_request};
use super::{IovaRanges, map_hint, map_request, refused};
use crate::ioctl;
pub(super) use log::ContainerLog;

/// Commands (`vfio.h: VFIO_BASE + number`).
const GET_API_VERSION: u8 = 0;
const CHECK_EXTENSION: u8 = 1;
const SET_IOMMU: u8 = 2;
const GROUP_SET_CONTAINER: u8 = 4;
const GROUP_UNSET_CONTAINER: u8 = 5;
const IOMMU_GET_INFO: u8 = 12;
const IOMMU_MAP_DMA: u8 = 13;
const IOMMU_UNMAP_DMA: u8 = 14;

/// `vfio.h: VFIO_API_VERSION`.
const API_VERSION: u32 = 0;

/// The kinds of IOMMU (`vfio.h: VFIO_TYPE1v2_IOMMU`, `VFIO_TYPE1_IOMMU`, `VFIO_NOIOMMU_IOMMU`), the best first. A
/// container offers the last one to groups without an IOMMU, and nothing else.
const IOMMUS: [u32; 3] = [3, 1, 8];

/// More bytes of information than any kernel has.
const INFO_BYTES_MAX: u32 = 1 << 20;

/// `struct vfio_iommu_type1_dma_map`.
#[derive(IntoBytes, zerocopy::Immutable)]
#[repr(C)]
struct DmaMapArgument {
    argsz: u32,
    flags: u32,
    vaddr: u64,
    iova: u64,
    size: u64,
}

/// `struct vfio_iommu_type1_dma_unmap`.
#[derive(IntoBytes, zerocopy::Immutable)]
#[repr(C)]
struct DmaUnmapArgument {
    argsz: u32,
    flags: u32,
    iova: u64,
    size: u64,
}

/// A container.
#[derive(Debug)]
pub(super) struct Container {
    fd: OwnedFd,
    is_ours: bool,
}

/// What the IOMMU of a container says of itself.
#[derive(Debug)]
pub(super) struct Information {
    pub ranges: IovaRanges,
    /// Its dirty tracking, where it has that.
    pub migration: Option<IommuMigration>,
    /// How many more mappings the container takes, if it reports that.
    pub mappings_left: Option<u32>,
}

impl Container {
    /// Checks that the fd is a container. `is_ours` says that no other code uses it.
    pub fn new(fd: OwnedFd, is_ours: bool) -> Result<Container> {
        let container = Container { fd, is_ours };
        match container.call(GET_API_VERSION, 0) {
            Ok(API_VERSION) => Ok(container),
            Ok(version) => Err(Error::Misbehaved {
                device: "/dev/vfio/vfio".into(),
                what: format!("VFIO API version {version}, expected {API_VERSION}"),
            }),
            Err(errno) => {
                Err(refused("/dev/vfio/vfio", "GET_API_VERSION", errno, "it is not a VFIO container"))
            }
        }
    }

    /// Whether it has an IOMMU, which it gets with its first group and loses with its last.
    pub fn is_set(&self) -> bool {
        // Every IOMMU has an answer. Without one a container refuses all that is an IOMMU's; ENODEV is the answer of
        // iommufd in a container's place.
        let info = self.info_of(size_of::<IommuInfo>() as u32);
        !matches!(info, Err(Errno::EINVAL | Errno::ENODEV))
    }

    /// Adds a group, and returns whether it is the first. Then it also maps `mappings`.
    pub fn attach(&self, name: &str, group: BorrowedFd<'_>, mappings: &Mappings) -> Result<bool> {
        let was_set = self.is_set();
        let mut container: RawFd = self.fd.as_raw_fd();
        // SAFETY: the argument is an fd's number in memory, as the command expects, and the fd is open.
        let added =
            unsafe { ioctl::call(group, ioctl::vfio(GROUP_SET_CONTAINER), (&raw mut container).cast()) };
        added.map_err(|errno| {
            let hint = match errno {
                Errno::EINVAL => "the group is in a container already, or one of its devices is not bound to a VFIO driver",
                Errno::EBUSY | Errno::EPERM => {
                    "a device of the group is in use by a driver of the host or by another process, or groups with and \
                     without an IOMMU would share a container"
                }
                Errno::ENODEV => "its devices were opened through their cdevs",
                _ => "",
            };
            refused(name, "GROUP_SET_CONTAINER", errno, hint)
        })?;
        if was_set {
            return Ok(false);
        }
        let is_set = self.is_set();
        let has_iommu = if is_set { Ok(()) } else { self.set_iommu(name) };
        let ready = has_iommu.and_then(|()| mappings.iter().try_for_each(|mapping| self.map(name, mapping)));
        if ready.is_err() {
            // SAFETY: the command has no argument.
            let removed =
                unsafe { ioctl::call(group, ioctl::vfio(GROUP_UNSET_CONTAINER), std::ptr::null_mut()) };
            if let Err(errno) = removed {
                tracing::warn!("{name}: its group stays in a container: {errno}");
            }
        }
        ready.map(|()| true)
    }

    fn set_iommu(&self, name: &str) -> Result<()> {
        let offered = |iommu: &u32| self.call(CHECK_EXTENSION, *iommu).is_ok_and(|answer| answer > 0);
        let Some(iommu) = IOMMUS.into_iter().find(offered) else {
            let hint = "the kernel has no type1 IOMMU for VFIO; it needs the module vfio_iommu_type1";
            return Err(refused(name, "SET_IOMMU", Errno::ENODEV, hint));
        };
        self.call(SET_IOMMU, iommu).map(drop).map_err(|errno| {
            let hint = match errno {
                Errno::EPERM => {
                    "the interrupts of this machine cannot be isolated; the option allow_unsafe_interrupts of the module \
                     vfio_iommu_type1 permits that"
                }
                Errno::EINVAL => "another user of the container has set its IOMMU meanwhile",
                _ => "",
            };
            refused(name, "SET_IOMMU", errno, hint)
        })
    }

    /// Maps memory of this process.
    pub fn map(&self, name: &str, mapping: &Mapping) -> Result<()> {
        let mut argument = DmaMapArgument {
            argsz: size_of::<DmaMapArgument>() as u32,
            flags: mapping.flags.bits(),
            vaddr: mapping.address(),
            iova: mapping.iova,
            size: mapping.size,
        };
        let argument = (&raw mut argument).cast();
        // SAFETY: the argument is the command's. Devices may write to the memory from now on, and nothing in this
        // process minds: it is a file's, mapped for them alone, or its caller promised so with a `HostAddress`.
        unsafe { ioctl::call(self.fd.as_fd(), ioctl::vfio(IOMMU_MAP_DMA), argument) }
            .map(drop)
            .map_err(|errno| refused(name, map_request(mapping), errno, self.map_hint(errno)))
    }

    /// Unmaps what lies in the range.
    pub fn unmap(&self, name: &str, range: Span) -> Result<()> {
        let (iova, size) = (range.first, range.size());
        let argsz = size_of::<DmaUnmapArgument>() as u32;
        let mut argument = DmaUnmapArgument { argsz, flags: 0, iova, size };
        let refused = |errno, hint| Err(refused(name, unmap_request(range), errno, hint));
        let pointer = (&raw mut argument).cast();
        // SAFETY: the argument is the command's, without addresses of this process in it.
        match unsafe { ioctl::call(self.fd.as_fd(), ioctl::vfio(IOMMU_UNMAP_DMA), pointer) } {
            // The kernel says how many bytes were unmapped.
            Ok(_) if argument.size == 0 => refused(Errno::ENOENT, NOTHING_THERE),
            Ok(_) => Ok(()),
            Err(Errno::EINVAL) => refused(Errno::EINVAL, IN_PART),
            Err(errno) => refused(errno, ""),
        }
    }

    /// Which addresses can be mapped.
    pub fn iova_ranges(&self) -> Result<IovaRanges> {
        self.information().map(|information| information.ranges)
    }

    /// The IOMMU's information (`VFIO_IOMMU_GET_INFO`).
    pub fn information(&self) -> Result<Information> {
        let name = "container";
        let refused = |errno| {
            let hint = match errno {
                Errno::EINVAL => "it has no IOMMU before its first device",
                Errno::ENOTTY => "its devices have no IOMMU",
                _ => "",
            };
            refused(name, "IOMMU_GET_INFO", errno, hint)
        };
        let misbehaved = |what: String| Error::Misbehaved { device: name.into(), what };
        let mut bytes = self.info_of(size_of::<IommuInfo>() as u32).map_err(refused)?;
        let mut info = read_info(&bytes);
        // The answer says how long it would like to be.
        if info.argsz as usize > bytes.len() {
            if info.argsz > INFO_BYTES_MAX {
                return Err(misbehaved(format!("IOMMU_GET_INFO of {} bytes", info.argsz)));
            }
            bytes = self.info_of(info.argsz).map_err(refused)?;
            info = read_info(&bytes);
        }
        let page_sizes = info.iova_pgsizes;
        let alignment = 1 << page_sizes.trailing_zeros().min(63);
        let mut information = Information {
            ranges: IovaRanges { ranges: Vec::new(), alignment },
            migration: None,
            mappings_left: None,
        };
        if !IommuInfoFlags::from_bits_retain(info.flags).contains(IommuInfoFlags::CAPS) {
            return Ok(information);
        }
        for capability in capabilities(&bytes, info.cap_offset) {
            let capability = capability.and_then(|capability| capability.iommu());
            match capability.map_err(|error| misbehaved(format!("IOMMU_GET_INFO: {error}")))? {
                IommuCapability::IovaRanges(ranges) => information.ranges.ranges = ranges.iter().collect(),
                IommuCapability::Migration(migration) => information.migration = Some(migration),
                IommuCapability::DmaAvail(avail) => information.mappings_left = Some(avail.avail),
                IommuCapability::Other(_) => {}
            }
        }
        Ok(information)
    }

    /// The first `bytes` of the IOMMU's information, at least the fixed structure.
    fn info_of(&self, bytes: u32) -> Result<Vec<u8>, Errno> {
        // In words, as the structures are aligned to them.
        let mut words = vec![0_u64; (bytes as usize).div_ceil(8).max(size_of::<IommuInfo>() / 8)];
        let argsz = size_of_val(words.as_slice()) as u32;
        words.as_mut_bytes()[..4].copy_from_slice(&argsz.to_ne_bytes());
        // SAFETY: the argument is the command's, of as many bytes as its argsz says.
        unsafe { ioctl::call(self.fd.as_fd(), ioctl::vfio(IOMMU_GET_INFO), words.as_mut_ptr().cast()) }?;
        Ok(words.as_bytes().to_vec())
    }

    fn map_hint(&self, errno: Errno) -> String {
        match errno {
            Errno::EINVAL => match self.iova_ranges() {
                Ok(ranges) => ranges.hint(),
                Err(_) => String::new(),
            },
            Errno::ENOTTY => "its devices have no IOMMU: they access memory by physical addresses".into(),
            errno => map_hint(errno).into(),
        }
    }

    /// A command whose argument is a number.
    fn call(&self, number: u8, argument: u32) -> Result<u32, Errno> {
        let argument = std::ptr::without_provenance_mut(argument as usize);
        // SAFETY: the commands that this is called with take a number, not an address.
        unsafe { ioctl::call(self.fd.as_fd(), ioctl::vfio(number), argument) }
    }
}

fn read_info(bytes: &[u8]) -> IommuInfo {
    IommuInfo::read_from_prefix(bytes).map_or_else(|_| IommuInfo::default(), |(info, _)| info)
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use limosa_protocol::info::DmaMapFlags;
    use vfio_bindings::bindings::vfio;

    use super::*;

    #[test]
    fn arguments_and_numbers_are_those_of_the_bindings() {
        type Map = vfio::vfio_iommu_type1_dma_map;
        assert_eq!(size_of::<DmaMapArgument>(), size_of::<Map>());
        assert_eq!(offset_of!(DmaMapArgument, vaddr), offset_of!(Map, vaddr));
        assert_eq!(offset_of!(DmaMapArgument, iova), offset_of!(Map, iova));
        assert_eq!(offset_of!(DmaMapArgument, size), offset_of!(Map, size));
        type Unmap = vfio::vfio_iommu_type1_dma_unmap;
        assert_eq!(size_of::<DmaUnmapArgument>(), size_of::<Unmap>());
        assert_eq!(offset_of!(DmaUnmapArgument, iova), offset_of!(Unmap, iova));
        assert_eq!(API_VERSION, vfio::VFIO_API_VERSION);
        let iommus = [vfio::VFIO_TYPE1v2_IOMMU, vfio::VFIO_TYPE1_IOMMU, vfio::VFIO_NOIOMMU_IOMMU];
        assert_eq!(IOMMUS, iommus);
        let access = [DmaMapFlags::READ, DmaMapFlags::WRITE].map(|flag| flag.bits());
        assert_eq!(access, [vfio::VFIO_DMA_MAP_FLAG_READ, vfio::VFIO_DMA_MAP_FLAG_WRITE]);
    }
}
