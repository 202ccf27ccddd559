//! What other users of the host can put in the way of a command with more rights: files that they hold or have made, links,
//! and servers. Where a second user is needed the tests need root.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;

use crate::support::users::{
    Holder, OTHER, can_be_another, give_away, hold_files, let_others_borrow, start_as_other,
};
use crate::support::{Folder, JsonOutput, Running, limosa, start, start_reading, start_under};
use limosa_testing::memfd;
use rustix::fs::{CWD, FileType, Mode, mknodat};

const BYTES: usize = 64 << 10;

#[test]
#[ignore = "other tests start it as a process"]
fn a_process_that_holds_files() {
    hold_files();
}

/// A file that is its owner's alone.
fn secret(folder: &Folder, name: &str) -> std::path::PathBuf {
    let path = folder.path(name);
    fs::write(&path, b"the owner's alone".repeat(BYTES)).unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(BYTES as u64).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    path
}

/// Saving from this memory and receiving into it are both refused with these words.
#[track_caller]
fn is_refused(folder: &Folder, memory: &str, code: i32, parts: &[&str]) {
    let saved = folder.text("refused.lmsa");
    let memory = format!("{memory}@0");
    limosa(&["save", &saved, "--memory", &memory, "--guest-stopped"]).fails(code, parts);
    assert!(!Path::new(&saved).exists());
    is_no_destination(folder, &memory, code, parts);
}

#[track_caller]
fn is_no_destination(folder: &Folder, memory: &str, code: i32, parts: &[&str]) {
    let listen = format!("unix:{}", folder.text("refused"));
    limosa(&["receive", "--memory", memory, "--listen", &listen]).fails(code, parts);
}

#[track_caller]
fn is_saved(folder: &Folder, memory: &str) {
    let memory = format!("{memory}@0");
    limosa(&["save", "--replace", &folder.text("saved.lmsa"), "--memory", &memory, "--guest-stopped"]).ok();
}

#[test]
fn a_file_that_a_process_may_not_read_was_saved_and_overwritten_for_it() {
    let folder = Folder::new().open_to_all();
    let secret = secret(&folder, "secret");
    let before = fs::read(&secret).unwrap();
    let holder = Holder::start(&[("path", &secret)]);
    let (name, link) = (holder.name(0), folder.text("link"));
    symlink(&name, &link).unwrap();
    let (process, number) = name.split_once("/fd/").unwrap();
    for way in [&name, &link, &format!("{process}/./../{}/fd/{number}", &process[6..])] {
        is_refused(&folder, way, 4, &["--memory", way, "O_PATH"]);
    }
    let task = format!("{process}/task/{}/fd/{number}", &process[6..]);
    is_refused(&folder, &task, 4, &["O_PATH"]);
    assert_eq!(fs::read(&secret).unwrap(), before);
}

#[test]
fn links_of_processes_that_are_no_descriptors_are_not_followed() {
    let folder = Folder::new().open_to_all();
    let held = secret(&folder, "held");
    let holder = Holder::start(&[("path", &folder.path(""))]);
    let process = holder.name(0).split_once("/fd/").unwrap().0.to_owned();
    for way in [
        format!("{process}/exe"),
        format!("{process}/root{}", held.display()),
        format!("{}/held", holder.name(0)),
    ] {
        is_refused(&folder, &way, 4, &["link of a process", &way]);
    }
    let report = format!("{}/report.json", holder.name(0));
    let saved = format!("{}/saved.lmsa", holder.name(0));
    let memory = [&format!("{}@0", held.display()), "--guest-stopped"].map(str::to_owned);
    let [memory, stopped] = memory.each_ref().map(String::as_str);
    let save = ["save", &folder.text("there.lmsa"), "--memory", memory, stopped, "--report", &report];
    limosa(&save).fails(1, &["link of a process", &report]);
    limosa(&["save", &saved, "--memory", memory, stopped]).fails(1, &["link of a process", &saved]);
    assert_eq!(fs::read_dir(folder.path("")).unwrap().count(), 1, "nothing was made");
}

