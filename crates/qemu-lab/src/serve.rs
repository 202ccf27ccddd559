//! Servers of devices: the command in a process of its own, or a model in the process of the test.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;

use limosa_device::Machine;
use limosa_vfio_user::server::{Options, Server, ShutdownHandle};
use tempfile::TempDir;

use crate::Lines;
use crate::qemu::beside_the_test;

/// `limosa serve` in a process. Killed when it is dropped.
pub struct Served {
    child: Child,
    socket: PathBuf,
    _folder: TempDir,
}

impl Served {
    /// Serves a model of the command with options of the model.
    pub fn start(model: &str, options: &[&str]) -> Served {
        let folder = tempfile::tempdir().expect("a folder for the socket");
        let socket = folder.path().join("device.sock");
        let mut command = Command::new(beside_the_test("limosa"));
        command.args(["serve", model, "--socket"]).arg(&socket);
        options.iter().for_each(|option| {
            command.args(["-o", option]);
        });
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("the command starts");
        let said = Lines::of(child.stdout.take().expect("stdout is a pipe"));
        assert!(said.wait_for("listening on").is_some(), "the server ended: {:#?}", said.all());
        Served { child, socket, _folder: folder }
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
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

/// Runs the command to its end, and returns what it printed.
///
/// # Panics
///
/// When it fails.
#[track_caller]
pub fn limosa(args: &[&str]) -> String {
    let ended = Command::new(beside_the_test("limosa")).args(args).stdin(Stdio::null()).output();
    let ended = ended.expect("the command starts");
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success(), "limosa {}: {}: {said}", args.join(" "), ended.status);
    String::from_utf8_lossy(&ended.stdout).into_owned()
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
