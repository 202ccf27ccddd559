//! Processes of the command, devices behind servers, and a link that can be held or cut. Nothing here
//! waits for time to pass: only for lines, ends and states, each within [`LIMIT`].

pub mod link;
pub mod pair;
pub mod schema;
pub mod users;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;

use limosa_client::{Device, DeviceExt};
use limosa_models::synthetic::{REGISTERS_REGION, registers};
use limosa_protocol::State;
use limosa_stream::{Decoded, Decoder, Kind};
pub use limosa_testing::{Ended, LIMIT, Process as Running};
use limosa_testing::{Screen, Terminal};
use limosa_vfio_user::client::{Client, Options};
use rustix::process::Signal;
use tempfile::TempDir;

/// The mark of the guest that is moved.
pub const GUEST: u64 = 0x6775_6573;

/// What the command printed for a program to read.
pub trait JsonOutput {
    /// It did what it was asked, and standard output is one JSON document.
    fn json(self) -> serde_json::Value;
    /// It failed with this code, and standard output is one JSON document that says the same as standard error.
    fn json_failure(&self, code: i32) -> serde_json::Value;
}

impl JsonOutput for Ended {
    #[track_caller]
    fn json(self) -> serde_json::Value {
        let text = self.ok();
        let document = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        schema::keeps(&document);
        document
    }

    #[track_caller]
    fn json_failure(&self, code: i32) -> serde_json::Value {
        assert_eq!(self.code, code, "{self:?}");
        let document: serde_json::Value =
            serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"));
        schema::keeps(&document);
        assert_eq!(document["code"], code, "{self:?}");
        let message = document["message"].as_str().unwrap_or_else(|| panic!("no message: {self:?}"));
        assert!(!message.is_empty() && self.err.contains(message), "{self:?}");
        document
    }
}

/// Starts the command.
pub fn start<S: AsRef<str>>(args: &[S]) -> Running {
    start_with(&[], args)
}

/// Starts the command by this path.
pub fn start_program<S: AsRef<str>>(program: &Path, args: &[S]) -> Running {
    Running::start(&mut prepared(Command::new(program), args))
}

/// The same, with this file mode creation mask.
pub fn start_under<S: AsRef<str>>(umask: &str, args: &[S]) -> Running {
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", "umask \"$1\"; shift; exec \"$@\"", "sh", umask, env!("CARGO_BIN_EXE_limosa")]);
    Running::start(&mut prepared(shell, args))
}

/// The same, with this as its standard input.
pub fn start_reading<S: AsRef<str>>(input: impl Into<Stdio>, args: &[S]) -> Running {
    Running::start_with_input(&mut prepared(Command::new(env!("CARGO_BIN_EXE_limosa")), args), input)
}

/// The same, in this folder.
pub fn start_in<S: AsRef<str>>(folder: &Path, args: &[S]) -> Running {
    let command = Command::new(env!("CARGO_BIN_EXE_limosa"));
    Running::start(prepared(command, args).current_dir(folder))
}

/// The same, by another program, which gets the command and its arguments after these of its own.
pub fn start_by<S: AsRef<str>>(program: &str, own: &[&str], args: &[S]) -> Running {
    let mut command = Command::new(program);
    command.args(own).arg(env!("CARGO_BIN_EXE_limosa"));
    Running::start(&mut prepared(command, args))
}

/// Runs a shell's commands, which get the command and its arguments, with a file system in memory at this folder (`$0`), mounted
/// with these options; `None` where this user may not mount it.
pub fn on_a_disk(options: &str, folder: &Path, commands: &str, args: &[&str]) -> Option<Ended> {
    let script = format!("mount -t tmpfs -o {options} none \"$0\" || exit 99; {commands}");
    let folder = folder.to_str().unwrap();
    let mounted = ["--user", "--map-root-user", "--mount", "bash", "-c", &script, folder];
    let ended = start_by("unshare", &mounted, args).end();
    let may_mount = ended.code != 99 && !ended.err.starts_with("unshare: ");
    if !may_mount {
        eprintln!("passed over: this user may not mount");
    }
    may_mount.then_some(ended)
}

/// The same, with these variables in its environment.
pub fn start_with<S: AsRef<str>>(variables: &[(String, String)], args: &[S]) -> Running {
    let command = Command::new(env!("CARGO_BIN_EXE_limosa"));
    Running::start(prepared(command, args).envs(variables.iter().cloned()))
}

/// The command with these arguments, in the environment of a test.
fn prepared<S: AsRef<str>>(mut command: Command, args: &[S]) -> Command {
    command
        .args(args.iter().map(AsRef::as_ref))
        .env_remove("RUST_LOG")
        .env_remove("RUST_BACKTRACE")
        // What is remembered of moves is not this user's.
        .env("XDG_STATE_HOME", state());
    command
}

/// A process that stands for a guest's, to be stopped and set going.
pub fn vcpus() -> Running {
    Running::start(Command::new("sleep").arg("1000"))
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
    let mut command = prepared(Command::new(env!("CARGO_BIN_EXE_limosa")), args);
    let status = command.stdin(Stdio::null()).stdout(out).stderr(err).status().unwrap();
    status.code().unwrap_or_else(|| -std::os::unix::process::ExitStatusExt::signal(&status).unwrap_or(0))
}

/// The command with these arguments, in the environment of a test.
pub fn limosa_command(args: &[&str]) -> Command {
    prepared(Command::new(env!("CARGO_BIN_EXE_limosa")), args)
}

/// Starts the command with its standard output in this place. Its standard error is to be read.
pub fn start_into(out: impl Into<Stdio>, args: &[&str]) -> std::process::Child {
    let mut command = prepared(Command::new(env!("CARGO_BIN_EXE_limosa")), args);
    command.stdin(Stdio::null()).stdout(out).stderr(Stdio::piped()).spawn().unwrap()
}

/// Runs the command in this folder, with these variables, and its output on a terminal of this width. Returns its exit code, and
/// what a person saw.
pub fn limosa_on_terminal(
    columns: u16,
    folder: &Folder,
    variables: &[(&str, &str)],
    args: &[&str],
) -> (i32, Screen) {
    let terminal = Terminal::new(columns);
    let mut command = prepared(Command::new(env!("CARGO_BIN_EXE_limosa")), args);
    command
        .current_dir(&folder.0)
        .env("TERM", "xterm")
        .env_remove("NO_COLOR")
        .envs(variables.iter().copied());
    let (out, err) = (terminal.end(), terminal.end());
    let mut child = command.stdin(Stdio::null()).stdout(out).stderr(err).spawn().unwrap();
    // It has ends of the terminal as well.
    drop(command);
    let screen = terminal.show();
    (child.wait().unwrap().code().unwrap(), screen)
}

/// Where nothing can be written: a disk that is full.
pub fn full() -> std::fs::File {
    std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap()
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

    pub fn pid(&self) -> String {
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
        limosa(&["state", &self.socket, "reset", "--force"]).ok();
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
