//! The other ends of a measurement, each in a process of its own: this program started again with
//! an environment variable that names the role and a socket as standard input.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::Context;
use limosa_vfio_user::client::{Client, Options};

use crate::{crate_server, device, floor};

const VARIABLE: &str = "LIMOSA_BENCH_ROLE";

/// What a child does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Answers bare requests.
    Floor,
    /// Serves the bench's own device with Limosa's server.
    Limosa,
    /// Serves a region with the `vfio_user` crate's server; the socket's path comes over stdin.
    VfioUserCrate,
}

const ROLES: [(Role, &str); 3] =
    [(Role::Floor, "floor"), (Role::Limosa, "limosa"), (Role::VfioUserCrate, "vfio_user")];

/// A running child. It ends when its socket is closed, and is waited for when this is dropped.
pub(crate) struct Child(std::process::Child);

impl Child {
    /// Starts this program again in the role, with the socket as its standard input.
    pub(crate) fn start(role: Role, stdin: OwnedFd) -> anyhow::Result<Child> {
        let name = ROLES.iter().find(|(of, _)| *of == role).map_or("", |(_, name)| name);
        let this = std::env::current_exe().context("cannot find this program to start it again")?;
        Child::of(&this, name, stdin).context("cannot start the other end of the measurement")
    }

    fn of(program: &Path, role: &str, stdin: OwnedFd) -> std::io::Result<Child> {
        let mut command = Command::new(program);
        // Signals of the terminal are for this process, which returns the device to its state, and then ends the child.
        command.process_group(0).env(VARIABLE, role);
        command.stdin(Stdio::from(stdin)).stdout(Stdio::null()).spawn().map(Child)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // The socket may still be open on this side, so the child is told to end before it is waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs the child's role if this process is a child, and returns whether it is. Call it first in `main` of every
/// program that measures.
pub fn run_if_child() -> anyhow::Result<bool> {
    let Ok(name) = std::env::var(VARIABLE) else { return Ok(false) };
    let (role, _) = ROLES
        .into_iter()
        .find(|(_, of)| *of == name)
        .with_context(|| format!("{VARIABLE}={name}: expected floor, limosa or vfio_user; unset it"))?;
    let stdin = std::io::stdin().as_fd().try_clone_to_owned().context("standard input is no socket")?;
    let stream = UnixStream::from(stdin);
    match role {
        Role::Floor => floor::serve(stream)?,
        Role::Limosa => device::serve(stream)?,
        Role::VfioUserCrate => crate_server::serve(stream)?,
    }
    Ok(true)
}

/// Keeps this process, and the children that it starts from now on, on the first core that it may
/// use.
pub fn pin_to_one_core() -> anyhow::Result<()> {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
    let allowed = sched_getaffinity(None).context("cannot read the CPU affinity")?;
    let first = (0..CpuSet::MAX_CPU).find(|cpu| allowed.is_set(*cpu)).context("no CPU is allowed")?;
    let mut one = CpuSet::new();
    one.set(first);
    sched_setaffinity(None, &one).context("cannot set the CPU affinity")
}

/// Connects to the bench's own device, served by this program in another process.
pub(crate) fn own_device(options: Options) -> anyhow::Result<(Client, Child)> {
    let (ours, theirs) = UnixStream::pair().context("cannot make a socket pair")?;
    let child = Child::start(Role::Limosa, theirs.into())?;
    Ok((Client::from_stream(ours, "bench", options)?, child))
}

#[cfg(test)]
mod tests {
    use rustix::process::{Pid, getpgid, getpgrp};

    use super::*;

    /// Ctrl-C ended the floor, and the measure under way was said to have lost its connection.
    #[test]
    fn the_terminals_signals_ended_the_other_end_of_a_measure() {
        let (_ours, theirs) = UnixStream::pair().unwrap();
        let child = Child::of(Path::new("cat"), "floor", theirs.into()).unwrap();
        let group = getpgid(Some(Pid::from_child(&child.0))).unwrap();
        assert_ne!(group, getpgrp());
    }
}
