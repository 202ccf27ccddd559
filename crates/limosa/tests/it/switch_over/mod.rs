//! Servers whose process is replaced while clients use them: by `limosa serve --take-from` and by `limosa switch-over`, with
//! refusals, and with processes that are killed.

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

/// What `limosa switch-over` said. Its new server goes on, with its log in a file.
struct Switched {
    code: i32,
    document: Value,
    err: String,
}

impl Switched {
    /// It failed so, and named each of these.
    #[track_caller]
    fn fails(&self, code: i32, parts: &[&str]) {
        assert_eq!(
            (self.code, &self.document["code"]),
            (code, &code.into()),
            "{}{}",
            self.document,
            self.err
        );
        for part in parts {
            let message = self.document["message"].as_str().unwrap();
            assert!(message.contains(part), "`{part}` is not named: {message}");
        }
    }
}

fn switch_over(folder: &Folder, args: &[&str], command: &[&str]) -> Switched {
    let [out, err] = ["out", "err"].map(|name| folder.path(name));
    let takeover = folder.text("takeover");
    let all = [&["--json", "switch-over", &takeover], args, &["--"], command].concat();
    let code = crate::support::limosa_into(File::create(&out).unwrap(), File::create(&err).unwrap(), &all);
    let [out, err] = [out, err].map(|path| std::fs::read_to_string(path).unwrap());
    Switched { code, document: serde_json::from_str(&out).unwrap_or_else(|_| panic!("{out}{err}")), err }
}

/// To a server of such devices, of which the last one has other options.
fn switch_over_to(scene: &Scene, model: &str, last: &[&str]) -> Switched {
    let command = scene.serve(model, last, &[]);
    switch_over_by(&scene.folder, &command)
}

fn switch_over_by(folder: &Folder, command: &[String]) -> Switched {
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    switch_over(folder, &[], &[&[env!("CARGO_BIN_EXE_limosa")], &command[..]].concat())
}

/// A server that is no child of this process. Told to end when it is dropped.
struct Stranger {
    pid: Pid,
    fd: OwnedFd,
}

impl Stranger {
    fn of(document: &Value) -> Stranger {
        let pid = document["took_over"]["pid"].as_i64().unwrap_or_else(|| panic!("{document}"));
        let pid = Pid::from_raw(pid.try_into().unwrap()).unwrap();
        Stranger { pid, fd: pidfd_open(pid, PidfdFlags::empty()).unwrap() }
    }

    fn wait(&self) {
        let limit = Timespec::try_from(LIMIT).unwrap();
        assert_eq!(poll(&mut [PollFd::new(&self.fd, PollFlags::IN)], Some(&limit)), Ok(1));
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = kill_process(self.pid, Signal::TERM);
        if !std::thread::panicking() {
            self.wait();
        }
    }
}

