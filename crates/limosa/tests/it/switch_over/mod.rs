//! Servers whose process is replaced while clients use them: by `limosa serve --take-from` and by `limosa switch-over`, with
//! refusals, and with processes that are killed.

mod access;
mod by_command;
mod by_signal;
mod devices;
mod kills;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::support::{Ended, Folder, LIMIT, Running, limosa, start};
use limosa_client::{Device, DeviceExt, DmaMap, DmaMemory, IrqAction};
use limosa_models::synthetic::{PAGE_BYTES, Pattern, REGISTERS_REGION, Window, registers::*};
use limosa_models::uart::PORTS_REGION;
use limosa_protocol::info::DmaMapFlags;
use limosa_protocol::{State, pci_index};
use limosa_vfio_user::client::{Client, Options};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use serde_json::Value;

const SWITCH_OVERS: u64 = 20;

/// The names of the devices of a server: one, as the command line has it, or many, by a file.
const ONE: &[&str] = &["device"];
const MANY: &[&str] = &["device", "second", "third"];

/// Servers of the same devices, one after another.
struct Scene {
    folder: Folder,
    names: &'static [&'static str],
    /// The options of each device.
    options: Vec<String>,
}

impl Scene {
    fn new(names: &'static [&'static str], options: &[&str]) -> Scene {
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        Scene { folder: Folder::new(), names, options }
    }

    /// The arguments of a server of these devices that can be replaced. The last device has other options.
    fn serve(&self, model: &str, last: &[&str], more: &[&str]) -> Vec<String> {
        let takeover = self.folder.text("takeover");
        let mut args: Vec<String> = ["-vv", "serve", "--takeover", &takeover].map(String::from).to_vec();
        if let [name] = self.names {
            args.extend([model, "--socket", &self.folder.text(name)].map(String::from));
            last.iter().for_each(|option| args.extend(["-o".into(), (*option).into()]));
        } else {
            let all: Vec<&str> = self.options.iter().map(String::as_str).collect();
            let (end, others) = self.names.split_last().unwrap();
            let devices: Vec<_> = others.iter().map(|name| (*name, &all[..])).chain([(*end, last)]).collect();
            args.extend(["--config".into(), file(&self.folder, model, &devices)]);
        }
        args.extend(more.iter().map(|arg| (*arg).to_owned()));
        args
    }

    fn own_options(&self) -> Vec<&str> {
        self.options.iter().map(String::as_str).collect()
    }

    fn first(&self, model: &str) -> Running {
        let running = start(&self.serve(model, &self.own_options(), &[]));
        self.listens(&running);
        running
    }

    /// Starts one that takes over.
    fn next(&self, model: &str) -> Running {
        self.next_with(model, &self.own_options())
    }

    /// The same with other options for its last device.
    fn next_with(&self, model: &str, last: &[&str]) -> Running {
        start(&self.serve(model, last, &["--take-from", &self.folder.text("takeover")]))
    }

    /// Each device is served.
    fn listens(&self, running: &Running) {
        for name in self.names {
            running.line(&format!("listening on {}", self.folder.text(name)));
        }
    }

    /// A client of each device.
    fn connect(&self) -> Vec<Client> {
        self.names.iter().map(|name| connect(&self.folder, name)).collect()
    }

    fn name_of_last(&self) -> String {
        self.folder.text(self.names.last().unwrap())
    }
}

/// A configuration file with these devices and their options.
fn file(folder: &Folder, model: &str, devices: &[(&str, &[&str])]) -> String {
    let mut text = format!("[defaults]\nmodel = \"{model}\"\n");
    for (name, options) in devices {
        let socket = folder.text(name);
        text += &format!("[[device]]\nsocket = {socket:?}\noptions = {options:?}\n");
    }
    std::fs::write(folder.path("devices.toml"), text).unwrap();
    folder.text("devices.toml")
}

fn connect(folder: &Folder, name: &str) -> Client {
    Client::connect(folder.path(name), Options::default()).unwrap()
}

fn get(client: &Client, register: u64) -> u64 {
    let mut value = [0; 8];
    client.region_read(REGISTERS_REGION, register, &mut value).unwrap();
    u64::from_le_bytes(value)
}

fn set(client: &Client, register: u64, value: u64) {
    client.region_write(REGISTERS_REGION, register, &value.to_le_bytes()).unwrap();
}

/// Guest memory at IOVA 0, in which the device is let to write on its own, and the interrupt of its end.
struct Guest {
    memory: File,
    done: OwnedFd,
}

const PAGES: u64 = 64;

impl Guest {
    fn start(client: &Client) -> Guest {
        let memory = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        let bytes = PAGES * PAGE_BYTES as u64;
        ftruncate(&memory, bytes).unwrap();
        let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
        let file = DmaMemory::File { fd: memory.as_fd(), offset: 0 };
        client.dma_map(&DmaMap { iova: 0, size: bytes, flags, memory: file }).unwrap();
        let done = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        client.set_irqs(pci_index::IRQ_MSI, 0, IrqAction::Wire(&[Some(done.as_fd())])).unwrap();
        set(client, DMA_PAGES, PAGES);
        set(client, DMA_CONTROL, 1);
        Guest { memory: memory.into(), done }
    }

