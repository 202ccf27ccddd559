//! Servers that start the process in their place themselves, at SIGUSR2: their own command line, by the path at which another
//! program may have been installed since.

use std::os::unix::fs::symlink;
use std::process::Command;

use super::*;

/// What the new process says once it serves.
const SERVES: &str = " serves in place of process ";
const FAILED: &str = "not replaced: this server goes on";
/// What a new server does until the old one takes back.
const HANGS: &[&str] = &["state=1M", "fault=stall:RESUMING>STOP:60000"];

/// A server and its successors, all of which write to the same pipes.
struct Installed {
    folder: Folder,
    names: &'static [&'static str],
    running: Running,
    pid: Pid,
}

impl Installed {
    fn start(names: &'static [&'static str], options: &[&str]) -> Installed {
        Installed::start_with(names, options, &[])
    }

    fn start_with(names: &'static [&'static str], options: &[&str], more: &[&str]) -> Installed {
        let folder = Folder::new();
        symlink(env!("CARGO_BIN_EXE_limosa"), folder.path("limosa")).unwrap();
        let config = describe(&folder, names, options);
        let takeover = folder.text("takeover");
        let args = ["-vv", "serve", "--config", &config, "--takeover", &takeover];
        let running = crate::support::start_program(&folder.path("limosa"), &[&args, more].concat());
        for name in names {
            running.line(&format!("listening on {}", folder.text(name)));
        }
        let pid = number(&running.pid());
        Installed { folder, names, running, pid }
    }

    /// The devices have these options from the next process on.
    fn describe(&self, options: &[&str]) {
        describe(&self.folder, self.names, options);
    }

    /// The next process runs this. A shell writes it, so that this process has it open for writing at no time.
    fn install(&self, script: &str) {
        let path = self.folder.path("limosa");
        std::fs::remove_file(&path).unwrap();
        let write = "printf '#!/bin/sh\\n%s\\n' \"$2\" >\"$1\" && chmod 700 \"$1\"";
        let written = Command::new("/bin/sh").args(["-c", write, "sh"]).arg(path).arg(script).status();
        assert!(written.unwrap().success());
    }

    fn signal(&self, signal: Signal) {
        kill_process(self.pid, signal).unwrap();
    }

    /// The number of a process that the server has started.
    fn child(&self) -> Pid {
        number(self.running.after("a new process is started, which takes over pid=").as_str())
    }

    /// Waits until another process serves.
    fn is_replaced(&mut self) {
        let line = loop {
            let line = self.running.next_line().unwrap_or_else(|| panic!("{}", self.running.err()));
            if line.contains(SERVES) {
                break line;
            }
        };
        let (new, old) = line.strip_prefix("process ").unwrap().split_once(SERVES).unwrap();
        let (old, _) = old.split_once(',').unwrap();
        assert_eq!(std::mem::replace(&mut self.pid, number(new)), number(old));
    }

    fn connect(&self) -> Vec<Client> {
        self.names.iter().map(|name| connect(&self.folder, name)).collect()
    }

    /// The server ends when it is told so, and all of its predecessors have.
    fn end(self) -> Ended {
        self.signal(Signal::TERM);
        let ended = self.running.end();
        for socket in self.names.iter().chain(&["takeover"]) {
            assert!(!self.folder.path(socket).exists(), "{socket} is left");
        }
        ended
    }
}

fn describe(folder: &Folder, names: &[&str], options: &[&str]) -> String {
    file(folder, "synthetic", &names.iter().map(|name| (*name, options)).collect::<Vec<_>>())
}

fn number(text: &str) -> Pid {
    let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
    Pid::from_raw(digits.parse().unwrap_or_else(|_| panic!("no number: {text}"))).unwrap()
}

#[test]
fn clients_lose_nothing_while_their_server_replaces_itself() {
    let mut server = Installed::start(MANY, &["state=1M", "seed=5", "dirty-rate=16M"]);
    let clients = server.connect();
    let guests: Vec<_> = clients.iter().map(Guest::start).collect();
    let ends = AtomicBool::new(false);
    const TIMES: u64 = 5;
    std::thread::scope(|scope| {
        let workers: Vec<_> = clients.iter().map(|client| scope.spawn(|| works(client, &ends))).collect();
        for _ in 0..TIMES {
            server.signal(Signal::USR2);
            server.is_replaced();
        }
        ends.store(true, Ordering::Relaxed);
        assert!(workers.into_iter().all(|worker| worker.join().unwrap() > TIMES));
    });
    for (guest, client) in guests.iter().zip(&clients) {
        assert!(guest.check(client) > PAGES);
        guest.is_interrupted(client);
    }
    drop(clients);
    server.end().ok();
}

