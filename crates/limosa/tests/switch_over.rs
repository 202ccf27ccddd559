//! Servers whose process is replaced while clients use them: by `limosa serve --take-from` and by `limosa switch-over`, with
//! refusals, and with processes that are killed.

mod support;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

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
use support::{Ended, Folder, LIMIT, Running, limosa, start};

const SWITCH_OVERS: u64 = 20;

/// The arguments of a server that can be replaced.
fn serve(folder: &Folder, model: &str, options: &[&str], more: &[&str]) -> Vec<String> {
    let (device, takeover) = (folder.text("device"), folder.text("takeover"));
    let mut args: Vec<String> =
        ["-vv", "serve", model, "--socket", &device, "--takeover", &takeover].map(String::from).to_vec();
    options.iter().for_each(|option| args.extend(["-o".into(), (*option).into()]));
    args.extend(more.iter().map(|arg| (*arg).to_owned()));
    args
}

fn first(folder: &Folder, model: &str, options: &[&str]) -> Running {
    let running = start(&serve(folder, model, options, &[]));
    running.line("listening on ");
    running
}

/// Starts one that takes over.
fn next(folder: &Folder, model: &str, options: &[&str]) -> Running {
    start(&serve(folder, model, options, &["--take-from", &folder.text("takeover")]))
}

fn connect(folder: &Folder) -> Client {
    Client::connect(folder.path("device"), Options::default()).unwrap()
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
    let folder = Folder::new();
    let options = ["state=1M", "seed=5", "dirty-rate=16M"];
    let mut server = first(&folder, "synthetic", &options);
    let client = connect(&folder);
    let guest = Guest::start(&client);
    let ends = AtomicBool::new(false);
    let (count, mut writes) = std::thread::scope(|scope| {
        let counts = scope.spawn(|| {
            let mut count = 0;
            while !ends.load(Ordering::Relaxed) {
                count += 1;
                set(&client, SCRATCH, count);
                assert_eq!(get(&client, SCRATCH), count, "what was written before is there");
            }
            count
        });
        let mut writes = vec![0];
        for _ in 0..SWITCH_OVERS {
            let new = next(&folder, "synthetic", &options);
            new.line("listening on ");
            std::mem::replace(&mut server, new).end().ok();
            writes.push(get(&client, DMA_SEQUENCE));
        }
        ends.store(true, Ordering::Relaxed);
        (counts.join().unwrap(), writes)
    });
    assert!(count > SWITCH_OVERS, "{count}");
    writes.push(guest.check(&client));
    assert!(writes.is_sorted() && writes.last() > Some(&PAGES), "{writes:?}");
    guest.is_interrupted(&client);
    drop(client);
    server.signal(Signal::TERM);
    server.end().ok();
    for socket in ["device", "takeover"] {
        assert!(!folder.path(socket).exists(), "the last server removes {socket}");
    }
}

const DATA: u64 = 0;
const LINE_STATUS: u64 = 5;
const DATA_READY: u8 = 1;

#[test]
fn a_serial_port_sends_back_every_byte_while_its_server_is_replaced_twenty_times() {
    let folder = Folder::new();
    let mut server = first(&folder, "uart", &[]);
    let client = connect(&folder);
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
            let new = next(&folder, "uart", &[]);
            new.line("listening on ");
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
    let code = support::limosa_into(File::create(&out).unwrap(), File::create(&err).unwrap(), &all);
    let [out, err] = [out, err].map(|path| std::fs::read_to_string(path).unwrap());
    Switched { code, document: serde_json::from_str(&out).unwrap_or_else(|_| panic!("{out}{err}")), err }
}

