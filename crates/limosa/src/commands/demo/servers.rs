//! The demo's device servers: this program again, `limosa serve`, each in a process of its own.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use limosa_vfio_user::client::{Client, Options};
use rustix::process::{Pid, Signal, kill_process};

/// A running server. Told to end, and waited for, when dropped.
pub struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    /// Starts a model's server and waits until it listens.
    pub fn start(folder: &Path, name: &str, model: &str, options: &[String]) -> anyhow::Result<Server> {
        let socket = folder.join(name);
        let this = std::env::current_exe().context("cannot find this program to start it again")?;
        let mut command = Command::new(this);
        command.args(["serve", model, "--with-parent", "--socket"]).arg(&socket);
        for option in options {
            command.args(["--option", option]);
        }
        let child = command
            // Ctrl-C is for the demo alone, which ends them when it no longer needs them.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start the server of {name}"))?;
        let mut server = Server { child, socket };
        let mut ready = String::new();
        if let Some(stdout) = server.child.stdout.take() {
            BufReader::new(stdout).read_line(&mut ready).with_context(|| format!("the server of {name}"))?;
        }
        if !ready.starts_with("listening on ") {
            let status = server.child.wait()?;
            bail!("the server of {name} did not start: {status}");
        }
        Ok(server)
    }

    /// Connects to it; messages call the device so.
    pub fn connect(&self, name: &str, limit: Duration) -> anyhow::Result<Client> {
        let stream = UnixStream::connect(&self.socket)
            .with_context(|| format!("cannot connect to {}", self.socket.display()))?;
        let options = Options { request_limit: limit, ..Options::default() };
        Ok(Client::from_stream(stream, name, options)?)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        // A server that has ended already is waited for as well.
        if let Some(pid) = pid {
            let _ = kill_process(pid, Signal::TERM);
        }
        let _ = self.child.wait();
    }
}
