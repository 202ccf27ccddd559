//! Both servers in processes of their own, killed (SIGKILL) at each named moment of the old one, and at each point of the new one,
//! under a client that keeps asking. Afterwards exactly one serves, if one lives that can.
//!
//! The points of the new server are its named moments and all that it traces while it takes over: each frame that it gets or sends,
//! each fd, each step, and both sides of the commit. An attempt that nobody disturbs counts them.
//!
//! The processes are this test's own program, which `role` turns into a server.

mod process;
#[path = "../toy/mod.rs"]
mod toy;

use std::fs;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::{Duration, Instant};

use limosa_host::SocketAccess;
use limosa_switch_over::{
    Ending, GiveLimits, GiveOptions, OldServer, Peer, Step, TakeOptions, TakeOver, give_to_child, take,
};
use limosa_testing::copy_of_this_program;
use limosa_testing::points::{self, KILL_AT, at};
use process::{Process, this_program};
use rustix::process::{DumpableBehavior, PTracer, set_dumpable_behavior, set_ptracer};
use toy::{Client, Place, Server, ToyGiver, ToyTaker};

/// How the new server comes by the old one's fds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Path,
    Child,
}

const FOLDER: &str = "TOY_FOLDER";
const ROLE: &str = "TOY_ROLE";
const WAY: &str = "TOY_WAY";
/// The moment at which the new process that the old one starts kills itself.
const KILL_CHILD: &str = "TOY_KILL_CHILD";
/// After it has given, the process remains.
const LINGER: &str = "TOY_LINGER";
/// No process of the same user may attach to this one.
const GUARDED: &str = "TOY_GUARDED";

fn setting(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn at_step(step: Step) {
    at(step.name());
}

/// A process of the test's, when the environment says so.
#[test]
fn role() {
    let Some(role) = setting(ROLE) else { return };
    let fds = open_fds();
    // Where kernel.yama.ptrace_scope is 1, siblings may not attach unless they are let. EINVAL without Yama.
    let _ = set_ptracer(PTracer::Any);
    let folder = PathBuf::from(setting(FOLDER).unwrap());
    let path = folder.join("take-over");
    let name = format!("toy {}", std::process::id());
    let options = TakeOptions { name: &name, observer: Some(&at_step), ..TakeOptions::default() };
    let server = match role.as_str() {
        "old" => {
            let (path, listener) =
                limosa_host::listen(&folder.join("toy"), &SocketAccess::default()).unwrap();
            if setting(GUARDED).is_some() {
                set_dumpable_behavior(DumpableBehavior::NotDumpable).unwrap();
            }
            say("listening");
            Server::start(listener.accept().unwrap().0, Place { path, listener })
        }
        "new" => {
            let from = match setting(WAY).as_deref() {
                Some("Child") => {
                    let channel = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
                    OldServer::Parent(UnixStream::from(channel))
                }
                _ => OldServer::Path(&path),
            };
            let taken = points::within(|| take(from, ToyTaker::new(at), &options));
            let committed = points::number_of("committed").unwrap_or(0);
            say(&format!("passed {} points, the commit at {committed}", points::passed()));
            let taken = match taken {
                Ok(taken) => taken,
                Err(error) => {
                    say(&format!("failed: {error}"));
                    std::process::exit(3);
                }
            };
            let limit = if setting(LINGER).is_some() { Duration::ZERO } else { Duration::from_secs(60) };
            match taken.old.see_off(limit).unwrap() {
                Ending::Ended => say("the old one ended"),
                Ending::Killed => say("the old one was killed"),
                Ending::Remains => panic!("the old one is still there"),
            }
            taken.server
        }
        other => panic!("no role {other}"),
    };
    serve(server, &path, &name, fds);
}

fn open_fds() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// How many fds are open beside those, once threads that close some have done so.
fn fds_beside(before: usize) -> usize {
    let limit = Instant::now() + Duration::from_secs(20);
    while open_fds() != before + FDS && Instant::now() < limit {
        thread::yield_now();
    }
    open_fds() - before
}

/// Fds of a server: its connection, the socket for clients, and the one for new servers.
const FDS: usize = 3;

/// Serves until it is given away.
fn serve(server: Arc<Server>, path: &Path, name: &str, fds: usize) {
    let giver = ToyGiver { server, at };
    let limits = GiveLimits { freeze: Duration::from_secs(30), ..GiveLimits::default() };
    let options = GiveOptions { name, limits, observer: Some(&at_step) };
    let take_over = TakeOver::listen(path).unwrap();
    say(&format!("serving with {} fds", fds_beside(fds)));
    loop {
        let given = match setting(WAY).as_deref() {
            Some("Child") => start_child(&giver, &options),
            _ => take_over.serve_one(&giver, &options, None),
        };
        match given {
            Ok(given) => {
                say(&format!("given after {} ns", given.report.standstill.as_nanos()));
                break;
            }
            Err(error) => say(&format!("kept: {error}")),
        }
    }
    if setting(LINGER).is_some() {
        loop {
            thread::park();
        }
    }
    drop(take_over);
    std::process::exit(0);
}

/// At a word from the test, starts the new server as a child.
fn start_child(
    giver: &ToyGiver,
    options: &GiveOptions,
) -> Result<limosa_switch_over::Given, limosa_switch_over::Error> {
    let mut word = String::new();
    // A child is told nothing, and ends with its client.
    if !std::io::stdin().read_line(&mut word).is_ok_and(|bytes| bytes > 0) {
        giver.server.until_ended();
        std::process::exit(0);
    }
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut command = this_program("new", Path::new(&setting(FOLDER).unwrap()), Way::Child);
    command.stdin(Stdio::from(OwnedFd::from(theirs))).env_remove(KILL_AT);
    if let Some(moment) = setting(KILL_CHILD).filter(|_| word.trim() == "first") {
        command.env(KILL_AT, moment);
    }
    let mut child = command.spawn().unwrap();
    drop(command);
    let given = give_to_child(ours, giver, options, None);
    match given {
        Ok(_) => drop(child),
        Err(_) => drop(child.wait().unwrap()),
    }
    given
}

/// A line that the test reads. The test runner may have written something before it. Without a reader the test is over, and
/// so is the process.
fn say(what: &str) {
    if writeln!(std::io::stdout(), "toy: {what}").is_err() {
        std::process::exit(0);
    }
}

/// An old server with a client.
fn old_server(folder: &Path, way: Way, settings: &[(&str, &str)]) -> (Process, Client) {
    let mut old = Process::start("old", folder, way, settings);
    old.says("listening");
    let client = Client::new(UnixStream::connect(folder.join("toy")).unwrap());
    old.says("serving");
    (old, client)
}

/// Runs `meanwhile` while the client asks.
fn asking<R>(client: Client, meanwhile: impl FnOnce() -> R) -> (Client, R) {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let client = scope.spawn(|| client.ask_until(&stop));
        let result = meanwhile();
        stop.store(true, SeqCst);
        (client.join().unwrap(), result)
    })
}

