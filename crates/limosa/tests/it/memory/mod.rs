//! Guest memory in files: moved while another process writes it, stopped with the guest, refused where it cannot be
//! one guest's.

mod huge_pages;
mod refused;
mod room;

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::Instant;

use crate::support::pair::Pair;
use crate::support::users::let_others_borrow;
use crate::support::{Folder, GUEST, JsonOutput, LIMIT, Running, limosa, start};
use limosa_protocol::State;
use limosa_testing::{proc_path, this_test};
use rustix::process::Signal;

const PAGE: u64 = 4096;
const WRITER: &str = "LIMOSA_TEST_WRITER";

/// A process that writes a guest's memory all the time.
struct Writer {
    process: Running,
    file: std::fs::File,
}

impl Writer {
    fn start(file: &Path) -> Writer {
        let process = Running::start(this_test("memory::a_process_that_writes").env(WRITER, file));
        process.line("the writer writes");
        Writer { process, file: std::fs::File::open(file).unwrap() }
    }

    fn pid(&self) -> String {
        self.process.pid()
    }

    /// How often it has written.
    fn written(&self) -> u64 {
        let mut counter = [0; 8];
        self.file.read_exact_at(&mut counter, 0).unwrap();
        u64::from_le_bytes(counter)
    }

    fn is_stopped(&self) -> bool {
        self.process.is_stopped()
    }

    /// It goes on.
    #[track_caller]
    fn writes(&self) {
        let (before, began) = (self.written(), Instant::now());
        while self.written() == before {
            assert!(began.elapsed() < LIMIT, "it stands still");
            std::thread::yield_now();
        }
    }
}

/// What [`Writer`] starts. A page changes back and forth between two contents, so that it is found out who takes a
/// page for clean that holds what it held before.
#[test]
#[ignore = "the other tests start it as a process"]
fn a_process_that_writes() {
    let Some(path) = std::env::var_os(WRITER) else { return };
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let pages = file.metadata().unwrap().len() / PAGE;
    let contents = [[0; PAGE as usize], [0x5a; PAGE as usize]];
    for count in 1_u64.. {
        let page = 1 + count.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (pages - 1);
        file.write_all_at(&contents[(count / 3 % 2) as usize], page * PAGE).unwrap();
        file.write_all_at(&count.to_le_bytes(), 0).unwrap();
        if count == 1000 {
            println!("the writer writes");
        }
    }
}

/// A file of this number of pages, each different.
fn memory(folder: &Folder, name: &str, pages: u64) -> String {
    let path = folder.path(name);
    let mut bytes = vec![0; (pages * PAGE) as usize];
    for (number, page) in bytes.chunks_exact_mut(PAGE as usize).enumerate() {
        page.fill(number as u8);
        page[8..16].copy_from_slice(&(number as u64).to_le_bytes());
    }
    std::fs::write(&path, bytes).unwrap();
    path.to_str().unwrap().to_owned()
}

fn empty(folder: &Folder, name: &str, pages: u64) -> String {
    let path = folder.path(name);
    std::fs::File::create(&path).unwrap().set_len(pages * PAGE).unwrap();
    path.to_str().unwrap().to_owned()
}

#[track_caller]
fn same(one: &str, other: &str) {
    let (one, other) = (std::fs::read(one).unwrap(), std::fs::read(other).unwrap());
    assert_eq!(one.len(), other.len());
    let differ =
        one.chunks(PAGE as usize).zip(other.chunks(PAGE as usize)).position(|(one, other)| one != other);
    assert_eq!(differ, None, "the first page that differs");
}

#[test]
fn memory_that_a_process_writes_all_the_time_is_sent_and_none_of_it_is_lost() {
    let pair = Pair::new(&[], &[]);
    let folder = &pair.folder;
    let (from, to) = (memory(folder, "from", 2048), empty(folder, "to", 2048));
    let writer = Writer::start(Path::new(&from));
    let link = format!("unix:{}", folder.text("link"));
    let [low, high] = [(&from, 0_u64), (&from, 4 << 20)];
    // Two parts of one file, named in another order there.
    let part = |(file, offset): (&String, u64)| {
        let address = if offset == 0 { 0 } else { 4_u64 << 30 };
        format!("{file}@{address:#x},offset={offset},size=4M")
    };
    let receiver = start(&[
        "--json",
        "receive",
        &pair.destination.socket,
        "--listen",
        &link,
        "--memory",
        &part((&to, 4 << 20)),
        "--memory",
        &part((&to, 0)),
    ]);
    receiver.line("listening on");
    let sent = limosa(&[
        "--json",
        "send",
        &pair.source.socket,
        "--to",
        &link,
        "--memory",
        &part(low),
        "--memory",
        &part(high),
        "--stop-with",
        &writer.pid(),
    ])
    .json();
    receiver.end().json();
    assert!(sent["memory_bytes"].as_u64().unwrap() > 2 << 20, "{sent}");
    assert!(writer.is_stopped(), "the guest runs elsewhere");
    same(&from, &to);
    assert!(pair.destination.runs(GUEST) && pair.source.state() == State::Stop);
}