#[test]
fn memory_of_a_process_is_used_with_the_access_that_it_has() {
    let folder = Folder::new().open_to_all();
    let contents = folder.path("contents");
    fs::write(&contents, vec![7; BYTES]).unwrap();
    fs::set_permissions(&contents, fs::Permissions::from_mode(0o666)).unwrap();
    let files =
        ["memory", "memory-read", "memory-sealed", "both", "write"].map(|access| (access, &*contents));
    let holder = Holder::start(&files);
    let [both, read, sealed, file, write] = [0, 1, 2, 3, 4].map(|file| holder.name(file));
    for memory in [&both, &read, &sealed] {
        is_saved(&folder, memory);
    }
    for memory in [&read, &sealed] {
        is_no_destination(&folder, &format!("{memory}@0"), 4, &["can be written to", memory]);
    }
    for memory in [&file, &write] {
        is_refused(&folder, memory, 4, &["no memory", "memfd", memory]);
    }
    is_no_destination(&folder, &format!("{both}@0,size=1M,create"), 2, &["create and owner="]);
    is_no_destination(&folder, &format!("{both}@0,owner=root"), 2, &["create and owner="]);
    let load = ["load", &folder.text("saved.lmsa"), "--memory", &format!("{both}@0")];
    limosa(&load).ok();
}

#[test]
fn descriptors_of_the_command_itself_are_memory_too() {
    let folder = Folder::new();
    let memory = memfd(BYTES as u64);
    memory.write_all_at(&[9; BYTES], 0).unwrap();
    for name in ["/dev/stdin", "/dev/fd/0", "/proc/self/fd/0", "/proc/thread-self/fd/0"] {
        let saved = folder.text("saved.lmsa");
        let input = memory.try_clone().unwrap();
        let memory = format!("{name}@0");
        start_reading(input, &["save", "--replace", "--memory", &memory, "--guest-stopped", &saved])
            .end()
            .ok();
    }
    let_others_borrow();
    let none = format!("/proc/{}/fd/999999", std::process::id());
    is_refused(&folder, &none, 4, &["has no fd 999999", &none]);
}

