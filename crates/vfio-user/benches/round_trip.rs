//! What a request costs beside a bare request and reply of the same sizes over AF_UNIX, in one run.
//!
//! `taskset -c 0 cargo bench --bench round_trip` puts both ends on one core. Rounds of the bare socket
//! and of the crate alternate, and their tenth percentiles are compared, so that a busy machine disturbs
//! both alike.

#[path = "../tests/common/mod.rs"]
mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use common::Served;
use common::device::{BAR0, TestDevice};
use limosa_client::{Chunk, DataStream, Device, DeviceExt};
use limosa_protocol::State;
use limosa_vfio_user::client::{Client, Options};
use limosa_vfio_user::server;

/// A thread that answers each request of `ask` bytes with `answer` bytes.
struct Bare {
    stream: UnixStream,
    ask: Vec<u8>,
    answer: Vec<u8>,
}

impl Bare {
    fn new(ask: usize, answer: usize) -> Bare {
        let (stream, mut peer) = UnixStream::pair().unwrap();
        for end in [&stream, &peer] {
            rustix::net::sockopt::set_socket_send_buffer_size(end, 4 << 20).unwrap();
        }
        std::thread::spawn(move || {
            let (mut request, reply) = (vec![0; ask], vec![1; answer]);
            while peer.read_exact(&mut request).is_ok() && peer.write_all(&reply).is_ok() {}
        });
        Bare { stream, ask: vec![2; ask], answer: vec![0; answer] }
    }

    fn round(&mut self) {
        self.stream.write_all(&self.ask).unwrap();
        self.stream.read_exact(&mut self.answer).unwrap();
    }
}

fn time(mut round: impl FnMut(), rounds: u32) -> Duration {
    let start = Instant::now();
    for _ in 0..rounds {
        round();
    }
    start.elapsed() / rounds
}

fn compare(name: &str, ask: usize, answer: usize, rounds: u32, mut ours: impl FnMut()) {
    let mut bare = Bare::new(ask, answer);
    let (mut floor, mut got) = (Vec::new(), Vec::new());
    time(|| bare.round(), rounds);
    time(&mut ours, rounds);
    let rounds = (rounds / 10).max(4);
    for _ in 0..200 {
        floor.push(time(|| bare.round(), rounds));
        got.push(time(&mut ours, rounds));
    }
    floor.sort();
    got.sort();
    let (floor, got) = (floor[20].as_secs_f64() * 1e6, got[20].as_secs_f64() * 1e6);
    println!(
        "{name:24} {got:9.2} us   bare {floor:9.2} us   x {:.3}   throughput {:.3}",
        got / floor,
        floor / got
    );
}

/// The least that passes for a server: what the client itself costs.
fn least(mut peer: UnixStream) {
    rustix::net::sockopt::set_socket_send_buffer_size(&peer, 4 << 20).unwrap();
    let mut body = vec![0u8; 8 << 20];
    let mut reply = vec![0u8; 8 << 20];
    loop {
        let mut head = [0u8; 24];
        if peer.read_exact(&mut head[..16]).is_err() {
            return;
        }
        let word = |at: usize, from: &[u8]| u32::from_ne_bytes(from[at..at + 4].try_into().unwrap()) as usize;
        let size = word(4, &head);
        let command = u16::from_ne_bytes([head[2], head[3]]);
        peer.read_exact(&mut body[..size - 16]).unwrap();
        let bytes = match command {
            1 => {
                let json = b"{\"capabilities\":{\"max_data_xfer_size\":4194304}}\0";
                reply[16..20].copy_from_slice(&[0; 4]);
                reply[20..20 + json.len()].copy_from_slice(json);
                20 + json.len()
            }
            9 => {
                reply[16..32].copy_from_slice(&body[..16]);
                32 + word(12, &body)
            }
            10 => {
                reply[16..32].copy_from_slice(&body[..16]);
                32
            }
            16 => {
                reply[16..40].copy_from_slice(&body[..24]);
                // GET of MIGRATION, then of the state.
                match word(4, &body) {
                    0x10001 => reply[24..32].copy_from_slice(&1u64.to_ne_bytes()),
                    0x10002 => reply[24..32].copy_from_slice(&1u64.to_ne_bytes()),
                    _ => {}
                }
                40
            }
            17 => {
                reply[16..24].copy_from_slice(&body[..8]);
                24 + word(4, &body)
            }
            _ => 16,
        };
        reply[..4].copy_from_slice(&head[..4]);
        reply[4..8].copy_from_slice(&(bytes as u32).to_ne_bytes());
        reply[8..12].copy_from_slice(&1u32.to_ne_bytes());
        reply[12..16].fill(0);
        peer.write_all(&reply[..bytes]).unwrap();
    }
}

