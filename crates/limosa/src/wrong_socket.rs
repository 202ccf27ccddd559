//! Finds out which listener is at a socket that does not answer as expected. After a failure there, one vfio-user VERSION message is
//! sent, to which each of this project's listeners has an answer of its own.

use std::fmt;
use std::io::{Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use limosa_migrate::link::Address;
use limosa_protocol::Errno;
use limosa_vfio_user::codec::{Command, Header, VersionMessage};
use limosa_vfio_user::version::{Capabilities, JSON_BYTES_MAX, Role, VERSION};
use zerocopy::IntoBytes;

/// The limit for all of it.
const LIMIT: Duration = Duration::from_secs(1);
/// An id that begins no method of HTTP, so that an HTTP server refuses it at once.
const ID: u16 = 0x0101;
/// The beginnings of other protocols' answers: the frame ABORT of a migration stream, a frame of the switch-over, HTTP.
const ABORT: &[u8] = &[15, 0, 0, 0, 0, 0, 0, 0];
const SWITCH_OVER: &[u8] = b"LSwO";
const HTTP: &[u8] = b"HTTP/";

/// A kind of listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listener {
    Device,
    Receiver,
    TakeOver,
    Http,
}

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Listener::Device => "the vfio-user socket of a device",
            Listener::Receiver => "where a receiver of moves listens",
            Listener::TakeOver => "where a new server takes over (--takeover)",
            Listener::Http => "where HTTP is answered, as with --metrics",
        })
    }
}

impl Listener {
    /// The command that is for it.
    fn command(self, name: &dyn fmt::Display) -> String {
        match self {
            Listener::Device => format!("`limosa probe {name}` looks at it"),
            Listener::Receiver => format!("`limosa send DEVICE --to unix:{name}` moves a device there"),
            Listener::TakeOver => format!("`limosa switch-over {name} -- NEW COMMAND` starts such a server"),
            Listener::Http => "a collector of metrics asks there".into(),
        }
    }
}

/// Why a path is not the socket of a device, if that is known.
pub fn not_a_device(path: &Path) -> Option<String> {
    named(at_path(path), Listener::Device, "a device's socket is expected", &path.display())
}

/// Why a path is not one where a new server takes over, if that is known.
pub fn not_a_take_over(path: &Path) -> Option<String> {
    let expected = "the --takeover path of a server is expected";
    named(at_path(path), Listener::TakeOver, expected, &path.display())
}

/// Why an address is not that of a receiver, if that is known.
pub fn not_a_receiver(address: &Address) -> Option<String> {
    let expected = "the address of `limosa receive --listen` is expected";
    match address {
        Address::Unix(path) => named(at_path(path), Listener::Receiver, expected, &path.display()),
        Address::Tcp(host, port) => {
            let place = (host.as_str(), *port).to_socket_addrs().ok()?.next()?;
            let stream = TcpStream::connect_timeout(&place, LIMIT).ok()?;
            stream.set_read_timeout(Some(LIMIT)).ok()?;
            named(ask(stream), Listener::Receiver, expected, address)
        }
        Address::File(_) => None,
    }
}

fn named(
    found: Option<Listener>,
    wanted: Listener,
    expected: &str,
    name: &dyn fmt::Display,
) -> Option<String> {
    let found = found.filter(|found| *found != wanted)?;
    Some(format!("it is {found}; {expected} ({})", found.command(name)))
}

fn at_path(path: &Path) -> Option<Listener> {
    let stream = limosa_host::connect(path, LIMIT).ok()?;
    let stream: &UnixStream = &stream;
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(LIMIT)).ok()?;
    stream.set_write_timeout(Some(LIMIT)).ok()?;
    ask(stream)
}

/// Sends VERSION as a control client, which does not take the place of a VMM. The answer shows what listens.
fn ask(mut stream: impl Read + Write) -> Option<Listener> {
    let role = Some(Role::Control);
    let ours = Capabilities { role, ..Capabilities::of_client(4096, false) }.encode(JSON_BYTES_MAX);
    let version = VersionMessage { major: VERSION.0, minor: VERSION.1 };
    let body = [version.as_bytes(), &ours].concat();
    let header = Header::command(ID, Command::VERSION, body.len())?;
    // A listener that sends first and then closes is heard as well.
    let _ = stream.write_all(&[header.as_bytes(), &body].concat());
    let (mut answer, until) = (Vec::new(), Instant::now() + LIMIT);
    while answer.len() < Header::BYTES && Instant::now() < until {
        let mut piece = [0; Header::BYTES];
        match stream.read(&mut piece) {
            Ok(0) | Err(_) => break,
            Ok(bytes) => answer.extend_from_slice(&piece[..bytes]),
        }
    }
    known(&answer, &header)
}

/// The listener with this answer.
fn known(answer: &[u8], asked: &Header) -> Option<Listener> {
    let begins = |with: &[u8]| answer.starts_with(with);
    // The echo of the id and the command, whether it is an agreement or a refusal.
    let refusal = asked.refusal(Errno::EINVAL);
    let echo = &refusal.as_bytes()[..4];
    match () {
        () if begins(ABORT) => Some(Listener::Receiver),
        () if begins(SWITCH_OVER) => Some(Listener::TakeOver),
        () if begins(HTTP) => Some(Listener::Http),
        () if begins(echo) => Some(Listener::Device),
        () => None,
    }
}

#[cfg(test)]
mod tests {
    use limosa_stream::Kind;

    use super::*;

    #[test]
    fn answers_of_listeners_are_told_apart() {
        assert_eq!(ABORT[..2], Kind::ABORT.0.to_le_bytes()[..2]);
        let asked = Header::command(ID, Command::VERSION, 8).unwrap();
        let refused = asked.refusal(Errno::EACCES);
        for (answer, listener) in [
            (refused.as_bytes(), Some(Listener::Device)),
            (&[ABORT, &[0; 20]].concat(), Some(Listener::Receiver)),
            (b"LSwO\x01\0\x01\0", Some(Listener::TakeOver)),
            (b"HTTP/1.1 400 Bad", Some(Listener::Http)),
            (b"SSH-2.0-OpenSSH_9", None),
            (b"", None),
        ] {
            assert_eq!(known(answer, &asked), listener, "{answer:?}");
        }
    }
}
