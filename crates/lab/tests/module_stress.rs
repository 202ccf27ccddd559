//! The lab's own module under callers that take no turns: whatever they call at once, nothing hangs, the kernel
//! warns of nothing, and the device works afterwards.

use std::io::Read;
use std::sync::atomic::{AtomicBool, Ordering};
use std::{fs, thread};

use limosa_client::{Chunk, DataStream, Device, DeviceExt};
use limosa_lab::module::{self, Dma, Guest, ModuleDevice, Register, mix};
use limosa_protocol::State;
use limosa_protocol::feature::DmaLoggingRange;
use limosa_vfio_kernel::{Door, KernelDevice};

/// Calls that each caller makes.
const CALLS: u64 = 400;

const BYTES: u64 = 1 << 20;

/// Numbers that look like chance and are the same each time.
struct Chance(u64);

impl Chance {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        (mix(self.0) % limit as u64) as usize
    }

    fn of<T: Copy>(&mut self, these: &[T]) -> T {
        these[self.below(these.len())]
    }
}

/// One call. Refusals are as good as answers here: what matters is that there is one.
fn call(device: &KernelDevice, guest: &Guest, stream: &mut Option<Box<dyn DataStream>>, chance: &mut Chance) {
    let mut data = vec![0; 1 + chance.below(100_000)];
    match chance.below(12) {
        0..4 => {
            if let Ok(Some(opened)) = device.set_state(chance.of(&State::ALL)) {
                *stream = Some(opened);
            }
        }
        4..7 => {
            if let Some(stream) = stream {
                let _ = stream.read(&mut data);
                let _ = stream.precopy_info();
                let _ = stream.write(&data);
            }
        }
        7 => drop(device.state().and_then(|_| device.mig_data_size())),
        8 => {
            let at = 8 * chance.below(1000) as u64;
            let dma = chance.of(&[Dma::Write, Dma::Read, Dma::WriteByCpu, Dma::WriteAndKeep, Dma::Unpin]);
            for (register, value) in [
                (Register::DmaIova, at),
                (Register::DmaBytes, 8 * chance.below(10_000) as u64),
                (Register::DmaCommand, dma as u64),
                (Register::Dirty, at),
            ] {
                let _ = device.region_write(module::BAR0, register as u64, &value.to_le_bytes());
            }
        }
        9 => {
            let _ = device.dma_logging_start(4096, &[DmaLoggingRange { iova: 0, length: BYTES }]);
            let _ = device.dma_logging_report(0, BYTES, 4096, &mut [0; 4]);
            if chance.below(2) == 0 {
                let _ = device.dma_logging_stop();
            }
        }
        10 => {
            if device.dma_unmap(0, BYTES, None).is_ok() {
                guest.map(device, 0);
            }
        }
        _ => drop(device.reset()),
    }
}

/// Wishes of a tester, of which nobody is told.
fn wish(module: &ModuleDevice, chance: &mut Chance) {
    let attribute = |name: &str| format!("/sys/bus/mdev/devices/{}/limosa/{name}", module.uuid());
    let (name, value) = chance.of(&[
        ("hold", "*>STOP"),
        ("hold", "read@1000"),
        ("hold", "get"),
        ("hold", "none"),
        ("fail", "*>STOP_COPY:5:1"),
        ("fail", "write:5:1"),
        ("error", "PRE_COPY>*:5:1"),
        ("state", "ERROR"),
        ("gone", "1"),
        ("gone", "0"),
        ("dirty", "7"),
        ("reinit", "1"),
        ("seed", "3"),
        ("check", ""),
    ]);
    if value.is_empty() {
        module.told(name);
    } else {
        let _ = fs::write(attribute(name), value);
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn calls_made_all_at_once_leave_a_device_that_works() {
    for (seed, door) in [(1, Door::Cdev), (2, Door::Group)] {
        let module = ModuleDevice::with_state("limosa-full", 100_000, 1024);
        let device = module.open(door);
        let guest = Guest::new(BYTES);
        guest.map(&device, 0);
        let busy = AtomicBool::new(true);
        thread::scope(|scope| {
            let tester = scope.spawn(|| {
                let mut chance = Chance(seed << 32);
                while busy.load(Ordering::Relaxed) {
                    wish(&module, &mut chance);
                }
                // Nobody is to be held for ever.
                module.wish("gone", 0);
                module.wish("hold", "none");
            });
            let callers: Vec<_> = (0..3)
                .map(|caller| {
                    let (device, guest) = (&device, &guest);
                    scope.spawn(move || {
                        let (mut chance, mut stream) = (Chance(seed + caller), None);
                        for _ in 0..CALLS {
                            call(device, guest, &mut stream, &mut chance);
                        }
                    })
                })
                .collect();
            for caller in callers {
                caller.join().unwrap();
            }
            busy.store(false, Ordering::Relaxed);
            tester.join().unwrap();
        });

        for rule in ["fail", "error"] {
            module.wish(rule, "none");
        }
        device.reset().unwrap();
        assert_eq!((module.number("pinned"), module.number("logging")), (0, 0));
        let mut stream = device.set_state(State::PreCopy).unwrap().unwrap();
        let mut data = vec![0; 1 << 20];
        while let Chunk::Data(_) = stream.read(&mut data).unwrap() {}
        device.set_state(State::Running).unwrap();
        module::dma(&device, Dma::Write, 0, 4096, 1).unwrap();
        assert_eq!(guest.read(0, 4096), module::pattern(1, 0, 4096));
    }
    let warnings = warnings();
    assert!(warnings.is_empty(), "{}", warnings.join("\n"));
}

/// What the kernel has warned of since it was booted.
fn warnings() -> Vec<String> {
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK;
    let kmsg = rustix::fs::open("/dev/kmsg", flags, rustix::fs::Mode::empty()).expect("/dev/kmsg");
    let (mut kmsg, mut record, mut found) = (fs::File::from(kmsg), [0; 8192], Vec::new());
    // One record a read, until there are no more; records that were overwritten are skipped (EPIPE).
    loop {
        match kmsg.read(&mut record) {
            Ok(bytes) => {
                let text = String::from_utf8_lossy(&record[..bytes]).into_owned();
                if ["WARNING:", "BUG:", "possible circular locking", "Call Trace"]
                    .iter()
                    .any(|bad| text.contains(bad))
                {
                    found.push(text);
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
            Err(_) => return found,
        }
    }
}
