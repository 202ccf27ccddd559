//! The client's memory reached by messages: on the connection's socket and on the twin socket,
//! within requests and beside them, with clients that answer late, wrong, or never.

#[macro_use]
#[path = "../common/mod.rs"]
mod common;
mod hostile;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use common::Served;
use common::device::*;
use common::raw::*;
use limosa_vfio_user::server::Options;

const IOVA: u64 = 0x4000_0000;

const ETIMEDOUT: u32 = 110;

const ECONNRESET: u32 = 104;

const EPROTO: u32 = 71;

const ENOMEM: u32 = 12;

/// A peer whose memory at [`IOVA`] has no fd.
fn peer(served: &Served) -> Raw {
    let mut raw = served.peer();
    raw.dma_map(IOVA, 16 << 20, 0, None).ok();
    raw
}

fn engine(operation: u64, bytes: u64) -> Vec<u8> {
    bytes![0u64, BAR2, 24u32, operation, IOVA, bytes]
}

/// Starts the engine, and returns the id of the request whose reply is still to come.
fn start(raw: &mut Raw, operation: u64, bytes: u64) -> u16 {
    let id = raw.next_id();
    raw.send(&message(id, REGION_WRITE, 0, &engine(operation, bytes)), &[]);
    id
}

/// Takes a DMA command and checks what it asks for.
#[track_caller]
fn command(raw: &Raw, command: u16, address: u64, count: u64) -> Message {
    let got = raw.receive();
    assert_eq!((got.command, got.flags & 0xf), (command, 0));
    assert_eq!((got.u64(0), got.u64(8)), (address, count));
    got
}

fn answer_read(raw: &Raw, command: &Message, data: &[u8]) {
    let mut body = bytes![command.u64(0), command.u64(8)];
    body.extend_from_slice(data);
    raw.send(&message(command.id, DMA_READ, REPLY, &body), &[]);
}

fn answer_write(raw: &Raw, command: &Message) {
    // As the specification has it: a count of 4 bytes.
    let body = bytes![command.u64(0), command.u64(8) as u32];
    raw.send(&message(command.id, DMA_WRITE, REPLY, &body), &[]);
}

#[track_caller]
fn reply_to(raw: &Raw, id: u16) -> Message {
    let reply = raw.receive();
    assert_eq!(reply.id, id);
    assert_eq!(reply.flags & 0xf, REPLY);
    reply
}

/// Waits for the engine's thread and returns its errno.
#[track_caller]
fn outcome(raw: &mut Raw) -> u32 {
    let deadline = Instant::now() + PATIENCE;
    loop {
        // The register is held back while the engine works, and all ones before.
        let outcome = raw.region_read(BAR2, 24, 4).ok().u32(16);
        if outcome != u32::MAX {
            return outcome;
        }
        assert!(Instant::now() < deadline, "the engine did not start");
    }
}

#[test]
fn dma_within_the_request_that_caused_it() {
    let served = Served::new();
    let mut raw = peer(&served);
    let id = start(&mut raw, DMA_READ_NOW, 100);
    let read = command(&raw, DMA_READ, IOVA, 100);
    answer_read(&raw, &read, &[7; 100]);
    reply_to(&raw, id).ok();
    assert_eq!(raw.region_read(BAR2, 64 << 10, 100).ok().body[16..], [7; 100]);

    let id = start(&mut raw, DMA_WRITE_NOW, 100);
    let write = command(&raw, DMA_WRITE, IOVA, 100);
    assert_eq!(write.body[16..], [7; 100]);
    answer_write(&raw, &write);
    reply_to(&raw, id).ok();
    // libvfio-user's clients answer with a count of 8 bytes.
    let id = start(&mut raw, DMA_WRITE_NOW, 3);
    let write = command(&raw, DMA_WRITE, IOVA, 3);
    raw.send(&message(write.id, DMA_WRITE, REPLY, &bytes![IOVA, 3u64]), &[]);
    reply_to(&raw, id).ok();
}

#[test]
fn dma_on_a_thread_of_the_device_while_the_client_is_idle() {
    let served = Served::new();
    let mut raw = peer(&served);
    let id = start(&mut raw, DMA_READ_LATER, 1 << 20);
    // The request's reply and the device's command come in either order.
    for _ in 0..2 {
        let message = raw.receive();
        if message.command == DMA_READ {
            answer_read(&raw, &message, &vec![9; 1 << 20]);
        } else {
            assert_eq!(message.ok().id, id);
        }
    }
    assert_eq!(outcome(&mut raw), 0);
    assert!(raw.region_read(BAR2, 64 << 10, 1 << 19).ok().body[16..].iter().all(|&byte| byte == 9));
}