/// By the command that the old server was started with.
fn switch_over_to(folder: &Folder, model: &str, options: &[&str]) -> Switched {
    let command = serve(folder, model, options, &[]);
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
    let folder = Folder::new();
    let server = first(&folder, "synthetic", &["state=1M"]);
    let old: u64 = server.pid().parse().unwrap();
    let client = connect(&folder);
    set(&client, SCRATCH, 77);
    let switched = switch_over_to(&folder, "synthetic", &["state=1M"]);
    let took_over = &switched.document["took_over"];
    let new = Stranger::of(&switched.document);
    assert_eq!((switched.code, took_over["old_pid"].as_u64()), (0, Some(old)), "{}", switched.err);
    assert_eq!(took_over["old_process"], "ended");
    let steps: Vec<_> =
        took_over["steps"].as_array().unwrap().iter().map(|step| step["step"].as_str().unwrap()).collect();
    assert_eq!(steps, ["hello", "offer", "prepare", "rest", "load", "running"]);
    assert!(took_over["standstill_ns"].as_u64().unwrap() > 0);
    server.end().ok();
    assert_eq!(get(&client, SCRATCH), 77);

    let again = switch_over_to(&folder, "synthetic", &["state=1M"]);
    let newest = Stranger::of(&again.document);
    new.wait();
    assert_eq!(get(&client, SCRATCH), 77);
    drop(newest);
    assert!(!folder.path("device").exists() && !folder.path("takeover").exists());
}

#[test]
fn what_does_not_fit_is_refused_by_name_and_the_old_server_goes_on() {
    let folder = Folder::new();
    let server = first(&folder, "synthetic", &["state=1M"]);
    let client = connect(&folder);
    let guest = Guest::start(&client);
    let serves = format!("process {}, serves as before", server.pid());
    let to = |model, options: &[&str]| switch_over_to(&folder, model, options);
    to("synthetic", &["state=2M"]).fails(1, &[&serves, "device 0: region 2", "same options"]);
    to("uart", &[]).fails(1, &[&serves, "device 0: region"]);
    to("synthetic", &["state=1M", "pre-copy=off"]).fails(1, &[&serves, "device 0: its migration"]);
    // The description fits; its state does not.
    let refused = to("synthetic", &["state=1M", "fault=fail:STOP>RESUMING"]);
    refused.fails(1, &[&serves, "device 0: the new device does not take its state"]);
    let refused = to("synthetic", &["state=1M", "block=32K"]);
    refused.fails(1, &[&serves, "device 0: the new device does not take its state"]);
    to("synthetic", &["state=nothing"]).fails(1, &[&serves, "gave up with code 2", "state"]);
    let mut elsewhere = serve(&folder, "synthetic", &["state=1M"], &[]);
    elsewhere[4] = folder.text("elsewhere");
    let command: Vec<&str> = elsewhere.iter().map(String::as_str).collect();
    let refused = switch_over(&folder, &[], &[&[env!("CARGO_BIN_EXE_limosa")], &command[..]].concat());
    refused.fails(1, &[&serves, "device 0: it listens at", "elsewhere", "same socket"]);
    switch_over(&folder, &[], &["/bin/false"]).fails(1, &[&serves, "ended: exit status: 1"]);
    let echo = switch_over(&folder, &[], &["/bin/sh", "-c", "echo no document"]);
    echo.fails(1, &[&serves, "limosa serve --json", "`no document"]);
    let alone = switch_over(&folder, &[], &["/bin/sh", "-c", "echo '{\"listening\": \"x\"}'"]);
    alone.fails(1, &[&serves, "--take-from"]);
    switch_over(&folder, &[], &["/no/such/program"]).fails(1, &["/no/such/program", "nothing has changed"]);
    let silent = switch_over(&folder, &["--limit", "0.1"], &["/bin/sh", "-c", "exec sleep 5"]);
    silent.fails(5, &["has not ended", "--limit"]);

    assert!(guest.check(&client) > 0);
    let switched = to("synthetic", &["state=1M"]);
    let _new = Stranger::of(&switched.document);
    server.end().ok();
    guest.is_interrupted(&client);
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
    for (path, part) in
        [("file", "no socket is there"), ("no/folder", "make its folder"), ("here", "listens there")]
    {
        limosa(&["serve", "uart", "--socket", &here, "--takeover", &folder.text(path)])
            .fails(4, &[&folder.text(path), part]);
        assert!(!folder.path("here").exists(), "nothing is left");
    }
    assert_eq!(std::fs::read(folder.path("file")).unwrap(), b"");
}