/// The client alone; its server makes one call more for each request than the bare one.
fn alone() {
    let (stream, peer) = UnixStream::pair().unwrap();
    std::thread::spawn(move || least(peer));
    let options = Options { data_bytes_max: 4 << 20, data_socket: false, ..Options::default() };
    let client = Client::from_stream(stream, "least", options).unwrap();
    let mut eight = [0; 8];
    compare("client: read 8 B", 32, 40, 2000, || client.region_read(BAR0, 0, &mut eight).unwrap());
    compare("client: write 8 B", 40, 32, 2000, || client.region_write(BAR0, 0, &[1; 8]).unwrap());
    for bytes in [64 << 10, 1 << 20] {
        let mut data = vec![0; bytes];
        let mut stream = client.set_state(State::StopCopy).unwrap().unwrap();
        let name = format!("client: MIG_READ {} KiB", bytes >> 10);
        compare(&name, 24, 24 + bytes, 20, || {
            stream.read(&mut data).unwrap();
        });
        client.set_state(State::Stop).unwrap();
        let mut stream = client.set_state(State::Resuming).unwrap().unwrap();
        let name = format!("client: MIG_WRITE {} KiB", bytes >> 10);
        compare(&name, 24 + bytes, 16, 20, || stream.write(&data).unwrap());
        client.set_state(State::Stop).unwrap();
    }
}

fn main() {
    alone();
    let options = server::Options { data_bytes_max: 4 << 20, ..Default::default() };
    // No more than a cache holds: the bare socket's bytes are warm too.
    let state = 4 << 20;
    let served = Served::with(TestDevice::new().state_bytes(state).machine(), options);
    let options = Options { data_bytes_max: 4 << 20, data_socket: false, ..Options::default() };
    let client = Client::connect(served.path(), options.clone()).unwrap();

    let mut eight = [0; 8];
    compare("region read 8 B", 32, 40, 2000, || client.region_read(BAR0, 0, &mut eight).unwrap());
    compare("region write 8 B", 40, 32, 2000, || client.region_write(BAR0, 0, &[1; 8]).unwrap());
    let mut page = [0; 4096];
    compare("region read 4 KiB", 32, 32 + 4096, 1000, || client.region_read(BAR0, 0, &mut page).unwrap());

    for bytes in [64 << 10, 1 << 20] {
        let mut stream: Option<Box<dyn DataStream>> = None;
        let mut data = vec![0; bytes];
        let name = format!("MIG_DATA_READ {} KiB", bytes >> 10);
        compare(&name, 24, 24 + bytes, 20, || {
            loop {
                let open = stream.get_or_insert_with(|| {
                    client.set_state(State::Stop).unwrap();
                    client.set_state(State::StopCopy).unwrap().unwrap()
                });
                if open.read(&mut data).unwrap() != Chunk::End {
                    break;
                }
                stream = None;
            }
        });
        client.set_state(State::Stop).unwrap();
        let name = format!("MIG_DATA_WRITE {} KiB", bytes >> 10);
        let mut stream: Option<Box<dyn DataStream>> = None;
        let mut written = 0;
        compare(&name, 24 + bytes, 16, 20, || {
            if written + bytes > state {
                client.reset().unwrap();
                stream = None;
                written = 0;
            }
            let open = stream.get_or_insert_with(|| client.set_state(State::Resuming).unwrap().unwrap());
            open.write(&data).unwrap();
            written += bytes;
        });
        client.reset().unwrap();
    }

    // The whole state, by messages and over a socket of its own.
    drop(client);
    for data_socket in [false, true] {
        let client = Client::connect(served.path(), Options { data_socket, ..options.clone() }).unwrap();
        let mut data = vec![0; 1 << 20];
        let name = if data_socket { "4 MiB, own socket" } else { "4 MiB, messages" };
        compare(name, 24, 24 + state, 5, || {
            client.set_state(State::Stop).unwrap();
            let mut stream = client.set_state(State::StopCopy).unwrap().unwrap();
            while stream.read(&mut data).unwrap() != Chunk::End {}
        });
    }
}
