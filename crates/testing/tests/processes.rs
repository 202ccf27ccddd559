//! What holds for processes of tests: each of these would let another test pass for no reason, or fail without one.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, Stdio};

use limosa_testing::{Process, is_alone, run_alone};
use rustix::process::Signal;

fn shell(script: &str) -> Process {
    Process::start_with_input(Command::new("/bin/sh").args(["-c", script]), Stdio::piped())
}

#[test]
fn lines_are_awaited_and_taken_once_and_the_last_one_may_lack_its_end() {
    let mut process = shell("read said; echo \"out $said\"; echo err $said >&2; printf last");
    process.say("something");
    assert_eq!(process.line("out "), "out something");
    assert_eq!(process.after("err "), "something");
    assert_eq!(process.next_line().as_deref(), Some("out something"));
    assert_eq!(process.next_line().as_deref(), Some("last"));
    assert_eq!(process.next_line(), None);
    assert!(!process.says("nobody says this"));
    let ended = process.end();
    assert_eq!((ended.code, &*ended.out, &*ended.err), (0, "out something\nlast", "err something\n"));
}

#[test]
fn a_line_that_never_comes_is_told_with_what_came_instead() {
    let process = shell("echo this; echo that >&2; exit 3");
    let panic = catch_unwind(AssertUnwindSafe(|| process.line("another"))).unwrap_err();
    let told = panic.downcast_ref::<String>().unwrap();
    assert!(["never said `another`", "this\n", "that\n"].iter().all(|part| told.contains(part)), "{told}");
    assert_eq!(process.end().code, 3);
}

#[test]
fn the_signal_that_ended_a_process_is_told_and_one_that_stopped_it_too() {
    let process = Process::start(Command::new("/bin/sh").args(["-c", "exec sleep 1000"]));
    process.runs_program("sleep");
    assert!(!process.is_stopped());
    process.signal(Signal::STOP);
    while !process.is_stopped() {
        std::thread::yield_now();
    }
    process.signal(Signal::KILL);
    assert_eq!(process.end().code, -Signal::KILL.as_raw());
}

#[test]
fn a_process_does_not_outlive_its_test() {
    let process = Process::start(Command::new("sleep").arg("1000"));
    let folder = format!("/proc/{}", process.pid());
    assert!(std::path::Path::new(&folder).exists());
    drop(process);
    assert!(!std::path::Path::new(&folder).exists());
}

#[test]
fn a_test_that_runs_alone_has_a_process_of_its_own() {
    if is_alone("a_test_that_runs_alone_has_a_process_of_its_own") {
        return;
    }
    let none = run_alone("no test has this name").expect("it runs elsewhere");
    assert!(none.out.contains("0 passed"), "{none:?}");
}
