//! The client against servers made of bytes: what each class of misbehaviour comes to, and that the
//! connection stays usable where it can.

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

/// Answers GET MIGRATION, GET and SET of the state.
fn answer_session(peer: &mut Peer, from: State) {
    for value in [0b111u64, u64::from(from.raw())] {
        let (header, body) = peer.receive();
        peer.reply(&header, &[&body[..8], &value.to_ne_bytes()].concat());
    }
    let (header, body) = peer.receive();
    peer.reply(&header, &body);
}

#[test]
fn data_that_is_not_what_it_says_is_refused() {
    let (client, thread) = with_features(|peer| {
        answer_session(peer, State::Stop);
        for (size, bytes) in [(101u32, 200usize), (u32::MAX, 100), (100, 99), (5, 0)] {
            let (header, _) = peer.receive();
            let data = MigData { argsz: 0, size };
            peer.reply(&header, &[data.as_bytes(), &vec![1; bytes]].concat());
        }
        let (header, _) = peer.receive();
        peer.reply(&header, &[0; 4]);
        // Padded to what was asked for, as libvfio-user does; and then the end.
        for size in [3u32, 0] {
            let (header, _) = peer.receive();
            let data = MigData { argsz: 0, size };
            peer.reply(&header, &[data.as_bytes(), &[9; 100]].concat());
        }
    });
    let mut stream = client.set_state(State::StopCopy).unwrap().unwrap();
    let mut data = [0; 100];
    for _ in 0..5 {
        assert!(matches!(stream.read(&mut data), Err(Error::Misbehaved { .. })));
    }
    assert_eq!(stream.read(&mut data).unwrap(), Chunk::Data(3));
    assert_eq!(stream.read(&mut data).unwrap(), Chunk::End);
    thread.join().unwrap();
}

#[test]
fn nothing_in_an_answer_to_a_read_from_precopy_is_not_the_end() {
    let (saw_read, read_seen) = std::sync::mpsc::channel();
    let (client, thread) = with_features(move |peer| {
        answer_session(peer, State::Running);
        // The read comes before the SET, its reply after.
        let (read, _) = peer.receive();
        saw_read.send(()).unwrap();
        let (set, body) = peer.receive();
        peer.reply(&set, &body);
        peer.reply(&read, &[0; 8]);
        let (read, _) = peer.receive();
        peer.reply(&read, &[0; 8]);
    });
    let mut stream = client.set_state(State::PreCopy).unwrap().unwrap();
    let early = std::thread::spawn(move || {
        let chunk = stream.read(&mut [0; 10]).unwrap();
        (stream, chunk)
    });
    read_seen.recv().unwrap();
    client.set_state(State::StopCopy).unwrap();
    let (mut stream, chunk) = early.join().unwrap();
    assert_eq!(chunk, Chunk::NothingForNow);
    assert_eq!(stream.read(&mut [0; 10]).unwrap(), Chunk::End);
    thread.join().unwrap();
}

#[test]
fn states_and_reports_that_make_no_sense_are_refused() {
    let (client, thread) = with_features(|peer| {
        let (header, body) = peer.receive();
        peer.reply(&header, &[&body[..8], &99u64.to_ne_bytes()].concat());
        // A report without its bitmap, as of two mappings at once.
        let (header, body) = peer.receive();
        peer.reply(&header, &body[..32]);
        // Another feature than was asked for.
        let (header, body) = peer.receive();
        peer.reply(&header, &[&body[..4], &[9, 0, 1, 0], &body[8..], &[0; 64]].concat());
        // A report whose last word holds more than the range.
        let (header, body) = peer.receive();
        peer.reply(&header, &[&body[..32], &[0xff; 8]].concat());
        let (header, _) = peer.receive();
        peer.reply(&header, &[0; 4]);
    });
    assert!(matches!(client.state(), Err(Error::Misbehaved { .. })));
    let mut words = [0; 2];
    assert!(client.dma_logging_report(0, 40 * 4096, 4096, &mut words).is_err());
    assert!(client.dma_logging_report(0, 40 * 4096, 4096, &mut words).is_err());
    client.dma_logging_report(0, 40 * 4096, 4096, &mut words).unwrap();
    assert_eq!(words, [(1 << 40) - 1, 0]);
    assert!(matches!(client.migration_flags(), Err(Error::Misbehaved { .. })));
    assert!(matches!(client.dma_logging_report(0, 4096, 0, &mut words), Err(Error::Usage { .. })));
    thread.join().unwrap();
}