/// How many points a new server passes, and the number of its commit.
fn points_of(way: Way) -> (usize, usize) {
    let folder = tempfile::tempdir().unwrap();
    let (mut old, client) = old_server(folder.path(), way, &[]);
    let (_client, said) = asking(client, || match way {
        Way::Path => Process::start("new", folder.path(), way, &[]).says("passed"),
        Way::Child => {
            old.tell("first");
            old.says("passed")
        }
    });
    let numbers: Vec<usize> = said.split([' ', ',']).filter_map(|word| word.parse().ok()).collect();
    let [passed, committed] = numbers[..] else { panic!("{said}") };
    // Both sides of the commit, and at least a point for each frame of either side before it.
    assert!(committed > 20 && committed + 2 < passed, "{said}");
    (passed, committed)
}

#[test]
fn a_new_process_that_is_killed_at_any_point_before_it_commits_leaves_the_old_one_serving() {
    let (_, committed) = points_of(Way::Path);
    for point in 0..committed {
        let folder = tempfile::tempdir().unwrap();
        let (mut old, client) = old_server(folder.path(), Way::Path, &[]);
        let (mut client, ()) = asking(client, || {
            let mut new = Process::start("new", folder.path(), Way::Path, &[(KILL_AT, &point.to_string())]);
            assert!(new.was_killed(), "{point}");
        });
        assert!(client.ask(100), "{point}: the old one serves");
        // And it is whole: another new server takes over.
        let (mut client, mut new) = asking(client, || {
            let mut new = Process::start("new", folder.path(), Way::Path, &[]);
            new.says("the old one ended");
            new
        });
        assert!(old.ended().success());
        assert!(client.ask(100), "{point}: the new one serves");
        new.says("serving");
    }
}

#[test]
fn a_child_that_is_killed_at_any_point_before_it_commits_leaves_its_parent_serving() {
    let (_, committed) = points_of(Way::Child);
    for point in 0..committed {
        let folder = tempfile::tempdir().unwrap();
        let number = point.to_string();
        let (mut old, client) = old_server(folder.path(), Way::Child, &[(KILL_CHILD, &number)]);
        let (mut client, ()) = asking(client, || {
            old.tell("first");
            old.says("kept");
        });
        assert!(client.ask(100), "{point}: the old one serves");
        let (mut client, ()) = asking(client, || {
            old.tell("second");
            old.says("the old one ended");
        });
        assert!(old.ended().success());
        assert!(client.ask(100), "{point}: the child serves");
        // It ends as its client does.
        old.says("serving");
    }
}