#[test]
fn the_command_starts_the_new_server_and_says_how_it_went() {
    for names in [ONE, MANY] {
        let scene = Scene::new(names, &["state=1M"]);
        let server = scene.first("synthetic");
        let old: u64 = server.pid().parse().unwrap();
        let clients = scene.connect();
        clients.iter().for_each(|client| set(client, SCRATCH, 77));
        let switched = switch_over_to(&scene, "synthetic", &["state=1M"]);
        let document = &switched.document;
        let took_over = &document["took_over"];
        let new = Stranger::of(document);
        assert_eq!((switched.code, took_over["old_pid"].as_u64()), (0, Some(old)), "{}", switched.err);
        let one = [document.clone()];
        let devices = document["devices"].as_array().map_or(&one[..], Vec::as_slice);
        let listening: Vec<_> = devices.iter().map(|device| device["listening"].as_str().unwrap()).collect();
        assert_eq!(listening, names.iter().map(|name| scene.folder.text(name)).collect::<Vec<_>>());
        assert_eq!(took_over["old_process"], "ended");
        let steps: Vec<_> = took_over["steps"]
            .as_array()
            .unwrap()
            .iter()
            .map(|step| step["step"].as_str().unwrap())
            .collect();
        assert_eq!(steps, ["hello", "offer", "prepare", "rest", "load", "running"]);
        assert!(took_over["standstill_ns"].as_u64().unwrap() > 0);
        server.end().ok();
        clients.iter().for_each(|client| assert_eq!(get(client, SCRATCH), 77));

        let again = switch_over_to(&scene, "synthetic", &["state=1M"]);
        let newest = Stranger::of(&again.document);
        new.wait();
        clients.iter().for_each(|client| assert_eq!(get(client, SCRATCH), 77));
        drop(newest);
        assert!(!scene.name_of_last().is_empty() && !scene.folder.path("takeover").exists());
        assert!(names.iter().all(|name| !scene.folder.path(name).exists()));
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name_and_the_old_server_goes_on() {
    for names in [ONE, MANY] {
        let scene = Scene::new(names, &["state=1M"]);
        let server = scene.first("synthetic");
        let clients = scene.connect();
        let guests: Vec<_> = clients.iter().map(Guest::start).collect();
        let serves = format!("process {}, serves as before", server.pid());
        let last = format!("device {}: ", scene.name_of_last());
        let to = |options: &[&str]| switch_over_to(&scene, "synthetic", options);
        to(&["state=2M"]).fails(1, &[&serves, &last, "region 2", "same options"]);
        to(&["state=1M", "pre-copy=off"]).fails(1, &[&serves, &last, "its migration has PRE_COPY"]);
        // The description fits; its state does not.
        let refused = to(&["state=1M", "fault=fail:STOP>RESUMING"]);
        refused.fails(1, &[&serves, &last, "the new device does not accept its state"]);
        let refused = to(&["state=1M", "block=32K"]);
        refused.fails(1, &[&serves, &last, "the new device does not accept its state"]);
        to(&["state=nothing"]).fails(1, &[&serves, "gave up with code 2", "state"]);
        for (client, guest) in clients.iter().zip(&guests) {
            assert!(guest.check(client) > 0);
        }
        let switched = to(&["state=1M"]);
        let _new = Stranger::of(&switched.document);
        server.end().ok();
        guests.iter().zip(&clients).for_each(|(guest, client)| guest.is_interrupted(client));
    }
}

#[test]
fn a_command_that_is_no_new_server_leaves_the_old_one_serving() {
    let scene = Scene::new(ONE, &["state=1M"]);
    let server = scene.first("synthetic");
    let client = connect(&scene.folder, "device");
    let serves = format!("process {}, serves as before", server.pid());
    let by = |args: &[&str], command: &[&str]| switch_over(&scene.folder, args, command);
    switch_over_to(&scene, "uart", &[]).fails(1, &[&serves, "of the kind synthetic", "of the kind uart"]);
    let mut elsewhere = scene.serve("synthetic", &["state=1M"], &[]);
    let at = elsewhere.iter().position(|arg| *arg == scene.name_of_last()).unwrap();
    elsewhere[at] = scene.folder.text("elsewhere");
    let refused = switch_over_by(&scene.folder, &elsewhere);
    refused.fails(1, &[&serves, &scene.name_of_last(), "elsewhere", "same sockets"]);
    let control = scene.serve("synthetic", &["state=1M"], &["--control", &scene.folder.text("control")]);
    let refused = switch_over_by(&scene.folder, &control);
    refused.fails(1, &[&serves, "for control clients at no path", "/control;"]);
    by(&[], &["/bin/false"]).fails(1, &[&serves, "ended: exit status: 1"]);
    let echo = by(&[], &["/bin/sh", "-c", "echo no document"]);
    echo.fails(1, &[&serves, "limosa serve --json", "`no document"]);
    let alone = by(&[], &["/bin/sh", "-c", "echo '{\"listening\": \"x\"}'"]);
    alone.fails(1, &[&serves, "--take-from"]);
    by(&[], &["/no/such/program"]).fails(1, &["/no/such/program", "nothing has changed"]);
    let silent = by(&["--limit", "0.1"], &["/bin/sh", "-c", "exec sleep 5"]);
    silent.fails(5, &["has not ended", "--limit"]);
    assert_eq!(client.state().unwrap(), State::Running);
}

#[test]
fn nobody_takes_over_from_a_server_without_takeover() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    let nothing = folder.text("nothing");
    limosa(&["serve", "synthetic", "--socket", &device.socket, "-o", "state=1M", "--take-from", &nothing])
        .fails(4, &["cannot take over from", &nothing, "--takeover"]);
    limosa(&["switch-over", &nothing, "--", "true"]).fails(4, &[&nothing, "--takeover"]);
    assert_eq!(device.state(), State::Running);
}

/// It said after 30 s that the server lives and does not answer.
#[test]
fn a_switch_over_on_a_devices_own_socket_took_its_server_for_one_that_hangs() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    let started = folder.text("started");
    limosa(&["switch-over", &device.socket, "--", "touch", &started])
        .fails(4, &["lets nobody take over", &device.socket, "not a device's socket", "nothing was started"]);
    assert!(!folder.path("started").exists());
    assert_eq!(device.state(), State::Running);
}

