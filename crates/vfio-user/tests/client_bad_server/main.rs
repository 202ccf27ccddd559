//! The client against servers made of bytes: what each class of misbehaviour comes to, and that the
//! connection stays usable where it can.

mod features;
mod sessions;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use limosa_client::{Chunk, Device, DeviceExt, DirtyBits, DmaMap, DmaMemory, DmaTarget, Error};
use limosa_protocol::info::DmaMapFlags;
use limosa_protocol::{Errno, FeatureIndex, FeatureOp, State};
use limosa_vfio_user::client::{Client, Options};
use limosa_vfio_user::codec::{Command, DmaAccess, Header, MigData};
use zerocopy::{FromBytes, IntoBytes};

/// What a client asks between VERSION and its first request: the probe of MIGRATION, DEVICE_GET_INFO, and
/// a PROBE of each feature that not every server has.
const FEATURE_PROBES: usize = 2 + 7;

/// A server's end of a connection.
struct Peer(UnixStream);

impl Peer {
    fn receive(&mut self) -> (Header, Vec<u8>) {
        let mut header = [0; 16];
        self.0.read_exact(&mut header).unwrap();
        let header = Header::read_from_bytes(&header).unwrap();
        let mut body = vec![0; header.size as usize - 16];
        self.0.read_exact(&mut body).unwrap();
        (header, body)
    }

    fn send(&mut self, header: Header, body: &[u8]) {
        self.0.write_all(&[header.as_bytes(), body].concat()).unwrap();
    }

    fn reply(&mut self, to: &Header, body: &[u8]) {
        self.send(to.reply(body.len()).unwrap(), body);
    }

    fn answer_version(&mut self, json: &str) {
        let (header, _) = self.receive();
        assert_eq!(header.command, Command::VERSION);
        self.reply(&header, &[&[0; 4], json.as_bytes(), &[0]].concat());
    }

    /// Answers the probe and says yes to every feature.
    fn answer_probes(&mut self) {
        self.answer_version("{}");
        for _ in 0..FEATURE_PROBES {
            let (header, body) = self.receive();
            self.reply(&header, &[&body[..], &[0; 16]].concat());
        }
    }

    fn region(&mut self, value: u64) {
        let (header, body) = self.receive();
        assert_eq!(header.command, Command::REGION_READ);
        self.reply(&header, &[&body[..16], &value.to_ne_bytes()].concat());
    }
}

fn options() -> Options {
    Options { request_limit: Duration::from_secs(20), features: false, ..Options::default() }
}

/// A client of a server that does what the script says.
fn with(
    options: Options,
    script: impl FnOnce(&mut Peer) + Send + 'static,
) -> (limosa_client::Result<Client>, std::thread::JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || script(&mut Peer(theirs)));
    (Client::from_stream(ours, "scripted", options), thread)
}

/// The same after a plain negotiation.
fn scripted(script: impl FnOnce(&mut Peer) + Send + 'static) -> (Client, std::thread::JoinHandle<()>) {
    let (client, thread) = with(options(), |peer| {
        peer.answer_version("{}");
        script(peer);
    });
    (client.unwrap(), thread)
}

fn read(client: &Client) -> limosa_client::Result<u64> {
    let mut data = [0; 8];
    client.region_read(0, 0, &mut data)?;
    Ok(u64::from_ne_bytes(data))
}