    /// Every page holds what the last write to it left; how many writes there were.
    fn check(&self, client: &Client) -> u64 {
        set(client, DMA_CONTROL, 0);
        assert_eq!((get(client, DMA_FAILED), get(client, BAD_BLOCKS)), (0, 0));
        let writes = get(client, DMA_SEQUENCE);
        let window = Window { seed: get(client, SEED), pages: PAGES, pattern: Pattern::Sequential };
        for (index, expected) in (0..).zip(window.expected(writes)) {
            let mut page = [0; PAGE_BYTES];
            self.memory.read_exact_at(&mut page, index * PAGE_BYTES as u64).unwrap();
            window.check(index, expected, &page).unwrap();
        }
        writes
    }

    /// The device raises its interrupt.
    fn is_interrupted(&self, client: &Client) {
        set(client, DMA_LIMIT, get(client, DMA_SEQUENCE) + 3);
        set(client, DMA_CONTROL, 1);
        let limit = Timespec::try_from(LIMIT).unwrap();
        assert_eq!(poll(&mut [PollFd::new(&self.done, PollFlags::IN)], Some(&limit)), Ok(1));
    }
}

#[test]
fn a_client_loses_nothing_while_its_server_is_replaced_twenty_times() {
    replaced_twenty_times(ONE);
}

#[test]
fn the_clients_of_three_devices_lose_nothing_while_their_server_is_replaced_twenty_times() {
    replaced_twenty_times(MANY);
}

/// Writes and reads a register until the end. How many times.
fn works(client: &Client, ends: &AtomicBool) -> u64 {
    let mut count = 0;
    while !ends.load(Ordering::Relaxed) {
        count += 1;
        set(client, SCRATCH, count);
        assert_eq!(get(client, SCRATCH), count, "what was written before is there");
    }
    count
}

fn replaced_twenty_times(names: &'static [&'static str]) {
    let scene = Scene::new(names, &["state=1M", "seed=5", "dirty-rate=16M"]);
    let mut server = scene.first("synthetic");
    let clients = scene.connect();
    let guests: Vec<_> = clients.iter().map(Guest::start).collect();
    let ends = AtomicBool::new(false);
    let (counts, mut writes) = std::thread::scope(|scope| {
        let workers: Vec<_> = clients.iter().map(|client| scope.spawn(|| works(client, &ends))).collect();
        let mut writes = vec![vec![0]; names.len()];
        for _ in 0..SWITCH_OVERS {
            let new = scene.next("synthetic");
            scene.listens(&new);
            std::mem::replace(&mut server, new).end().ok();
            for (writes, client) in writes.iter_mut().zip(&clients) {
                writes.push(get(client, DMA_SEQUENCE));
            }
        }
        ends.store(true, Ordering::Relaxed);
        (workers.into_iter().map(|worker| worker.join().unwrap()).collect::<Vec<_>>(), writes)
    });
    assert!(counts.iter().all(|count| *count > SWITCH_OVERS), "{counts:?}");
    for ((client, guest), writes) in clients.iter().zip(&guests).zip(&mut writes) {
        writes.push(guest.check(client));
        assert!(writes.is_sorted() && writes.last() > Some(&PAGES), "{writes:?}");
        guest.is_interrupted(client);
    }
    drop(clients);
    server.signal(if names == ONE { Signal::TERM } else { Signal::HUP });
    server.end().ok();
    for socket in names.iter().chain(&["takeover"]) {
        assert!(!scene.folder.path(socket).exists(), "the last server removes {socket}");
    }
}

const DATA: u64 = 0;
const LINE_STATUS: u64 = 5;
const DATA_READY: u8 = 1;

#[test]
fn a_serial_port_sends_back_every_byte_while_its_server_is_replaced_twenty_times() {
    let scene = Scene::new(ONE, &[]);
    let mut server = scene.first("uart");
    let client = connect(&scene.folder, "device");
    let read = |register| {
        let mut value = [0];
        client.region_read(PORTS_REGION, register, &mut value).unwrap();
        value[0]
    };
    // FIFOs, and characters of eight bits.
    for (register, value) in [(2, 7), (3, 3)] {
        client.region_write(PORTS_REGION, register, &[value]).unwrap();
    }
    let ends = AtomicBool::new(false);
    let count = std::thread::scope(|scope| {
        let bytes = scope.spawn(|| {
            let mut count = 0_u64;
            while !ends.load(Ordering::Relaxed) {
                client.region_write(PORTS_REGION, DATA, &[count as u8]).unwrap();
                while read(LINE_STATUS) & DATA_READY == 0 {}
                assert_eq!(read(DATA), count as u8, "byte {count}");
                count += 1;
            }
            count
        });
        for _ in 0..SWITCH_OVERS {
            let new = scene.next("uart");
            scene.listens(&new);
            std::mem::replace(&mut server, new).end().ok();
        }
        ends.store(true, Ordering::Relaxed);
        bytes.join().unwrap()
    });
    assert!(count > SWITCH_OVERS && read(LINE_STATUS) & DATA_READY == 0, "{count}");
}