#[test]
fn dma_on_a_thread_that_the_request_waits_for() {
    let served = Served::new();
    let mut raw = peer(&served);
    let id = start(&mut raw, DMA_READ_JOINED, 64);
    let read = command(&raw, DMA_READ, IOVA, 64);
    answer_read(&raw, &read, &[5; 64]);
    reply_to(&raw, id).ok();
}

#[test]
fn requests_that_arrive_meanwhile_are_answered_afterwards_in_order() {
    let served = Served::new();
    let mut raw = peer(&served);
    for operation in [DMA_READ_NOW, DMA_READ_JOINED] {
        let first = start(&mut raw, operation, 8);
        let read = command(&raw, DMA_READ, IOVA, 8);
        let ids: Vec<u16> = (0..50)
            .map(|i: u32| {
                let id = raw.next_id();
                let mut body = bytes![u64::from(i), BAR0, 1u32];
                body.push(i as u8);
                raw.send(&message(id, REGION_WRITE, 0, &body), &[]);
                id
            })
            .collect();
        answer_read(&raw, &read, &[1; 8]);
        for id in [first].into_iter().chain(ids) {
            reply_to(&raw, id).ok();
        }
        let data = raw.region_read(BAR0, 0, 50).ok();
        assert!(data.body[16..].iter().enumerate().all(|(i, &byte)| byte == i as u8));
    }
}

#[test]
fn fds_that_arrive_meanwhile_are_their_requests() {
    let served = Served::new();
    let mut raw = peer(&served);
    let first = start(&mut raw, DMA_READ_NOW, 8);
    let read = command(&raw, DMA_READ, IOVA, 8);
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let ids = [raw.next_id(), raw.next_id()];
    raw.send(&message(ids[0], SET_IRQS, 0, &bytes![20u32, 0x24u32, MSI, 0u32, 1u32]), &[event.as_fd()]);
    raw.send(&message(ids[1], SET_IRQS, 0, &bytes![20u32, 0x21u32, MSI, 0u32, 1u32]), &[]);
    answer_read(&raw, &read, &[1; 8]);
    for id in [first].into_iter().chain(ids) {
        reply_to(&raw, id).ok();
    }
    let mut count = [0; 8];
    rustix::io::read(&event, &mut count).unwrap();
    assert!(u64::from_ne_bytes(count) >= 1);
}

