//! `limosa switch-over`: it starts the new server and says how it went, and what it refuses.

use super::*;

/// What `limosa switch-over` said. Its new server goes on, with its log in a file.
pub(super) struct Switched {
    pub(super) code: i32,
    pub(super) document: Value,
    pub(super) err: String,
}

impl Switched {
    /// It failed so, and named each of these.
    #[track_caller]
    pub(super) fn fails(&self, code: i32, parts: &[&str]) {
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

pub(super) fn switch_over(folder: &Folder, args: &[&str], command: &[&str]) -> Switched {
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

pub(super) fn switch_over_by(folder: &Folder, command: &[String]) -> Switched {
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    switch_over(folder, &[], &[&[env!("CARGO_BIN_EXE_limosa")], &command[..]].concat())
}

/// A server that is no child of this process. Told to end when it is dropped.
pub(super) struct Stranger {
    pid: Pid,
    fd: OwnedFd,
}

impl Stranger {
    pub(super) fn of(document: &Value) -> Stranger {
        let pid = document["took_over"]["pid"].as_i64().unwrap_or_else(|| panic!("{document}"));
        let pid = Pid::from_raw(pid.try_into().unwrap()).unwrap();
        Stranger { pid, fd: pidfd_open(pid, PidfdFlags::empty()).unwrap() }
    }

    pub(super) fn wait(&self) {
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
fn a_full_disk_behind_standard_output_was_told_as_an_old_server_that_serves() {
    let scene = Scene::new(ONE, &[]);
    let old = scene.first("synthetic");
    let (takeover, device, log) =
        (scene.folder.text("takeover"), scene.folder.text("device"), scene.folder.text("log"));
    let command = scene.serve("synthetic", &[], &[]);
    let mut args = vec!["switch-over", &takeover, "--log", &log, "--", env!("CARGO_BIN_EXE_limosa")];
    args.extend(command.iter().map(String::as_str));
    let (mut said, err) = std::io::pipe().unwrap();
    let code = crate::support::limosa_into(crate::support::full(), err, &args);
    let mut err = String::new();
    std::io::Read::read_to_string(&mut said, &mut err).unwrap();
    assert_eq!(code, 8, "{err}");
    assert!(err.contains("the new server serves, but standard output"), "{err}");
    let peer = std::os::unix::net::UnixStream::connect(device).unwrap();
    let pid = rustix::net::sockopt::socket_peercred(&peer).unwrap().pid.as_raw_nonzero().get();
    let _new = Stranger::of(&serde_json::json!({ "took_over": { "pid": pid } }));
    old.end().ok();
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
    limosa(&["switch-over", &device.socket, "--", "touch", &started]).fails(
        4,
        &[
            "the vfio-user socket of a device",
            "--takeover path of a server is expected",
            &device.socket,
            "nothing was started",
        ],
    );
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

#[test]
fn a_log_in_a_fifo_that_nobody_reads_was_waited_for() {
    let scene = Scene::new(ONE, &["state=1M"]);
    let _server = scene.first("synthetic");
    let (takeover, fifo) = (scene.folder.text("takeover"), scene.folder.text("fifo"));
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RWXU).unwrap();
    limosa(&["switch-over", &takeover, "--log", &fifo, "--", "true"])
        .fails(4, &["--log", &fifo, "it is a FIFO that no process reads", "nothing was started"]);
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