#[test]
fn every_bad_answer_to_version_is_an_error() {
    type Script = fn(&mut Peer);
    let cases: [(&str, Script); 12] = [
        ("EOF", |_| {}),
        ("refused", |peer| {
            let (header, _) = peer.receive();
            peer.send(header.refusal(Errno::EBUSY), &[]);
        }),
        ("no version in it", |peer| {
            let (header, _) = peer.receive();
            peer.reply(&header, &[0; 2]);
        }),
        ("another major", |peer| {
            let (header, _) = peer.receive();
            peer.reply(&header, &[1, 0, 0, 0]);
        }),
        ("a higher minor", |peer| {
            let (header, _) = peer.receive();
            peer.reply(&header, &[0, 0, 99, 0]);
        }),
        ("wrong type", |peer| peer.answer_version("{\"capabilities\":{\"max_msg_fds\":true}}")),
        ("a limit of 0", |peer| peer.answer_version("{\"capabilities\":{\"max_data_xfer_size\":0}}")),
        ("no JSON", |peer| peer.answer_version("{")),
        ("no NUL", |peer| {
            let (header, _) = peer.receive();
            peer.reply(&header, b"\0\0\0\0{}");
        }),
        ("a twin socket without fd", |peer| {
            peer.answer_version("{\"capabilities\":{\"twin_socket\":{\"supported\":true,\"fd_index\":0}}}");
        }),
        ("a huge answer", |peer| {
            let (header, _) = peer.receive();
            peer.send(Header { size: u32::MAX, ..header.reply(0).unwrap() }, &[0; 100]);
        }),
        ("another id", |peer| {
            let (header, _) = peer.receive();
            peer.reply(&Header { id: header.id + 1, ..header }, b"\0\0\0\0{}\0");
        }),
    ];
    for (name, script) in cases {
        let (client, thread) = with(options(), script);
        let error = client.err().unwrap_or_else(|| panic!("{name} was accepted"));
        assert!(
            matches!(error, Error::Misbehaved { .. } | Error::Disconnected { .. } | Error::Refused { .. }),
            "{name}: {error}"
        );
        thread.join().unwrap();
    }
}

#[test]
fn a_reply_that_nobody_asked_for_ends_the_connection() {
    for change in [
        |header: Header| Header { id: header.id ^ 0x100, ..header },
        |header: Header| Header { command: Command::REGION_WRITE, ..header },
        |header: Header| Header { flags: 7, ..header },
        |header: Header| Header { size: 4, ..header },
    ] {
        let (client, thread) = scripted(move |peer| {
            let (header, body) = peer.receive();
            peer.send(change(header.reply(24).unwrap()), &[&body[..16], &[0; 8]].concat());
        });
        let error = read(&client).unwrap_err();
        assert!(matches!(error, Error::Misbehaved { .. }), "{error}");
        assert!(read(&client).unwrap_err().is_connection_lost(), "nor is anything sent after it");
        thread.join().unwrap();
    }
}

#[test]
fn replies_of_the_wrong_length_leave_the_connection_in_step() {
    let (client, thread) = scripted(|peer| {
        for bytes in [0, 8, 15, 16, 20, 23, 25, 100, 100_000] {
            let (header, _) = peer.receive();
            let mut body = vec![0; bytes];
            if bytes >= 16 {
                body[12..16].copy_from_slice(&8u32.to_ne_bytes());
            }
            peer.reply(&header, &body);
        }
        let (header, _) = peer.receive();
        // A refusal with a body, against the specification.
        let refusal = Header { size: 116, ..header.refusal(Errno::EINVAL) };
        peer.send(refusal, &[0; 100]);
        let (header, _) = peer.receive();
        peer.send(Header { error: 0, ..header.refusal(Errno::EINVAL) }, &[]);
        peer.region(77);
    });
    for _ in 0..9 {
        assert!(matches!(read(&client), Err(Error::Misbehaved { .. })));
    }
    assert!(read(&client).unwrap_err().is_refused(Errno::EINVAL));
    assert!(read(&client).unwrap_err().is_refused(Errno::EIO), "an errno is optional");
    assert_eq!(read(&client).unwrap(), 77);
    thread.join().unwrap();
}