#[test]
fn an_unmap_that_cannot_report_loses_no_page() {
    let (client, thread) = with_features(|peer| {
        let map = |peer: &mut Peer| {
            let (header, _) = peer.receive();
            assert_eq!(header.command, Command::DMA_MAP);
            peer.reply(&header, &[]);
        };
        map(peer);
        let (header, body) = peer.receive();
        assert_eq!((header.command, body[4]), (Command::DMA_UNMAP, 1));
        peer.send(header.refusal(Errno::EINVAL), &[]);
        for again in [false, true] {
            if again {
                map(peer);
            }
            let (header, body) = peer.receive();
            assert_eq!((header.command, body[4]), (Command::DMA_UNMAP, 0), "nor is it tried again");
            peer.reply(&header, &body);
        }
    });
    let target: Arc<dyn DmaTarget> = Arc::new(Zeros { full: false });
    let memory = DmaMemory::Messages(&target);
    for _ in 0..2 {
        client.dma_map(&DmaMap { iova: 0, size: 70 * 4096, flags: DmaMapFlags::WRITE, memory }).unwrap();
        let mut words = [0; 3];
        let dirty = DirtyBits { page_size: 4096, words: &mut words };
        client.dma_unmap(0, 70 * 4096, Some(dirty)).unwrap();
        // The device may run: what it wrote is not known.
        assert_eq!(words, [u64::MAX, 0b11_1111, 0]);
    }
    thread.join().unwrap();
}

/// A server that knows of no write of its own, as one is that has no fd of the memory: what it wrote
/// by messages is in its reports all the same.
#[test]
fn pages_written_by_messages_are_dirty_even_if_the_server_does_not_say_so() {
    /// Writes eight bytes, and the reply says that they were written.
    fn write(peer: &mut Peer, iova: u64) {
        let access = DmaAccess { address: iova, count: 8 };
        let header = Header::command(77, Command::DMA_WRITE, 24).unwrap();
        peer.send(header, &[access.as_bytes(), &[1; 8]].concat());
        let (reply, _) = peer.receive();
        assert_eq!((reply.command, reply.flags), (Command::DMA_WRITE, Header::TYPE_REPLY));
    }
    /// Takes a request of the client's, writes meanwhile, and says yes with `more` bytes of zeros.
    fn agree(peer: &mut Peer, command: Command, writes: &[u64], more: usize) {
        let (header, body) = peer.receive();
        assert_eq!(header.command, command);
        writes.iter().for_each(|&iova| write(peer, iova));
        peer.reply(&header, &[&body[..], &vec![0; more]].concat());
    }
    let (client, thread) = with_features(|peer| {
        agree(peer, Command::DMA_MAP, &[], 0);
        agree(peer, Command::REGION_READ, &[0x1_0000], 8);
        agree(peer, Command::DEVICE_FEATURE, &[0x1_1000], 0);
        agree(peer, Command::REGION_READ, &[0x1_2ffc], 8);
        agree(peer, Command::DEVICE_FEATURE, &[], 8);
        agree(peer, Command::DEVICE_FEATURE, &[0x1_5000], 8);
        agree(peer, Command::REGION_READ, &[0x1_7000], 8);
        agree(peer, Command::DMA_UNMAP, &[0x1_f000], 8);
        agree(peer, Command::DMA_MAP, &[], 0);
        agree(peer, Command::DMA_UNMAP, &[0x1_4000], 0);
        agree(peer, Command::DEVICE_FEATURE, &[], 8);
    });
    let dirty = |bits: &[u64]| bits.iter().fold(0, |word, bit| word | 1 << bit);
    let target: Arc<dyn DmaTarget> = Arc::new(Zeros { full: false });
    let memory = DmaMemory::Messages(&target);
    client.dma_map(&DmaMap { iova: 0x1_0000, size: 0x1_0000, flags: DmaMapFlags::WRITE, memory }).unwrap();
    read(&client).unwrap();
    assert_eq!(client.dma_logging_start(4096, &[]).unwrap(), 4096);
    read(&client).unwrap();
    let mut words = [0];
    client.dma_logging_report(0x1_0000, 0x1_0000, 4096, &mut words).unwrap();
    assert_eq!(words, [dirty(&[1, 2, 3])], "nothing of before the log, all of it since");
    words = [0];
    client.dma_logging_report(0x1_0000, 0x1_0000, 0x2000, &mut words).unwrap();
    assert_eq!(words, [dirty(&[2])], "each page once, at the report's size");
    read(&client).unwrap();
    words = [0];
    client.dma_unmap(0x1_0000, 0x1_0000, Some(DirtyBits { page_size: 4096, words: &mut words })).unwrap();
    assert_eq!(words, [dirty(&[7, 15])]);
    // An unmap that does not ask for the dirty pages leaves them for a report.
    client.dma_map(&DmaMap { iova: 0x1_0000, size: 0x1_0000, flags: DmaMapFlags::WRITE, memory }).unwrap();
    client.dma_unmap(0x1_0000, 0x1_0000, None).unwrap();
    words = [0];
    client.dma_logging_report(0x1_0000, 0x1_0000, 4096, &mut words).unwrap();
    assert_eq!(words, [dirty(&[4])], "a plain unmap forgot what was written before it");
    thread.join().unwrap();
}

