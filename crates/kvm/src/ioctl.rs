//! The ioctls of a VM (`kvm.h`) that the logs need, and their structures.

use std::ffi::c_void;
use std::io;
use std::os::fd::BorrowedFd;

use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, opcode};

const KVMIO: u8 = 0xae;

/// `KVM_CHECK_EXTENSION`.
const CHECK_EXTENSION: Opcode = opcode::none(KVMIO, 0x03);
/// `KVM_GET_DIRTY_LOG`.
const GET_DIRTY_LOG: Opcode = opcode::write::<DirtyLogArgument>(KVMIO, 0x42);
/// `KVM_SET_USER_MEMORY_REGION`.
const SET_USER_MEMORY_REGION: Opcode = opcode::write::<UserMemoryRegion>(KVMIO, 0x46);
/// `KVM_ENABLE_CAP`.
const ENABLE_CAP: Opcode = opcode::write::<EnableCap>(KVMIO, 0xa3);
/// `KVM_CLEAR_DIRTY_LOG`.
const CLEAR_DIRTY_LOG: Opcode = opcode::read_write::<ClearDirtyLogArgument>(KVMIO, 0xc0);
/// `KVM_RESET_DIRTY_RINGS`.
const RESET_DIRTY_RINGS: Opcode = opcode::none(KVMIO, 0xc7);

/// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`, and both of its flags.
pub(crate) const CAP_MANUAL_PROTECT: u32 = 168;
pub(crate) const MANUAL_PROTECT_ENABLE: u64 = 1;
pub(crate) const INITIALLY_SET: u64 = 2;

/// `struct kvm_userspace_memory_region`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct UserMemoryRegion {
    pub(crate) slot: u32,
    pub(crate) flags: u32,
    pub(crate) guest_phys_addr: u64,
    pub(crate) memory_size: u64,
    pub(crate) userspace_addr: u64,
}

/// `struct kvm_dirty_log`.
#[repr(C)]
struct DirtyLogArgument {
    slot: u32,
    padding: u32,
    dirty_bitmap: u64,
}

/// `struct kvm_clear_dirty_log`.
#[repr(C)]
struct ClearDirtyLogArgument {
    slot: u32,
    num_pages: u32,
    first_page: u64,
    dirty_bitmap: u64,
}

/// `struct kvm_enable_cap`.
#[repr(C)]
struct EnableCap {
    cap: u32,
    flags: u32,
    args: [u64; 4],
    pad: [u8; 64],
}

struct Call {
    opcode: Opcode,
    argument: *mut c_void,
}

// SAFETY: the opcode and the argument are handed to the kernel as they are, and the output is its return value. What the kernel
// does with the argument is the promise of the callers of `call`.
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

/// # Safety
///
/// The argument is what the command expects, and every address in it points to memory of the length that the argument says, which
/// the kernel may read or write until this returns.
unsafe fn call(vm: BorrowedFd<'_>, opcode: Opcode, argument: *mut c_void) -> io::Result<u32> {
    loop {
        // SAFETY: as the caller promises.
        match unsafe { rustix::ioctl::ioctl(vm, Call { opcode, argument }) } {
            Err(rustix::io::Errno::INTR) => {}
            answer => return answer.map_err(io::Error::from),
        }
    }
}

/// The value of an extension; 0 where KVM does not have it.
pub(crate) fn extension(vm: BorrowedFd<'_>, cap: u32) -> io::Result<u32> {
    // SAFETY: the argument is a number.
    unsafe { call(vm, CHECK_EXTENSION, std::ptr::without_provenance_mut(cap as usize)) }
}

pub(crate) fn enable(vm: BorrowedFd<'_>, cap: u32, value: u64) -> io::Result<()> {
    let mut argument = EnableCap { cap, flags: 0, args: [value, 0, 0, 0], pad: [0; 64] };
    // SAFETY: a `struct kvm_enable_cap`, whose capabilities here take no addresses.
    unsafe { call(vm, ENABLE_CAP, (&raw mut argument).cast()) }.map(drop)
}