#[test]
fn an_old_process_that_is_killed_before_all_is_handed_over_leaves_nobody_that_serves() {
    for moment in
        ["hello", "in offer", "offer", "in prepare", "prepare", "in freeze", "freeze", "in rest", "rest"]
    {
        let folder = tempfile::tempdir().unwrap();
        let (mut old, client) = old_server(folder.path(), Way::Path, &[(KILL_AT, moment)]);
        let (mut client, ()) = asking(client, || {
            let mut new = Process::start("new", folder.path(), Way::Path, &[]);
            let why = new.says("failed");
            assert!(why.contains("closed the channel or ended"), "{moment}: {why}");
            assert_eq!(new.ended().code(), Some(3), "{moment}");
        });
        assert!(old.was_killed(), "{moment}");
        assert!(!client.ask(1), "{moment}: nobody has the state");
    }
}

#[test]
fn an_old_process_that_is_killed_once_all_is_handed_over_leaves_the_new_one_serving() {
    for moment in ["load", "in given", "running"] {
        for way in [Way::Path, Way::Child] {
            let folder = tempfile::tempdir().unwrap();
            let (mut old, client) = old_server(folder.path(), way, &[(KILL_AT, moment)]);
            let (mut client, new) = asking(client, || match way {
                Way::Path => {
                    let mut new = Process::start("new", folder.path(), way, &[]);
                    new.says("serving");
                    Some(new)
                }
                Way::Child => {
                    old.tell("first");
                    old.says("serving");
                    None
                }
            });
            assert!(old.was_killed(), "{moment} {way:?}");
            assert!(client.ask(100), "{moment} {way:?}: the new one serves");
            drop(new);
        }
    }
}

#[test]
fn a_new_process_that_is_killed_at_any_point_after_its_commit_was_the_only_server() {
    let (passed, committed) = points_of(Way::Path);
    for point in committed..passed {
        let folder = tempfile::tempdir().unwrap();
        let (mut old, client) = old_server(folder.path(), Way::Path, &[]);
        let (mut client, ()) = asking(client, || {
            let mut new = Process::start("new", folder.path(), Way::Path, &[(KILL_AT, &point.to_string())]);
            assert!(new.was_killed(), "{point}");
            old.says("given");
        });
        assert!(old.ended().success(), "{point}");
        assert!(!client.ask(1), "{point}: the old one does not serve from an old state");
    }
}

#[test]
fn an_old_process_that_does_not_end_is_killed_by_the_new_one() {
    let folder = tempfile::tempdir().unwrap();
    let (mut old, client) = old_server(folder.path(), Way::Path, &[(LINGER, "1")]);
    let (mut client, mut new) = asking(client, || {
        let mut new = Process::start("new", folder.path(), Way::Path, &[(LINGER, "1")]);
        new.says("the old one was killed");
        new
    });
    assert!(old.was_killed());
    assert!(client.ask(100));
    new.says("serving");
}

#[test]
fn a_chain_of_servers_keeps_its_client_and_no_fd() {
    let folder = tempfile::tempdir().unwrap();
    let (mut server, mut client) = old_server(folder.path(), Way::Path, &[]);
    for generation in 0..25 {
        let (asked, next) = asking(client, || {
            let mut next = Process::start("new", folder.path(), Way::Path, &[]);
            assert_eq!(next.says("serving"), format!("serving with {FDS} fds"), "generation {generation}");
            next
        });
        assert!(server.ended().success());
        // The socket for clients is there, and is that of the new process.
        let another = UnixStream::connect(folder.path().join("toy")).unwrap();
        assert_eq!(Peer::of(&another).unwrap().pid(), next.pid());
        (server, client) = (next, asked);
    }
    assert!(client.ask(100));
}

/// The user whose processes the test starts where it may: one without rights, as root may attach to any process.
const NOBODY: u32 = 65_534;

#[test]
fn a_process_of_the_same_user_that_may_not_attach_gets_nothing() {
    let folder = tempfile::tempdir().unwrap();
    // Where that user can reach it.
    let program = folder.path().join("program");
    copy_of_this_program(&program);
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let is_root = rustix::process::geteuid().is_root();
    if is_root {
        std::os::unix::fs::chown(folder.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let start = |role: &str, settings: &[(&str, &str)]| {
        let as_named = this_program(role, folder.path(), Way::Path);
        let mut command = Command::new(&program);
        command.args(as_named.get_args());
        command.envs(as_named.get_envs().filter_map(|(name, value)| Some((name, value?))));
        if is_root {
            command.uid(NOBODY).gid(NOBODY);
        }
        Process::spawn(command, settings)
    };
    for guarded in [true, false] {
        let settings = [(GUARDED, "1")];
        let mut old = start("old", if guarded { &settings } else { &[] });
        old.says("listening");
        let client = Client::new(UnixStream::connect(folder.path().join("toy")).unwrap());
        old.says("serving");
        let (mut client, mut new) = asking(client, || start("new", &[]));
        if guarded {
            let why = new.says("failed");
            assert!(why.contains("kernel.yama.ptrace_scope"), "{why}");
            assert!(why.contains("run the new server as root"), "{why}");
            assert_eq!(new.ended().code(), Some(3));
        } else {
            new.says("serving");
        }
        assert!(client.ask(100));
        fs::remove_file(folder.path().join("toy")).unwrap();
    }
}