#[test]
fn a_new_version_at_the_same_path_runs_with_the_same_arguments_folder_and_environment() {
    let mut server = Installed::start(ONE, &["state=1M"]);
    let client = connect(&server.folder, "device");
    set(&client, SCRATCH, 3);
    let seen = server.folder.text("seen");
    let program = env!("CARGO_BIN_EXE_limosa");
    server.install(&format!(
        "{{ echo \"$@\"; pwd; env; echo fds; ls /proc/self/fd; }} >{seen}\nexec {program} \"$@\""
    ));
    server.signal(Signal::USR2);
    server.is_replaced();
    assert_eq!(get(&client, SCRATCH), 3);
    let seen = std::fs::read_to_string(seen).unwrap();
    let (seen, fds) = seen.split_once("fds\n").unwrap();
    let here = std::env::current_dir().unwrap();
    for part in ["-vv serve --config ", "XDG_STATE_HOME=", "LIMOSA_OLD_SERVER=", here.to_str().unwrap()] {
        assert!(seen.contains(part), "{seen}");
    }
    // The channel, both outputs, what the shell has of its own, what `ls` reads, and what this process has inherited itself.
    let inherited = Command::new("ls").arg("/proc/self/fd").output().unwrap().stdout;
    let inherited = String::from_utf8(inherited).unwrap();
    let expected: Vec<_> = inherited.lines().chain(["0", "1", "2", "3", "10", "255"]).collect();
    assert!(fds.lines().all(|fd| expected.contains(&fd)), "{fds} and not {expected:?}");
    server.end().ok();
}

#[test]
fn a_program_that_is_not_there_or_ends_at_once_leaves_the_old_server_serving() {
    for (script, parts) in [
        (None, &["limosa cannot be started", "No such file"][..]),
        (Some("exit 7"), &["step hello", "has ended: exit status: 7"]),
        (Some("kill -9 $$"), &["has ended: signal: 9"]),
    ] {
        let mut server = Installed::start(ONE, &["state=1M"]);
        let client = connect(&server.folder, "device");
        match script {
            Some(script) => server.install(script),
            None => std::fs::remove_file(server.folder.path("limosa")).unwrap(),
        }
        server.signal(Signal::USR2);
        let failed = server.running.line(FAILED);
        for part in parts {
            assert!(failed.contains(part), "`{part}` is not named: {failed}");
        }
        assert_eq!(client.state().unwrap(), State::Running);
        // It can be tried again.
        let _ = std::fs::remove_file(server.folder.path("limosa"));
        symlink(env!("CARGO_BIN_EXE_limosa"), server.folder.path("limosa")).unwrap();
        server.signal(Signal::USR2);
        server.is_replaced();
        assert_eq!(client.state().unwrap(), State::Running);
        server.end().ok();
    }
}

#[test]
fn a_file_that_does_not_fit_any_more_is_named_in_the_log_and_the_old_server_goes_on() {
    let server = Installed::start(MANY, &["state=1M"]);
    let clients = server.connect();
    server.describe(&["state=2M"]);
    server.signal(Signal::USR2);
    let failed = server.running.line(FAILED);
    for part in ["region 2", &server.folder.text("device"), "has ended: exit status: 3"] {
        assert!(failed.contains(part), "`{part}` is not named: {failed}");
    }
    clients.iter().for_each(|client| assert_eq!(client.state().unwrap(), State::Running));
    server.end().ok();
}

#[test]
fn a_new_device_that_hangs_in_its_load_is_named_in_the_log_and_the_old_server_goes_on() {
    let server = Installed::start(MANY, &["state=1M"]);
    let clients = server.connect();
    server.describe(HANGS);
    server.signal(Signal::USR2);
    let failed = server.running.line(FAILED);
    for part in [&*server.folder.text("device"), "the new device was not loaded"] {
        assert!(failed.contains(part), "`{part}` is not named: {failed}");
    }
    clients.iter().for_each(|client| assert_eq!(client.state().unwrap(), State::Running));
    server.end().ok();
}

#[test]
fn a_server_that_waits_for_its_new_process_serves_on_and_ends_when_it_is_told() {
    let server = Installed::start(ONE, &["state=1M"]);
    let client = connect(&server.folder, "device");
    server.install("exec sleep 1000");
    server.signal(Signal::USR2);
    let child = pidfd_open(server.child(), PidfdFlags::empty()).unwrap();
    set(&client, SCRATCH, 9);
    assert_eq!(get(&client, SCRATCH), 9);
    server.end().ok();
    let limit = Timespec::try_from(LIMIT).unwrap();
    assert_eq!(poll(&mut [PollFd::new(&child, PollFlags::IN)], Some(&limit)), Ok(1), "it was killed");
}

