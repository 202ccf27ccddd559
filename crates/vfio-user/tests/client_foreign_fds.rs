//! What a client does with the fds that a server sends, due or not: no call of it takes longer than its limit because of
//! them, whatever kind of file they are.

#[macro_use]
mod common;

use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use common::lingering::{in_time, lingering, send_with};
use common::raw::*;
use limosa_client::{Chunk, Device, DeviceExt, DmaMap, DmaMemory, Error, IrqAction};
use limosa_protocol::State;
use limosa_protocol::info::DmaMapFlags;
use limosa_testing::memfd;
use limosa_vfio_user::client::{Client, Options};
use rustix::event::{EventfdFlags, eventfd};

/// What a server answers to a command, and with which fd.
type Answer = (Vec<u8>, Option<OwnedFd>);

/// A server that answers everything. `change` may change what it answers.
fn serve(
    socket: UnixStream,
    version: &'static str,
    mut change: impl FnMut(&Message, &mut Answer) + Send + 'static,
) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let peer = Raw::new(socket);
        let mut state = RUNNING;
        while let Some(asked) = peer.try_receive() {
            let body = match asked.command {
                VERSION => [bytes![0u16, 1u16], version.as_bytes().to_vec(), vec![0]].concat(),
                GET_INFO => bytes![16u32, 2u32, 9u32, 5u32],
                GET_REGION_INFO => bytes![32u32, 3u32, asked.u32(8), 0u32, 4096u64, 0u64],
                GET_IRQ_INFO => bytes![16u32, 1u32, asked.u32(8), 1u32],
                GET_REGION_IO_FDS => bytes![16u32, 0u32, asked.u32(8), 0u32],
                REGION_READ => [&asked.body[..16], &vec![0; asked.u32(12) as usize]].concat(),
                REGION_WRITE => asked.body[..16].to_vec(),
                DMA_UNMAP => asked.body[..24].to_vec(),
                MIG_DATA_READ => bytes![8u32, 0u32],
                FEATURE if asked.u32(4) & PROBE != 0 => asked.body[..8].to_vec(),
                FEATURE => match asked.u32(4) & 0xffff {
                    1 => [&asked.body[..8], &bytes![7u64][..]].concat(),
                    2 if asked.u32(4) & GET != 0 => [&asked.body[..8], &bytes![state, -1i32][..]].concat(),
                    2 => {
                        state = asked.u32(8);
                        asked.body[..16].to_vec()
                    }
                    _ => [&asked.body[..8], &[0; 8][..]].concat(),
                },
                _ => Vec::new(),
            };
            let mut answer = (body, None);
            change(&asked, &mut answer);
            let reply = message(asked.id, asked.command, REPLY, &answer.0);
            match answer.1 {
                Some(fd) => send_with(&peer, &reply, fd),
                None => peer.send(&reply, &[]),
            }
        }
    })
}

fn connect(
    options: Options,
    version: &'static str,
    change: impl FnMut(&Message, &mut Answer) + Send + 'static,
) -> (limosa_client::Result<Client>, JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = serve(theirs, version, change);
    (in_time("connecting", move || Client::from_stream(ours, "hostile", options)), server)
}

/// The other ends of sockets that linger, so that they do.
type Unread = Arc<Mutex<Vec<TcpStream>>>;

/// Adds an fd that lingers to every answer to a command.
fn bringing(command: u16, unread: &Unread) -> impl FnMut(&Message, &mut Answer) + Send + 'static {
    let unread = Arc::clone(unread);
    move |asked, answer| {
        // Few of them: each may hold up a thread of the closer's until the test ends.
        let mut unread = unread.lock().unwrap();
        if asked.command == command && unread.len() < 2 {
            let (fd, other) = lingering();
            unread.push(other);
            answer.1 = Some(fd);
        }
    }
}

#[test]
fn an_fd_whose_closing_blocks_holds_up_no_call() {
    let commands = [
        VERSION,
        GET_INFO,
        GET_REGION_INFO,
        GET_REGION_IO_FDS,
        GET_IRQ_INFO,
        REGION_READ,
        REGION_WRITE,
        SET_IRQS,
        DMA_MAP,
        DMA_UNMAP,
        RESET,
        FEATURE,
        MIG_DATA_READ,
    ];
    for command in commands {
        let unread = Unread::default();
        let (client, server) = connect(Options::default(), "{}", bringing(command, &unread));
        let client = client.unwrap();
        in_time("a call", move || {
            client.info().unwrap();
            client.region(0).unwrap();
            client.region_io_fds(0).unwrap();
            client.irq(0).unwrap();
            client.region_read(0, 0, &mut [0; 8]).unwrap();
            client.region_write(0, 0, &[0; 8]).unwrap();
            let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
            client.set_irqs(0, 0, IrqAction::Wire(&[Some(event.as_fd())])).unwrap();
            let memory = memfd(4096);
            let memory = DmaMemory::File { fd: memory.as_fd(), offset: 0 };
            client.dma_map(&DmaMap { iova: 0, size: 4096, flags: DmaMapFlags::READ, memory }).unwrap();
            client.dma_unmap(0, 4096, None).unwrap();
            client.reset().unwrap();
            let mut stream = client.set_state(State::StopCopy).unwrap().unwrap();
            assert_eq!(stream.read(&mut [0; 8]).unwrap(), Chunk::End);
            client.set_state(State::Stop).unwrap();
        });
        assert!(!unread.lock().unwrap().is_empty(), "no answer to {command} brought any");
        server.join().unwrap();
    }
}

