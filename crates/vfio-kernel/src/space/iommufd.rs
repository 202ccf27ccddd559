//! An address space of iommufd's: an IOAS, and page tables (HWPTs) with dirty tracking for the devices whose IOMMU
//! has that (`iommufd.h`).

mod argument;
mod dirty;
mod log;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use limosa_client::{DmaMap, Result};
use limosa_protocol::Errno;
use limosa_protocol::capability::IovaRange;
use limosa_protocol::info::DmaMapFlags;

use super::intervals::Span;
use super::mappings::{IN_PART, Mapping, NOTHING_THERE, unmap_request};
use super::{IovaRanges, map_hint, map_request, refused};
use crate::ioctl;
use argument::*;
pub(super) use log::PageTableLog;
use log::PageTables;

/// Commands (`iommufd.h: IOMMUFD_CMD_*`).
const DESTROY: u8 = 0x80;
const IOAS_ALLOC: u8 = 0x81;
const IOAS_IOVA_RANGES: u8 = 0x84;
const IOAS_MAP: u8 = 0x85;
const IOAS_UNMAP: u8 = 0x86;
const HWPT_ALLOC: u8 = 0x89;
const GET_HW_INFO: u8 = 0x8a;
const IOAS_MAP_FILE: u8 = 0x8f;

/// `vfio.h: VFIO_DEVICE_BIND_IOMMUFD` and `VFIO_DEVICE_ATTACH_IOMMUFD_PT`.
const BIND_IOMMUFD: u8 = 18;
const ATTACH_IOMMUFD_PT: u8 = 19;

/// `iommufd.h: IOMMU_HWPT_ALLOC_DIRTY_TRACKING`.
const HWPT_ALLOC_DIRTY_TRACKING: u32 = 1 << 1;
/// `iommufd.h: IOMMU_HW_CAP_DIRTY_TRACKING`.
const HW_CAP_DIRTY_TRACKING: u64 = 1 << 0;

/// `iommufd.h: IOMMU_IOAS_MAP_*`.
const MAP_FIXED_IOVA: u32 = 1 << 0;
const MAP_WRITEABLE: u32 = 1 << 1;
const MAP_READABLE: u32 = 1 << 2;

/// More ranges of addresses than any IOMMU has.
const RANGES_MAX: u32 = 1 << 16;

/// An IOAS and its page tables.
#[derive(Debug)]
pub(super) struct Iommufd {
    fd: OwnedFd,
    ioas: u32,
    /// Whether the IOAS is to be destroyed with this.
    is_ours: bool,
    /// Those with dirty tracking that devices are attached to.
    page_tables: Mutex<Vec<PageTable>>,
}

#[derive(Debug)]
struct PageTable {
    id: u32,
    /// Whether it is to be destroyed with the space.
    is_ours: bool,
}

impl Iommufd {
    /// A new IOAS of an iommufd that nobody else has.
    pub fn new(fd: OwnedFd) -> Result<Iommufd> {
        let ioas = new_ioas(fd.as_fd())?;
        Ok(Iommufd { fd, ioas, is_ours: true, page_tables: Mutex::default() })
    }

    /// One that the caller holds, with its own page tables.
    pub fn borrowed(fd: OwnedFd, ioas: u32, hwpts: &[u32]) -> Result<Iommufd> {
        let page_tables = hwpts.iter().map(|&id| PageTable { id, is_ours: false }).collect();
        let iommufd = Iommufd { fd, ioas, is_ours: false, page_tables: Mutex::new(page_tables) };
        // Shows that they are what they should be.
        iommufd.iova_ranges()?;
        Ok(iommufd)
    }

