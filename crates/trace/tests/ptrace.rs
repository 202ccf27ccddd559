//! Programs under ptrace: what is seen of them, and that they do what they would do without it.
//!
//! The programs are tests of this file that are ignored, run as processes of their own.

mod common;

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::thread::JoinHandle;

use common::{Collected, collect, machine};
use limosa_client::{Chunk, DeviceExt};
use limosa_protocol::feature::FeatureMigState;
use limosa_protocol::{Errno, FeatureHeader, FeatureIndex, FeatureOp, State};
use limosa_testing::{Process, this_test};
use limosa_trace::event::{Event, Outcome, Request};
use limosa_trace::ptrace::{Control, Ended, Error, Target, trace};
use limosa_trace::sink::line;
use limosa_vfio_user::client::{self, Client};
use limosa_vfio_user::server::{self, Server};
use rustix::process::{Pid, Signal, kill_process};

/// Traces a target to its end.
fn traced(target: &Target) -> (Result<Ended, Error>, Vec<Event>) {
    let Collected { recorder, events } = collect();
    let ended = trace(target, &recorder.handle(), &Control::default());
    assert!(recorder.finish().is_empty());
    (ended, events())
}

fn words(words: &[&str]) -> Target {
    Target::Command(words.iter().map(OsString::from).collect())
}

fn shell(script: &str) -> Target {
    words(&["sh", "-c", script])
}

/// A test of this file as a program.
fn program(test: &str) -> Target {
    let command = this_test(test);
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    Target::Command(words.map(OsString::from).collect())
}

/// With the lines that were traced, if something is wrong with them.
fn lines(events: &[Event]) -> Vec<String> {
    events.iter().map(line).collect()
}

#[test]
#[ignore = "a program of another test"]
fn asks_what_is_no_device() {
    let null = File::open("/dev/null").unwrap();
    let mut argument = [0u32; 4];
    argument[..2].copy_from_slice(&{
        let header = FeatureHeader::new(FeatureIndex::MIG_DEVICE_STATE, FeatureOp::SET, 8);
        [header.argsz, header.flags]
    });
    let state = FeatureMigState::new(State::StopCopy);
    argument[2..].copy_from_slice(&[state.device_state, u32::MAX]);
    for request in [0x3b75, 0x3b6f, 0x3b6b] {
        // SAFETY: /dev/null knows no ioctl and writes to no argument, and this one has the length that it says.
        let answer = unsafe { libc::ioctl(null.as_raw_fd(), request as _, argument.as_mut_ptr()) };
        assert_eq!(answer, -1);
    }
}

#[test]
fn ioctls_are_shown_with_their_payload_and_errno() {
    let (ended, events) = traced(&program("asks_what_is_no_device"));
    assert_eq!(ended.unwrap(), Ended::Exited(0));
    let shown = lines(&events);
    let set = "/dev/null FEATURE SET MIG_DEVICE_STATE STOP_COPY -> ENOTTY";
    assert!(shown.iter().any(|line| line.contains(set)), "{shown:#?}");
    assert!(shown.iter().any(|line| line.contains("/dev/null DEVICE_RESET -> ENOTTY")), "{shown:#?}");
    assert!(shown.iter().any(|line| line.contains("/dev/null DEVICE_GET_INFO -> ENOTTY")), "{shown:#?}");
    assert_eq!(events[0].outcome, Outcome::Refused(Errno::ENOTTY));
}

#[test]
#[ignore = "a program of another test"]
fn walks_a_device_behind_a_socket() {
    let path = std::env::var_os("LIMOSA_TEST_SOCKET").unwrap();
    let client = Client::connect(path, client::Options::default()).unwrap();
    client.set_state(State::Stop).unwrap();
    let mut stream = client.set_state(State::StopCopy).unwrap().unwrap();
    let mut data = vec![0; 1 << 16];
    while let Chunk::Data(_) = stream.read(&mut data).unwrap() {}
    assert!(client.set_state(State::PreCopy).is_err());
}

#[test]
fn messages_on_a_clients_socket_are_shown_with_their_answers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("device.sock");
    let server = Server::bind(&path, machine(), server::Options::default()).unwrap();
    let shutdown = server.shutdown_handle();
    let serves = std::thread::spawn(move || server.serve());
    let Target::Command(words) = program("walks_a_device_behind_a_socket") else { unreachable!() };
    let variable = OsString::from(format!("LIMOSA_TEST_SOCKET={}", path.display()));
    let target = Target::Command([vec!["env".into(), variable], words].concat());
    let (ended, events) = traced(&target);
    shutdown.shut_down();
    serves.join().unwrap().unwrap();
    assert_eq!(ended.unwrap(), Ended::Exited(0));
    let shown = lines(&events);
    for part in [
        " device.sock VERSION 0.2 ",
        " FEATURE SET MIG_DEVICE_STATE STOP > STOP_COPY -> ok <",
        " FEATURE SET MIG_DEVICE_STATE STOP_COPY > PRE_COPY -> EINVAL",
    ] {
        assert!(shown.iter().any(|line| line.contains(part)), "{part}: {shown:#?}");
    }
    let bytes: u64 = events.iter().filter(|event| event.session_of.is_some()).map(|event| event.bytes).sum();
    assert!(bytes > 1 << 20, "{bytes} bytes of session data: {shown:#?}");
    assert!(!events.iter().any(|event| event.request == Request::Malformed), "{shown:#?}");
}

