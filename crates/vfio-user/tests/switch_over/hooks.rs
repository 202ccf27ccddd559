//! Models whose calls take long in a switch-over: they hold up no other device, and either side takes back.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use limosa_client::{Device, DeviceExt};
use limosa_device::saved::Section;
use limosa_device::{
    Bus, Description, Fault, Machine, Region, RegionMapping, SimpleModel, Whole, WholeState,
};
use limosa_protocol::info::RegionFlags;
use limosa_protocol::{Errno, State};
use limosa_switch_over::{OldServer, TakeLimits, TakeOptions, take};
use limosa_vfio_user::client::{Client, Options as ClientOptions};
use limosa_vfio_user::server::{NewDevice, Replacing};

use crate::{Running, memory, options};

/// What a call of a model waits for.
#[derive(Default)]
struct Gate {
    state: Mutex<(bool, usize)>,
    changed: Condvar,
}

const PATIENCE: Duration = Duration::from_secs(30);

impl Gate {
    /// Comes to it, and waits until it is open.
    fn pass(&self) {
        self.pass_with(usize::MAX);
    }

    /// Comes to it, and waits until it is open, as it is once this many have come.
    fn pass_with(&self, calls: usize) {
        let mut state = self.state.lock().unwrap();
        state.1 += 1;
        state.0 |= state.1 >= calls;
        self.changed.notify_all();
        let (_open, late) = self.changed.wait_timeout_while(state, PATIENCE, |(open, _)| !*open).unwrap();
        assert!(!late.timed_out(), "nobody opens it");
    }

    fn open(&self) {
        self.state.lock().unwrap().0 = true;
        self.changed.notify_all();
    }

    /// Waits until this many calls have come.
    fn await_calls(&self, calls: usize) {
        let state = self.state.lock().unwrap();
        let (_state, late) =
            self.changed.wait_timeout_while(state, PATIENCE, |(_, came)| *came < calls).unwrap();
        assert!(!late.timed_out(), "{calls} calls did not come");
    }
}