    /// Gives the device to the iommufd and returns its id there.
    pub fn bind(&self, name: &str, device: BorrowedFd<'_>) -> Result<u32> {
        let iommufd = self.fd.as_raw_fd();
        let mut bind = BindIommufd { argsz: size::<BindIommufd>(), iommufd, ..Default::default() };
        // SAFETY: the argument is the command's; the fd in it is open.
        unsafe { ioctl::call(device, ioctl::vfio(BIND_IOMMUFD), (&raw mut bind).cast()) }.map_err(|errno| {
            let hint = match errno {
                Errno::EBUSY => "it or its group is in use by another process (fuser -v shows which)",
                // What the kernel says of a second opening of a cdev.
                Errno::EINVAL => "another process has it open (fuser -v shows which): a cdev has one user at a time",
                Errno::ENODEV => "the device is gone",
                Errno::EACCES => "it is a virtual function of a device that is in use, and needs the VF token of that device",
                Errno::EPERM => {
                    "the interrupts of this machine cannot be isolated; the option allow_unsafe_interrupts of the module \
                     iommufd permits that"
                }
                _ => "",
            };
            refused(name, "BIND_IOMMUFD", errno, hint)
        })?;
        Ok(bind.out_devid)
    }

    /// Attaches a device that is bound: `attach` says whether it takes a page table. Returns whether it came to
    /// one with dirty tracking; `logs` says that this has to be on.
    pub fn attach(
        &self,
        name: &str,
        device: u32,
        logs: bool,
        attach: &mut dyn FnMut(u32) -> Result<(), Errno>,
    ) -> Result<bool> {
        let mut page_tables = self.page_tables();
        let mut is_tracked = false;
        if self.has_dirty_tracking(name, device)? {
            is_tracked = page_tables.iter().any(|table| match attach(table.id) {
                Ok(()) => true,
                Err(errno) => {
                    tracing::debug!("{name}: cannot use page table {}: {errno}", table.id);
                    false
                }
            });
            if !is_tracked && let Some(table) = self.new_page_table(name, device) {
                if logs && let Err(error) = self.track(name, table.id, true) {
                    self.destroy(table.id);
                    return Err(error);
                }
                match attach(table.id) {
                    Ok(()) => {
                        is_tracked = true;
                        page_tables.push(table);
                    }
                    Err(errno) => {
                        tracing::debug!("{name}: cannot use its own page table: {errno}");
                        self.destroy(table.id);
                    }
                }
            }
        }
        if !is_tracked {
            attach(self.ioas).map_err(|errno| {
                let hint = match errno {
                    Errno::EADDRINUSE => "memory is mapped at addresses that its IOMMU reserves",
                    Errno::ENOMEM => map_hint(errno),
                    Errno::EBUSY => "it is being reset",
                    Errno::EINVAL => "its IOMMU cannot reach all of the memory that is mapped",
                    _ => "",
                };
                refused(name, "ATTACH_IOMMUFD_PT", errno, hint)
            })?;
        }
        tracing::debug!("{name}: attached, {} dirty tracking", if is_tracked { "with" } else { "without" });
        Ok(is_tracked)
    }

    /// Whether the IOMMU of a device tracks dirty pages (`IOMMU_GET_HW_INFO`).
    fn has_dirty_tracking(&self, name: &str, device: u32) -> Result<bool> {
        let mut info = HwInfo { size: size::<HwInfo>(), dev_id: device, ..Default::default() };
        // SAFETY: the argument is the command's, its one address is of no bytes.
        match unsafe { request(self.fd.as_fd(), GET_HW_INFO, &mut info) } {
            Ok(_) => Ok(info.out_capabilities & HW_CAP_DIRTY_TRACKING != 0),
            // A mediated device, which has no IOMMU; a driver that says nothing; a kernel that does not ask.
            Err(Errno::ENOENT | Errno::ENOTSUP | Errno::ENODEV | Errno::ENOTTY) => Ok(false),
            Err(errno) => Err(refused(name, "GET_HW_INFO", errno, "")),
        }
    }

