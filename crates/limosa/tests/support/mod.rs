//! Processes of the command, devices behind servers, and a link that can be held or cut. Nothing here
//! waits for time to pass: only for lines, ends and states, each within [`LIMIT`].
#![allow(dead_code, reason = "every test file uses a part of it")]

pub mod link;
pub mod users;
pub mod vcpus;

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use limosa_client::{Device, DeviceExt};
use limosa_models::synthetic::{REGISTERS_REGION, registers};
use limosa_protocol::State;
use limosa_stream::{Decoded, Decoder, Kind};
use limosa_vfio_user::client::{Client, Options};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// Longer than anything here takes; what takes longer hangs.
pub const LIMIT: Duration = Duration::from_secs(60);

/// What a process of the command said, and how it ended.
#[derive(Debug)]
pub struct Ended {
    /// The exit code; negative for a signal.
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Ended {
    /// It did what it was asked.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, 0, "{self:?}");
        self.out
    }

    /// It did what it was asked, and standard output is one JSON document.
    #[track_caller]
    pub fn json(self) -> serde_json::Value {
        let text = self.ok();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// It failed with this code, and standard output is one JSON document that says the same as standard error.
    #[track_caller]
    pub fn json_failure(&self, code: i32) -> serde_json::Value {
        assert_eq!(self.code, code, "{self:?}");
        let document: serde_json::Value =
            serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"));
        assert_eq!(document["code"], code, "{self:?}");
        let message = document["message"].as_str().unwrap_or_else(|| panic!("no message: {self:?}"));
        assert!(!message.is_empty() && self.err.contains(message), "{self:?}");
        document
    }

    /// It failed with this code, said so in a line that begins like all others, printed nothing else,
    /// and named each of these.
    #[track_caller]
    pub fn fails(&self, code: i32, parts: &[&str]) {
        assert_eq!(self.code, code, "{self:?}");
        let said = self.err.lines().rev().find(|line| !line.is_empty()).unwrap_or_default();
        let is_ours = said.starts_with("limosa: ") || self.err.contains("error: ");
        assert!(is_ours && !self.err.contains("panicked"), "{self:?}");
        for part in parts {
            assert!(self.err.contains(part), "`{part}` is not named: {self:?}");
        }
    }
}

#[derive(Default)]
struct Said {
    out: String,
    err: String,
    /// How many of the two streams have ended.
    ended: usize,
}

impl Said {
    fn line(&self, part: &str) -> Option<String> {
        self.out.lines().chain(self.err.lines()).find(|line| line.contains(part)).map(str::to_owned)
    }
}

#[derive(Default)]
struct Shared {
    said: Mutex<Said>,
    news: Condvar,
}

impl Shared {
    fn said(&self) -> MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done` gives something; `None` when all has been said before it does.
    fn wait<T>(&self, what: &str, done: impl Fn(&Said) -> Option<T>) -> Option<T> {
        let until = Instant::now() + LIMIT;
        let mut said = self.said();
        loop {
            let now = done(&said);
            if now.is_some() || said.ended == 2 {
                return now;
            }
            let left = until.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{what} hangs: {}{}", said.out, said.err);
            said = self.news.wait_timeout(said, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// A process of the command. Killed when it is dropped.
pub struct Running {
    child: Child,
    shared: Arc<Shared>,
    name: String,
}

/// Starts the command.
pub fn start<S: AsRef<str>>(args: &[S]) -> Running {
    start_with(&[], args)
}

/// The same, with this file mode creation mask.
pub fn start_under<S: AsRef<str>>(umask: &str, args: &[S]) -> Running {
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", "umask \"$1\"; shift; exec \"$@\"", "sh", umask, env!("CARGO_BIN_EXE_limosa")]);
    spawn(shell, &[], args)
}

/// The same, in this folder.
pub fn start_in<S: AsRef<str>>(folder: &Path, args: &[S]) -> Running {
    let mut command = Command::new(env!("CARGO_BIN_EXE_limosa"));
    command.current_dir(folder);
    spawn(command, &[], args)
}

/// The same, by another program, which gets the command and its arguments after these of its own.
pub fn start_by<S: AsRef<str>>(program: &str, own: &[&str], args: &[S]) -> Running {
    let mut command = Command::new(program);
    command.args(own).arg(env!("CARGO_BIN_EXE_limosa"));
    spawn(command, &[], args)
}

/// The same, with these variables in its environment.
pub fn start_with<S: AsRef<str>>(variables: &[(String, String)], args: &[S]) -> Running {
    spawn(Command::new(env!("CARGO_BIN_EXE_limosa")), variables, args)
}

fn spawn<S: AsRef<str>>(mut command: Command, variables: &[(String, String)], args: &[S]) -> Running {
    let args: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
    let mut child = command
        .args(&args)
        .env_remove("RUST_LOG")
        .env_remove("RUST_BACKTRACE")
        // What is remembered of moves is not this user's.
        .env("XDG_STATE_HOME", state())
        .envs(variables.iter().cloned())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let shared = Arc::new(Shared::default());
    let out = child.stdout.take().unwrap();
    let err = child.stderr.take().unwrap();
    listen(out, Arc::clone(&shared), |said| &mut said.out);
    listen(err, Arc::clone(&shared), |said| &mut said.err);
    Running { child, shared, name: args.join(" ") }
}

/// A folder of this test process's.
fn state() -> &'static Path {
    static STATE: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().unwrap());
    STATE.path()
}

/// Runs the command to its end.
pub fn limosa<S: AsRef<str>>(args: &[S]) -> Ended {
    start(args).end()
}

/// The same, with these variables in its environment.
pub fn limosa_with<S: AsRef<str>>(variables: &[(String, String)], args: &[S]) -> Ended {
    start_with(variables, args).end()
}

/// Runs the command to its end with its output in these places, of which nothing is read here.
pub fn limosa_into<S: AsRef<str>>(out: impl Into<Stdio>, err: impl Into<Stdio>, args: &[S]) -> i32 {
    let args = args.iter().map(AsRef::as_ref);
    let mut command = Command::new(env!("CARGO_BIN_EXE_limosa"));
    command.args(args).env_remove("RUST_LOG").env("XDG_STATE_HOME", state()).stdin(Stdio::null());
    let status = command.stdout(out).stderr(err).status().unwrap();
    status.code().unwrap_or_else(|| -std::os::unix::process::ExitStatusExt::signal(&status).unwrap_or(0))
}

/// Where nothing can be written: a disk that is full.
pub fn full() -> std::fs::File {
    std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap()
}

fn listen(from: impl Read + Send + 'static, shared: Arc<Shared>, into: fn(&mut Said) -> &mut String) {
    std::thread::spawn(move || {
        let mut from = BufReader::new(from);
        loop {
            let mut line = Vec::new();
            let read = from.read_until(b'\n', &mut line).unwrap_or(0);
            let mut said = shared.said();
            match read {
                0 => said.ended += 1,
                _ => into(&mut said).push_str(&String::from_utf8_lossy(&line)),
            }
            drop(said);
            shared.news.notify_all();
            if read == 0 {
                return;
            }
        }
    });
}

impl Running {
    /// Waits for a line with this part, and returns it.
    #[track_caller]
    pub fn line(&self, part: &str) -> String {
        let line = self.shared.wait(&self.name, |said| said.line(part));
        line.unwrap_or_else(|| {
            let said = self.shared.said();
            panic!("{} never said `{part}`: {}{}", self.name, said.out, said.err)
        })
    }

    /// Whether it says this before it ends.
    pub fn says(&self, part: &str) -> bool {
        self.shared.wait(&self.name, |said| said.line(part)).is_some()
    }

    /// The first line with one of these parts, if it says one before it ends.
    pub fn says_one_of(&self, parts: &[&str]) -> Option<String> {
        self.shared.wait(&self.name, |said| parts.iter().find_map(|part| said.line(part)))
    }

    /// What comes after this in the line with it, such as an address.
    #[track_caller]
    pub fn after(&self, part: &str) -> String {
        let line = self.line(part);
        line.split_once(part).map(|(_, rest)| rest.trim().to_owned()).unwrap()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.pid().try_into().unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    /// Waits for its end.
    pub fn end(mut self) -> Ended {
        self.wait()
    }

    /// As with `kill -9`.
    pub fn kill(mut self) {
        self.signal(Signal::KILL);
        self.wait();
    }

    fn wait(&mut self) -> Ended {
        self.shared.wait(&self.name, |_| None::<()>);
        let status = self.child.wait().unwrap();
        let mut said = self.shared.said();
        let signal = std::os::unix::process::ExitStatusExt::signal(&status);
        let code = status.code().unwrap_or_else(|| -signal.unwrap_or(0));
        Ended { code, out: std::mem::take(&mut said.out), err: std::mem::take(&mut said.err) }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // After its end both have no effect.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A folder for one test.
pub struct Folder(TempDir);

impl Folder {
    pub fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// A synthetic device of 1 MiB or what the options say, behind a server.
    #[track_caller]
    pub fn device(&self, name: &str, options: &[&str]) -> Server {
        self.serve("synthetic", name, &[&["state=1M"], options].concat())
    }

    #[track_caller]
    pub fn serve(&self, model: &str, name: &str, options: &[&str]) -> Server {
        let socket = self.text(name);
        let mut args = vec!["-vv", "serve", model, "--socket", &socket];
        for option in options {
            args.extend(["-o", option]);
        }
        let running = start(&args);
        assert_eq!(running.after("listening on "), socket);
        Server { running: Some(running), socket }
    }
}

/// A device server. Ended by SIGTERM when it is dropped.
pub struct Server {
    running: Option<Running>,
    pub socket: String,
}

impl Server {
    /// Waits until it says this in its log.
    #[track_caller]
    pub fn line(&self, part: &str) {
        self.running.as_ref().unwrap().line(part);
    }

    pub fn client(&self) -> Client {
        Client::connect(Path::new(&self.socket), Options::default()).unwrap()
    }

    pub fn state(&self) -> State {
        self.client().state().unwrap()
    }

    /// Reads a register of a synthetic device.
    pub fn register(&self, at: u64) -> u64 {
        let mut value = [0; 8];
        self.client().region_read(REGISTERS_REGION, at, &mut value).unwrap();
        u64::from_le_bytes(value)
    }

    /// Writes a register of a synthetic device.
    pub fn write(&self, at: u64, value: u64) {
        self.client().region_write(REGISTERS_REGION, at, &value.to_le_bytes()).unwrap();
    }

    /// Writes something that is then part of the state, by which the guest is known.
    pub fn mark(&self, guest: u64) {
        self.write(registers::SCRATCH, guest);
    }

    /// The mark of the guest that the device holds.
    pub fn guest(&self) -> u64 {
        self.register(registers::SCRATCH)
    }

    /// Whether this guest runs here.
    pub fn runs(&self, guest: u64) -> bool {
        self.state() == State::Running && self.guest() == guest
    }

    pub fn signal(&self, signal: Signal) {
        self.running.as_ref().unwrap().signal(signal);
    }

    pub fn pid(&self) -> u32 {
        self.running.as_ref().unwrap().pid()
    }

    /// It is killed, and nothing more is wanted of it.
    pub fn kill_now(mut self) {
        self.kill();
    }

    pub fn kill(&mut self) {
        self.running.take().unwrap().kill();
    }

    /// Asks it to end, and waits.
    pub fn end(&mut self) -> Ended {
        let running = self.running.take().unwrap();
        running.signal(Signal::TERM);
        running.end()
    }

    /// The device can be probed, reset and moved, whatever happened to it.
    #[track_caller]
    pub fn is_usable(&self, folder: &Folder) {
        limosa(&["probe", &self.socket]).ok();
        limosa(&["state", &self.socket, "reset"]).ok();
        assert_eq!(self.state(), State::Running);
        let file = folder.text(&format!("{}-usable", Path::new(&self.socket).file_name().unwrap().display()));
        limosa(&["save", &self.socket, &file]).ok();
        limosa(&["load", &file, &self.socket]).ok();
        assert_eq!(self.state(), State::Running);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.running.is_some() && !std::thread::panicking() {
            self.end();
        }
    }
}

/// The device data in a saved stream.
pub fn device_data(file: &Path) -> Vec<u8> {
    let mut decoder = Decoder::new();
    decoder.push(&std::fs::read(file).unwrap());
    let mut data = Vec::new();
    while let Some(decoded) = decoder.next().unwrap() {
        if let Decoded::Frame { header, payload, .. } = decoded
            && header.kind == Kind::DEVICE_DATA
        {
            data.extend_from_slice(payload);
        }
    }
    assert!(!data.is_empty());
    data
}
