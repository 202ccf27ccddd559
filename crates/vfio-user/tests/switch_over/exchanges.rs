//! A client in the middle of an exchange over its twin socket, on which a device reaches memory by messages.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use limosa_device::saved::Section;
use limosa_device::{Bus, Description, Fault, Machine, Region, SimpleModel, Whole, WholeState};
use limosa_protocol::Errno;
use limosa_protocol::info::RegionFlags;
use limosa_switch_over::{OldServer, TakeLimits, TakeOptions, take};
use limosa_vfio_user::server::{Options, Server};

use crate::common::raw::*;
use crate::{Meanwhile, Running, bytes, options};

const IOVA: u64 = 0x10_0000;
const BYTES: usize = 64;
/// Reads memory at IOVA, into what is read here.
const FETCH: u64 = 0;

/// Fetches memory within a write to its register.
#[derive(Default)]
struct Fetcher {
    bus: Option<Bus>,
    fetched: Vec<u8>,
}

fn fetcher() -> Arc<Machine> {
    Machine::simple(Whole::new(Fetcher { bus: None, fetched: vec![0; BYTES] }))
}

impl SimpleModel for Fetcher {
    fn description(&self) -> Description {
        let flags = RegionFlags::READ | RegionFlags::WRITE;
        Description {
            regions: vec![Region { flags, size: BYTES as u64, ..Region::default() }],
            ..Description::default()
        }
    }

    fn attach(&mut self, bus: Bus) {
        self.bus = Some(bus);
    }

    fn region_read(&mut self, _: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        data.copy_from_slice(&self.fetched[offset as usize..][..data.len()]);
        Ok(())
    }

    fn region_write(&mut self, _: u32, _: u64, _: &[u8]) -> Result<(), Errno> {
        let memory = &self.bus.as_ref().expect("attached").memory;
        memory.read(IOVA, &mut self.fetched)
    }

    fn reset(&mut self) -> Result<(), Errno> {
        Ok(())
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct SavedFetcher {
    #[prost(bytes = "vec", tag = "1")]
    fetched: Vec<u8>,
}

impl WholeState for Fetcher {
    type Saved = SavedFetcher;
    const KIND: &'static str = "test.fetcher";
    const SECTION: Section = Section::message("fetched", 1);

    fn stop(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn start(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn to_saved(&self) -> SavedFetcher {
        SavedFetcher { fetched: self.fetched.clone() }
    }

    fn restore(&mut self, saved: SavedFetcher) -> Result<(), Errno> {
        self.fetched = saved.fetched;
        Ok(())
    }
}

/// A client with memory at IOVA that has no file, and its twin socket.
fn twins(folder: &std::path::Path) -> (Raw, Raw) {
    let mut raw = Raw::connect(&folder.join("device0"));
    let reply = raw.version(r#"{"capabilities":{"max_msg_fds":4,"twin_socket":{"supported":true}}}"#).ok();
    let [fd]: [_; 1] = reply.fds.try_into().unwrap();
    raw.dma_map(IOVA, 1 << 20, 0, None).ok();
    (raw, Raw::new(UnixStream::from(fd)))
}

/// Has the device fetch; the id of the request whose reply is still to come.
fn begin(raw: &mut Raw) -> u16 {
    let id = raw.next_id();
    raw.send(&message(id, REGION_WRITE, 0, &bytes![FETCH, 0u32, 8u32, 0u64]), &[]);
    id
}

/// The device's request for memory.
fn asked(twin: &Raw) -> Message {
    let command = twin.receive();
    assert_eq!((command.command, command.u64(0), command.u64(8)), (DMA_READ, IOVA, BYTES as u64));
    command
}

fn answer(command: &Message, byte: u8) -> Vec<u8> {
    let mut body = bytes![command.u64(0), command.u64(8)];
    body.extend([byte; BYTES]);
    message(command.id, DMA_READ, REPLY, &body)
}

#[track_caller]
fn is_fetched(raw: &mut Raw, byte: u8) {
    assert_eq!(raw.region_read(0, 0, BYTES as u32).ok().body[16..], [byte; BYTES]);
}

/// The device fetches, over one answer of the client's.
#[track_caller]
fn fetches(raw: &mut Raw, twin: &Raw, byte: u8) {
    let id = begin(raw);
    twin.send(&answer(&asked(twin), byte), &[]);
    let reply = raw.receive();
    assert_eq!(reply.id, id);
    reply.ok();
    is_fetched(raw, byte);
}

/// Its server, whose device waits for an answer for as long as the test takes.
fn patient(folder: &std::path::Path) -> Running {
    let (machine, options) = (fetcher(), Options { dma_limit: Duration::from_secs(60), ..options() });
    let server = Server::bind(folder.join("device0"), Arc::clone(&machine), options).unwrap();
    Running::new(vec![server], vec![machine], folder.join("take-over"))
}

#[test]
fn an_exchange_that_is_under_way_ends_in_the_old_server_and_the_next_is_the_new_ones() {
    // How much of the answer has come before the freeze.
    for before in [0, 3, 16, 40] {
        let folder = tempfile::tempdir().unwrap();
        let running = patient(folder.path());
        let (mut raw, twin) = twins(folder.path());
        let mut id = None;
        let (began, begins) = std::sync::mpsc::channel::<Vec<u8>>();
        let running = std::thread::scope(|scope| {
            let (raw, twin, id) = (&mut raw, &twin, &mut id);
            scope.spawn(move || {
                let rest = begins.recv().unwrap();
                // Likely in the freeze; right at any other time too.
                std::thread::sleep(Duration::from_millis(50));
                twin.send(&rest, &[]);
            });
            running.replaced_meanwhile(vec![fetcher()], |_| {
                *id = Some(begin(raw));
                let answer = answer(&asked(twin), 1);
                twin.send(&answer[..before], &[]);
                began.send(answer[before..].to_vec()).unwrap();
                Ok(())
            })
        });
        let reply = raw.receive();
        assert_eq!(Some(reply.id), id);
        reply.ok();
        is_fetched(&mut raw, 1);
        fetches(&mut raw, &twin, 2);
        drop((raw, running));
    }
}

#[test]
fn a_client_that_does_not_answer_keeps_its_server_and_ends_its_exchange_there() {
    let folder = tempfile::tempdir().unwrap();
    let running = patient(folder.path());
    let (mut raw, twin) = twins(folder.path());
    let mut under_way = None;
    let taker = Meanwhile::new(vec![fetcher()], |_| {
        under_way = Some((begin(&mut raw), asked(&twin)));
        Ok(())
    });
    // The old server asks the device how much it has left, which waits for that request. Nobody stands still meanwhile.
    let limits = TakeLimits { rest: Duration::from_millis(300), ..TakeLimits::default() };
    let options = TakeOptions { limits, ..TakeOptions::default() };
    let refused =
        take(OldServer::Path(&running.take_over), taker, &options).expect_err("a refusal").to_string();
    assert!(refused.contains("took longer than the step's limit"), "{refused}");
    let (id, command) = under_way.unwrap();
    twin.send(&answer(&command, 1), &[]);
    let reply = raw.receive();
    assert_eq!(reply.id, id);
    reply.ok();
    is_fetched(&mut raw, 1);
    let running = running.replaced_by(vec![fetcher()]);
    fetches(&mut raw, &twin, 2);
    drop((raw, running));
}