#[test]
fn of_switch_overs_at_the_same_time_one_replaces_the_server_and_the_others_say_so() {
    let scene = Scene::new(ONE, &["state=1M"]);
    let server = scene.first("synthetic");
    let client = connect(&scene.folder, "device");
    set(&client, SCRATCH, 5);
    let (takeover, log) = (scene.folder.text("takeover"), scene.folder.text("log"));
    let command = scene.serve("synthetic", &["state=1M"], &[]);
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    let program = env!("CARGO_BIN_EXE_limosa");
    let args = [&["--json", "switch-over", &takeover, "--log", &log, "--", program], &command[..]].concat();
    let all: Vec<_> = (0..3).map(|_| start(&args)).collect();
    let ended: Vec<_> = all.into_iter().map(Running::end).collect();
    server.end().ok();
    let (won, lost): (Vec<_>, Vec<_>) = ended.iter().partition(|ended| ended.code == 0);
    // One that came when all was over replaces the new server.
    let documents: Vec<Value> = won.iter().map(|won| serde_json::from_str(&won.out).unwrap()).collect();
    let was_replaced = |pid: &Value| documents.iter().any(|other| other["took_over"]["old_pid"] == *pid);
    let last = documents.iter().find(|document| !was_replaced(&document["took_over"]["pid"]));
    let _new = Stranger::of(last.unwrap_or_else(|| panic!("{ended:?}")));
    for lost in lost {
        // One that came between the end of the old server and the first word of the new one found nobody.
        match lost.code {
            4 => lost.fails(4, &["--takeover"]),
            _ => lost.fails(3, &["another switch-over came first"]),
        }
    }
    assert_eq!(get(&client, SCRATCH), 5);
    assert!(std::fs::read_to_string(log).unwrap().contains("done by this server"), "the log is in its file");
}

/// A mode that was changed in the file was ignored.
#[test]
fn a_mode_that_changes_in_a_switch_over_is_given_to_the_socket() {
    use std::os::unix::fs::PermissionsExt;
    let mut scene = Scene::new(ONE, &["state=1M"]);
    scene.options.push("block=64K".into());
    let server = scene.first("synthetic");
    let mode = || {
        let socket = std::fs::metadata(scene.folder.path("device")).unwrap();
        socket.permissions().mode() & 0o777
    };
    assert_eq!(mode(), 0o600);
    let to = |more: &[&str]| {
        let options: Vec<&str> = scene.own_options();
        switch_over_by(&scene.folder, &scene.serve("synthetic", &options, more))
    };
    let switched = to(&["--mode", "660"]);
    let second = Stranger::of(&switched.document);
    server.end().ok();
    assert_eq!(mode(), 0o660);
    // What somebody else has changed since stays, as the command line says the same.
    std::fs::set_permissions(scene.folder.path("device"), PermissionsExt::from_mode(0o666)).unwrap();
    let switched = to(&["--mode", "660"]);
    let third = Stranger::of(&switched.document);
    second.wait();
    assert_eq!(mode(), 0o666);
    let switched = to(&[]);
    let _fourth = Stranger::of(&switched.document);
    third.wait();
    assert_eq!(mode(), 0o600);
}

#[test]
fn wrong_input_is_named() {
    let folder = Folder::new();
    let here = folder.text("here");
    limosa(&["switch-over"]).fails(2, &["PATH"]);
    limosa(&["switch-over", "x"]).fails(2, &["NEW COMMAND"]);
    limosa(&["switch-over", "x", "--limit", "0", "--", "true"]).fails(2, &["--limit"]);
    limosa(&["serve", "uart", "--socket", &here, "--takeover"]).fails(2, &["--takeover"]);
    limosa(&["serve", "uart", "--socket", &here, "--take-from"]).fails(2, &["--take-from"]);
    std::fs::write(folder.path("file"), "").unwrap();
    std::os::unix::fs::symlink(&here, folder.path("link")).unwrap();
    for (path, code, part) in [
        ("file", 3, "not a socket"),
        ("no/folder", 4, "make its folder"),
        ("here", 2, "expected a path of its own"),
        ("link", 2, "expected a path of its own"),
    ] {
        limosa(&["serve", "uart", "--socket", &here, "--takeover", &folder.text(path)])
            .fails(code, &[&folder.text(path), part]);
        assert!(!folder.path("here").exists(), "nothing is left");
    }
    limosa(&["serve", "uart", "--socket", &here, "--control", &folder.text("link")])
        .fails(2, &["--control and --socket are one path"]);
    assert_eq!(std::fs::read(folder.path("file")).unwrap(), b"");
}