#[test]
fn signals_that_come_together_replace_a_server_once_or_one_after_the_other() {
    let mut server = Installed::start(ONE, &["state=1M"]);
    let client = connect(&server.folder, "device");
    set(&client, SCRATCH, 4);
    for _ in 0..3 {
        server.signal(Signal::USR2);
    }
    server.is_replaced();
    server.signal(Signal::USR2);
    server.is_replaced();
    assert_eq!(get(&client, SCRATCH), 4);
    server.end().ok();
}

#[test]
fn a_server_that_took_over_by_a_path_replaces_itself_too() {
    let scene = Scene::new(ONE, &["state=1M"]);
    let old = scene.first("synthetic");
    let client = connect(&scene.folder, "device");
    set(&client, SCRATCH, 6);
    let new = scene.next("synthetic");
    old.end().ok();
    while !new.next_line().unwrap().contains(SERVES) {}
    new.signal(Signal::USR2);
    let serves = loop {
        let line = new.next_line().unwrap();
        if line.contains(SERVES) {
            break line;
        }
    };
    assert!(serves.contains(&format!("{SERVES}{}", new.pid())), "{serves}");
    assert_eq!(get(&client, SCRATCH), 6);
    kill_process(number(serves.strip_prefix("process ").unwrap()), Signal::TERM).unwrap();
    new.end().ok();
}

#[test]
fn a_new_process_that_is_killed_at_any_step_leaves_the_old_server_serving() {
    for moment in ["a new process is started", "step=offer", "step=prepare", "step=rest"] {
        let mut server = Installed::start(MANY, &["state=1M"]);
        let clients = server.connect();
        let guests: Vec<_> = clients.iter().map(Guest::start).collect();
        server.describe(HANGS);
        server.signal(Signal::USR2);
        server.running.line(moment);
        kill_process(server.child(), Signal::KILL).unwrap();
        assert!(server.running.line(FAILED).contains("signal: 9"), "{moment}");
        for (guest, client) in guests.iter().zip(&clients) {
            assert!(guest.check(client) > 0, "{moment}");
        }
        server.describe(&["state=1M"]);
        server.signal(Signal::USR2);
        server.is_replaced();
        guests.iter().zip(&clients).for_each(|(guest, client)| guest.is_interrupted(client));
        server.end().ok();
    }
}

#[test]
fn an_old_server_that_is_killed_once_all_is_handed_over_is_replaced_by_its_child() {
    let mut server = Installed::start(MANY, &["state=1M"]);
    let clients = server.connect();
    let guests: Vec<_> = clients.iter().map(Guest::start).collect();
    server.describe(&["state=1M", "fault=stall:RESUMING>STOP:1000"]);
    server.signal(Signal::USR2);
    // The new process stands still in its load.
    server.running.line("stalls as scripted");
    server.signal(Signal::KILL);
    server.is_replaced();
    for (guest, client) in guests.iter().zip(&clients) {
        assert!(guest.check(client) > 0);
        guest.is_interrupted(client);
    }
    server.signal(Signal::TERM);
    assert_eq!(server.running.end().code, -Signal::KILL.as_raw());
}

#[test]
fn an_old_server_that_is_killed_before_leaves_no_child() {
    let server = Installed::start(ONE, &["state=1M", "fault=stall:PRE_COPY_P2P>STOP_COPY:60000"]);
    let client = connect(&server.folder, "device");
    server.signal(Signal::USR2);
    server.running.line("stalls as scripted");
    server.signal(Signal::KILL);
    let Ended { code, err, .. } = server.running.end();
    assert!(
        code == -Signal::KILL.as_raw() && err.contains("cannot take over from process "),
        "{code}: {err}"
    );
    assert!(client.state().is_err());
}

#[test]
fn a_server_without_takeover_ignores_the_signal_and_says_so() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    device.signal(Signal::USR2);
    device.line("SIGUSR2: this server is not replaced, as it was started without --takeover");
    assert_eq!(device.state(), State::Running);
}

#[test]
fn a_variable_that_no_server_has_set_is_refused_by_name() {
    let folder = Folder::new();
    let socket = folder.text("device");
    let old = vec![("LIMOSA_OLD_SERVER".to_owned(), "1".to_owned())];
    let refused = crate::support::limosa_with(&old, &["serve", "uart", "--socket", &socket]);
    refused.fails(2, &["LIMOSA_OLD_SERVER", "no channel to process 1"]);
    assert!(!folder.path("device").exists());
}
