//! [`AddressSpace`]: the memory that devices reach by DMA, an IOAS of iommufd's (`iommufd.h: IOMMU_IOAS_ALLOC`) or
//! a container with the type1 IOMMU (`vfio.h: VFIO_SET_IOMMU`).
//!
//! Both behave alike: memory can be mapped before the first device is attached and is there for every device that
//! is attached later; it is unmapped in the pieces in which it was mapped, or in several of them at once.

mod attachment;
mod container;
mod dirty;
mod file;
mod intervals;
mod iommufd;
mod log;
mod mappings;
mod refusal;

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use limosa_client::{DeviceIdentity, DirtyBits, DmaMap, DmaMemory, Error, Result};
use limosa_protocol::Errno;
use limosa_protocol::capability::IovaRange;
use limosa_protocol::info::DmaMapFlags;
use rustix::fs::{Mode, OFlags};

use crate::Door;
use crate::ioctl::errno;
use container::{Container, ContainerLog};
use file::{MappedFile, can_be_pinned_as_file};
use intervals::Span;
use iommufd::{Iommufd, PageTableLog};
use log::{DoorLog, Log};
use mappings::{Backing, Mapping, Mappings};
use refusal::{map_hint, map_request, refused, usage};

pub use dirty::SpaceLog;

/// The memory that one or several devices reach by DMA. Copies are the same space.
///
/// When the last copy is dropped, what was mapped through it is unmapped, and the page tables that were made for
/// it are destroyed. What its caller brought along, and mapped otherwise, stays.
#[derive(Clone, Debug)]
pub struct AddressSpace {
    inner: Arc<Inner>,
}

struct Inner {
    kind: Kind,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    mappings: Mappings,
    /// The attachments, by the names given for them, and whether the log sees what those devices write. For a name that
    /// was given several times it has to see all of them.
    attached: BTreeMap<String, bool>,
    /// The devices in the space, and whether the log sees what they write.
    devices: BTreeMap<DeviceIdentity, bool>,
    /// While it logs.
    log: Option<Log>,
}

enum Kind {
    Iommufd(Arc<Iommufd>),
    Container(Arc<Container>),
}

impl Kind {
    /// The kernel's log of dirty pages, off.
    fn log(&self) -> Box<dyn DoorLog> {
        match self {
            Kind::Iommufd(iommufd) => Box::new(PageTableLog::new(iommufd.clone())),
            Kind::Container(container) => Box::new(ContainerLog::new(container.clone())),
        }
    }
}

/// Which addresses a space takes; see [`AddressSpace::iova_ranges`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IovaRanges {
    /// First and last address of each, in order. Empty where the kernel names no limits.
    pub ranges: Vec<IovaRange>,
    /// Addresses and sizes must be multiples of this number of bytes, a power of two.
    pub alignment: u64,
}

impl IovaRanges {
    /// What a refused mapping means.
    fn hint(&self) -> String {
        let alignment = self.alignment;
        let mut hint = format!("addresses and sizes are multiples of {alignment:#x}");
        for (at, range) in self.ranges.iter().take(8).enumerate() {
            let before = if at == 0 { ", in " } else { ", " };
            hint += &format!("{before}{:#x}..={:#x}", range.start, range.end);
        }
        hint
    }
}

impl AddressSpace {
    /// A new one: an IOAS of `/dev/iommu`, or a container of `/dev/vfio/vfio`.
    pub fn new(door: Door) -> Result<AddressSpace> {
        Ok(AddressSpace::of(match door {
            Door::Cdev => Kind::Iommufd(Iommufd::new(open("/dev/iommu", "CONFIG_IOMMUFD")?)?.into()),
            Door::Group => {
                let container = open("/dev/vfio/vfio", "CONFIG_VFIO_CONTAINER")?;
                Kind::Container(Container::new(container, true)?.into())
            }
        }))
    }

    /// An IOAS that the caller holds. The fd is duplicated.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] with ENOENT when there is no such IOAS, and with ENOTTY when the fd is not an iommufd.
    pub fn from_iommufd(iommufd: BorrowedFd<'_>, ioas: u32) -> Result<AddressSpace> {
        AddressSpace::from_page_tables(iommufd, ioas, &[])
    }

