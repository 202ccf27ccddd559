//! Headers, lengths and fds that make no sense, and messages in pieces.

use super::*;

#[test]
fn headers_that_make_no_sense_are_refused() {
    let served = Served::new();
    let mut raw = served.peer();
    for size in 0..16 {
        raw.send(&header(77, GET_INFO, size, 0), &[]);
        let reply = raw.receive();
        assert_eq!((reply.id, reply.refused()), (77, EINVAL), "size {size}");
    }
    for kind in 2..16 {
        raw.send(&message(78, GET_INFO, kind, &[0; 100]), &[]);
        let reply = raw.receive();
        assert_eq!((reply.id, reply.refused()), (78, EINVAL), "type {kind}");
    }
    // Replies that nobody waits for are dropped.
    for command in 0..20 {
        raw.send(&message(79, command, REPLY, &[0; 100]), &[]);
        raw.send(&message(79, command, REPLY | ERROR, &[]), &[]);
    }
    raw.send(&header(79, DMA_READ, 0, REPLY), &[]);
    raw.assert_usable();
}

#[test]
fn messages_that_are_too_long_are_drained_and_refused() {
    let served = Served::new();
    let mut raw = served.peer();
    raw.set_state(RESUMING).ok();
    let megabytes = vec![0xa5; 3 << 20];
    for command in [0, DMA_MAP, GET_INFO, SET_IRQS, REGION_WRITE, FEATURE, MIG_DATA_READ, MIG_DATA_WRITE, 999]
    {
        assert_eq!(raw.call(command, &megabytes).refused(), EMSGSIZE, "command {command}");
        raw.send(&message(5, command, NO_REPLY, &megabytes), &[]);
        raw.assert_usable();
    }
    // The longest that is taken.
    let longest = vec![1; 1 << 20];
    raw.region_write(BAR0, 0, &longest).ok();
    raw.mig_write(&longest).ok();
    assert_eq!(raw.mig_write(&vec![1; (1 << 20) + 1]).refused(), EINVAL);
    raw.assert_usable();
}

#[test]
fn a_message_that_nobody_could_drain_ends_the_connection() {
    let served = Served::new();
    for command in [GET_INFO, REGION_WRITE, MIG_DATA_WRITE, 0] {
        let raw = served.peer();
        raw.send(&header(80, command, u32::MAX, 0), &[]);
        let reply = raw.receive();
        assert_eq!((reply.id, reply.refused()), (80, EMSGSIZE));
        raw.expect_end();
    }
    served.peer().assert_usable();
}

#[test]
fn messages_in_pieces_and_many_in_one_piece_are_the_same() {
    let served = Served::new();
    let raw = served.peer();
    let event = event();
    let mut all = Vec::new();
    let mut expected = Vec::new();
    for (n, (command, body, _)) in well_formed().into_iter().enumerate() {
        if command == SET_IRQS || command == DMA_MAP {
            continue;
        }
        expected.push(n as u16);
        all.extend(message(n as u16, command, 0, &body));
    }
    for piece in [1, 2, 3, 7, 15, 16, 17, 100, usize::MAX] {
        for chunk in all.chunks(piece.min(all.len())) {
            raw.send(chunk, &[]);
        }
        for id in &expected {
            assert_eq!(raw.receive().id, *id, "in pieces of {piece}");
        }
        // An fd comes with the bytes of its message, wherever it is cut.
        let wire = message(99, SET_IRQS, 0, &bytes![20u32, 0x24u32, MSI, 0u32, 1u32]);
        let cut = piece.min(wire.len() - 1);
        raw.send(&message(98, GET_INFO, 0, &[16, 0, 0, 0]), &[]);
        raw.send(&wire[..cut], &[event.as_fd()]);
        raw.send(&wire[cut..], &[]);
        raw.send(&message(100, GET_INFO, 0, &[16, 0, 0, 0]), &[]);
        for id in [98, 99, 100] {
            let reply = raw.receive();
            assert_eq!(reply.id, id);
            reply.ok();
        }
    }
}

