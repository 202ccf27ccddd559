//! The only place that makes ioctls (`vfio.h` and `iommufd.h`: all of their commands are plain `_IO`).

use std::ffi::c_void;
use std::os::fd::BorrowedFd;

use limosa_protocol::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, opcode};

/// A command of `vfio.h`: `_IO(VFIO_TYPE, VFIO_BASE + number)`.
pub(crate) const fn vfio(number: u8) -> Opcode {
    opcode::none(b';', 100 + number)
}

/// A command of `iommufd.h`: `_IO(IOMMUFD_TYPE, number)`, from `IOMMUFD_CMD_BASE` 0x80 on.
pub(crate) const fn iommufd(number: u8) -> Opcode {
    opcode::none(b';', number)
}

struct Call {
    opcode: Opcode,
    argument: *mut c_void,
}

// SAFETY: the opcode and the pointer are handed to the kernel as they are, and the output is its return value. What
// the kernel does with the pointer is the promise of who calls `call`.
unsafe impl Ioctl for Call {
    type Output = u32;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.argument
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<u32> {
        Ok(output.cast_unsigned())
    }
}

/// Makes the call; an interrupted one is made again. The value is the kernel's, not negative.
///
/// # Safety
///
/// The argument is what the command expects, and every address in it points to memory of the length that the
/// argument says, which the kernel may read or write until this returns.
pub(crate) unsafe fn call(fd: BorrowedFd<'_>, opcode: Opcode, argument: *mut c_void) -> Result<u32, Errno> {
    loop {
        // SAFETY: as the caller promises.
        match unsafe { rustix::ioctl::ioctl(fd, Call { opcode, argument }) } {
            Err(rustix::io::Errno::INTR) => {}
            answer => return answer.map_err(errno),
        }
    }
}

/// An errno of rustix's as the protocol's.
pub(crate) fn errno(error: rustix::io::Errno) -> Errno {
    Errno::from_raw(error.raw_os_error().unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vfio_bindings::bindings::vfio as linux;

    #[test]
    fn commands_are_numbered_as_linux_numbers_them() {
        // _IO(type, number) on x86-64 and aarch64.
        let io = |number: u32| Opcode::from(u32::from(linux::VFIO_TYPE) << 8 | number);
        assert_eq!(vfio(17), io(linux::VFIO_BASE + 17), "VFIO_DEVICE_FEATURE");
        assert_eq!(iommufd(0x80), io(0x80), "IOMMU_DESTROY");
    }

    #[test]
    fn a_call_on_what_is_no_device_gives_its_errno() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let fd = std::os::fd::AsFd::as_fd(&file);
        // SAFETY: the command has no argument.
        let answer = unsafe { call(fd, vfio(11), std::ptr::null_mut()) };
        assert_eq!(answer, Err(Errno::ENOTTY));
    }
}