type Hook = Arc<dyn Fn(&'static str) + Send + Sync>;

/// A register of 8 bytes and a region that a client may map. Calls a hook with the name of each call of a switch-over.
struct Hooked {
    hook: Hook,
    value: u64,
    file: Arc<OwnedFd>,
    first: Arc<OwnedFd>,
    is_stopped: bool,
}

fn hooked(hook: impl Fn(&'static str) + Send + Sync + 'static) -> Arc<Machine> {
    let file = Arc::new(memory(4096));
    let first = Arc::clone(&file);
    Machine::simple(Whole::new(Hooked { hook: Arc::new(hook), value: 0, file, first, is_stopped: false }))
}

fn plain() -> Arc<Machine> {
    hooked(|_| {})
}

impl SimpleModel for Hooked {
    fn description(&self) -> Description {
        let flags = RegionFlags::READ | RegionFlags::WRITE;
        let mapping = RegionMapping { fd: Arc::clone(&self.first), offset: 0, areas: Vec::new() };
        let mapped = Region { flags, size: 4096, mapping: Some(mapping), ..Region::default() };
        let regions = vec![Region { flags, size: 8, ..Region::default() }, mapped];
        Description { regions, ..Description::default() }
    }

    fn attach(&mut self, _: Bus) {}

    fn region_read(&mut self, _: u32, _: u64, data: &mut [u8]) -> Result<(), Errno> {
        data.copy_from_slice(&self.value.to_le_bytes()[..data.len()]);
        Ok(())
    }

    fn region_write(&mut self, _: u32, _: u64, data: &[u8]) -> Result<(), Errno> {
        self.value = u64::from_le_bytes(data.try_into().map_err(|_| Errno::EINVAL)?);
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Errno> {
        Ok(())
    }

    fn region_file(&self, region: u32) -> Option<Arc<OwnedFd>> {
        (region == 1).then(|| Arc::clone(&self.file))
    }

    fn adopts_region_files(&self) -> bool {
        true
    }

    fn adopt_region_file(&mut self, _: u32, file: Arc<OwnedFd>) -> Result<(), Errno> {
        (self.hook)("adopt");
        self.file = file;
        Ok(())
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct SavedValue {
    #[prost(fixed64, tag = "1")]
    value: u64,
}

impl WholeState for Hooked {
    type Saved = SavedValue;
    const KIND: &'static str = "test.hooked";
    const SECTION: Section = Section::message("value", 1);

    fn stop(&mut self) -> Result<(), Fault> {
        (self.hook)("stop");
        self.is_stopped = true;
        Ok(())
    }

    fn start(&mut self) -> Result<(), Fault> {
        self.is_stopped = false;
        Ok(())
    }

    fn to_saved(&self) -> SavedValue {
        if self.is_stopped {
            (self.hook)("save");
        }
        SavedValue { value: self.value }
    }

    fn restore(&mut self, saved: SavedValue) -> Result<(), Errno> {
        (self.hook)("restore");
        self.value = saved.value;
        Ok(())
    }
}

fn connect(folder: &std::path::Path, at: usize) -> Client {
    Client::connect(folder.join(format!("device{at}")), ClientOptions::default()).unwrap()
}

fn set(client: &Client, value: u64) {
    client.region_write(0, 0, &value.to_le_bytes()).unwrap();
}

fn get(client: &Client) -> u64 {
    let mut value = [0; 8];
    client.region_read(0, 0, &mut value).unwrap();
    u64::from_le_bytes(value)
}

/// Takes over, with an own limit for what the old server does in its freeze.
fn attempt(running: &Running, machines: Vec<Arc<Machine>>, rest: Duration) -> String {
    let limits = TakeLimits { rest, ..TakeLimits::default() };
    let options_of = TakeOptions { name: "new", limits, observer: None };
    let taker = Replacing::new(machines.into_iter().map(|machine| (machine, options())));
    let refused = take(OldServer::Path(&running.take_over), taker, &options_of);
    refused.expect_err("a refusal").to_string()
}

const LONG: Duration = Duration::from_secs(60);

/// They stopped one after the other: the first of these waited for ever for the others.
#[test]
fn devices_of_a_server_stop_and_are_saved_side_by_side() {
    const DEVICES: usize = 12;
    for call in ["stop", "save"] {
        let folder = tempfile::tempdir().unwrap();
        let gate = Arc::new(Gate::default());
        let machine = || {
            let gate = Arc::clone(&gate);
            hooked(move |this| {
                if this == call {
                    gate.pass_with(DEVICES);
                }
            })
        };
        let running = Running::bind(folder.path(), (0..DEVICES).map(|_| machine()).collect());
        let clients: Vec<_> = (0..DEVICES).map(|at| connect(folder.path(), at)).collect();
        clients.iter().zip(1..).for_each(|(client, value)| set(client, value));
        let running = running.replaced_by((0..DEVICES).map(|_| plain()).collect());
        clients.iter().zip(1..).for_each(|(client, value)| assert_eq!(get(client), value));
        drop((clients, running));
    }
}

/// The clients of all devices of a server stood still until the last one had stopped, however long that took.
#[test]
fn a_device_that_does_not_stop_or_save_holds_up_no_client_of_another() {
    for call in ["stop", "save"] {
        let folder = tempfile::tempdir().unwrap();
        let gate = Arc::new(Gate::default());
        let waits = Arc::clone(&gate);
        let blocks = hooked(move |this| {
            if this == call {
                waits.pass();
            }
        });
        let running = Running::bind(folder.path(), vec![plain(), blocks, plain()]);
        let clients: Vec<_> = (0..3).map(|at| connect(folder.path(), at)).collect();
        clients.iter().zip(1..).for_each(|(client, value)| set(client, value));
        let refused = attempt(&running, (0..3).map(|_| plain()).collect(), LONG);
        assert!(refused.contains("device1: it does not stop within"), "{refused}");
        gate.await_calls(1);
        // It has not stopped yet.
        for at in [0, 2] {
            assert_eq!((get(&clients[at]), clients[at].state().unwrap()), (at as u64 + 1, State::Running));
        }
        gate.open();
        assert_eq!((get(&clients[1]), clients[1].state().unwrap()), (2, State::Running));
        let running = running.replaced_by((0..3).map(|_| plain()).collect());
        clients.iter().zip(1..).for_each(|(client, value)| assert_eq!(get(client), value));
        drop((clients, running));
    }
}

#[test]
fn calls_that_take_a_while_are_waited_for() {
    for call in ["stop", "save", "restore", "adopt"] {
        let folder = tempfile::tempdir().unwrap();
        let slow = move |this| {
            if this == call {
                std::thread::sleep(Duration::from_millis(100));
            }
        };
        let running = Running::bind(folder.path(), vec![hooked(slow), plain()]);
        let client = connect(folder.path(), 0);
        set(&client, 77);
        let running = running.replaced_by(vec![hooked(slow), plain()]);
        assert_eq!((get(&client), client.state().unwrap()), (77, State::Running), "{call}");
        drop((client, running));
    }
}

#[test]
fn a_new_device_that_hangs_in_its_load_is_given_up_and_the_old_one_runs_meanwhile() {
    for call in ["restore", "adopt"] {
        let folder = tempfile::tempdir().unwrap();
        let running = Running::bind(folder.path(), vec![plain(), plain()]);
        let clients = [connect(folder.path(), 0), connect(folder.path(), 1)];
        set(&clients[1], 5);
        let gate = Arc::new(Gate::default());
        let waits = Arc::clone(&gate);
        let hangs = hooked(move |this| {
            if this == call {
                waits.pass();
            }
        });
        // The new device hangs still when its server has said so and the old one has taken back.
        let failed = attempt(&running, vec![plain(), hangs], LONG);
        assert!(failed.contains("device 1: the new device was not loaded"), "{failed}");
        gate.await_calls(1);
        for client in &clients {
            assert_eq!(client.state().unwrap(), State::Running);
        }
        gate.open();
        assert_eq!(get(&clients[1]), 5);
        let running = running.replaced_by(vec![plain(), plain()]);
        assert_eq!(get(&clients[1]), 5);
        drop((clients, running));
    }
}

#[test]
fn the_only_new_device_that_hangs_in_its_load_is_named_to_the_old_server() {
    let folder = tempfile::tempdir().unwrap();
    let running = Running::bind(folder.path(), vec![plain()]);
    let client = connect(folder.path(), 0);
    set(&client, 8);
    let gate = Arc::new(Gate::default());
    let waits = Arc::clone(&gate);
    let hangs = hooked(move |this| {
        if this == "restore" {
            waits.pass();
        }
    });
    let new = NewDevice {
        machine: hangs,
        options: options(),
        socket: Some(folder.path().join("device0")),
        control: None,
    };
    let refused = running.refuses_taker(Replacing::new([new]));
    assert!(refused.contains("device0: the new device was not loaded"), "{refused}");
    assert_eq!((get(&client), client.state().unwrap()), (8, State::Running));
    gate.open();
    drop((client, running));
}

/// Only the old server's limit of 120 s ended that, without naming the device.
#[test]
fn a_new_device_that_hangs_while_the_old_one_runs_is_named_with_what_it_does() {
    let folder = tempfile::tempdir().unwrap();
    let running = Running::bind(folder.path(), vec![plain(), plain()]);
    let clients = [connect(folder.path(), 0), connect(folder.path(), 1)];
    set(&clients[0], 6);
    let gate = Arc::new(Gate::default());
    let waits = Arc::clone(&gate);
    let hangs = hooked(move |this| {
        if this == "stop" {
            waits.pass();
        }
    });
    let device = |machine, at: usize| NewDevice {
        machine,
        options: options(),
        socket: Some(folder.path().join(format!("device{at}"))),
        control: None,
    };
    let new = Replacing::new([device(hangs, 0), device(plain(), 1)]);
    let refused = running.refuses_taker(new.with_round_limit(Duration::from_secs(2)));
    let expected = "device0: the new device was not prepared within 2s, and hangs while entering RESUMING";
    assert!(refused.contains(expected), "{refused}");
    assert_eq!((get(&clients[0]), clients[0].state().unwrap()), (6, State::Running));
    gate.open();
    let running = running.replaced_by(vec![plain(), plain()]);
    assert_eq!(get(&clients[0]), 6);
    drop((clients, running));
}

/// They were loaded one after the other: the first of these waited for the others until the freeze was over.
#[test]
fn new_devices_are_loaded_side_by_side_in_the_freeze() {
    const DEVICES: usize = 12;
    for call in ["restore", "adopt"] {
        let folder = tempfile::tempdir().unwrap();
        let running = Running::bind(folder.path(), (0..DEVICES).map(|_| plain()).collect());
        let clients: Vec<_> = (0..DEVICES).map(|at| connect(folder.path(), at)).collect();
        clients.iter().zip(1..).for_each(|(client, value)| set(client, value));
        let gate = Arc::new(Gate::default());
        let machine = || {
            let gate = Arc::clone(&gate);
            hooked(move |this| {
                if this == call {
                    gate.pass_with(DEVICES);
                }
            })
        };
        let running = running.replaced_by((0..DEVICES).map(|_| machine()).collect());
        clients.iter().zip(1..).for_each(|(client, value)| assert_eq!(get(client), value));
        drop((clients, running));
    }
}

#[test]
fn a_new_device_that_panics_in_its_load_is_named_and_the_old_one_runs() {
    let folder = tempfile::tempdir().unwrap();
    let running = Running::bind(folder.path(), vec![plain(), plain()]);
    let client = connect(folder.path(), 1);
    set(&client, 9);
    let panics = hooked(|this| assert_ne!(this, "adopt", "as the test expects"));
    let refused = running.refuses(vec![plain(), panics]);
    assert!(refused.contains("device 1: the new device"), "{refused}");
    assert_eq!((get(&client), client.state().unwrap()), (9, State::Running));
    drop((client, running));
}

#[test]
fn the_only_device_that_does_not_stop_is_given_up_by_the_new_server_and_runs_on() {
    let folder = tempfile::tempdir().unwrap();
    let gate = Arc::new(Gate::default());
    let waits = Arc::clone(&gate);
    let blocks = hooked(move |this| {
        if this == "stop" {
            waits.pass();
        }
    });
    let running = Running::bind(folder.path(), vec![blocks]);
    let client = connect(folder.path(), 0);
    set(&client, 6);
    let began = Instant::now();
    let failed = attempt(&running, vec![plain()], Duration::from_millis(200));
    assert!(failed.contains("took longer") && began.elapsed() < PATIENCE, "{failed}");
    gate.open();
    assert_eq!((get(&client), client.state().unwrap()), (6, State::Running));
    let running = running.replaced_by(vec![plain()]);
    assert_eq!(get(&client), 6);
    drop((client, running));
}