/// Answers the request for a session's socket, and keeps the server's end.
fn give_data_fd(peer: &mut Peer) -> UnixStream {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
    let (header, body) = peer.receive();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let reply = [header.reply(16).unwrap().as_bytes(), &body[..8], &[0; 8]].concat();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [std::os::fd::AsFd::as_fd(&theirs)];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let parts = [std::io::IoSlice::new(&reply)];
    rustix::net::sendmsg(&peer.0, &parts, &mut control, SendFlags::empty()).unwrap();
    ours
}

/// A client that asked for a session's socket, in a state that was entered from STOP or RUNNING.
fn with_data_fd(
    from: State,
    script: impl FnOnce(&mut Peer, UnixStream) + Send + 'static,
) -> (Client, std::thread::JoinHandle<()>) {
    let (client, thread) = with(Options { features: true, data_socket: true, ..options() }, move |peer| {
        peer.answer_probes();
        answer_session(peer, from);
        let ours = give_data_fd(peer);
        script(peer, ours);
    });
    (client.unwrap(), thread)
}

#[test]
fn the_end_of_a_sessions_socket_counts_only_when_confirmed() {
    let (client, thread) = with_data_fd(State::Stop, |peer, mut ours| {
        ours.write_all(&[7; 300]).unwrap();
        drop(ours);
        let (read, _) = peer.receive();
        peer.send(read.refusal(Errno::EIO), &[]);
        let (read, _) = peer.receive();
        peer.reply(&read, &[0; 8]);
    });
    let mut stream = client.set_state(State::StopCopy).unwrap().unwrap();
    let mut data = [0; 1000];
    assert_eq!(stream.read(&mut data).unwrap(), Chunk::Data(300));
    assert!(stream.read(&mut data).unwrap_err().is_refused(Errno::EIO), "the device could not go on");
    assert_eq!(stream.read(&mut data).unwrap(), Chunk::End);
    thread.join().unwrap();
}