    /// A page table with dirty tracking for the device, or `None` where there is none to be had.
    fn new_page_table(&self, name: &str, device: u32) -> Option<PageTable> {
        let mut alloc = HwptAlloc {
            size: size::<HwptAlloc>(),
            flags: HWPT_ALLOC_DIRTY_TRACKING,
            dev_id: device,
            pt_id: self.ioas,
            ..Default::default()
        };
        // SAFETY: the argument is the command's, its one address is of no bytes.
        match unsafe { request(self.fd.as_fd(), HWPT_ALLOC, &mut alloc) } {
            Ok(_) => Some(PageTable { id: alloc.out_hwpt_id, is_ours: true }),
            Err(errno) => {
                tracing::info!("{name}: no page table with dirty tracking: {errno}");
                None
            }
        }
    }

    /// Maps a file that the kernel pins itself; `false` where it knows no such thing.
    pub fn map_file(&self, name: &str, map: &DmaMap<'_>, fd: BorrowedFd<'_>, offset: u64) -> Result<bool> {
        let mut argument = IoasMapFile {
            size: size::<IoasMapFile>(),
            flags: map_flags(map.flags),
            ioas_id: self.ioas,
            fd: fd.as_raw_fd(),
            start: offset,
            length: map.size,
            iova: map.iova,
        };
        // SAFETY: the argument is the command's, without addresses in it; the fd in it is open.
        match unsafe { request(self.fd.as_fd(), IOAS_MAP_FILE, &mut argument) } {
            Ok(_) => Ok(true),
            // Linux before 6.13.
            Err(Errno::ENOTTY) => Ok(false),
            Err(errno) => {
                let request = format!("mapping {:#x} bytes of a file at IOVA {:#x}", map.size, map.iova);
                Err(refused(name, request, errno, self.map_hint(errno)))
            }
        }
    }

    /// Maps memory of this process.
    pub fn map(&self, name: &str, mapping: &Mapping) -> Result<()> {
        let mut argument = IoasMap {
            size: size::<IoasMap>(),
            flags: map_flags(mapping.flags),
            ioas_id: self.ioas,
            reserved: 0,
            user_va: mapping.address(),
            length: mapping.size,
            iova: mapping.iova,
        };
        // SAFETY: the argument is the command's. Devices may write to the memory from now on, and nothing in this
        // process minds: it is a file's, mapped for them alone, or its caller promised so with a `HostAddress`.
        unsafe { request(self.fd.as_fd(), IOAS_MAP, &mut argument) }
            .map(drop)
            .map_err(|errno| refused(name, map_request(mapping), errno, self.map_hint(errno)))
    }

    /// Unmaps what lies in the range.
    pub fn unmap(&self, name: &str, range: Span) -> Result<()> {
        let (iova, length) = (range.first, range.size());
        let mut argument = IoasUnmap { size: size::<IoasUnmap>(), ioas_id: self.ioas, iova, length };
        // SAFETY: the argument is the command's, without addresses of this process in it.
        unsafe { request(self.fd.as_fd(), IOAS_UNMAP, &mut argument) }.map(drop).map_err(|errno| {
            let hint = match errno {
                Errno::ENOENT => format!("{NOTHING_THERE}, or in part: {IN_PART}"),
                Errno::EBUSY => "a device still uses it".into(),
                _ => String::new(),
            };
            refused(name, unmap_request(range), errno, hint)
        })
    }

    /// Which addresses can be mapped.
    pub fn iova_ranges(&self) -> Result<IovaRanges> {
        let mut ranges = Vec::new();
        loop {
            let mut argument = IoasIovaRanges {
                size: size::<IoasIovaRanges>(),
                ioas_id: self.ioas,
                num_iovas: ranges.len() as u32,
                allowed_iovas: ranges.as_mut_ptr() as u64,
                ..Default::default()
            };
            // SAFETY: the argument is the command's, and the kernel writes at most as many ranges as it counts, of
            // two words each as `IovaRange` is.
            let answer = unsafe { request(self.fd.as_fd(), IOAS_IOVA_RANGES, &mut argument) };
            let count = argument.num_iovas;
            match answer {
                Ok(_) => {
                    ranges.truncate(count as usize);
                    return Ok(IovaRanges { ranges, alignment: argument.out_iova_alignment });
                }
                Err(Errno::EMSGSIZE) if count > ranges.len() as u32 && count <= RANGES_MAX => {
                    ranges.resize(count as usize, IovaRange::default());
                }
                Err(errno) => {
                    let hint = match errno {
                        Errno::ENOENT | Errno::EINVAL => format!("there is no IOAS {}", self.ioas),
                        Errno::ENOTTY => "the fd is not an iommufd (/dev/iommu)".into(),
                        _ => String::new(),
                    };
                    return Err(refused("iommufd", "IOAS_IOVA_RANGES", errno, hint));
                }
            }
        }
    }

