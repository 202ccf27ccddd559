//! A server in a process of its own, which the test starts, hears and waits for.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};

use super::{FOLDER, ROLE, WAY, Way};

pub(super) fn this_program(role: &str, folder: &Path, way: Way) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "role", "--nocapture", "--test-threads=1"])
        .env(ROLE, role)
        .env(FOLDER, folder)
        .env(WAY, format!("{way:?}"))
        .env("RUST_BACKTRACE", "0");
    command
}

/// A server process.
pub(super) struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: BufReader<ChildStdout>,
}

impl Process {
    pub(super) fn start(role: &str, folder: &Path, way: Way, settings: &[(&str, &str)]) -> Process {
        Process::spawn(this_program(role, folder, way), settings)
    }

    pub(super) fn spawn(mut command: Command, settings: &[(&str, &str)]) -> Process {
        command.envs(settings.iter().copied()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Process { stdin: child.stdin.take(), child, lines }
    }

    /// The next line that the process says; `None` once it, and each child of it, has ended.
    pub(super) fn next(&mut self) -> Option<String> {
        let mut line = String::new();
        loop {
            line.clear();
            if self.lines.read_line(&mut line).unwrap() == 0 {
                return None;
            }
            if let Some((_, said)) = line.trim_end().split_once("toy: ") {
                return Some(said.into());
            }
        }
    }

    /// Reads on to a line with this.
    pub(super) fn says(&mut self, what: &str) -> String {
        let mut before = Vec::new();
        loop {
            match self.next() {
                Some(line) if line.contains(what) => return line,
                Some(line) => before.push(line),
                None => panic!("the process ended without {what:?}; it said {before:?}"),
            }
        }
    }

    pub(super) fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    pub(super) fn ended(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    pub(super) fn was_killed(&mut self) -> bool {
        std::os::unix::process::ExitStatusExt::signal(&self.ended()) == Some(9)
    }

    /// Has it start a new server.
    pub(super) fn tell(&mut self, word: &str) {
        writeln!(self.stdin.as_mut().unwrap(), "{word}").unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Whatever it is, it ends with the test.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