#[test]
fn a_command_ends_as_it_would_without_a_trace() {
    for (script, ended) in [
        ("exit 7", Ended::Exited(7)),
        ("kill -KILL $$", Ended::Killed(9)),
        ("kill -TERM $$", Ended::Killed(15)),
        // Signals arrive, also those of children, and what the shell does then.
        ("trap 'exit 3' USR1; kill -USR1 $$; exit 4", Ended::Exited(3)),
        ("(exit 5) & wait $!; exit $?", Ended::Exited(5)),
        ("exec sh -c 'exit 6'", Ended::Exited(6)),
        ("(kill -STOP $$; kill -CONT $$); exit 8", Ended::Exited(8)),
    ] {
        assert_eq!(traced(&shell(script)).0.unwrap(), ended, "{script}");
    }
}

#[test]
fn a_program_that_is_not_there_is_named() {
    let (ended, _) = traced(&words(&["no-such-program-anywhere"]));
    assert!(matches!(&ended, Err(Error::NoProgram(name)) if name == "no-such-program-anywhere"), "{ended:?}");
    let (ended, _) = traced(&words(&["/etc/passwd"]));
    assert!(matches!(&ended, Err(Error::NotStarted { errno: Errno::EACCES, .. })), "{ended:?}");
    let (ended, _) = traced(&words(&["/no/such/program"]));
    assert!(matches!(&ended, Err(Error::NotStarted { errno: Errno::ENOENT, .. })), "{ended:?}");
}

#[test]
#[ignore = "a program of another test"]
fn has_many_threads_that_ask() {
    std::thread::scope(|scope| {
        for _ in 0..200 {
            scope.spawn(asks_what_is_no_device);
        }
    });
}

#[test]
fn two_hundred_threads_are_followed() {
    let (ended, events) = traced(&program("has_many_threads_that_ask"));
    assert_eq!(ended.unwrap(), Ended::Exited(0));
    assert_eq!(events.len(), 3 * 200, "{:#?}", lines(&events));
}

#[test]
#[ignore = "a program of another test"]
fn starts_programs_that_ask() {
    // vfork and exec, by the standard library; then an exec by a thread that is not the first.
    let ask = || this_test("asks_what_is_no_device");
    assert!(ask().stdout(Stdio::null()).status().unwrap().success());
    asks_what_is_no_device();
    std::thread::spawn(move || std::os::unix::process::CommandExt::exec(&mut ask())).join().unwrap();
}

#[test]
fn children_and_other_programs_of_a_process_are_followed() {
    let (ended, events) = traced(&program("starts_programs_that_ask"));
    assert_eq!(ended.unwrap(), Ended::Exited(0));
    assert_eq!(events.len(), 3 * 3, "{:#?}", lines(&events));
}

/// Traces a process on a thread, once it is traced.
fn attach(process: &Process) -> (Control, JoinHandle<Result<Ended, Error>>) {
    let pid: i32 = process.pid().parse().unwrap();
    let control = Control::default();
    let of_thread = control.clone();
    let thread = std::thread::spawn(move || {
        let Collected { recorder, .. } = collect();
        let ended = trace(&Target::Process(pid), &recorder.handle(), &of_thread);
        recorder.finish();
        ended
    });
    while tracer_of(process) == "0" && !thread.is_finished() {
        std::thread::yield_now();
    }
    (control, thread)
}

fn tracer_of(process: &Process) -> String {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("TracerPid:"));
    line.unwrap().trim().to_owned()
}

#[test]
fn a_process_goes_on_when_its_trace_ends() {
    let mut process = Process::start_with_input(&mut Command::new("cat"), Stdio::piped());
    let (control, thread) = attach(&process);
    process.say("one");
    process.line("one");
    control.stop();
    assert_eq!(thread.join().unwrap().unwrap(), Ended::Detached);
    assert_eq!(tracer_of(&process), "0");
    process.say("two");
    process.line("two");
    assert_eq!(process.end().code, 0);
}

#[test]
fn a_process_that_is_stopped_stays_so() {
    let process = Process::start(Command::new("sleep").arg("1000"));
    process.signal(Signal::STOP);
    while !process.is_stopped() {
        std::thread::yield_now();
    }
    let (control, thread) = attach(&process);
    control.stop();
    assert_eq!(thread.join().unwrap().unwrap(), Ended::Detached);
    assert_eq!(tracer_of(&process), "0");
    while !process.is_stopped() {
        std::thread::yield_now();
    }
    process.kill();
}

#[test]
fn a_process_that_dies_under_its_trace_ends_it() {
    let process = Process::start(Command::new("sleep").arg("1000"));
    let (_control, thread) = attach(&process);
    kill_process(Pid::from_raw(process.pid().parse().unwrap()).unwrap(), Signal::KILL).unwrap();
    assert_eq!(thread.join().unwrap().unwrap(), Ended::Killed(9));
}

#[test]
fn what_cannot_be_traced_is_refused_with_its_reason() {
    let process = Process::start(Command::new("sleep").arg("1000"));
    let (control, thread) = attach(&process);
    let pid: i32 = process.pid().parse().unwrap();
    let (again, _) = traced(&Target::Process(pid));
    let own = std::process::id().cast_signed();
    assert!(matches!(again, Err(Error::Traced { tracer, .. }) if tracer == own), "{again:?}");
    control.stop();
    thread.join().unwrap().unwrap();
    let itself = traced(&Target::Process(own)).0;
    assert!(matches!(itself, Err(Error::Itself(_))), "{itself:?}");
    let nobody = traced(&Target::Process(i32::MAX)).0;
    assert!(matches!(nobody, Err(Error::NoProcess(_))), "{nobody:?}");
}
