//! A process of this machine, and how it ended.

use std::io::Write;
use std::ops::Deref;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Once};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::SIGHUP;

use crate::LIMIT;
use crate::transcript::{Stream, Transcript};

/// What a program said, and how it ended.
#[derive(Clone, Debug, Default)]
pub struct Ended {
    /// The exit code; negative for a signal.
    pub code: i32,
    /// What it said on standard output.
    pub out: String,
    /// What it said on standard error.
    pub err: String,
}

impl Ended {
    /// It did what it was asked; returns standard output.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, 0, "{self:?}");
        self.out
    }

    /// The command `limosa` failed with this code, said so in a line that begins like all of its others, and named each
    /// of these.
    #[track_caller]
    pub fn fails(&self, code: i32, parts: &[&str]) {
        assert_eq!(self.code, code, "{self:?}");
        // With -v another thread may log behind it.
        let is_ours =
            self.err.lines().any(|line| line.starts_with("limosa: ")) || self.err.contains("error: ");
        assert!(is_ours && !self.err.contains("panicked"), "{self:?}");
        for part in parts {
            assert!(self.err.contains(part), "`{part}` is not named: {self:?}");
        }
    }
}

/// Makes the processes that a test starts end at a SIGHUP, as those of a shell do, also where the tests run under nohup(1): a
/// signal that is ignored stays so in a program that is executed (execve(2)), and one with a handler gets its default back.
fn take_back_hangups() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let status = std::fs::read_to_string("/proc/self/status").expect("the system has /proc");
        let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
        let ignored = u64::from_str_radix(ignored.expect("proc_pid_status(5)").trim(), 16).expect("a mask");
        if ignored & 1 << (SIGHUP - 1) != 0 {
            signal_hook::flag::register(SIGHUP, Arc::default()).expect("a signal that can be handled");
        }
    });
}

/// A process, and by [`Deref`] what it says. Killed when it is dropped.
pub struct Process {
    child: Child,
    transcript: Transcript,
}

impl Process {
    /// Starts a process that has nothing to read.
    #[track_caller]
    pub fn start(command: &mut Command) -> Process {
        Process::start_with_input(command, Stdio::null())
    }

    /// Starts a process with this as its standard input. If that is [`Stdio::piped`], [`Process::say`] writes to it.
    #[track_caller]
    pub fn start_with_input(command: &mut Command, input: impl Into<Stdio>) -> Process {
        take_back_hangups();
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let name = words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
        let mut child = command
            .stdin(input)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let transcript = Transcript::new(&name, 2);
        transcript.listen(Stream::Out, child.stdout.take().expect("a pipe"));
        transcript.listen(Stream::Err, child.stderr.take().expect("a pipe"));
        Process { child, transcript }
    }

    /// What it says; stays when the process has ended.
    pub fn transcript(&self) -> &Transcript {
        &self.transcript
    }

    /// Writes a line to its standard input.
    #[track_caller]
    pub fn say(&mut self, line: &str) {
        let input = self.child.stdin.as_mut().expect("a process that was started with a pipe");
        writeln!(input, "{line}").unwrap_or_else(|error| panic!("{}: {error}", self.transcript.name()));
    }

    /// Its number, as arguments and `/proc` have it.
    pub fn pid(&self) -> String {
        self.child.id().to_string()
    }

    /// Sends it a signal.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("a child of ours");
    }

    /// Waits for its end, after that of its standard input.
    pub fn end(mut self) -> Ended {
        drop(self.child.stdin.take());
        self.wait()
    }

    /// Kills it as `kill -9` does, and waits until it is gone.
    pub fn kill(mut self) {
        self.signal(Signal::KILL);
        self.wait();
    }

    fn wait(&mut self) -> Ended {
        self.transcript.end();
        let status = self.child.wait().expect("a child of ours");
        let code = status.code().unwrap_or_else(|| -status.signal().unwrap_or(0));
        Ended { code, out: self.transcript.out(), err: self.transcript.err() }
    }

    /// Whether a signal has stopped it.
    pub fn is_stopped(&self) -> bool {
        self.stat().1.starts_with('T')
    }

    /// Waits until it runs this program, which another one has started in its place.
    #[track_caller]
    pub fn runs_program(&self, program: &str) {
        let until = Instant::now() + LIMIT;
        while self.stat().0 != program {
            assert!(Instant::now() < until, "{} never ran {program}", self.transcript.name());
            std::thread::yield_now();
        }
    }

    /// The ticks of the system's clock at which it started (proc(5): starttime).
    pub fn started(&self) -> u64 {
        let started = self.stat().1.split(' ').nth(19).and_then(|ticks| ticks.parse().ok());
        started.expect("what proc(5) says")
    }

    /// The name of its program, and the fields of `/proc/PID/stat` behind it.
    fn stat(&self) -> (String, String) {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).expect("a child of ours");
        let (name, rest) = stat.rsplit_once(") ").expect("what proc(5) says");
        let (_, name) = name.split_once('(').expect("what proc(5) says");
        (name.to_owned(), rest.to_owned())
    }
}

impl Deref for Process {
    type Target = Transcript;

    fn deref(&self) -> &Transcript {
        &self.transcript
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // After its end both have no effect.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