/// In pre-copy an empty socket is asked about once; while the server still writes, the client waits
/// for the socket and not by asking again; in STOP_COPY it asks only about the end.
#[test]
fn a_sessions_socket_is_waited_for_and_not_asked_about_again_and_again() {
    /// Nothing comes from the client while it has nothing to go on with.
    fn is_quiet(peer: &Peer) -> bool {
        let mut fds = [rustix::event::PollFd::new(&peer.0, rustix::event::PollFlags::IN)];
        let while_it_could = rustix::event::Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
        rustix::event::poll(&mut fds, Some(&while_it_could)).unwrap() == 0
    }
    let (client, thread) = with_data_fd(State::Running, |peer, mut ours| {
        let asked = |peer: &mut Peer| {
            let (read, _) = peer.receive();
            assert_eq!(read.command, Command::MIG_DATA_READ);
            read
        };
        // It still writes.
        let read = asked(peer);
        peer.send(read.refusal(Errno::EAGAIN), &[]);
        assert!(is_quiet(peer), "it asks again before anything has come");
        ours.write_all(&[1; 10]).unwrap();
        // Nothing for now, three times.
        for _ in 0..3 {
            let read = asked(peer);
            peer.reply(&read, &[0; 8]);
            peer.region(5);
        }
        let (set, body) = peer.receive();
        assert_eq!(set.command, Command::DEVICE_FEATURE);
        peer.reply(&set, &body);
        assert!(is_quiet(peer), "what is in STOP_COPY's socket needs no question");
        ours.write_all(&[2; 10]).unwrap();
        drop(ours);
        let read = asked(peer);
        peer.reply(&read, &[0; 8]);
    });
    let mut stream = client.set_state(State::PreCopy).unwrap().unwrap();
    let mut data = [0; 1000];
    assert_eq!(stream.read(&mut data).unwrap(), Chunk::Data(10));
    for _ in 0..3 {
        assert_eq!(stream.read(&mut data).unwrap(), Chunk::NothingForNow);
        assert_eq!(read(&client).unwrap(), 5, "the next request is another");
    }
    client.set_state(State::StopCopy).unwrap();
    assert_eq!(stream.read(&mut data).unwrap(), Chunk::Data(10));
    assert_eq!(stream.read(&mut data).unwrap(), Chunk::End);
    thread.join().unwrap();
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

#[test]
fn a_server_that_refuses_device_feature_is_used_without() {
    let (client, thread) = with(Options { features: true, ..options() }, |peer| {
        peer.answer_version("{}");
        for _ in 0..FEATURE_PROBES {
            let (header, _) = peer.receive();
            peer.send(header.refusal(Errno::EINVAL), &[]);
        }
        peer.region(3);
    });
    let client = client.unwrap();
    assert!(client.migration_flags().unwrap().is_empty());
    assert_eq!(client.mig_data_size().unwrap(), None);
    assert!(!client.precopy_info_v2().unwrap());
    assert_eq!(client.reset_count().unwrap(), None, "and nothing is sent: the next request is the read");
    assert_eq!(read(&client).unwrap(), 3);
    thread.join().unwrap();
}

#[test]
fn a_server_whose_only_extension_is_not_the_reset_count_is_not_asked_for_it() {
    // As a server that keeps its step and refuses indexes that it does not know, by whatever errno.
    for errno in [Errno::ENOTTY, Errno::EINVAL, Errno::ENOTSUP, Errno::EIO] {
        let (client, thread) = with(Options { features: true, ..options() }, move |peer| {
            peer.answer_version("{}");
            for _ in 0..FEATURE_PROBES {
                let (header, body) = peer.receive();
                let asked = body.get(4..6).map(|index| [index[0], index[1]]);
                match asked {
                    Some([0x02, 0xfe]) => peer.send(header.refusal(errno), &[]),
                    _ => peer.reply(&header, &[&body[..], &[0; 16]].concat()),
                }
            }
            peer.region(4);
        });
        let client = client.unwrap();
        assert_eq!(client.reset_count().unwrap(), None, "{errno}");
        assert!(!client.probe(FeatureIndex::RESET_COUNT, FeatureOp::GET).unwrap());
        assert_eq!(read(&client).unwrap(), 4);
        thread.join().unwrap();
    }
}

#[test]
fn a_reset_count_that_is_cut_or_refused_leaves_the_connection_in_step() {
    let (client, thread) = with_features(|peer| {
        for bytes in [0, 7, 8] {
            let (header, body) = peer.receive();
            assert_eq!(body, [16u32, 1 << 16 | 0xfe02].map(u32::to_ne_bytes).concat(), "the header alone");
            peer.reply(&header, &[&body[..], &[1; 8][..bytes]].concat());
        }
        for errno in [Errno::ENOTTY, Errno::EINVAL, Errno::EIO] {
            let (header, _) = peer.receive();
            peer.send(header.refusal(errno), &[]);
        }
        peer.region(5);
    });
    for _ in 0..2 {
        assert!(matches!(client.reset_count(), Err(Error::Misbehaved { .. })), "it said that it has it");
    }
    assert_eq!(client.reset_count().unwrap(), Some(0x0101_0101_0101_0101));
    assert_eq!(client.reset_count().unwrap(), None);
    assert_eq!(client.reset_count().unwrap(), None);
    assert!(client.reset_count().unwrap_err().is_refused(Errno::EIO), "no answer either way");
    assert_eq!(read(&client).unwrap(), 5);
    thread.join().unwrap();
}

#[test]
fn a_server_that_loses_its_step_and_finds_it_is_used_without_features() {
    let (client, thread) = with(Options { features: true, ..options() }, |peer| {
        peer.answer_version("{}");
        // Takes the body of what it does not know for a header.
        let mut header = [0; 16];
        for _ in 0..2 {
            peer.0.read_exact(&mut header).unwrap();
            let header = Header::read_from_bytes(&header).unwrap();
            peer.send(Header { error: 0, ..header.refusal(Errno::EINVAL) }, &[]);
        }
        let (info, body) = peer.receive();
        assert_eq!(info.command, Command::DEVICE_GET_INFO);
        peer.reply(&info, &body);
        peer.region(4);
    });
    let client = client.unwrap();
    assert!(client.migration_flags().unwrap().is_empty());
    assert!(client.state().unwrap_err().is_refused(Errno::ENOTTY));
    assert_eq!(read(&client).unwrap(), 4);
    thread.join().unwrap();
}

#[test]
fn a_server_that_breaks_on_device_feature_is_connected_to_again() {
    type Script = fn(Peer);
    let ways: [(&str, Script); 3] = [
        ("closes", |mut peer| drop(peer.receive())),
        ("sends garbage", |mut peer| {
            drop(peer.receive());
            peer.0.write_all(&[0xff; 64]).unwrap();
            std::io::copy(&mut peer.0, &mut std::io::sink()).unwrap();
        }),
        ("answers out of order", |mut peer| {
            let _first = peer.receive();
            let (second, body) = peer.receive();
            peer.reply(&second, &body);
            std::io::copy(&mut peer.0, &mut std::io::sink()).unwrap();
        }),
    ];
    for (name, way) in ways {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("device.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = std::thread::spawn(move || {
            let mut first = Peer(listener.accept().unwrap().0);
            first.answer_version("{}");
            way(first);
            let mut second = Peer(listener.accept().unwrap().0);
            second.answer_version("{}");
            second.region(8);
        });
        let client = Client::connect(&path, Options { features: true, ..options() }).unwrap();
        assert!(client.migration_flags().unwrap().is_empty(), "{name}: nothing is asked again");
        assert_eq!(read(&client).unwrap(), 8);
        thread.join().unwrap();
    }
}

#[test]
fn a_probe_is_sent_as_promised() {
    let (client, thread) = with(Options { features: true, ..options() }, |peer| {
        peer.answer_version("{}");
        let (header, body) = peer.receive();
        assert_eq!((header.command, header.size), (Command::DEVICE_FEATURE, 32));
        let as_header = Header::read_from_bytes(&body).unwrap();
        assert_eq!((as_header.command, as_header.flags), (Command(0), 0));
        assert_eq!(body[4..8], (FeatureOp::PROBE.bits() | FeatureOp::GET.bits() | 1).to_ne_bytes());
    });
    assert!(client.is_err());
    thread.join().unwrap();
}
