//! The guest: a few instructions that write to memory, in a vCPU of KVM; and the memory, slots and registers that it has.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{kvm_enable_cap, kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use limosa_kvm::{RingLog, Slot};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

/// Two regions, with a gap between them as a PC has one.
const REGIONS: [(GuestAddress, usize); 2] = [(GuestAddress(0), 4 << 20), (GuestAddress(1 << 30), 2 << 20)];
/// Where the code is.
const CODE: u64 = 0x1000;
/// The pages that it writes to, one after the other: half of them in each region.
const FIRST: u64 = 0x10_0000;
const SECOND: u64 = 1 << 30;
const PAGES: u64 = 256;
/// The size of a dirty ring: fewer entries than the guest has pages to write to, apart from those that KVM keeps, so that it fills.
const RING_BYTES: usize = 16 << 10;

/// Leaves its count in the page whose turn it is, in both halves, and leaves KVM after every 32 counts.
const PROGRAM: [u8; 34] = [
    0x40, // again: inc eax
    0x89, 0xc3, // mov ebx, eax
    0x81, 0xe3, 0xff, 0x00, 0x00, 0x00, // and ebx, 255
    0xc1, 0xe3, 0x0c, // shl ebx, 12
    0x89, 0x83, 0x00, 0x00, 0x10, 0x00, // mov [ebx + FIRST], eax
    0x89, 0x83, 0x00, 0x00, 0x00, 0x40, // mov [ebx + SECOND], eax
    0xa8, 0x1f, // test al, 31
    0x75, 0xe4, // jnz again
    0xe6, 0x10, // out 0x10, al
    0xeb, 0xe0, // jmp again
    0xf4, 0xf4, // hlt
];

/// A guest with one vCPU, which does not run yet.
pub struct Guest {
    pub memory: GuestMemoryMmap,
    pub vm: VmFd,
    /// The rings of the vCPU, if the VM has them.
    pub rings: Option<RingLog>,
    vcpu: Mutex<Vcpu>,
    /// The vCPU is to run, or has stopped.
    changed: Condvar,
}

struct Vcpu {
    fd: VcpuFd,
    is_wanted: bool,
    is_running: bool,
    /// Its thread has ended, and why.
    over: Option<String>,
}

impl Guest {
    /// A guest, and with `has_rings` its log as rings. A destination has the same memory, and nothing in it.
    pub fn new(has_rings: bool) -> Result<Arc<Guest>> {
        let kvm = Kvm::new()?;
        let vm = kvm.create_vm()?;
        if has_rings {
            let mut ring = kvm_enable_cap { cap: kvm_bindings::KVM_CAP_DIRTY_LOG_RING, ..Default::default() };
            ring.args[0] = RING_BYTES as u64;
            vm.enable_cap(&ring)?;
        }
        let memory = GuestMemoryMmap::from_ranges(&REGIONS)?;
        for slot in Slot::of(&memory) {
            let region = kvm_userspace_memory_region {
                slot: slot.number,
                flags: slot.flags,
                guest_phys_addr: slot.guest_address,
                memory_size: slot.bytes,
                userspace_addr: slot.host_address,
            };
            // SAFETY: the memory belongs to the guest as the VM does, which is dropped with it, and its regions do not overlap.
            unsafe { vm.set_user_memory_region(region) }?;
        }
        let vcpu = vm.create_vcpu(0)?;
        // Protected mode without paging, where all segments are all of memory.
        let mut sregs = vcpu.get_sregs()?;
        for segment in
            [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.ss, &mut sregs.fs, &mut sregs.gs]
        {
            (segment.base, segment.limit, segment.g, segment.db) = (0, u32::MAX, 1, 1);
        }
        sregs.cr0 |= 1;
        vcpu.set_sregs(&sregs)?;
        vcpu.set_regs(&kvm_regs { rip: CODE, rflags: 2, ..Default::default() })?;
        let slots = Slot::of(&memory);
        // SAFETY: the VM has these slots, as they were set above, and the log is dropped with it.
        let rings = |vcpu| unsafe { RingLog::new(&borrowed(&vm), [&borrowed(vcpu)], RING_BYTES, slots) };
        let rings = has_rings.then(|| rings(&vcpu)).transpose()?;
        let vcpu = Mutex::new(Vcpu { fd: vcpu, is_wanted: false, is_running: false, over: None });
        Ok(Arc::new(Guest { memory, vm, rings, vcpu, changed: Condvar::new() }))
    }