    /// An IOAS that the caller holds, with the page tables, allocated with `IOMMU_HWPT_ALLOC_DIRTY_TRACKING`, to
    /// which the caller has attached its devices. The fd is duplicated, and the page tables stay the caller's: they
    /// serve to see what those devices write, and other devices are attached to them where that is possible.
    ///
    /// # Errors
    ///
    /// As [`AddressSpace::from_iommufd`]. Whether there are such page tables shows when dirty pages are to be logged.
    pub fn from_page_tables(iommufd: BorrowedFd<'_>, ioas: u32, hwpts: &[u32]) -> Result<AddressSpace> {
        let iommufd = Iommufd::borrowed(own("iommufd", iommufd)?, ioas, hwpts)?;
        Ok(AddressSpace::of(Kind::Iommufd(iommufd.into())))
    }

    /// A container that the caller holds, with its IOMMU or before it. The fd is duplicated.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] with ENOTTY when the fd is not a container.
    pub fn from_container(container: BorrowedFd<'_>) -> Result<AddressSpace> {
        let container = Container::new(own("container", container)?, false)?;
        Ok(AddressSpace::of(Kind::Container(container.into())))
    }

    fn of(kind: Kind) -> AddressSpace {
        AddressSpace { inner: Arc::new(Inner { kind, state: Mutex::default() }) }
    }

    /// Which devices can be attached.
    pub fn door(&self) -> Door {
        match self.inner.kind {
            Kind::Iommufd(_) => Door::Cdev,
            Kind::Container(_) => Door::Group,
        }
    }

    /// The iommufd and the id of the IOAS, for what this crate has no call for; `None` for a container.
    ///
    /// In an IOAS that [`AddressSpace::new`] made, memory is to be mapped through this object alone: its log
    /// ([`AddressSpace::dirty_log`]) does not look for any other.
    pub fn ioas(&self) -> Option<(BorrowedFd<'_>, u32)> {
        match &self.inner.kind {
            Kind::Iommufd(iommufd) => Some(iommufd.ioas()),
            Kind::Container(_) => None,
        }
    }

    /// Which addresses can be mapped. It narrows with every device that is attached.
    pub fn iova_ranges(&self) -> Result<IovaRanges> {
        match &self.inner.kind {
            Kind::Iommufd(iommufd) => iommufd.iova_ranges(),
            Kind::Container(container) => container.iova_ranges(),
        }
    }

    /// Gives its devices access to memory. `name` is for messages.
    ///
    /// A file is mapped into this process where the kernel needs an address, and stays so until it is unmapped.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] for memory that only answers messages, which a kernel device cannot send, for a range
    /// that is empty or beyond 2^64, and for no access at all; [`Error::Refused`] by the kernel, for a range
    /// that overlaps another, that the IOMMU cannot reach, or for memory that cannot be pinned.
    pub fn map(&self, name: &str, map: &DmaMap<'_>) -> Result<()> {
        let known = DmaMapFlags::READ | DmaMapFlags::WRITE;
        if !map.flags.intersects(known) || !known.contains(map.flags) {
            return Err(usage(name, "a mapping needs READ, WRITE or both"));
        }
        let Some(range) = Span::of(map.iova, map.size) else {
            return Err(usage(name, format!("a mapping of {:#x} bytes at {:#x}", map.size, map.iova)));
        };
        let mappings = &mut self.inner.state().mappings;
        let backing = match map.memory {
            DmaMemory::Messages(_) => {
                return Err(usage(
                    name,
                    "a kernel device cannot ask this process for memory; give it a file or an address",
                ));
            }
            DmaMemory::Address(address) => Backing::Address(address),
            DmaMemory::File { fd, offset } => {
                let done = match &self.inner.kind {
                    Kind::Iommufd(iommufd) if can_be_pinned_as_file(fd) => {
                        iommufd.map_file(name, map, fd, offset)?
                    }
                    _ => false,
                };
                if done { Backing::Kernel } else { Backing::Mapped(MappedFile::new(name, fd, offset, map)?) }
            }
        };
        let mapping = Mapping { iova: map.iova, size: map.size, flags: map.flags, backing };
        match &self.inner.kind {
            _ if matches!(mapping.backing, Backing::Kernel) => {}
            Kind::Iommufd(iommufd) => iommufd.map(name, &mapping)?,
            Kind::Container(container) if container.is_set() => container.map(name, &mapping)?,
            // Its IOMMU comes with its first group: until then the record is all there is.
            Kind::Container(_) if mappings.overlaps(range) => {
                return Err(refused(name, map_request(&mapping), Errno::EEXIST, map_hint(Errno::EEXIST)));
            }
            Kind::Container(_) => {}
        }
        mappings.insert(mapping);
        Ok(())
    }

