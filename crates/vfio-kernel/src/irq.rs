//! Interrupts (`vfio.h: VFIO_DEVICE_GET_IRQ_INFO`, `VFIO_DEVICE_SET_IRQS`): wired to eventfds, triggered,
//! masked and unmasked.

use std::os::fd::{AsRawFd, BorrowedFd};

use limosa_client::{IrqAction, Result};
use limosa_protocol::Errno;
use limosa_protocol::info::{IrqInfo, IrqSet, IrqSetFlags};
use zerocopy::IntoBytes;

use crate::device::KernelDevice;
use crate::ioctl;
use crate::refusal::Request;

/// `VFIO_DEVICE_GET_IRQ_INFO`.
const GET_IRQ_INFO: u8 = 9;

/// `VFIO_DEVICE_SET_IRQS`.
const SET_IRQS: u8 = 10;

/// The most vectors of one request: those of MSI-X.
const VECTORS_MAX: usize = 2048;

impl KernelDevice {
    pub(crate) fn irq_info(&self, index: u32) -> Result<IrqInfo> {
        let request = Request::GetIrqInfo(index);
        let mut info = IrqInfo { argsz: size_of::<IrqInfo>() as u32, index, ..IrqInfo::default() };
        let at = info.as_mut_bytes().as_mut_ptr().cast();
        // SAFETY: a `struct vfio_irq_info` of argsz bytes, without pointers.
        match unsafe { ioctl::call(self.device_fd(), ioctl::vfio(GET_IRQ_INFO), at) } {
            Ok(_) => Ok(info),
            Err(errno) => Err(request.refused(self.name_str(), errno)),
        }
    }

    pub(crate) fn act_on_irqs(&self, index: u32, start: u32, action: IrqAction<'_>) -> Result<()> {
        let none = IrqSetFlags::DATA_NONE;
        match action {
            IrqAction::Disable => {
                match self.irq_set(index, 0, 0, none | IrqSetFlags::ACTION_TRIGGER, &[]) {
                    // Linux refuses to unwire what is not wired; nothing is then, which is what was asked for.
                    Err(error)
                        if error.is_refused(Errno::EINVAL)
                            && self.irq_info(index).is_ok_and(|info| info.count > 0) =>
                    {
                        Ok(())
                    }
                    other => other,
                }
            }
            IrqAction::Trigger(count) => {
                self.irq_set(index, start, count, none | IrqSetFlags::ACTION_TRIGGER, &[])
            }
            IrqAction::Mask(count) => self.irq_set(index, start, count, none | IrqSetFlags::ACTION_MASK, &[]),
            IrqAction::Unmask(count) => {
                self.irq_set(index, start, count, none | IrqSetFlags::ACTION_UNMASK, &[])
            }
            IrqAction::Wire([]) => Ok(()),
            IrqAction::Wire(fds) => self.wire(index, start, fds),
        }
    }

    /// Sets all eventfds in one request: the kernel sets up MSI and MSI-X with as many vectors as the first request
    /// has.
    fn wire(&self, index: u32, start: u32, fds: &[Option<BorrowedFd<'_>>]) -> Result<()> {
        if fds.len() > VECTORS_MAX {
            let what =
                format!("{} with {} vectors; MSI-X has {VECTORS_MAX}", Request::SetIrqs(index), fds.len());
            return Err(self.usage(what));
        }
        let raw: Vec<i32> = fds.iter().map(|fd| fd.as_ref().map_or(-1, AsRawFd::as_raw_fd)).collect();
        let flags = IrqSetFlags::DATA_EVENTFD | IrqSetFlags::ACTION_TRIGGER;
        self.irq_set(index, start, raw.len() as u32, flags, &raw)
    }

    fn irq_set(&self, index: u32, start: u32, count: u32, flags: IrqSetFlags, fds: &[i32]) -> Result<()> {
        let argsz = (size_of::<IrqSet>() + size_of_val(fds)) as u32;
        let set = IrqSet { argsz, flags: flags.bits(), index, start, count };
        let mut argument = [set.argsz, set.flags, set.index, set.start, set.count].to_vec();
        argument.extend(fds.iter().map(|fd| fd.cast_unsigned()));
        let at = argument.as_mut_ptr().cast();
        // SAFETY: a `struct vfio_irq_set` with an fd for each vector where the flags say so, argsz bytes in all,
        // without pointers.
        match unsafe { ioctl::call(self.device_fd(), ioctl::vfio(SET_IRQS), at) } {
            Ok(_) => Ok(()),
            Err(errno) => Err(Request::SetIrqs(index).refused(self.name_str(), errno)),
        }
    }
}