    /// Puts the program into memory: at the source, where the guest begins.
    pub fn load(&self) -> Result<()> {
        Ok(self.memory.write_slice(&PROGRAM, GuestAddress(CODE))?)
    }

    /// The body of the vCPU's thread.
    pub fn run(&self) {
        let why = self.run_until_it_fails().err().map_or_else(String::new, |error| error.to_string());
        let mut vcpu = self.vcpu();
        (vcpu.over, vcpu.is_running) = (Some(why), false);
        self.changed.notify_all();
    }

    fn run_until_it_fails(&self) -> Result<()> {
        let mut vcpu = self.vcpu();
        loop {
            if !vcpu.is_wanted && vcpu.is_running {
                // KVM ends the instruction that has left it, so that the registers are those after it.
                vcpu.fd.set_kvm_immediate_exit(1);
                let left = vcpu.fd.run().err().map(|error| error.errno());
                vcpu.fd.set_kvm_immediate_exit(0);
                if left != Some(rustix::io::Errno::INTR.raw_os_error()) {
                    return Err("the guest left KVM in another way than it was asked to".into());
                }
            }
            while !vcpu.is_wanted {
                vcpu.is_running = false;
                self.changed.notify_all();
                vcpu = self.changed.wait(vcpu).unwrap_or_else(PoisonError::into_inner);
            }
            vcpu.is_running = true;
            match vcpu.fd.run()? {
                VcpuExit::IoOut(0x10, _) => {}
                // More pages were written than its ring has entries.
                VcpuExit::Unsupported(kvm_bindings::KVM_EXIT_DIRTY_RING_FULL) => {
                    self.rings.as_ref().ok_or("a ring that was not asked for is full")?.collect()?;
                }
                exit => return Err(format!("the guest has crashed: {exit:?}").into()),
            }
            // Whoever wants the vCPU gets it here: a mutex alone is not fair.
            drop(vcpu);
            std::thread::yield_now();
            vcpu = self.vcpu();
        }
    }

    /// Lets the vCPU run, or stops it: when this returns it has left KVM, with its registers.
    pub fn set_running(&self, runs: bool) {
        let mut vcpu = self.vcpu();
        vcpu.is_wanted = runs;
        self.changed.notify_all();
        while !runs && vcpu.is_running {
            vcpu = self.changed.wait(vcpu).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until the guest has counted further than this.
    pub fn counts_beyond(&self, count: u64) -> Result<u64> {
        loop {
            let vcpu = self.vcpu();
            if let Some(why) = &vcpu.over {
                return Err(why.clone().into());
            }
            let found = vcpu.fd.get_regs()?.rax;
            if found > count {
                return Ok(found);
            }
            drop(vcpu);
            std::thread::yield_now();
        }
    }

    /// The vCPU's registers.
    pub fn registers(&self) -> Result<kvm_regs> {
        Ok(self.vcpu().fd.get_regs()?)
    }

    pub fn set_registers(&self, registers: &kvm_regs) -> Result<()> {
        Ok(self.vcpu().fd.set_regs(registers)?)
    }

    /// Checks that each page has the last count that the guest left there. The vCPU must not run.
    pub fn check(&self) -> Result<u64> {
        let count = self.registers()?.rax;
        for page in 0..PAGES {
            let back = count.wrapping_sub(page) % PAGES;
            let expected = count.saturating_sub(back) as u32;
            for half in [FIRST, SECOND] {
                let found: u32 = self.memory.read_obj(GuestAddress(half + page * 4096))?;
                if found != expected {
                    return Err(format!(
                        "page {page} at {half:#x} has {found}, not {expected}, at count {count}"
                    )
                    .into());
                }
            }
        }
        Ok(count)
    }

    fn vcpu(&self) -> MutexGuard<'_, Vcpu> {
        self.vcpu.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The descriptor of something that has one and does not say so with today's trait.
pub fn borrowed(of: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: it stays open as long as its owner, which is borrowed.
    unsafe { BorrowedFd::borrow_raw(of.as_raw_fd()) }
}

/// Whether this machine has KVM, and this process may use it.
#[allow(dead_code, reason = "tests alone ask")]
pub fn has_kvm() -> io::Result<()> {
    std::fs::File::options().read(true).write(true).open("/dev/kvm").map(drop)
}