#[test]
fn fds_that_a_message_does_not_take_are_closed_and_refused() {
    let served = Served::new();
    let mut raw = served.peer();
    let seen = Seen::new();
    for (command, body, _) in well_formed() {
        let fds = vec![seen.write.as_fd(); 2];
        let reply = raw.call_fds(command, &body, &fds);
        assert_eq!(reply.refused(), EINVAL, "command {command}");
    }
    assert_eq!(raw.call_fds(RESET, &[], &[seen.write.as_fd()]).refused(), EINVAL);
    // More than any message takes, with each byte of a message.
    let request = message(81, SET_IRQS, 0, &bytes![20u32, 0x24u32, MSI, 0u32, 4u32]);
    let most = vec![seen.write.as_fd(); 253];
    for byte in &request {
        raw.send(std::slice::from_ref(byte), &most);
    }
    assert_eq!(raw.receive().refused(), EINVAL);
    // With a reply that nobody waits for, and with messages that are too long or unknown.
    raw.send(&message(82, DMA_READ, REPLY, &[0; 50]), &most);
    raw.send(&message(83, GET_INFO, 0, &vec![0; 1 << 20]), &most);
    assert_eq!(raw.receive().refused(), EMSGSIZE);
    raw.send(&message(84, 999, NO_REPLY, &[]), &most);
    raw.send(&message(85, MIG_DATA_WRITE, NO_REPLY, &[0; 5000]), &most);
    raw.assert_usable();
    seen.assert_closed();
}

#[test]
fn fds_of_the_wrong_kind_or_number_are_refused() {
    let served = Served::new();
    let mut raw = served.peer();
    let file = memory();
    let event = event();
    let (pipe, _write) = rustix::pipe::pipe().unwrap();
    let directory = rustix::fs::open("/", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let map = bytes![32u32, 3u32, 0u64, 0u64, 4096u64];
    for fd in [event.as_fd(), pipe.as_fd(), directory.as_fd(), raw.socket.try_clone().unwrap().as_fd()] {
        assert_ne!(raw.call_fds(DMA_MAP, &map, &[fd]).refused(), 0);
    }
    assert_eq!(raw.call_fds(DMA_MAP, &map, &[file.as_fd(), file.as_fd()]).refused(), EINVAL);
    let wire = |count: u32| bytes![20u32, 0x24u32, MSI, 0u32, count];
    for fd in [file.as_fd(), pipe.as_fd(), directory.as_fd()] {
        assert_eq!(raw.call_fds(SET_IRQS, &wire(1), &[fd]).refused(), EINVAL);
    }
    for (count, fds) in [(1, 2), (2, 1), (4, 3), (3, 4), (0, 1), (5, 5)] {
        assert_eq!(raw.call_fds(SET_IRQS, &wire(count), &vec![event.as_fd(); fds]).refused(), EINVAL);
    }
    // Fds where the data flag says there are none.
    let none = bytes![20u32, 0x21u32, MSI, 0u32, 1u32];
    assert_eq!(raw.call_fds(SET_IRQS, &none, &[event.as_fd()]).refused(), EINVAL);
    raw.call_fds(SET_IRQS, &wire(1), &[event.as_fd()]).ok();
    raw.assert_usable();
}

#[test]
fn the_fds_of_a_client_that_died_are_closed() {
    let served = Served::new();
    let mut raw = served.peer();
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    // Held as the fd of a message that never became whole.
    raw.send(&header(1, DMA_MAP, 48, 0), &[theirs.as_fd()]);
    drop(theirs);
    drop(raw);
    let mut byte = [0];
    assert_eq!(std::io::Read::read(&mut &ours, &mut byte).unwrap(), 0);
    raw = served.peer();
    raw.assert_usable();
}
