//! A new server that the old one starts itself: the channel is its standard input, which an environment variable
//! announces.

use std::ffi::OsStr;
use std::io::{self, Error, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};

use crate::new::OldServer;
use crate::peer::Peer;

/// The variable that a new server finds in its environment if the old one has started it: the number of the old process.
pub const OLD_SERVER_VARIABLE: &str = "LIMOSA_OLD_SERVER";

/// Starts a new server, and gives its process and the channel for [`give_to_child`](crate::give_to_child). The command's standard
/// input and [`OLD_SERVER_VARIABLE`] are set here; all else is the caller's.
///
/// # Errors
///
/// The system's, of a socket pair or of the program. Nothing has been started.
pub fn start_child(command: &mut Command) -> io::Result<(Child, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    let child = command
        .env(OLD_SERVER_VARIABLE, std::process::id().to_string())
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn();
    // The other end is closed here, so that its end in the new process is noticed.
    command.stdin(Stdio::null());
    Ok((child?, ours))
}

/// The server that started this process to be replaced by it, and its number; `None` if no server did.
///
/// # Errors
///
/// `InvalidInput` if [`OLD_SERVER_VARIABLE`] names a process, and standard input is no channel to it; else the system's.
pub fn parent_server() -> io::Result<Option<(OldServer<'static>, i32)>> {
    std::env::var_os(OLD_SERVER_VARIABLE).map(|old| of_parent(&old, io::stdin())).transpose()
}

fn of_parent(old: &OsStr, channel: impl AsFd) -> io::Result<(OldServer<'static>, i32)> {
    let channel = channel.as_fd();
    // The maker of a socket pair is the other end's process.
    let peer = Peer::of(channel).ok().filter(|peer| old == OsStr::new(&peer.pid().to_string()));
    let Some(peer) = peer else {
        let what = format!(
            "{OLD_SERVER_VARIABLE}: standard input is no channel to process {}; a server sets this variable for the process \
             that it starts, and nobody else should",
            old.display()
        );
        return Err(Error::new(ErrorKind::InvalidInput, what));
    };
    let channel = channel.try_clone_to_owned()?;
    Ok((OldServer::Parent(channel.into()), peer.pid()))
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn a_channel_is_that_of_the_process_that_is_named() {
        let this = std::process::id().to_string();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert!(matches!(of_parent(this.as_ref(), &ours), Ok((OldServer::Parent(_), pid)) if pid > 0));
        for (old, channel) in [
            ("1", OwnedFd::from(ours)),
            (&*this, File::open("/dev/null").unwrap().into()),
            ("", File::open("/dev/null").unwrap().into()),
        ] {
            let refused = of_parent(old.as_ref(), channel).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::InvalidInput);
            assert!(refused.to_string().contains("LIMOSA_OLD_SERVER: "), "{refused}");
        }
    }

    #[test]
    fn a_program_that_is_not_there_is_not_started() {
        let missing = start_child(&mut Command::new("/no/such/program")).unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::NotFound);
    }

    /// The process has its channel, and the variable that names this one.
    #[test]
    fn a_child_has_the_channel_as_its_standard_input() {
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", "echo $LIMOSA_OLD_SERVER >&0"]);
        let (mut child, channel) = start_child(&mut shell).unwrap();
        let mut said = String::new();
        io::Read::read_to_string(&mut &channel, &mut said).unwrap();
        assert_eq!(said.trim(), std::process::id().to_string());
        assert!(child.wait().unwrap().success());
    }
}