#[test]
fn an_fd_of_another_kind_than_is_due_is_refused() {
    let twin = r#"{"capabilities":{"twin_socket":{"supported":true,"fd_index":0}}}"#;
    let unread = Unread::default();
    let (client, server) = connect(Options::default(), twin, bringing(VERSION, &unread));
    let error = client.err().expect("a TCP socket is no twin socket");
    assert!(matches!(error, Error::Misbehaved { .. }), "{error}");
    server.join().unwrap();

    let unread = Unread::default();
    let mut bring = bringing(FEATURE, &unread);
    let options = Options { data_socket: true, ..Options::default() };
    let (client, server) = connect(options, "{}", move |asked, answer| {
        if asked.command == FEATURE && asked.u32(4) & 0xffff == 0xfe01 && asked.u32(4) & PROBE == 0 {
            bring(asked, answer);
        }
    });
    let client = client.unwrap();
    let error = client.set_state(State::StopCopy).err().expect("a TCP socket is no session's");
    assert!(matches!(error, Error::Misbehaved { .. }), "{error}");
    drop(client);
    server.join().unwrap();

    let unread = Unread::default();
    let mut bring = bringing(GET_REGION_IO_FDS, &unread);
    let (client, server) = connect(Options::default(), "{}", move |asked, answer| {
        if asked.command == GET_REGION_IO_FDS {
            let entry = bytes![0u64, 4u64, 0u32, 0u32, 0u32, 0u32, 0u64];
            answer.0 = [bytes![56u32, 0u32, 0u32, 1u32], entry].concat();
            bring(asked, answer);
        }
    });
    let client = client.unwrap();
    let error = client.region_io_fds(0).expect_err("a TCP socket is no eventfd");
    assert!(matches!(error, Error::Misbehaved { .. }), "{error}");
    drop(client);
    server.join().unwrap();
}

#[test]
fn fds_that_nobody_received_do_not_hold_up_the_client_s_end() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let peer = theirs.try_clone().unwrap();
    let server = serve(theirs, "{}", |_, _| {});
    let client = Client::from_stream(ours, "hostile", Options::default()).unwrap();
    let (fd, _unread) = lingering();
    Raw::new(peer).send(&message(1, GET_INFO, REPLY, &[]), &[fd.as_fd()]);
    drop(fd);
    in_time("dropping the client", move || drop(client));
    server.join().unwrap();
}

#[test]
fn more_regions_interrupts_or_vectors_than_a_device_can_have_are_not_believed() {
    for (regions, irqs, vectors) in [(257u32, 5u32, 1u32), (u32::MAX, 0, 1), (9, 257, 1), (9, 5, 2049)] {
        let (client, server) = connect(Options::default(), "{}", move |asked, answer| match asked.command {
            GET_INFO => answer.0 = bytes![16u32, 2u32, regions, irqs],
            GET_IRQ_INFO => answer.0 = bytes![16u32, 1u32, 0u32, vectors],
            _ => {}
        });
        let client = client.unwrap();
        let found = client.info().map(drop).and_then(|()| client.irq(0).map(drop));
        assert!(matches!(found, Err(Error::Misbehaved { .. })), "{regions} {irqs} {vectors}: {found:?}");
        drop(client);
        server.join().unwrap();
    }
    let (client, server) = connect(Options::default(), "{}", |asked, answer| match asked.command {
        GET_INFO => answer.0 = bytes![16u32, 2u32, 256u32, 256u32],
        GET_IRQ_INFO => answer.0 = bytes![16u32, 1u32, 0u32, 2048u32],
        _ => {}
    });
    let client = client.unwrap();
    assert_eq!(client.info().unwrap().num_regions, 256);
    assert_eq!(client.irq(0).unwrap().count, 2048);
    drop(client);
    server.join().unwrap();
}

#[test]
fn information_that_always_wants_more_room_is_not_asked_for_without_end() {
    for command in [GET_REGION_INFO, GET_REGION_IO_FDS] {
        let asks = Arc::new(Mutex::new(0));
        let (client, server) = connect(Options::default(), "{}", {
            let asks = Arc::clone(&asks);
            move |asked, answer| {
                if asked.command == command {
                    *asks.lock().unwrap() += 1;
                    answer.0[..4].copy_from_slice(&(asked.u32(0) + 1).to_ne_bytes());
                }
            }
        });
        let client = client.unwrap();
        let _ = (client.region(0), client.region_io_fds(0));
        drop(client);
        server.join().unwrap();
        assert!(*asks.lock().unwrap() <= 4, "command {command}");
    }
}

#[test]
fn a_server_that_accepts_nobody_is_not_waited_for_for_ever() {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let socket =
        || socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None).unwrap();
    let (listener, address) = (socket(), SocketAddrUnix::new(&path).unwrap());
    rustix::net::bind(&listener, &address).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    // Until its queue is full.
    let _queued: Vec<_> = (0..1000)
        .map_while(|_| {
            let next = socket();
            rustix::net::connect(&next, &address).is_ok().then_some(next)
        })
        .collect();
    let options = Options { request_limit: std::time::Duration::from_millis(5), ..Options::default() };
    let error = in_time("connecting", move || Client::connect(path, options).map(drop)).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
}