    /// Takes memory away again: once this returns, no device touches it. With `dirty`, the pages that were written since
    /// they were last reported are set in it, which needs logging to be on. They are in the next report as well.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] with ENOENT when nothing is mapped there, and with EINVAL when the range covers a mapping
    /// in part, through both doors and whether or not the log is on; [`Error::Usage`] for a range that is empty or beyond
    /// 2^64, and for `dirty` while the log is off. Of a range with several mappings some may be unmapped then; what was
    /// written there is in the next report.
    pub fn unmap(&self, name: &str, iova: u64, size: u64, dirty: Option<DirtyBits<'_>>) -> Result<()> {
        let Some(range) = Span::of(iova, size) else {
            return Err(usage(name, format!("unmapping {size:#x} bytes at {iova:#x}")));
        };
        if let Some(DirtyBits { page_size, words }) = &dirty {
            limosa_client::dirty::check(name, iova, size, *page_size, words)?;
        }
        let mut state = self.inner.state();
        let State { mappings, log, .. } = &mut *state;
        // Doors have different answers to this, and a container without IOMMU has none. What is not known here, the
        // caller may have mapped otherwise.
        if mappings.overlaps(range) {
            mappings.check_whole(name, range)?;
        }
        if let Some(log) = log {
            return log.unmap(name, mappings, range, dirty);
        }
        if dirty.is_some() {
            return Err(usage(name, "its address space does not log dirty pages"));
        }
        match &self.inner.kind {
            Kind::Iommufd(iommufd) => iommufd.unmap(name, range)?,
            Kind::Container(container) if container.is_set() => container.unmap(name, range)?,
            Kind::Container(_) => mappings.check_whole(name, range)?,
        }
        mappings.remove(range);
        Ok(())
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let mappings = std::mem::take(&mut self.state().mappings);
        for mapping in mappings {
            let (range, size, iova) = (mapping.span(), mapping.size, mapping.iova);
            let unmapped = match &self.kind {
                Kind::Iommufd(iommufd) => iommufd.unmap("address space", range),
                Kind::Container(container) if container.is_set() => container.unmap("address space", range),
                Kind::Container(_) => Ok(()),
            };
            if let Err(error) = unmapped
                && error.errno() != Some(Errno::ENOENT)
            {
                tracing::warn!("a device may still reach {size:#x} bytes at {iova:#x}: {error}");
                // Nothing else may come to lie where a device writes.
                std::mem::forget(mapping);
            }
        }
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            Kind::Iommufd(iommufd) => iommufd.fmt(f),
            Kind::Container(container) => container.fmt(f),
        }
    }
}

fn open(path: &str, option: &str) -> Result<OwnedFd> {
    rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|error| {
        let errno = errno(error);
        let hint = match errno {
            Errno::ENOENT | Errno::ENODEV | Errno::ENXIO => {
                format!("the kernel has no such device node: it needs {option}, and the module loaded")
            }
            Errno::EACCES | Errno::EPERM => {
                "it takes root, or membership of the group that owns the device node".into()
            }
            _ => String::new(),
        };
        Error::Os { device: path.into(), what: "opening it".into(), errno, hint: hint.into() }
    })
}

fn own(what: &str, fd: BorrowedFd<'_>) -> Result<OwnedFd> {
    rustix::io::fcntl_dupfd_cloexec(fd, 0).map_err(|error| Error::Os {
        device: what.into(),
        what: "duplicating its file descriptor".into(),
        errno: errno(error),
        hint: "".into(),
    })
}
