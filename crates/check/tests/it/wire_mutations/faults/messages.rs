//! Faults in headers, VERSION and fds.

use super::*;

pub(super) fn all() -> Vec<Case> {
    vec![
        // Header
        answer("a reply has another id", "wire.reply", |m, r| {
            if m.header.id == 0xbeef {
                r.header.id ^= 1;
            }
        }),
        answer("a reply has another command", "wire.reply", |m, r| {
            if m.header.id == 0xbeef {
                r.header.command = Command::DEVICE_RESET;
            }
        }),
        ask("an id that was just used is refused", "wire.ids", |m, c| {
            let last = c.server.memory.swap(u64::from(m.header.id), SeqCst);
            when(last == u64::from(m.header.id), Do::Refuse(Errno::EBUSY))
        }),
        ask("the error field of a command matters", "wire.reserved", |m, _| {
            when(m.header.error != 0, Do::Refuse(Errno::EINVAL))
        }),
        ask("a flag that is not assigned ends the connection", "wire.answered", |m, _| {
            when(m.header.flags & !0x1f != 0, Do::Close)
        }),
        ask("a size of 0 is taken", "wire.size", |m, _| when(m.header.size == 0, Do::Reply(Vec::new()))),
        ask("a size of 15 kills the server", "wire.size", |m, _| when(m.header.size == 15, Do::Die)),
        ask("a size of 4 GiB kills the server", "wire.survives", |m, _| {
            when(m.header.size == u32::MAX, Do::Die)
        }),
        ask("a body of 1 MiB kills the server", "wire.survives", |m, _| {
            when(m.is(Command::DEVICE_GET_INFO) && m.body.len() == 1 << 20, Do::Die)
        }),
        ask("a reply kills the server", "wire.survives", |m, _| when(m.header.flags == 1, Do::Die)),
        ask("an unknown type kills the server", "wire.survives", |m, _| when(m.header.flags == 7, Do::Die)),
        other("a message is one receive", "wire.stream", Fault::WholeMessages),
        Case {
            words: "a receive is one message",
            clause: "wire.stream",
            fault: Fault::SingleMessages,
            // Two that are sent one after the other may come as one, too.
            only: Some("vfio-user.two-messages-in-one-write"),
        },
        answer("GET_IRQ_INFO is answered for the next message", "wire.order", |m, r| {
            if m.is(Command::DEVICE_GET_IRQ_INFO) {
                r.header.id = r.header.id.wrapping_add(1);
            }
        }),
        ask("a posted command is replied to", "wire.posted", |m, _| {
            when(
                m.header.flags & Header::NO_REPLY != 0 && m.is(Command::DEVICE_GET_INFO),
                Do::Reply(Vec::new()),
            )
        }),
        ask("a posted command is refused", "wire.posted", |m, _| {
            when(m.header.flags & Header::NO_REPLY != 0 && m.is(Command(999)), Do::Refuse(Errno::ENOSYS))
        }),
        ask("a posted command is not done", "wire.posted", |m, _| {
            when(m.header.flags & Header::NO_REPLY != 0 && m.is(Command::DMA_MAP), Do::Ignore)
        }),
        other("half a message kills the server", "wire.survives", Fault::DiesOfHalves),
        Case {
            words: "a client that does not take its reply kills the server",
            clause: "wire.survives",
            fault: Fault::DiesAfter(2),
            only: Some("vfio-user.client-gone-before-its-reply"),
        },
        ask("an unknown command ends the connection", "wire.answered", |m, _| {
            when(is_unknown(m.header.command), Do::Close)
        }),
        ask("an unknown command succeeds", "wire.unknown", |m, _| {
            when(is_unknown(m.header.command), Do::Reply(Vec::new()))
        }),
        answer("a refusal has a body", "wire.answered", |m, r| {
            if is_refusal(r) && m.is(Command(999)) {
                r.set_body(vec![0; 4]);
            }
        }),
        ask("a command of the server's succeeds", "wire.direction", |m, _| {
            when(m.is(Command::DMA_READ) || m.is(Command::DMA_WRITE), Do::Reply(Vec::new()))
        }),
        ask("a body that is too short is taken", "wire.short", |m, _| {
            when(m.body.len() < fixed_bytes(m.header.command), Do::Reply(Vec::new()))
        }),
        // VERSION
        answer("VERSION's reply ends without a NUL", "version.reply", |m, r| {
            if is_bare(m) {
                let end = r.body.len() - 1;
                r.set_body(r.body[..end].to_vec());
            }
        }),
        answer("VERSION's reply has another major version", "version.reply", |m, r| {
            if is_bare(m) && !is_refusal(r) {
                r.body[0] = 1;
            }
        }),
        answer("the minor version is the server's", "version.minor", |m, r| {
            if m.is(Command::VERSION) && m.body.len() == 7 && !is_refusal(r) {
                r.body[2] = 2;
            }
        }),
        ask("a later minor version is refused", "version.minor", |m, _| {
            when(
                m.is(Command::VERSION) && m.u32(0) >> 16 == 0xffff && data(m).len() == 3,
                Do::Refuse(Errno::EINVAL),
            )
        }),
        ask("every major version is taken", "version.major", |m, _| {
            when(m.is(Command::VERSION) && m.u32(0) & 0xffff != 0, Do::Reply(agreed("{}")))
        }),
        ask("VERSION without data is refused", "version.optional", |m, _| {
            when(m.is(Command::VERSION) && m.body.len() == 4, Do::Refuse(Errno::EINVAL))
        }),
        ask("VERSION without capabilities is refused", "version.optional", |m, _| {
            when(m.is(Command::VERSION) && data(m) == b"{}\0", Do::Refuse(Errno::EINVAL))
        }),
        ask("an unknown capability is refused", "version.optional", |m, _| {
            let is_unknown = data(m).windows(11).any(|name| name == b"of_tomorrow");
            when(m.is(Command::VERSION) && is_unknown, Do::Refuse(Errno::EINVAL))
        }),
        ask("every version data is taken", "version.malformed", |m, _| {
            let bad = m.body.len() < 4 || Capabilities::decode(data(m)).is_err();
            when(m.is(Command::VERSION) && bad, Do::Reply(agreed("{}")))
        }),
        ask("GET_INFO is answered before VERSION", "version.first", |m, c| {
            when(c.messages == 0 && m.is(Command::DEVICE_GET_INFO), Do::Reply(vec![0; 16]))
        }),
        ask("a second VERSION kills the server", "version.first", |m, c| {
            when(c.messages > 0 && m.is(Command::VERSION), Do::Die)
        }),
        answer("max_data_xfer_size is 0", "version.limits", |m, r| {
            if is_bare(m) {
                r.set_body(agreed("{\"capabilities\":{\"max_data_xfer_size\":0}}"));
            }
        }),
        answer("a capability of the server's own is announced", "version.subset", |m, r| {
            if is_bare(m) {
                r.set_body(agreed("{\"capabilities\":{\"own\":{\"pgsize\":4096}}}"));
            }
        }),
        answer("write_multiple is announced to everybody", "version.subset", |m, r| {
            if is_bare(m) {
                r.set_body(agreed("{\"capabilities\":{\"write_multiple\":true}}"));
            }
        }),
        answer("a twin socket is announced to everybody", "version.twin", |m, r| {
            if m.is(Command::VERSION) && data(m) == b"{\"capabilities\":{\"max_msg_fds\":8}}\0" {
                r.set_body(agreed(
                    "{\"capabilities\":{\"twin_socket\":{\"supported\":true,\"fd_index\":0}}}",
                ));
            }
        }),
        answer("a twin socket is announced and not sent", "version.twin", |m, r| {
            if m.is(Command::VERSION) {
                r.fds.clear();
            }
        }),
        ask("VERSION with an fd kills the server", "wire.survives", |m, _| {
            when(m.is(Command::VERSION) && !m.fds.is_empty(), Do::Die)
        }),
        // Fds
        ask("an fd that is not due ends the connection", "wire.answered", |m, _| {
            when(m.is(Command::DEVICE_GET_INFO) && !m.fds.is_empty(), Do::Close)
        }),
        ask("fds of refused messages are kept", "fds.closed", |m, c| {
            let is_map = m.is(Command::DMA_MAP) && m.fds.len() == 1;
            if !is_map && !m.is(Command(999)) {
                return Do::Pass;
            }
            let is_socket = |fd: &OwnedFd| {
                let mode = rustix::fs::fstat(fd).unwrap().st_mode;
                FileType::from_raw_mode(mode) == FileType::Socket
            };
            if !m.fds.iter().any(|fd| is_socket(fd)) {
                return Do::Pass;
            }
            c.server.kept.lock().unwrap().extend(m.fds.drain(..).map(|fd| fd.into_inner()));
            Do::Refuse(Errno::EINVAL)
        }),
        ask("a message may have any number of fds", "fds.limit", |m, _| {
            when(m.is(Command::DMA_MAP) && m.fds.len() > 16, Do::Reply(Vec::new()))
        }),
        ask("two fds are taken for a map", "map.fd", |m, _| {
            when(m.is(Command::DMA_MAP) && m.fds.len() == 2, Do::Reply(Vec::new()))
        }),
        ask("any fd is taken for a map", "map.fd", |m, _| {
            if m.is(Command::DMA_MAP) && m.fds.len() == 1 {
                m.fds.clear();
            }
            Do::Pass
        }),
    ]
}