/// A new server that hangs in the freeze until the old one takes back.
const HANGS: &[&str] = &["state=1M", "fault=stall:RESUMING>STOP:60000"];

#[test]
fn a_new_server_that_is_killed_at_any_step_leaves_the_old_one_serving() {
    let folder = Folder::new();
    let server = first(&folder, "synthetic", &["state=1M"]);
    let client = connect(&folder);
    let guest = Guest::start(&client);
    for step in ["hello", "offer", "prepare", "rest"] {
        let new = next(&folder, "synthetic", HANGS);
        new.line(&format!("done by this server step={step}"));
        new.kill();
        assert_eq!(client.state().unwrap(), State::Running, "killed after {step}");
    }
    assert!(guest.check(&client) > 0);
    let new = next(&folder, "synthetic", &["state=1M"]);
    new.line("listening on ");
    server.end().ok();
    guest.is_interrupted(&client);
}

#[test]
fn a_new_server_that_hangs_is_given_up_and_the_old_one_goes_on() {
    let folder = Folder::new();
    let server = first(&folder, "synthetic", &["state=1M"]);
    let client = connect(&folder);
    let new = next(&folder, "synthetic", &["state=1M", "fault=stall:RESUMING>STOP:5000"]);
    server.line("not replaced: this server goes on");
    assert_eq!(client.state().unwrap(), State::Running);
    new.end().fails(1, &["cannot take over from", "the old server took back"]);
    assert_eq!(client.state().unwrap(), State::Running);
}

#[test]
fn an_old_server_that_is_killed_once_all_is_handed_over_is_replaced() {
    let folder = Folder::new();
    let server = first(&folder, "synthetic", &["state=1M"]);
    let client = connect(&folder);
    let guest = Guest::start(&client);
    let new = next(&folder, "synthetic", &["state=1M", "fault=stall:RESUMING>STOP:1000"]);
    new.line("done by this server step=rest");
    server.kill();
    new.line("listening on ");
    assert!(guest.check(&client) > 0);
    guest.is_interrupted(&client);
}

#[test]
fn an_old_server_that_is_killed_before_leaves_no_server() {
    let folder = Folder::new();
    // It hangs in its freeze.
    let server = first(&folder, "synthetic", &["state=1M", "fault=stall:STOP>STOP_COPY:60000"]);
    let client = connect(&folder);
    let new = next(&folder, "synthetic", &["state=1M"]);
    new.line("done by this server step=prepare");
    server.kill();
    new.end().fails(4, &["cannot take over from", "ended"]);
    assert!(client.state().is_err());
}

#[test]
fn a_server_that_is_told_to_end_in_a_switch_over_ends() {
    let folder = Folder::new();
    let server = first(&folder, "synthetic", &["state=1M"]);
    let client = connect(&folder);
    let new = next(&folder, "synthetic", HANGS);
    new.line("done by this server step=prepare");
    server.signal(Signal::TERM);
    server.end().ok();
    assert!(client.state().is_err());
    assert!(!folder.path("device").exists() && !folder.path("takeover").exists());
    // The new one may be told too.
    new.signal(Signal::TERM);
    let Ended { code, err, .. } = new.end();
    assert!([3, 4, 7].contains(&code), "{code}: {err}");
}

#[test]
fn a_new_server_that_is_told_to_end_before_it_serves_leaves_the_old_one_serving() {
    let folder = Folder::new();
    let server = first(&folder, "synthetic", &["state=1M"]);
    let client = connect(&folder);
    let new = next(&folder, "synthetic", HANGS);
    new.line("done by this server step=rest");
    new.signal(Signal::TERM);
    new.end().fails(7, &["cancelled", "the old server goes on"]);
    assert_eq!(client.state().unwrap(), State::Running);
    server.signal(Signal::TERM);
    server.end().ok();
}
