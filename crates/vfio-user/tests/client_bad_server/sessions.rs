//! Answers about states and sessions that make no sense, and a session's socket.

use super::*;

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
