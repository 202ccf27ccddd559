//! Servers of devices: the command in a process of its own, or a model in the process of the test.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread::JoinHandle;

use limosa_device::Machine;
use limosa_testing::{Process, beside_the_test};
use limosa_vfio_user::server::{Options, Server, ShutdownHandle};
use tempfile::TempDir;

const SOCKET: &str = "device.sock";
const TAKEOVER: &str = "takeover.sock";

/// `limosa serve` in a process, which does not outlive this.
pub struct Served {
    process: Option<Process>,
    /// Its arguments, but for those of a switch-over.
    args: Vec<OsString>,
    folder: TempDir,
}

impl Served {
    /// Serves a model of the command with options of the model.
    pub fn start(model: &str, options: &[&str]) -> Served {
        let folder = tempfile::tempdir().expect("a folder for the sockets");
        let mut args: Vec<OsString> = vec!["serve".into(), model.into()];
        options.iter().for_each(|option| args.extend(["-o".into(), option.into()]));
        for (option, name) in [("--socket", SOCKET), ("--takeover", TAKEOVER)] {
            args.extend([option.into(), folder.path().join(name).into()]);
        }
        let process = Self::spawn(Command::new(beside_the_test("limosa")).args(&args));
        Served { process: Some(process), args, folder }
    }

    fn spawn(command: &mut Command) -> Process {
        let process = Process::start(command);
        process.line("listening on");
        process
    }

    /// Another process takes its place, while its client goes on.
    pub fn replace(&mut self) {
        let mut command = Command::new(beside_the_test("limosa"));
        command.args(&self.args).arg("--take-from").arg(self.folder.path().join(TAKEOVER));
        let old = self.process.replace(Self::spawn(&mut command)).expect("it was not killed");
        old.end().ok();
    }

    /// Serves again after it was killed, a device in its first state.
    pub fn restart(&mut self) {
        self.process = Some(Self::spawn(Command::new(beside_the_test("limosa")).args(&self.args)));
    }

    /// Where it listens.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join(SOCKET)
    }

    /// Ends it without a word to its client.
    pub fn kill(&mut self) {
        self.process = None;
    }
}

/// Runs the command to its end, and returns what it printed.
///
/// # Panics
///
/// When it fails.
#[track_caller]
pub fn limosa(args: &[&str]) -> String {
    Process::start(Command::new(beside_the_test("limosa")).args(args)).end().ok()
}

/// A machine served on a thread of the test. Shut down when it is dropped.
pub struct ServedHere {
    socket: PathBuf,
    shutdown: ShutdownHandle,
    thread: Option<JoinHandle<std::io::Result<()>>>,
    _folder: TempDir,
}

impl ServedHere {
    /// Serves a machine.
    pub fn start(machine: Arc<Machine>) -> ServedHere {
        let folder = tempfile::tempdir().expect("a folder for the socket");
        let socket = folder.path().join("device.sock");
        let server = Server::bind(&socket, machine, Options::default()).expect("a server");
        let shutdown = server.shutdown_handle();
        let thread = Some(std::thread::spawn(move || server.serve()));
        ServedHere { socket, shutdown, thread, _folder: folder }
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for ServedHere {
    fn drop(&mut self) {
        self.shutdown.shut_down();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