    fn map_hint(&self, errno: Errno) -> String {
        match errno {
            Errno::EINVAL | Errno::EOVERFLOW => match self.iova_ranges() {
                Ok(ranges) => ranges.hint(),
                Err(_) => String::new(),
            },
            errno => map_hint(errno).into(),
        }
    }

    /// The fd and the IOAS's id.
    pub fn ioas(&self) -> (BorrowedFd<'_>, u32) {
        (self.fd.as_fd(), self.ioas)
    }

    /// Whether there are page tables with dirty tracking.
    pub fn has_page_tables(&self) -> bool {
        !self.page_tables().is_empty()
    }

    fn destroy(&self, id: u32) {
        let mut argument = Destroy { size: size::<Destroy>(), id };
        // SAFETY: the argument is the command's, without addresses in it.
        if let Err(errno) = unsafe { request(self.fd.as_fd(), DESTROY, &mut argument) } {
            // EBUSY: whoever holds the device open holds this too, and ends it with the device.
            tracing::debug!("iommufd object {id} stays: {errno}");
        }
    }

    fn page_tables(&self) -> MutexGuard<'_, Vec<PageTable>> {
        self.page_tables.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Iommufd {
    fn drop(&mut self) {
        let tables = std::mem::take(&mut *self.page_tables());
        tables.iter().filter(|table| table.is_ours).for_each(|table| self.destroy(table.id));
        if self.is_ours {
            self.destroy(self.ioas);
        }
    }
}

/// Attaches a cdev to a page table or an IOAS, by id.
pub(super) fn attach(device: BorrowedFd<'_>, page_table: u32) -> Result<(), Errno> {
    let mut argument = AttachIommufdPt { argsz: size::<AttachIommufdPt>(), flags: 0, pt_id: page_table };
    // SAFETY: the argument is the command's, without addresses in it.
    unsafe { ioctl::call(device, ioctl::vfio(ATTACH_IOMMUFD_PT), (&raw mut argument).cast()) }.map(drop)
}

/// The id of a new IOAS.
fn new_ioas(fd: BorrowedFd<'_>) -> Result<u32> {
    let mut alloc = IoasAlloc { size: size::<IoasAlloc>(), ..Default::default() };
    // SAFETY: the argument is the command's, without addresses in it.
    unsafe { request(fd, IOAS_ALLOC, &mut alloc) }
        .map_err(|errno| refused("iommufd", "IOAS_ALLOC", errno, ""))?;
    Ok(alloc.out_ioas_id)
}

/// Makes a request of iommufd.
///
/// # Safety
///
/// The argument is the command's, and every address in it points to memory of the length that the argument says,
/// which the kernel may read or write until this returns.
unsafe fn request<T>(fd: BorrowedFd<'_>, number: u8, argument: &mut T) -> Result<u32, Errno> {
    // SAFETY: as the caller promises.
    unsafe { ioctl::call(fd, ioctl::iommufd(number), (&raw mut *argument).cast()) }
}

fn map_flags(flags: DmaMapFlags) -> u32 {
    let mut mapped = MAP_FIXED_IOVA;
    if flags.contains(DmaMapFlags::READ) {
        mapped |= MAP_READABLE;
    }
    if flags.contains(DmaMapFlags::WRITE) {
        mapped |= MAP_WRITEABLE;
    }
    mapped
}