#[test]
fn memory_migrates_from_file_to_file_and_a_move_that_fails_lets_the_guest_go_on() {
    let pair = Pair::new(&[], &["fault=fail:RESUMING>STOP"]);
    let (from, to) = (memory(&pair.folder, "from", 512), empty(&pair.folder, "to", 512));
    let writer = Writer::start(Path::new(&from));
    let (here, there, pid) = (format!("{from}@1M"), format!("{to}@0x100000"), writer.pid());
    let more = ["--memory", &here, &there, "--stop-with", &pid];
    pair.migrate(&more).fails(3, &[&pair.destination.socket, "the source is as it was before"]);
    pair.is_as_before();
    assert!(!writer.is_stopped());
    writer.writes();
    pair.migrate(&more).ok();
    assert!(writer.is_stopped());
    same(&from, &to);
}

#[test]
fn a_process_that_stood_still_before_the_move_is_not_set_going_by_its_failure() {
    let pair = Pair::new(&[], &["fault=fail:RESUMING>STOP"]);
    let (from, to) = (memory(&pair.folder, "from", 16), empty(&pair.folder, "to", 16));
    let writer = Writer::start(Path::new(&from));
    writer.process.signal(Signal::STOP);
    while !writer.is_stopped() {
        std::thread::yield_now();
    }
    let (here, there, pid) = (format!("{from}@0"), format!("{to}@0"), writer.pid());
    pair.migrate(&["--memory", &here, &there, "--stop-with", &pid]).fails(3, &["as it was before"]);
    assert!(writer.is_stopped());
    pair.is_as_before();
}

#[test]
fn memory_is_saved_with_devices_and_loaded_into_a_file_that_is_made() {
    let pair = Pair::new(&[], &[]);
    let folder = &pair.folder;
    let from = memory(folder, "from", 300);
    let (file, to) = (folder.text("file"), folder.text("to"));
    let writer = Writer::start(Path::new(&from));
    let pid = writer.pid();
    limosa(&["save", &pair.source.socket, &file, "--memory", &format!("{from}@0"), "--stop-with", &pid]).ok();
    assert!(!writer.is_stopped() && pair.source.runs(GUEST), "the guest runs on");
    writer.writes();
    let stop = ["--stop", "--replace", "--memory", &format!("{from}@0"), "--stop-with", &pid];
    limosa(&[&["save", &pair.source.socket, &file][..], &stop].concat()).ok();
    assert!(writer.is_stopped());
    let inspected = limosa(&["--json", "inspect", &file]).json();
    assert_eq!(inspected["offer"]["memory"][0]["bytes"], 300 * PAGE, "{inspected}");
    let load = |memory: &str| limosa(&["load", &file, &pair.destination.socket, "--memory", memory]);
    load(&format!("{to}@0")).fails(4, &[&to, "No such file", "size=BYTES,create"]);
    load(&format!("{to}@0,size=1196032,create")).fails(3, &["memory 0", "0x124000", "0x12c000"]);
    load(&format!("{to}@0,size=1200K,create")).ok();
    same(&from, &to);
    assert!(pair.destination.runs(GUEST));
}

#[test]
fn memory_moves_without_any_device_and_from_a_memfd_of_another_process() {
    let folder = Folder::new();
    let_others_borrow();
    let memfd = limosa_testing::memfd(64 * PAGE);
    memfd.write_all_at(b"the guest", 5 * PAGE).unwrap();
    let name = proc_path(&memfd);
    let to = empty(&folder, "to", 64);
    let (from, onto) = (format!("{name}@0"), format!("{to}@0"));
    limosa(&["migrate", "--memory", &from, &onto, "--guest-stopped"]).ok();
    let moved = std::fs::read(&to).unwrap();
    assert_eq!(&moved[5 * 4096..][..9], b"the guest");
    // And back, onto what is there.
    memfd.write_all_at(&[1; 3 * PAGE as usize], 9 * PAGE).unwrap();
    limosa(&["migrate", "--memory", &onto, &from, "--guest-stopped"]).ok();
    let mut back = vec![0; 64 * PAGE as usize];
    memfd.read_exact_at(&mut back, 0).unwrap();
    assert!(back == moved);
}

