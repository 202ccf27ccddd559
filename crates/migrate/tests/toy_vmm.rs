//! The example of a VMM, as two processes: its guest moves under load with nothing lost, and goes on where it was when
//! the destination dies or the move is called off.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

/// So long that only a process that hangs is waited for in vain.
const PATIENCE: Duration = Duration::from_secs(120);
/// So few bytes a second that a move does not end by itself while a test runs.
const SLOW: &str = "300000";

/// The example, which cargo builds with the tests of this package; here for whoever runs this one alone.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(built)
}

fn built() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let folder = test.parent().and_then(|deps| deps.parent()).unwrap();
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--quiet", "--package", "limosa-migrate", "--example", "toy_vmm"]);
    if folder.ends_with("release") {
        build.arg("--release");
    }
    assert!(build.status().unwrap().success(), "the example does not build");
    folder.join("examples/toy_vmm")
}

/// A process of the example.
struct Vmm {
    process: Child,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
}

impl Vmm {
    fn new(arguments: &[&str]) -> Vmm {
        let mut command = Command::new(program());
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let (output, (sender, lines)) = (process.stdout.take().unwrap(), channel());
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines() {
                if sender.send(line.unwrap()).is_err() {
                    break;
                }
            }
        });
        Vmm { input: process.stdin.take(), process, lines }
    }

    fn say(&mut self, line: &str) {
        writeln!(self.input.as_mut().unwrap(), "{line}").unwrap();
    }

    /// The rest of the next line that begins so.
    fn expect(&self, begin: &str) -> String {
        let mut before = Vec::new();
        loop {
            let Ok(line) = self.lines.recv_timeout(PATIENCE) else {
                panic!("no `{begin}` after {before:#?}")
            };
            if let Some(rest) = line.strip_prefix(begin) {
                return rest.trim().to_string();
            }
            assert!(!line.starts_with("the guest has crashed"), "{line}");
            before.push(line);
        }
    }

    fn count(&mut self) -> u64 {
        self.say("count");
        self.expect("count ").parse().unwrap()
    }

    /// The guest counts on from there.
    fn counts_beyond(&mut self, from: u64) {
        while self.count() <= from + 1000 {}
    }

    fn quit(mut self) -> ExitStatus {
        drop(self.input.take());
        self.process.wait().unwrap()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A guest that runs, one that waits for it, and where.
fn two() -> (Vmm, Vmm, String, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let address = format!("unix:{}", folder.path().join("move").display());
    let destination = Vmm::new(&["receive", &address]);
    destination.expect("listens at");
    let mut source = Vmm::new(&["run"]);
    source.expect("runs");
    source.counts_beyond(5000);
    (source, destination, address, folder)
}

#[test]
fn a_guest_moves_between_two_processes_under_load_with_nothing_lost() {
    let (mut source, mut destination, address, _folder) = two();
    source.say(&format!("send {address}"));
    let left = source.expect("commits");
    let (_, left) = left.split_once(": ").unwrap();
    // Its prepare hook has compared each page with the count.
    assert_eq!(destination.expect("takes over:"), left, "count and checksum of all memory");
    source.expect("moved");
    destination.expect("runs");
    let count = left.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert_eq!(source.count(), count, "it stands still");
    destination.counts_beyond(count);
    assert!(source.quit().success() && destination.quit().success());
}

#[test]
fn a_destination_that_is_killed_leaves_the_guest_running_and_movable() {
    let (mut source, mut destination, address, folder) = two();
    source.say(&format!("send {address} {SLOW}"));
    source.expect("phase pre-copy");
    destination.process.kill().unwrap();
    source.expect("undone:");
    let count = source.count();
    source.counts_beyond(count);

    std::fs::remove_file(folder.path().join("move")).unwrap();
    let mut another = Vmm::new(&["receive", &address]);
    another.expect("listens at");
    source.say(&format!("send {address}"));
    source.expect("moved");
    another.expect("runs");
    another.counts_beyond(count);
}

#[test]
fn a_move_that_is_called_off_leaves_the_guest_running_and_the_destination_waiting() {
    let (mut source, mut destination, address, _folder) = two();
    source.say(&format!("send {address} {SLOW}"));
    source.expect("phase pre-copy");
    source.say("cancel");
    source.expect("undone: cancelled");
    destination.expect("discarded:");
    let count = source.count();
    source.counts_beyond(count);
    source.say(&format!("send {address}"));
    source.expect("moved");
    destination.expect("runs");
    destination.counts_beyond(count);
}
