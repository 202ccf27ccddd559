//! A vfio-user server with whatever a client sends.
//!
//! Input: all that comes over the socket before it is closed.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use limosa_device::{Machine, Whole};
use limosa_vfio_user::server::{Options, ShutdownHandle, serve_connection};

use crate::cell::Cell;
use crate::vfio_user_server::conversation;

/// The longest input: what fits into a socket, so that it is there before the server is.
pub(crate) const BYTES_MAX: usize = 64 << 10;

/// See the module.
pub fn run(data: &[u8]) {
    let Some(data) = data.get(..data.len().min(BYTES_MAX)) else { return };
    let (mut client, server) = UnixStream::pair().expect("a socket pair");
    client.write_all(data).expect("it fits");
    client.shutdown(Shutdown::Write).expect("it is connected");
    // Replies are taken, so that the server never waits for that.
    let taking = std::thread::spawn(move || client.read_to_end(&mut Vec::new()).map(drop));
    let limit = Duration::from_secs(1);
    let options =
        Options { message_limit: limit, version_limit: limit, dma_limit: limit, ..Options::default() };
    let machine = Machine::simple(Whole::new(Cell::default()));
    let shutdown = ShutdownHandle::new().expect("an eventfd");
    // How it ends is the client's affair.
    let _ = serve_connection(server, &machine, &options, &shutdown);
    let _ = taking.join().expect("it does not panic");
}

/// See [`Target::seeds`](crate::Target::seeds).
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let (client, _) = conversation();
    let cut = client[..client.len() / 2].to_vec();
    vec![("conversation", client), ("cut", cut)]
}
