//! Servers of devices: the command in a process of its own, or a model in the process of the test.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;

use limosa_device::Machine;
use limosa_vfio_user::server::{Options, Server, ShutdownHandle};
use tempfile::TempDir;

use crate::Lines;
use crate::qemu::beside_the_test;

const SOCKET: &str = "device.sock";
const TAKEOVER: &str = "takeover.sock";

/// `limosa serve` in a process. Killed when it is dropped.
pub struct Served {
    child: Child,
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
        let child = Self::spawn(Command::new(beside_the_test("limosa")).args(&args));
        Served { child, args, folder }
    }

    fn spawn(command: &mut Command) -> Child {
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("the command starts");
        let said = Lines::of(child.stdout.take().expect("stdout is a pipe"));
        assert!(said.wait_for("listening on").is_some(), "the server ended: {:#?}", said.all());
        child
    }

    /// Another process takes its place, while its client goes on.
    pub fn replace(&mut self) {
        let mut command = Command::new(beside_the_test("limosa"));
        command.args(&self.args).arg("--take-from").arg(self.folder.path().join(TAKEOVER));
        let mut old = std::mem::replace(&mut self.child, Self::spawn(&mut command));
        assert!(old.wait().expect("a child").success(), "the old server failed");
    }

    /// Where it listens.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join(SOCKET)
    }

    /// Ends it without a word to its client.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.kill();
    }
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