#[test]
fn what_is_no_file_of_memory_is_refused_by_its_name() {
    let folder = Folder::new();
    let precious = secret(&folder, "precious");
    let at = |name: &str| folder.text(name);
    symlink("precious", folder.path("link")).unwrap();
    fs::hard_link(&precious, folder.path("second")).unwrap();
    mknodat(CWD, folder.path("fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
    let before = fs::read(&precious).unwrap();
    is_refused(&folder, &at("link"), 4, &["symbolic link", "precious"]);
    is_refused(&folder, &at("second"), 4, &["2 names"]);
    is_refused(&folder, &at("fifo"), 4, &["it is a FIFO", "expected a regular file"]);
    is_refused(&folder, "/dev/null", 4, &["it is a device node"]);
    for name in ["link", "second", "fifo"] {
        is_no_destination(&folder, &format!("{}@0,size=1M,create", at(name)), 4, &[name]);
    }
    symlink("made-elsewhere", folder.path("dangling")).unwrap();
    is_no_destination(&folder, &format!("{}@0,size=1M,create", at("dangling")), 4, &["made-elsewhere"]);
    assert!(!folder.path("made-elsewhere").exists());
    assert_eq!(fs::read(&precious).unwrap(), before);
}

#[test]
fn memory_in_a_file_of_another_user_was_moved_without_a_word() {
    if !can_be_another("memory_in_a_file_of_another_user_was_moved_without_a_word") {
        return;
    }
    let folder = Folder::new().open_to_all();
    let theirs = folder.text("theirs");
    fs::write(&theirs, vec![7; BYTES]).unwrap();
    give_away(Path::new(&theirs));
    let user = OTHER.to_string();
    is_refused(&folder, &theirs, 4, &[&theirs, &user, "root (0)", ",owner=65534"]);
    is_no_destination(&folder, &format!("{theirs}@0,size=1M,create"), 4, &["root (0)", ",owner=65534"]);
    assert_eq!(fs::metadata(&theirs).unwrap().len(), BYTES as u64);
    is_no_destination(&folder, &format!("{theirs}@0,owner=4242"), 4, &["user 4242"]);
    let owned = format!("{theirs}@0,owner={user}");
    let saved = folder.text("saved.lmsa");
    limosa(&["save", &saved, "--memory", &owned, "--guest-stopped"]).ok();
    fs::write(&theirs, vec![0; BYTES]).unwrap();
    limosa(&["load", &saved, "--memory", &owned]).ok();
    assert_eq!(fs::read(&theirs).unwrap(), vec![7; BYTES]);
    // One that is made is given to its owner.
    let made = folder.path("made");
    let to_make = format!("{}@0,size={BYTES},create,owner={user}", made.display());
    limosa(&["load", &saved, "--memory", &to_make]).ok();
    let found = fs::metadata(&made).unwrap();
    assert_eq!((found.uid(), found.mode() & 0o7777), (OTHER, 0o600));
    assert_eq!(fs::read(&made).unwrap(), vec![7; BYTES]);
}

#[track_caller]
fn mode(path: &str) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

/// Ends it and waits.
fn end(running: Running) {
    running.signal(rustix::process::Signal::TERM);
    running.end();
}

#[test]
fn sockets_were_open_to_whom_the_umask_let_in() {
    for umask in ["000", "022", "077"] {
        let folder = Folder::new();
        let socket = folder.text("socket");
        let listen = format!("unix:{socket}");
        let (memory, moves) = (format!("{}@0,size=4096,create", folder.text("memory")), folder.text("moves"));
        let all: [&[&str]; 3] = [
            &["serve", "uart", "--socket", &socket],
            &["receive", "--memory", &memory, "--listen", &listen, "--moves", &moves],
            &["answer", "--listen", &listen, "--moves", &moves],
        ];
        for args in all {
            let running = start_under(umask, args);
            running.line("listening on");
            assert_eq!(mode(&socket), 0o600, "{} under umask {umask}", args[0]);
            end(running);
            assert!(!Path::new(&socket).exists(), "{}", args[0]);
        }
        let group = rustix::process::getegid().as_raw().to_string();
        let wide = ["serve", "uart", "--socket", &socket, "--mode", "660", "--group", &group];
        let running = start_under(umask, &wide);
        running.line("listening on");
        assert_eq!(mode(&socket), 0o660);
        end(running);
        limosa(&["serve", "uart", "--socket", &socket, "--mode", "066"]).fails(2, &["--mode", "such as 660"]);
        limosa(&["serve", "uart", "--socket", &socket, "--group", "no-such-group"])
            .fails(2, &["--group", "/etc/group"]);
    }
}

#[test]
fn a_socket_that_another_process_put_in_the_place_of_the_own_was_removed() {
    let folder = Folder::new();
    let socket = folder.text("socket");
    let listen = format!("unix:{socket}");
    let memory = format!("{}@0,size=4096,create", folder.text("memory"));
    let all: [&[&str]; 3] = [
        &["serve", "uart", "--socket", &socket],
        &["receive", "--memory", &memory, "--listen", &listen],
        &["answer", "--listen", &listen],
    ];
    for args in all {
        let running = start(args);
        running.line("listening on");
        fs::remove_file(&socket).unwrap();
        let other = UnixListener::bind(&socket).unwrap();
        end(running);
        assert!(Path::new(&socket).exists(), "{}", args[0]);
        drop(other);
        fs::remove_file(&socket).unwrap();
    }
}

#[test]
fn a_server_of_another_user_was_trusted_with_the_guest() {
    if !can_be_another("a_server_of_another_user_was_trusted_with_the_guest") {
        return;
    }
    let folder = Folder::new().open_to_all();
    let others = folder.others("others");
    let (device, user) = (format!("{others}/device"), OTHER.to_string());
    let server = start_as_other(&["serve", "synthetic", "--socket", &device, "-o", "state=1M"]);
    server.line("listening on");
    let both = ["root (0)", &user, "--server-uid", &device];
    let refused = limosa(&["probe", &device]);
    assert!(!refused.err.contains("root (0) or root (0)"), "{refused:?}");
    refused.fails(4, &both);
    limosa(&["save", &device, &folder.text("saved.lmsa")]).fails(4, &both);
    limosa(&["probe", &device, "--server-uid", "4242"]).fails(4, &["user 4242", "--server-uid"]);
    limosa(&["probe", &device, "--server-uid", &user]).ok();
    end(server);

    let (memory, moves) = (format!("{others}/memory@0,size={BYTES},create"), format!("{others}/moves"));
    let to = format!("unix:{others}/link");
    let receiver = start_as_other(&["receive", "--memory", &memory, "--listen", &to, "--moves", &moves]);
    receiver.line("listening on");
    fs::write(folder.path("guest"), vec![7; BYTES]).unwrap();
    let guest = format!("{}@0", folder.text("guest"));
    let mut send = vec!["send", "--memory", &guest, "--guest-stopped", "--to", &to];
    limosa(&send).fails(4, &["root (0)", &user, "--server-uid"]);
    send.extend(["--server-uid", &user]);
    limosa(&send).ok();
    receiver.end().ok();
    assert_eq!(fs::read(format!("{others}/memory")).unwrap(), vec![7; BYTES]);

    // Root's servers are trusted by all, if they let them in.
    let ours = folder.text("ours");
    let server = start(&["serve", "uart", "--socket", &ours, "--mode", "666"]);
    server.line("listening on");
    start_as_other(&["probe", &ours]).end().ok();
    end(server);
    let server = start(&["serve", "uart", "--socket", &ours]);
    server.line("listening on");
    start_as_other(&["probe", &ours]).end().fails(4, &["ermission denied"]);
    end(server);
}

#[test]
fn a_lines_terminal_is_used_with_the_access_that_its_process_has() {
    let folder = Folder::new().open_to_all();
    let held = secret(&folder, "held");
    let holder = Holder::start(&[("path", &held)]);
    let line = format!("line={}", holder.name(0));
    limosa(&["serve", "uart", "--socket", &folder.text("socket"), "-o", &line]).fails(4, &["O_PATH", &line]);
}

#[test]
fn what_others_name_does_nothing_on_a_terminal() {
    let folder = Folder::new();
    let wild = folder.text("a\x1b[2J\u{9b}\u{202e}b");
    let said = limosa(&["verify", &wild]);
    said.fails(4, &["a\\u{1b}[2J\\u{9b}\\u{202e}b"]);
    assert!(said.err.chars().all(|c| c == '\n' || limosa_stream::is_printable(c)), "{said:?}");
    let memory = format!("{}@0", folder.text("memory"));
    fs::write(folder.path("memory"), vec![7; BYTES]).unwrap();
    limosa(&["save", &wild, "--memory", &memory, "--guest-stopped"]).ok();
    let said = limosa(&["verify", &wild, "--json"]);
    assert!(said.out.chars().all(|c| c == '\n' || limosa_stream::is_printable(c)), "{said:?}");
    assert_eq!(said.json()["place"], wild);
    let_others_borrow();
    let held = fs::File::open(&wild).unwrap();
    let said = limosa(&["verify", &format!("/proc/{}/fd/{}", std::process::id(), held.as_raw_fd())]).ok();
    assert!(said.contains("whole"), "a snapshot that a process holds is borrowed from it: {said}");
}