/// # Safety
///
/// The VM may use the memory at `userspace_addr` as the guest's.
pub(crate) unsafe fn set_memory(vm: BorrowedFd<'_>, mut region: UserMemoryRegion) -> io::Result<()> {
    // SAFETY: a `struct kvm_userspace_memory_region`; its address is the caller's promise.
    unsafe { call(vm, SET_USER_MEMORY_REGION, (&raw mut region).cast()) }.map(drop)
}

/// Reads the bitmap of a slot of this many pages. `words` has room for it.
pub(crate) fn dirty_log(vm: BorrowedFd<'_>, slot: u32, pages: u64, words: &mut [u64]) -> io::Result<()> {
    assert!(words.len() as u64 >= pages.div_ceil(64), "{} words for {pages} pages", words.len());
    let mut argument =
        DirtyLogArgument { slot, padding: 0, dirty_bitmap: words.as_mut_ptr().expose_provenance() as u64 };
    // SAFETY: a `struct kvm_dirty_log`. KVM writes a bit for each page of the slot, in whole words of 64. The callers know the
    // slot's size: the VM was told of it with this one.
    unsafe { call(vm, GET_DIRTY_LOG, (&raw mut argument).cast()) }.map(drop)
}

/// Clears the pages of a slot that are set in `words`, from `first` on, and protects them. `first` is a multiple of 64, and so is
/// `pages`, unless they are the last ones of the slot.
pub(crate) fn clear_dirty_log(
    vm: BorrowedFd<'_>,
    slot: u32,
    first: u64,
    pages: u32,
    words: &[u64],
) -> io::Result<()> {
    assert!(words.len() as u64 >= u64::from(pages).div_ceil(64), "{} words for {pages} pages", words.len());
    let dirty_bitmap = words.as_ptr().expose_provenance() as u64;
    let mut argument = ClearDirtyLogArgument { slot, num_pages: pages, first_page: first, dirty_bitmap };
    // SAFETY: a `struct kvm_clear_dirty_log`. KVM reads a bit for each of the pages.
    unsafe { call(vm, CLEAR_DIRTY_LOG, (&raw mut argument).cast()) }.map(drop)
}

/// Protects the pages again that were taken from the rings.
pub(crate) fn reset_rings(vm: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: the command has no argument.
    unsafe { call(vm, RESET_DIRTY_RINGS, std::ptr::null_mut()) }
}

#[cfg(test)]
mod tests {
    use std::mem::size_of;

    use super::*;

    #[test]
    fn structures_have_the_sizes_that_linux_gives_them() {
        assert_eq!(size_of::<UserMemoryRegion>(), size_of::<kvm_bindings::kvm_userspace_memory_region>());
        assert_eq!(size_of::<DirtyLogArgument>(), size_of::<kvm_bindings::kvm_dirty_log>());
        assert_eq!(size_of::<ClearDirtyLogArgument>(), size_of::<kvm_bindings::kvm_clear_dirty_log>());
        assert_eq!(size_of::<EnableCap>(), size_of::<kvm_bindings::kvm_enable_cap>());
        assert_eq!(CAP_MANUAL_PROTECT, kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
        assert_eq!(MANUAL_PROTECT_ENABLE, u64::from(kvm_bindings::KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE));
        assert_eq!(INITIALLY_SET, u64::from(kvm_bindings::KVM_DIRTY_LOG_INITIALLY_SET));
    }

    #[test]
    fn a_file_that_is_no_vm_gives_its_errno() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let vm = std::os::fd::AsFd::as_fd(&null);
        let enotty = Some(rustix::io::Errno::NOTTY.raw_os_error());
        assert_eq!(extension(vm, CAP_MANUAL_PROTECT).unwrap_err().raw_os_error(), enotty);
        assert_eq!(dirty_log(vm, 0, 64, &mut [0]).unwrap_err().raw_os_error(), enotty);
        assert_eq!(reset_rings(vm).unwrap_err().raw_os_error(), enotty);
    }
}