#[test]
fn compressed_memory_and_devices_arrive_over_links_and_in_files() {
    for method in ["zstd", "lz4"] {
        let pair = Pair::new(&[], &[]);
        let folder = &pair.folder;
        let (from, to) = (memory(folder, "from", 512), empty(folder, "to", 512));
        let (here, there, file) = (format!("{from}@0"), format!("{to}@0"), folder.text("file"));
        let save =
            ["save", &pair.source.socket, &file, "--memory", &here, "--guest-stopped", "--compress", method];
        limosa(&save).ok();
        assert!(std::fs::metadata(&file).unwrap().len() < 2 << 20, "3 MiB of memory and state");
        limosa(&["load", &file, &pair.destination.socket, "--memory", &there]).ok();
        same(&from, &to);
        assert!(pair.destination.runs(GUEST));
        std::fs::File::options().write(true).open(&to).unwrap().write_all_at(&[9; 8192], 8192).unwrap();
        let link = format!("unix:{}", folder.text("link"));
        let receiver = start(&["receive", &pair.destination.socket, "--listen", &link, "--memory", &there]);
        receiver.line("listening on");
        let send = ["send", &pair.source.socket, "--to", &link, "--memory", &here, "--guest-stopped"];
        limosa(&[&send[..], &["--compress", method]].concat()).ok();
        receiver.end().ok();
        same(&from, &to);
    }
    limosa(&["save", "x", "y", "--compress", "gzip"]).fails(2, &["gzip", "zstd, lz4"]);
}

#[test]
fn memory_that_was_never_touched_takes_no_room_at_the_destination() {
    let folder = Folder::new();
    let (from, to) = (empty(&folder, "from", 8192), empty(&folder, "to", 8192));
    let file = std::fs::File::options().write(true).open(&from).unwrap();
    file.write_all_at(&[7; 10], 5_000_000).unwrap();
    limosa(&["migrate", "--memory", &format!("{from}@0"), &format!("{to}@0"), "--guest-stopped"]).ok();
    same(&from, &to);
    let blocks = std::fs::metadata(&to).unwrap().blocks();
    assert!(blocks * 512 < 1 << 20, "{blocks} blocks");
}

#[test]
fn commands_stop_and_start_the_guest_and_one_that_fails_calls_the_move_off() {
    let pair = Pair::new(&[], &["fault=fail:STOP>RUNNING_P2P"]);
    let text = |name: &str| pair.folder.text(name);
    let (from, to) = (memory(&pair.folder, "from", 16), empty(&pair.folder, "to", 16));
    let (here, there) = (format!("{from}@0"), format!("{to}@0"));
    let log = text("log");
    let note = |what: &str| format!("echo {what} >> {log}");
    let (stop, resume, start) = (note("stop"), note("resume"), note("start"));
    let said = || std::fs::read_to_string(&log).unwrap_or_default();
    let memory = ["--memory", &here, &there];
    let migrate = |more: &[&str]| pair.migrate(&[&memory, more].concat());

    migrate(&["--on-stop", "exit 3", "--on-resume", &resume])
        .fails(3, &["the VMM refused to stop", "--on-stop `exit 3`", "exit status: 3", "as it was before"]);
    assert_eq!(said(), "resume\n", "it may have been half stopped");
    pair.is_as_before();
    let all = ["--on-stop", &stop, "--on-resume", &resume, "--on-start", &start];
    migrate(&all).fails(3, &[&pair.destination.socket, "as it was before"]);
    assert_eq!(said(), "resume\nstop\nresume\n");
    migrate(&["--on-stop", &stop, "--on-resume", "echo out of order >&2; false", "--on-start", &start]).ok();
    assert_eq!(said(), "resume\nstop\nresume\nstop\nstart\n");
    same(&from, &to);
    assert!(pair.destination.runs(GUEST));
}

#[test]
fn a_guest_that_cannot_be_started_or_set_going_again_is_said_so() {
    let pair = Pair::new(&[], &["fault=fail:RESUMING>STOP"]);
    let undone = pair.migrate(&["--on-stop", "true", "--on-resume", "exit 4"]);
    undone.fails(3, &["not all is as it was before", "--on-resume `exit 4`", "the guest may stand still"]);
    let moved = pair.migrate(&["--on-stop", "true", "--on-start", "exit 5"]);
    moved.fails(8, &["--on-start `exit 5`", "the devices run here, the guest may not"]);
    assert!(moved.out.contains("downtime") && pair.destination.runs(GUEST));
}