#[test]
fn transfers_are_cut_to_what_the_client_takes() {
    let served = Served::new();
    let mut raw = Raw::connect(served.path());
    raw.version(r#"{"capabilities":{"max_data_xfer_size":1000}}"#).ok();
    raw.dma_map(IOVA, 1 << 20, 0, None).ok();
    let id = start(&mut raw, DMA_READ_NOW, 2500);
    for (at, count) in [(0, 1000), (1000, 1000), (2000, 500)] {
        let read = command(&raw, DMA_READ, IOVA + at, count);
        answer_read(&raw, &read, &vec![(at / 1000) as u8; count as usize]);
    }
    reply_to(&raw, id).ok();
    let data = raw.region_read(BAR2, 64 << 10, 2500).ok();
    assert!(data.body[16..].iter().enumerate().all(|(i, &byte)| byte == (i / 1000) as u8));
}

/// A peer with a socket for the server's commands.
fn twins(served: &Served) -> (Raw, Raw) {
    let mut raw = Raw::connect(served.path());
    let reply = raw.version(r#"{"capabilities":{"max_msg_fds":4,"twin_socket":{"supported":true}}}"#).ok();
    let json = String::from_utf8(reply.body[4..].to_vec()).unwrap();
    assert!(json.contains(r#""twin_socket":{"#) && json.contains(r#""fd_index":0"#), "{json}");
    let [fd]: [_; 1] = reply.fds.try_into().unwrap();
    raw.dma_map(IOVA, 16 << 20, 0, None).ok();
    (raw, Raw::new(UnixStream::from(fd)))
}

#[test]
fn dma_goes_over_the_twin_socket_when_the_client_has_one() {
    let served = Served::new();
    let (mut raw, twin) = twins(&served);
    for operation in [DMA_READ_NOW, DMA_READ_JOINED] {
        let id = start(&mut raw, operation, 1 << 20);
        let read = command(&twin, DMA_READ, IOVA, 1 << 20);
        answer_read(&twin, &read, &vec![3; 1 << 20]);
        reply_to(&raw, id).ok();
    }
    let id = start(&mut raw, DMA_WRITE_NOW, 1 << 20);
    let write = command(&twin, DMA_WRITE, IOVA, 1 << 20);
    assert!(write.body[16..].iter().all(|&byte| byte == 3));
    answer_write(&twin, &write);
    reply_to(&raw, id).ok();
}

#[test]
fn nonsense_on_the_twin_socket_is_dropped() {
    let options = Options { dma_limit: Duration::from_secs(1), ..Options::default() };
    let served = Served::with(TestDevice::new().machine(), options);
    let (mut raw, twin) = twins(&served);
    let id = start(&mut raw, DMA_READ_NOW, 8);
    let late = command(&twin, DMA_READ, IOVA, 8);
    assert_eq!(reply_to(&raw, id).refused(), ETIMEDOUT);
    answer_read(&twin, &late, &[1; 8]);
    twin.send(&message(1, GET_INFO, 0, &[0; 16]), &[]);
    twin.send(&header(1, GET_INFO, 3, 0), &[]);
    twin.send(&message(99, DMA_READ, REPLY | ERROR, &[0; 9000]), &[]);
    let id = start(&mut raw, DMA_READ_NOW, 8);
    let read = command(&twin, DMA_READ, IOVA, 8);
    answer_read(&twin, &read, &[2; 8]);
    reply_to(&raw, id).ok();
    assert_eq!(raw.region_read(BAR2, 64 << 10, 8).ok().body[16..], [2; 8]);
}

#[test]
fn the_end_of_either_socket_fails_the_transfer_at_once() {
    let options = Options { dma_limit: Duration::from_secs(3600), ..Options::default() };
    let served = Served::with(TestDevice::new().machine(), options);
    let (mut raw, twin) = twins(&served);
    let id = start(&mut raw, DMA_READ_NOW, 8);
    command(&twin, DMA_READ, IOVA, 8);
    drop(twin);
    assert_eq!(reply_to(&raw, id).refused(), ECONNRESET);
    assert_eq!(raw.region_write(BAR2, 0, &engine(DMA_READ_NOW, 8)[16..]).refused(), ECONNRESET);
    raw.assert_usable();
    drop(raw);

    let (mut raw, twin) = twins(&served);
    raw.region_write(BAR2, 0, &engine(DMA_READ_LATER, 8)[16..]).ok();
    command(&twin, DMA_READ, IOVA, 8);
    drop(raw);
    assert_eq!(outcome(&mut served.peer()), ECONNRESET);
}

#[test]
fn many_threads_share_one_socket() {
    let served = Served::new();
    let mut raw = peer(&served);
    let memory = &served.machine.bus().memory;
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4u64)
            .map(|worker| {
                scope.spawn(move || {
                    for i in 0..50 {
                        let mut data = [0; 16];
                        let iova = IOVA + worker * 4096 + i * 16;
                        memory.read(iova, &mut data).unwrap();
                        assert_eq!(u64::from_ne_bytes(data[..8].try_into().unwrap()), iova);
                        memory.write(iova, &data).unwrap();
                    }
                })
            })
            .collect();
        let (mut served_dma, mut replies) = (0, 0);
        while served_dma < 400 || replies < 100 {
            if served_dma % 4 == 0 && replies < 100 {
                let id = raw.next_id();
                raw.send(&message(id, REGION_READ, 0, &bytes![0u64, CONFIG, 4u32]), &[]);
                replies += 1;
            }
            let message = raw.receive();
            match message.command {
                DMA_READ => {
                    answer_read(&raw, &message, &bytes![message.u64(0), 0u64]);
                    served_dma += 1;
                }
                DMA_WRITE => {
                    answer_write(&raw, &message);
                    served_dma += 1;
                }
                _ => drop(message.ok()),
            }
        }
        workers.into_iter().for_each(|worker| worker.join().unwrap());
    });
}

/// What QEMU 11.1 says in its first message.
const QEMU: &str = r#"{"capabilities": {"pgsizes": 4096, "max_msg_fds": 16, "max_dma_maps": 65535, "max_data_xfer_size": 1048576, "migration": {"max_bitmap_size": 268435456, "pgsize": 4096}, "write_multiple": true}}"#;

#[test]
fn qemu_is_not_sent_messages_that_it_reads_otherwise() {
    const ENOTSUP: u32 = 95;
    let served = Served::new();
    let mut raw = Raw::connect(served.path());
    raw.version(QEMU).ok();
    // QEMU maps its ROMs without an fd also where all of its memory is shared.
    raw.dma_map(IOVA, 1 << 20, 0, None).ok();
    let began = Instant::now();
    for operation in [DMA_READ_NOW, DMA_WRITE_NOW] {
        // The next message is the refusal, and no DMA message.
        assert_eq!(raw.call(REGION_WRITE, &engine(operation, 64)).refused(), ENOTSUP);
    }
    assert!(began.elapsed() < Options::default().dma_limit, "an access waited for QEMU");
    raw.region_read(BAR0, 0, 8).ok();
}
