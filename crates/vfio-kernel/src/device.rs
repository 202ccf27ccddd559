//! [`KernelDevice`]: a device of the kernel's as a `client::Device`.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock, Weak};

use limosa_client::dirty::{all_dirty, check};
use limosa_client::{
    Device, DeviceExt, DeviceIdentity, DeviceLog, DirtyBits, DmaMap, Error, FeatureReply, FeatureRequest,
    IrqAction, Region, Result,
};
use limosa_protocol::State;
use limosa_protocol::bitmap::or_into;
use limosa_protocol::info::{DeviceInfo, IrqInfo, RegionInfo};
use zerocopy::IntoBytes;

use crate::find::Roots;
use crate::refusal::Request;
use crate::{AddressSpace, Door, ioctl, open};

/// `VFIO_DEVICE_GET_INFO`.
const GET_INFO: u8 = 7;

/// `VFIO_DEVICE_RESET`.
const RESET: u8 = 11;

/// How a device is opened.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The interface to use; by default that of the address space, else that of the named node, else the cdev, or
    /// the group if the kernel has no cdev or no iommufd.
    pub door: Option<Door>,
    /// The address space to attach it to; by default one of its own.
    pub space: Option<AddressSpace>,
}

/// A device behind `/dev/vfio`.
///
/// ```no_run
/// use limosa_client::{Device, DeviceExt};
/// use limosa_client::protocol::State;
/// use limosa_vfio_kernel::{KernelDevice, Options};
///
/// let device = KernelDevice::open("0000:65:00.1", &Options::default())?;
/// println!("{}: migration {:?}, state {}", device.name(), device.migration_flags()?, device.state()?);
/// let stream = device.set_state(State::StopCopy)?;
/// # Ok::<(), limosa_client::Error>(())
/// ```
///
/// A VMM that has opened the device itself hands over its fd:
///
/// ```no_run
/// use std::os::fd::AsFd;
///
/// use limosa_client::DeviceExt;
/// use limosa_vfio_kernel::KernelDevice;
///
/// fn flags(vmm: &impl AsFd) -> limosa_client::Result<()> {
///     let device = KernelDevice::from_fd("gpu0", vmm.as_fd(), None)?;
///     println!("{:?}", device.migration_flags()?);
///     Ok(())
/// }
/// ```
pub struct KernelDevice {
    name: Arc<str>,
    identity: DeviceIdentity,
    // Closed in this order: the device before its group, the group before the space that it is in.
    fd: Arc<OwnedFd>,
    group: Option<OwnedFd>,
    space: Option<AddressSpace>,
    door: Option<Door>,
    /// The regions that were asked for: where they are in the fd does not change.
    pub(crate) regions: RwLock<BTreeMap<u32, RegionInfo>>,
    /// It was in RESUMING when it was opened, and has not been reset since.
    pub(crate) forsaken: AtomicBool,
}

/// What a door hands out.
pub(crate) struct Opened {
    pub fd: OwnedFd,
    pub group: Option<OwnedFd>,
    pub space: Option<AddressSpace>,
    pub door: Option<Door>,
}

impl KernelDevice {
    /// Opens the device of this name, as [`Name`](crate::Name) has them: a PCI address, an mdev's UUID,
    /// `/dev/vfio/devices/vfioN`, or a group, `/dev/vfio/N` or N, that has just one device.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] for an invalid name, and for an interface that does not match the address space. [`Error::Os`]
    /// with a remedy: ENOENT where there is no such device or node, EACCES without permission, ENODEV for a device that
    /// is bound to no VFIO driver or has no IOMMU group, EBUSY for one that another process has open, EPERM for a group
    /// that is not viable. [`Error::Refused`] if the kernel refuses a step.
    pub fn open(name: &str, options: &Options) -> Result<KernelDevice> {
        KernelDevice::open_below(&Roots::default(), name, options)
    }

    pub(crate) fn open_below(roots: &Roots, name: &str, options: &Options) -> Result<KernelDevice> {
        let opened = open::open(roots, name, options)?;
        let device = KernelDevice::new(name, opened)?;
        // Whoever opens a device has it alone, so a session that is older has lost its data. Most drivers reset what
        // is closed. mtty does not, and takes the kernel down when it is asked to load what is gone.
        let loads = device.state().is_ok_and(|state| state == State::Resuming);
        device.forsaken.store(loads, Ordering::Relaxed);
        Ok(device)
    }

    /// A device that the caller has open; `name` is for messages. The fd is duplicated, and the caller's fd stays
    /// open. `space` is the address space for its DMA, if this side maps memory; the caller has attached the device to
    /// it.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] by `DEVICE_GET_INFO` if the fd is not a VFIO device, or if the device is not yet bound to an
    /// iommufd. [`Error::Os`] with EMFILE.
    pub fn from_fd(name: &str, device: BorrowedFd<'_>, space: Option<AddressSpace>) -> Result<KernelDevice> {
        let fd = device.try_clone_to_owned().map_err(|error| Error::Os {
            device: name.into(),
            what: "duplicating its fd".into(),
            errno: open::os_errno(&error),
            hint: "".into(),
        })?;
        let door = space.as_ref().map(AddressSpace::door);
        KernelDevice::new(name, Opened { fd, group: None, space, door })
    }

    fn new(name: &str, opened: Opened) -> Result<KernelDevice> {
        let device = KernelDevice::of(name, opened);
        // Shows that the fd is one of a VFIO device. And mtty does not answer for interrupts before it was asked this.
        device.info()?;
        if let Some(space) = &device.space {
            space.has_device(&device);
        }
        Ok(device)
    }

