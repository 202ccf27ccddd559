//! A vfio-user client with whatever a server answers.
//!
//! Input: all that comes over the socket before it is closed.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use limosa_client::{Chunk, Device, DeviceExt};
use limosa_device::{Machine, Whole};
use limosa_protocol::State;
use limosa_vfio_user::client::{Client, Options};
use limosa_vfio_user::server::{self, ShutdownHandle, serve_connection};

use crate::cell::Cell;
use crate::vfio_user_client::BYTES_MAX;

/// See the module.
pub fn run(data: &[u8]) {
    let Some(data) = data.get(..data.len().min(BYTES_MAX)) else { return };
    let (client, mut server) = UnixStream::pair().expect("a socket pair");
    server.write_all(data).expect("it fits");
    server.shutdown(Shutdown::Write).expect("it is connected");
    let taking = std::thread::spawn(move || server.read_to_end(&mut Vec::new()).map(drop));
    talk(client);
    let _ = taking.join().expect("it does not panic");
}

/// Asks for everything once. Whatever comes back, it ends.
fn talk(stream: UnixStream) {
    let limit = Duration::from_secs(1);
    let options =
        Options { request_limit: limit, state_limit: limit, twin_socket: false, ..Options::default() };
    let Ok(client) = Client::from_stream(stream, "peer", options) else { return };
    let _ = client.info();
    let _ = client.region(0);
    let _ = client.irq(0);
    let _ = client.region_write(0, 0, &[7; 8]);
    let _ = client.region_read(0, 0, &mut [0; 8]);
    let _ = client.mig_data_size();
    let _ = client.dma_logging_start(4096, &[]);
    let _ = client.dma_logging_report(0, 1 << 20, 4096, &mut [0; 4]);
    if let Ok(Some(mut stream)) = client.set_state(State::StopCopy) {
        let mut chunk = [0; 64];
        while let Ok(Chunk::Data(bytes)) = stream.read(&mut chunk) {
            assert!((1..=chunk.len()).contains(&bytes));
        }
    }
    let _ = client.reset();
}

/// What the two sides say to each other when all is well: the client's bytes and the server's.
pub(crate) fn conversation() -> (Vec<u8>, Vec<u8>) {
    let (near, client) = UnixStream::pair().expect("a socket pair");
    let (far, server) = UnixStream::pair().expect("a socket pair");
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let machine = Machine::simple(Whole::new(Cell::default()));
            let shutdown = ShutdownHandle::new().expect("an eventfd");
            let _ = serve_connection(server, &machine, &server::Options::default(), &shutdown);
        });
        let (near, far) = (&near, &far);
        let to_server = scope.spawn(move || pass_on(near, far));
        let to_client = scope.spawn(move || pass_on(far, near));
        talk(client);
        let joined =
            |thread: std::thread::ScopedJoinHandle<'_, Vec<u8>>| thread.join().expect("it does not panic");
        (joined(to_server), joined(to_client))
    })
}

/// Passes bytes on to the end, and keeps them.
fn pass_on(mut from: &UnixStream, mut to: &UnixStream) -> Vec<u8> {
    let (mut all, mut piece) = (Vec::new(), [0; 4096]);
    while let Ok(bytes @ 1..) = from.read(&mut piece) {
        all.extend_from_slice(&piece[..bytes]);
        if to.write_all(&piece[..bytes]).is_err() {
            break;
        }
    }
    // It may be gone.
    let _ = to.shutdown(Shutdown::Write);
    all
}

/// See [`Target::seeds`](crate::Target::seeds).
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let (_, server) = conversation();
    let cut = server[..server.len() / 2].to_vec();
    vec![("conversation", server), ("cut", cut)]
}