#[test]
fn a_late_reply_is_not_taken_for_anothers() {
    // Only a reset has so short a limit.
    let options = Options { state_limit: Duration::from_millis(1), ..options() };
    let (timed_out, go_on) = std::sync::mpsc::channel();
    let (client, thread) = with(options, move |peer| {
        peer.answer_version("{}");
        let (first, _) = peer.receive();
        assert_eq!(first.command, Command::DEVICE_RESET);
        go_on.recv().unwrap();
        // Its reply comes after the client gave up, with a body and in two pieces.
        let late = [first.reply(24).unwrap().as_bytes(), &[1; 24]].concat();
        peer.0.write_all(&late[..20]).unwrap();
        let (read, body) = peer.receive();
        peer.0.write_all(&late[20..]).unwrap();
        peer.reply(&read, &[&body[..16], &2u64.to_ne_bytes()].concat());
        for value in 3..200 {
            peer.region(value);
        }
    });
    let client = client.unwrap();
    assert!(matches!(client.reset(), Err(Error::Timeout { .. })));
    timed_out.send(()).unwrap();
    for value in 2..200 {
        assert_eq!(read(&client).unwrap(), value);
    }
    thread.join().unwrap();
}

#[test]
fn a_server_that_never_replies_is_given_up() {
    let options = Options { state_limit: Duration::from_millis(1), ..options() };
    let (client, thread) = with(options, |peer| {
        peer.answer_version("{}");
        std::io::copy(&mut peer.0, &mut std::io::sink()).unwrap();
    });
    let client = client.unwrap();
    let lost = (0..100).find_map(|_| match client.reset() {
        Err(Error::Timeout { .. }) => None,
        other => Some(other),
    });
    assert!(matches!(lost, Some(Err(Error::Misbehaved { .. }))), "{lost:?}");
    assert!(read(&client).unwrap_err().is_connection_lost());
    thread.join().unwrap();
}

#[test]
fn a_connection_that_is_cut_within_a_reply_is_lost_for_all() {
    let (client, thread) = scripted(|peer| {
        let (header, body) = peer.receive();
        peer.send(header.reply(24).unwrap(), &body[..16]);
    });
    let error = read(&client).unwrap_err();
    assert!(matches!(error, Error::Disconnected { .. }), "{error}");
    thread.join().unwrap();
    assert!(client.region_write_posted(0, 0, &[1]).is_err());
}

#[test]
fn a_refusal_of_a_posted_write_is_ignored() {
    let (client, thread) = scripted(|peer| {
        let (header, _) = peer.receive();
        assert_eq!(header.flags & Header::NO_REPLY, Header::NO_REPLY);
        peer.send(header.refusal(Errno::EINVAL), &[]);
        peer.region(5);
    });
    client.region_write_posted(0, 0, &[1; 4]).unwrap();
    assert_eq!(read(&client).unwrap(), 5);
    thread.join().unwrap();
}

#[test]
fn broken_information_is_refused() {
    let region = |argsz: u32, flags: u32, cap: u32| {
        [argsz, flags, 3, cap].iter().flat_map(|word| word.to_ne_bytes()).chain([0; 16]).collect::<Vec<u8>>()
    };
    let (client, thread) = scripted(move |peer| {
        let mut next = |body: &[u8]| {
            let (header, _) = peer.receive();
            peer.reply(&header, body);
        };
        next(&region(32, 0, 0)[..31]);
        next(&region(32, 0, 0).iter().map(|_| 0).collect::<Vec<u8>>());
        // A capability that points at itself.
        let mut looped = region(48, 0b1101, 32);
        looped[16..24].copy_from_slice(&4096u64.to_ne_bytes());
        looped.extend([1u16.to_ne_bytes(), 1u16.to_ne_bytes()].concat());
        looped.extend(32u32.to_ne_bytes());
        looped.extend([0; 8]);
        next(&looped);
        // Says that more is needed, for ever.
        next(&region(5000, 0, 0));
        next(&region(6000, 0, 0));
        next(&region(u32::MAX, 0, 0));
        // Entries for fds that are not there, and fewer than it says.
        next(&[56, 0, 3, 1u32].iter().flat_map(|w| w.to_ne_bytes()).chain([0; 40]).collect::<Vec<u8>>());
        next(&[16, 0, 3, u32::MAX].iter().flat_map(|w| w.to_ne_bytes()).collect::<Vec<u8>>());
        next(&[0; 12]);
    });
    assert!(matches!(client.region(3), Err(Error::Misbehaved { .. })), "too short");
    assert!(matches!(client.region(3), Err(Error::Misbehaved { .. })), "another region");
    assert!(matches!(client.region(3), Err(Error::Misbehaved { .. })), "a capability loop");
    assert_eq!(client.region(3).unwrap().info.argsz, u32::MAX, "what is too much is not asked for");
    assert!(matches!(client.region_io_fds(3), Err(Error::Misbehaved { .. })));
    assert!(matches!(client.region_io_fds(3), Err(Error::Misbehaved { .. })));
    assert!(matches!(client.irq(3), Err(Error::Misbehaved { .. })));
    thread.join().unwrap();
}

