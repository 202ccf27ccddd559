//! The move: the hooks, the registers as a device, and the two sides joined in one process.

use std::sync::Arc;

use kvm_bindings::kvm_regs;
use limosa_device::saved::Section;
use limosa_device::{Bus, Description, Fault, Loopback, Machine, SimpleModel, Whole, WholeState};
use limosa_kvm::{BitmapLog, Regions, Slot};
use limosa_migrate::{
    Destination, DirtyLog, Ledger, Memory, MovedDevice, Options, Outcome, Received, Report, Source, Vmm,
    move_local,
};
use limosa_protocol::Errno;

use crate::guest::{Guest, Result, borrowed};

/// The vCPU's registers, which are moved as a device in the VMM's own process.
struct Registers(Arc<Guest>);

/// Those that the program of this guest uses. A VMM saves all that `KVM_GET_*` returns.
#[derive(Clone, PartialEq, prost::Message)]
struct SavedRegisters {
    #[prost(uint64, tag = "1")]
    rip: u64,
    #[prost(uint64, tag = "2")]
    rflags: u64,
    #[prost(uint64, tag = "3")]
    rax: u64,
    #[prost(uint64, tag = "4")]
    rbx: u64,
}

impl SimpleModel for Registers {
    fn description(&self) -> Description {
        Description::default()
    }

    fn attach(&mut self, _bus: Bus) {}

    fn region_read(&mut self, _region: u32, _offset: u64, _data: &mut [u8]) -> Result<(), Errno> {
        Err(Errno::EINVAL)
    }

    fn region_write(&mut self, _region: u32, _offset: u64, _data: &[u8]) -> Result<(), Errno> {
        Err(Errno::EINVAL)
    }

    fn reset(&mut self) -> Result<(), Errno> {
        Ok(())
    }
}

impl WholeState for Registers {
    type Saved = SavedRegisters;
    const KIND: &'static str = "kvm-guest.registers";
    const SECTION: Section = Section::message("registers", 1);

    // The hooks stop and start the vCPU, before and after all devices.
    fn stop(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn start(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn to_saved(&self) -> SavedRegisters {
        let kvm_regs { rip, rflags, rax, rbx, .. } = self.0.registers().unwrap_or_default();
        SavedRegisters { rip, rflags, rax, rbx }
    }

    fn restore(&mut self, saved: SavedRegisters) -> Result<(), Errno> {
        let SavedRegisters { rip, rflags, rax, rbx } = saved;
        self.0
            .set_registers(&kvm_regs { rip, rflags, rax, rbx, ..Default::default() })
            .map_err(|_| Errno::EINVAL)
    }
}

/// What the engine asks of the VMM.
struct Hooks(Arc<Guest>);

impl Vmm for Hooks {
    fn stop(&self) -> Result<(), String> {
        self.0.set_running(false);
        Ok(())
    }

    fn resume(&self) {
        self.0.set_running(true);
    }

    fn prepare(&self) -> Result<(), String> {
        self.0.check().map(drop).map_err(|error| error.to_string())
    }

    fn start(&self) {
        self.0.set_running(true);
    }
}

/// Moves the guest `from` one VM to another one, while it runs. With a VMM each side is a process, and a link joins them
/// (`limosa-migrate`'s example `toy_vmm`).
pub fn move_guest(from: &Arc<Guest>, to: &Arc<Guest>) -> Result<Report> {
    let registers = |guest: &Arc<Guest>| {
        Loopback::new("registers", Machine::simple(Whole::new(Registers(Arc::clone(guest)))))
    };
    let (here, there) = (registers(from), registers(to));
    let (options, ledger) = (Options::default(), Ledger::new());
    let (our_memory, their_memory) = (Regions::new(&from.memory)?, Regions::new(&to.memory)?);
    let (our_regions, their_regions) = (our_memory.for_engine(), their_memory.for_engine());
    // SAFETY: the VM has these slots, and keeps them as long as the guest, which outlives the log.
    let bitmaps = || unsafe { BitmapLog::new(&borrowed(&from.vm), Slot::of(&from.memory)) };
    let (mut bitmaps, mut rings) = match &from.rings {
        None => (Some(bitmaps()?), None),
        Some(rings) => (None, Some(rings)),
    };
    let log: &mut dyn DirtyLog = match (&mut bitmaps, &mut rings) {
        (Some(bitmaps), _) => bitmaps,
        (_, Some(rings)) => rings,
        _ => return Err("no log".into()),
    };
    let (ours, theirs) = ([MovedDevice::new(&here)], [MovedDevice::new(&there)]);
    let (our_hooks, their_hooks) = (Hooks(Arc::clone(from)), Hooks(Arc::clone(to)));
    let (outcome, received) = move_local(
        Source::new(&ours, &options).with_memory(Memory::logged(our_regions, log)).with_vmm(&our_hooks),
        Destination::new(&theirs, &ledger, &options).with_memory(&their_regions).with_vmm(&their_hooks),
    );
    match (outcome, received) {
        (Outcome::Moved(report), Received::Runs(_)) => Ok(report),
        (outcome, received) => Err(format!("not moved: {outcome:?} {received:?}").into()),
    }
}