    fn of(name: &str, opened: Opened) -> KernelDevice {
        let Opened { fd, group, space, door } = opened;
        KernelDevice {
            name: name.into(),
            identity: DeviceIdentity::unique(),
            fd: Arc::new(fd),
            group,
            space,
            door,
            regions: RwLock::default(),
            forsaken: AtomicBool::new(false),
        }
    }

    /// Whatever the fd is.
    #[cfg(test)]
    pub(crate) fn unchecked(name: &str, fd: OwnedFd) -> KernelDevice {
        KernelDevice::of(name, Opened { fd, group: None, space: None, door: None })
    }

    /// The interface through which it was opened; `None` for one from an fd without an address space.
    pub fn door(&self) -> Option<Door> {
        self.door
    }

    /// The address space that its DMA goes through, if this side is to map.
    pub fn address_space(&self) -> Option<&AddressSpace> {
        self.space.as_ref()
    }

    /// The fd of the group that it was opened through, such as KVM wants to know of.
    pub fn group_fd(&self) -> Option<BorrowedFd<'_>> {
        self.group.as_ref().map(AsFd::as_fd)
    }

    pub(crate) fn device_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(crate) fn downgraded(&self) -> Weak<OwnedFd> {
        Arc::downgrade(&self.fd)
    }

    pub(crate) fn name_str(&self) -> &str {
        &self.name
    }

    pub(crate) fn name_arc(&self) -> Arc<str> {
        Arc::clone(&self.name)
    }

    pub(crate) fn usage(&self, what: String) -> Error {
        Error::Usage { device: self.name_str().into(), what }
    }

    pub(crate) fn misbehaved(&self, what: String) -> Error {
        Error::Misbehaved { device: self.name_str().into(), what }
    }

    pub(crate) fn duplicate(&self, request: Request) -> Result<OwnedFd> {
        self.fd.try_clone().map_err(|error| Error::Os {
            device: self.name_str().into(),
            what: format!("{request}: duplicating its fd"),
            errno: open::os_errno(&error),
            hint: "".into(),
        })
    }

    fn space_for(&self, request: &str) -> Result<&AddressSpace> {
        self.space.as_ref().ok_or_else(|| {
            self.usage(format!(
                "{request}: the device was taken over without an address space, so its memory is mapped by whoever \
                 opened it; hand `from_fd` an AddressSpace to map it here"
            ))
        })
    }
}

impl AsFd for KernelDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device_fd()
    }
}

impl fmt::Debug for KernelDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelDevice")
            .field("name", &self.name)
            .field("door", &self.door)
            .finish_non_exhaustive()
    }
}

impl Device for KernelDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn identity(&self) -> Option<DeviceIdentity> {
        Some(self.identity)
    }

    fn feature(&self, request: &mut FeatureRequest<'_>) -> Result<FeatureReply> {
        self.perform(request)
    }

    fn reset(&self) -> Result<()> {
        // SAFETY: the request has no argument.
        match unsafe { ioctl::call(self.device_fd(), ioctl::vfio(RESET), std::ptr::null_mut()) } {
            Ok(_) => {
                self.forsaken.store(false, Ordering::Relaxed);
                Ok(())
            }
            Err(errno) => Err(Request::Reset.refused(&self.name, errno)),
        }
    }

    fn info(&self) -> Result<DeviceInfo> {
        let mut info = DeviceInfo { argsz: size_of::<DeviceInfo>() as u32, ..DeviceInfo::default() };
        let at = info.as_mut_bytes().as_mut_ptr().cast();
        // SAFETY: the first fields of a `struct vfio_device_info`, of which argsz says that there is no more.
        match unsafe { ioctl::call(self.device_fd(), ioctl::vfio(GET_INFO), at) } {
            Ok(_) => Ok(info),
            Err(errno) => Err(Request::GetInfo.refused(&self.name, errno)),
        }
    }

    fn region(&self, index: u32) -> Result<Region> {
        self.region_info(index)
    }

    fn irq(&self, index: u32) -> Result<IrqInfo> {
        self.irq_info(index)
    }

    fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        self.pread(region, offset, data)
    }

    fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        self.pwrite(region, offset, data)
    }

    fn set_irqs(&self, index: u32, start: u32, action: IrqAction<'_>) -> Result<()> {
        self.act_on_irqs(index, start, action)
    }

    fn dma_map(&self, map: &DmaMap<'_>) -> Result<()> {
        self.space_for("IOMMU_MAP_DMA")?.map(&self.name, map)
    }

    fn dma_unmap(&self, iova: u64, size: u64, dirty: Option<DirtyBits<'_>>) -> Result<()> {
        let space = self.space_for("IOMMU_UNMAP_DMA")?;
        let Some(DirtyBits { page_size, words }) = dirty else {
            return space.unmap(&self.name, iova, size, None);
        };
        if space.logs(self.identity) {
            return space.unmap(&self.name, iova, size, Some(DirtyBits { page_size, words }));
        }
        // Its own log knows. It outlives the memory, and is complete once the device cannot write there any more.
        check(&self.name, iova, size, page_size, words)?;
        if !DeviceLog::new(self).is_supported()? {
            let what = "neither it nor its address space logs dirty pages";
            return Err(Error::Usage { device: self.name.to_string(), what: what.into() });
        }
        space.unmap(&self.name, iova, size, None)?;
        let mut found = vec![0; words.len()];
        match self.dma_logging_report(iova, size, page_size, &mut found) {
            Ok(()) => or_into(words, &found),
            Err(error) => {
                tracing::warn!("all unmapped memory is treated as dirty: {error}");
                all_dirty(size, page_size, words);
            }
        }
        Ok(())
    }
}
