//! Guest memory in files: moved while another process writes it, stopped with the guest, refused where it cannot be
//! one guest's.

mod support;

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::Instant;

use limosa_migrate::{FilePages, GuestPages};
use limosa_protocol::State;
use limosa_testing::{proc_path, this_test};
use rustix::fs::MemfdFlags;
use rustix::process::Signal;
use support::users::let_others_borrow;
use support::{Ended, Folder, JsonOutput, LIMIT, Running, Server, limosa, start, start_by};

const GUEST: u64 = 0x6775_6573;
const PAGE: u64 = 4096;
const WRITER: &str = "LIMOSA_TEST_WRITER";

/// A process that writes a guest's memory all the time.
struct Writer {
    process: Running,
    file: std::fs::File,
}

impl Writer {
    fn start(file: &Path) -> Writer {
        let process = Running::start(this_test("a_process_that_writes").env(WRITER, file));
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

/// A file of so many pages, every one of them different.
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

struct Pair {
    folder: Folder,
    source: Server,
    destination: Server,
}

impl Pair {
    fn new(destination: &[&str]) -> Pair {
        let folder = Folder::new();
        let (source, destination) = (folder.device("source", &[]), folder.device("destination", destination));
        source.mark(GUEST);
        Pair { folder, source, destination }
    }

    #[track_caller]
    fn is_as_before(&self) {
        assert!(self.source.runs(GUEST) && self.destination.guest() != GUEST);
    }

    fn migration<'a>(&'a self, more: &[&'a str]) -> Vec<&'a str> {
        [&["migrate", &self.source.socket, &self.destination.socket], more].concat()
    }

    fn migrate(&self, more: &[&str]) -> Ended {
        limosa(&self.migration(more))
    }
}

#[test]
fn memory_that_a_process_writes_all_the_time_is_sent_and_none_of_it_is_lost() {
    let pair = Pair::new(&[]);
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
    let pair = Pair::new(&["fault=fail:RESUMING>STOP"]);
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
    let pair = Pair::new(&["fault=fail:RESUMING>STOP"]);
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
    let pair = Pair::new(&[]);
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

const HUGE: u64 = 2 << 20;

/// So many huge pages of 2 MiB that nobody has. The reservation is as it was before when this is dropped.
struct HugePages(Option<String>);

impl HugePages {
    const COUNT: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

    fn reserve(wanted: u64) -> Result<HugePages, String> {
        let path = |name: &str| format!("{}/{name}", HugePages::COUNT);
        let read = |name: &str| -> Result<u64, String> {
            let text = std::fs::read_to_string(path(name)).map_err(|error| format!("{name}: {error}"))?;
            text.trim().parse().map_err(|_| format!("{name}: {text}"))
        };
        let free = || Ok::<u64, String>(read("free_hugepages")?.saturating_sub(read("resv_hugepages")?));
        if free()? >= wanted {
            return Ok(HugePages(None));
        }
        let before = read("nr_hugepages")?;
        let more = (before + wanted - free()?).to_string();
        std::fs::write(path("nr_hugepages"), more).map_err(|error| format!("nr_hugepages: {error}"))?;
        let reserved = HugePages(Some(before.to_string()));
        match free()? {
            free if free >= wanted => Ok(reserved),
            free => Err(format!("{wanted} huge pages are needed, {free} can be had")),
        }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = std::fs::write(format!("{}/nr_hugepages", HugePages::COUNT), before);
        }
    }
}

/// Memory of huge pages, reserved when it is touched.
fn huge(pages: u64) -> (std::fs::File, FilePages, String) {
    let_others_borrow();
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = std::fs::File::from(rustix::fs::memfd_create("guest", flags).unwrap());
    file.set_len(pages * HUGE).unwrap();
    let name = proc_path(&file);
    // There is no write to such a file but by a mapping.
    let mapped = FilePages::mapped(file.try_clone().unwrap(), 0, pages * HUGE).unwrap();
    (file, mapped, format!("{name}@0"))
}

#[test]
fn huge_pages_that_are_missing_were_found_out_in_the_midst_of_a_move() {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let Ok(file) = rustix::fs::memfd_create("guest", flags) else {
        eprintln!("not tested, as this system has no huge pages of 2 MiB");
        return;
    };
    let file = std::fs::File::from(file);
    let name = proc_path(&file);
    let pair = Pair::new(&[]);
    let from = pair.folder.text("from");
    // More than any machine has.
    let bytes = HUGE << 22;
    std::fs::File::create(&from).unwrap().set_len(bytes).unwrap();
    file.set_len(bytes).unwrap();
    let (here, there) = (format!("{from}@0"), format!("{name}@0"));
    let few = ["needs up to 4194304 huge pages of 2048 KiB", "are free", "nr_hugepages", name.as_str()];
    pair.migrate(&["--memory", &here, &there, "--guest-stopped"]).fails(3, &few);
    let link = format!("unix:{}", pair.folder.text("link"));
    limosa(&["receive", &pair.destination.socket, "--listen", &link, "--memory", &there]).fails(3, &few);
    pair.is_as_before();
}

#[test]
fn a_length_that_is_not_whole_huge_pages_was_an_invalid_argument() {
    let pair = Pair::new(&[]);
    let mount = pair.folder.path("huge");
    std::fs::create_dir(&mount).unwrap();
    let from = memory(&pair.folder, "from", 768);
    let odd = mount.join("odd");
    // Mounted where nobody else sees it, which only root may.
    let script = "mount -t hugetlbfs -o pagesize=2M none \"$0\" || exit 99; \"$@\"; code=$?; \
                  [ -z \"$(ls -A \"$0\")\" ] || exit 98; exit $code";
    let mounted = ["--mount", "bash", "-c", script, mount.to_str().unwrap()];
    let (here, there) = (format!("{from}@0"), format!("{}@0,size=3M,create", odd.display()));
    let ended =
        start_by("unshare", &mounted, &pair.migration(&["--guest-stopped", "--memory", &here, &there]));
    let ended = ended.end();
    if ended.code == 99 || ended.err.starts_with("unshare: ") {
        eprintln!("passed over: this user may not mount, or there are no huge pages: {}", ended.err);
        return;
    }
    ended.fails(3, &["huge pages of 2048 KiB", "3145728 bytes are not whole ones", odd.to_str().unwrap()]);
    pair.is_as_before();
}

#[test]
fn memory_of_huge_pages_moves() {
    const PAGES: u64 = 4;
    let _reserved = match HugePages::reserve(2 * PAGES) {
        Ok(reserved) => reserved,
        Err(why) => {
            eprintln!("not tested, as this machine has no huge pages to give: {why}");
            return;
        }
    };
    let (_here_file, here, from) = huge(PAGES);
    let (_there_file, there, to) = huge(PAGES);
    let read = |pages: &FilePages| {
        let mut all = vec![0; (PAGES * HUGE) as usize];
        pages.read(0, &mut all).unwrap();
        all
    };
    here.write(3 * PAGE, &[1; 5000]).unwrap();
    here.write(2 * HUGE - 7, &[2; 20]).unwrap();
    there.write(HUGE, &[9; 10_000]).unwrap();
    limosa(&["migrate", "--memory", &from, &to, "--guest-stopped"]).ok();
    assert!(read(&here) == read(&there));
    // With a guest that might write, whose changes are found by comparing, over links and compressed.
    let folder = Folder::new();
    let other = memory(&folder, "other", 16);
    let writer = Writer::start(Path::new(&other));
    here.write(3 * HUGE + 100, &[3; 100_000]).unwrap();
    here.write(0, &[0; 8 * PAGE as usize]).unwrap();
    let link = format!("unix:{}", folder.text("link"));
    let receiver = start(&["receive", "--listen", &link, "--memory", &to]);
    receiver.line("listening on");
    let send = ["send", "--to", &link, "--memory", &from, "--stop-with", &writer.pid()];
    limosa(&[&send[..], &["--links", "2", "--compress", "lz4"]].concat()).ok();
    receiver.end().ok();
    assert!(read(&here) == read(&there));
    let file = folder.text("snapshot");
    limosa(&["save", &file, "--memory", &from, "--guest-stopped"]).ok();
    there.write(3 * HUGE, &[4; 4096]).unwrap();
    limosa(&["load", &file, "--memory", &to]).ok();
    assert!(read(&here) == read(&there));
}

#[test]
fn compressed_memory_and_devices_arrive_over_links_and_in_files() {
    for method in ["zstd", "lz4"] {
        let pair = Pair::new(&[]);
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
    limosa(&["save", "x", "y", "--compress", "gzip"]).fails(2, &["gzip", "expected zstd or lz4"]);
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
    let pair = Pair::new(&["fault=fail:STOP>RUNNING_P2P"]);
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
    let pair = Pair::new(&["fault=fail:RESUMING>STOP"]);
    let undone = pair.migrate(&["--on-stop", "true", "--on-resume", "exit 4"]);
    undone.fails(3, &["not all is as it was before", "--on-resume `exit 4`", "the guest may stand still"]);
    let moved = pair.migrate(&["--on-stop", "true", "--on-start", "exit 5"]);
    moved.fails(8, &["--on-start `exit 5`", "the devices run here, the guest may not"]);
    assert!(moved.out.contains("downtime") && pair.destination.runs(GUEST));
}

#[test]
fn memory_maps_that_do_not_match_are_refused_before_the_guest_is_stopped() {
    let pair = Pair::new(&[]);
    let (from, to) = (memory(&pair.folder, "from", 64), empty(&pair.folder, "to", 64));
    let stopped = pair.folder.text("stopped");
    let stop = format!("touch {stopped}");
    let link = format!("unix:{}", pair.folder.text("link"));
    for (here, there, parts) in [
        (vec!["@0"], vec![], vec!["only the source has memory 0"]),
        (vec![], vec!["@0"], vec!["only the destination has memory 0"]),
        (vec!["@0"], vec!["@0,size=32K"], vec!["0x40000 bytes at 0x0", "0x8000 bytes at 0x0"]),
        (vec!["@0"], vec!["@0x1000"], vec!["0x40000 bytes at 0x0", "0x40000 bytes at 0x1000"]),
        // A hole there where there is none here.
        (
            vec!["@0"],
            vec!["@0,size=32K", "@0x10000,size=32K,offset=32K"],
            vec!["0x40000 bytes at 0x0", "0x8000 bytes at 0x0", "only the destination has memory 1"],
        ),
    ] {
        let words = |file: &str, parts: &[&str]| -> Vec<String> {
            parts.iter().flat_map(|part| ["--memory".to_owned(), format!("{file}{part}")]).collect()
        };
        let receive = ["receive", &pair.destination.socket, "--listen", &link].map(str::to_owned);
        let receiver = start(&[&receive[..], &words(&to, &there)].concat());
        receiver.line("listening on");
        let send = ["send", &pair.source.socket, "--to", &link, "--on-stop", &stop].map(str::to_owned);
        limosa(&[&send[..], &words(&from, &here)].concat())
            .fails(3, &[&["cannot be moved"][..], &parts].concat());
        receiver.end().fails(3, &parts);
        pair.is_as_before();
        assert!(!Path::new(&stopped).exists(), "the guest was not disturbed");
    }
    assert!(std::fs::read(&to).unwrap().iter().all(|byte| *byte == 0), "nothing was written");
}

#[test]
fn memory_that_cannot_be_one_guests_is_refused_before_anything_is_opened_for_long() {
    let pair = Pair::new(&[]);
    let folder = &pair.folder;
    let file = memory(folder, "file", 64);
    std::fs::write(folder.path("odd"), [1; 5000]).unwrap();
    let (odd, dir, none) = (folder.text("odd"), folder.text(""), folder.text("none"));
    let link = format!("unix:{}", folder.text("link"));
    let send = |memory: &[String]| {
        let words = ["send", &pair.source.socket, "--to", &link, "--guest-stopped"].map(str::to_owned);
        let memory = memory.iter().flat_map(|memory| ["--memory".to_owned(), memory.clone()]);
        limosa(&words.into_iter().chain(memory).collect::<Vec<_>>())
    };
    for (memory, code, parts) in [
        (vec![format!("{file}@0"), format!("{file}@0x10000")], 2, vec!["overlap", "0x0 to 0x3ffff"]),
        (
            vec![format!("{file}@1G,size=64K"), format!("{file}@0,offset=32K,size=64K")],
            2,
            vec!["the same bytes of one file"],
        ),
        (vec![format!("{file}@0,create,size=1M")], 2, vec!["create is for where memory is written to"]),
        (vec![format!("{file}@0x800")], 2, vec!["not a multiple of 4096"]),
        (vec![file.clone()], 2, vec!["expected FILE@GPA"]),
        (vec![format!("{file}@0,size=1M")], 3, vec!["262144 bytes, and 1048576 are needed"]),
        (vec![format!("{file}@0,offset=1M")], 3, vec!["expected whole pages"]),
        (vec![format!("{file}@0xfffffffffffff000")], 3, vec!["beyond 2^64"]),
        (vec![format!("{odd}@0")], 3, vec!["5000 bytes", "expected whole pages of 4096"]),
        (vec![format!("{none}@0")], 4, vec!["No such file", "a mapping of"]),
        (vec![format!("{dir}@0")], 4, vec!["no regular file"]),
    ] {
        send(&memory).fails(code, &[&["--memory"][..], &parts].concat());
    }
    pair.is_as_before();
    let (here, there) = (format!("{file}@0"), format!("{file}@0"));
    pair.migrate(&["--memory", &here, &there, "--guest-stopped"]).fails(2, &["the same bytes of one file"]);
    pair.migrate(&["--memory", &here, &there]).fails(2, &["--stop-with", "--on-stop", "--guest-stopped"]);
    pair.migrate(&["--memory", &here]).fails(2, &["2 values"]);
    pair.migrate(&["--guest-stopped", "--on-stop", "true"]).fails(2, &["cannot be used with"]);
    pair.migrate(&["--on-resume", "true"]).fails(2, &["--on-stop"]);
    pair.migrate(&["--stop-with", "0"]).fails(2, &["--stop-with"]);
    pair.migrate(&["--stop-with", "2147483647"]).fails(4, &["--stop-with 2147483647", "no such process"]);
    pair.is_as_before();
}

#[test]
fn a_file_that_becomes_shorter_in_the_move_undoes_it() {
    let pair = Pair::new(&[]);
    let (from, to) = (memory(&pair.folder, "from", 64), empty(&pair.folder, "to", 64));
    let (here, there) = (format!("{from}@0"), format!("{to}@0"));
    let stop = format!("truncate -s 4096 {from}");
    pair.migrate(&["--memory", &here, &there, "--on-stop", &stop])
        .fails(1, &["guest memory at", "the source is as it was before"]);
    pair.is_as_before();
}

/// Runs the command where files cannot grow beyond this many KiB.
fn limosa_with_little_room(kib: u32, args: &[&str]) -> Ended {
    let limit = format!("trap '' XFSZ; ulimit -f {kib}; exec \"$0\" \"$@\"");
    start_by("bash", &["-c", &limit], args).end()
}

#[test]
fn a_file_that_can_take_no_more_brings_the_source_back_and_leaves_nothing_behind() {
    let pair = Pair::new(&[]);
    let folder = &pair.folder;
    let (from, to) = (memory(folder, "from", 512), empty(folder, "to", 512));
    let (file, here, there) = (folder.text("file"), format!("{from}@0"), format!("{to}@0"));
    let before = std::fs::read_dir(folder.path("")).unwrap().count();
    limosa_with_little_room(64, &["save", &pair.source.socket, &file])
        .fails(1, &[&file, "too large", "the source is as it was before"]);
    pair.is_as_before();
    let save = ["save", &pair.source.socket, &file, "--memory", &here, "--guest-stopped"];
    limosa_with_little_room(1536, &save).fails(1, &[&file, "too large", "the source is as it was before"]);
    pair.is_as_before();
    assert_eq!(std::fs::read_dir(folder.path("")).unwrap().count(), before, "nothing is left behind");
    pair.migrate(&["--memory", &here, &there, "--guest-stopped"]).ok();
    same(&from, &to);
}

/// Runs a shell's commands, which get the command and its arguments, with a file system of 1 MiB at this folder; `None`
/// where this user may not.
fn on_a_small_disk(folder: &Path, commands: &str, args: &[&str]) -> Option<Ended> {
    let script = format!("mount -t tmpfs -o size=1m none \"$0\" || exit 99; {commands}");
    let folder = folder.to_str().unwrap();
    let mounted = ["--user", "--map-root-user", "--mount", "bash", "-c", &script, folder];
    let ended = start_by("unshare", &mounted, args).end();
    (ended.code != 99 && !ended.err.starts_with("unshare: ")).then_some(ended)
}

#[test]
fn a_full_disk_brings_the_source_back() {
    let pair = Pair::new(&[]);
    let folder = &pair.folder;
    let disk = folder.path("disk");
    std::fs::create_dir(&disk).unwrap();
    let from = memory(folder, "from", 512);
    let (file, here) = (folder.text("disk/file"), format!("{from}@0"));
    let there = format!("{file}@0,size=2M,create");
    let save = ["save", &pair.source.socket, &file, "--memory", &here, "--guest-stopped"];
    let commands = "\"$@\"; code=$?; [ -z \"$(ls -A \"$0\")\" ] || exit 98; exit $code";
    let Some(saved) = on_a_small_disk(&disk, commands, &save) else {
        eprintln!("passed over: this user may not mount");
        return;
    };
    saved.fails(1, &[&file, "No space left", "the source is as it was before"]);
    pair.is_as_before();
    let migrate = pair.migration(&["--guest-stopped", "--memory", &here, &there]);
    let moved = on_a_small_disk(&disk, "exec \"$@\"", &migrate).unwrap();
    moved.fails(1, &["guest memory at", "no more room on its disk", "the source is as it was before"]);
    pair.is_as_before();
}