/// A client of a server with every feature, whose device is in STOP.
fn with_features(script: impl FnOnce(&mut Peer) + Send + 'static) -> (Client, std::thread::JoinHandle<()>) {
    let (client, thread) = with(Options { features: true, data_socket: false, ..options() }, |peer| {
        peer.answer_probes();
        script(peer);
    });
    (client.unwrap(), thread)
}

struct Zeros {
    full: bool,
}

impl DmaTarget for Zeros {
    fn read(&self, _: u64, data: &mut [u8]) -> std::io::Result<()> {
        data.fill(0);
        Ok(())
    }
    fn write(&self, _: u64, _: &[u8]) -> std::io::Result<()> {
        if self.full { Err(rustix::io::Errno::NOSPC.into()) } else { Ok(()) }
    }
}

#[test]
fn what_the_server_asks_for_is_bounded_and_refused_in_step() {
    let (client, thread) = scripted(|peer| {
        let (map, _) = peer.receive();
        peer.reply(&map, &[]);
        let (read, body) = peer.receive();
        let mut ask = |command: Command, access: DmaAccess, data: usize| {
            let body = [access.as_bytes(), &vec![0; data]].concat();
            peer.send(Header::command(9, command, body.len()).unwrap(), &body);
            let (reply, body) = peer.receive();
            assert_eq!((reply.id, reply.command), (9, command));
            (reply.flags & Header::ERROR != 0, reply.error, body.len())
        };
        let at = |address, count| DmaAccess { address, count };
        assert_eq!(ask(Command::DMA_READ, at(4096, 4096), 0), (false, 0, 16 + 4096));
        assert_eq!(ask(Command::DMA_READ, at(0, 8), 0), (true, Errno::EFAULT.raw(), 0));
        assert_eq!(ask(Command::DMA_READ, at(8190, 4), 0), (true, Errno::EFAULT.raw(), 0));
        assert_eq!(ask(Command::DMA_READ, at(u64::MAX, 4), 0), (true, Errno::EINVAL.raw(), 0));
        assert_eq!(ask(Command::DMA_READ, at(4096, u64::MAX), 0), (true, Errno::EINVAL.raw(), 0));
        assert_eq!(ask(Command::DMA_READ, at(4096, (1 << 20) + 1), 0), (true, Errno::EINVAL.raw(), 0));
        assert_eq!(ask(Command::DMA_WRITE, at(4096, 100), 99), (true, Errno::EINVAL.raw(), 0));
        assert_eq!(ask(Command::DMA_WRITE, at(4096, 100), 100), (true, Errno::ENOSPC.raw(), 0));
        assert_eq!(ask(Command::REGION_READ, at(0, 8), 5000), (true, Errno::ENOTSUP.raw(), 0));
        peer.send(Header::command(9, Command::DMA_READ, 3).unwrap(), &[0; 3]);
        assert_eq!(peer.receive().0.error, Errno::EINVAL.raw());
        peer.reply(&read, &[&body[..16], &6u64.to_ne_bytes()].concat());
    });
    let memory: Arc<dyn DmaTarget> = Arc::new(Zeros { full: true });
    let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
    let map = DmaMap { iova: 4096, size: 4096, flags, memory: DmaMemory::Messages(&memory) };
    client.dma_map(&map).unwrap();
    assert_eq!(read(&client).unwrap(), 6);
    thread.join().unwrap();
}
