//! The faults of servers, each with the clause that it breaks.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering::SeqCst;

use limosa_protocol::info::{IrqSetFlags, RegionFlags};
use limosa_protocol::{Errno, FeatureOp};
use limosa_vfio_user::codec::{Command, Header, RegionAccess, VersionMessage};
use limosa_vfio_user::version::Capabilities;
use rustix::fs::FileType;

use super::proxy::{Connection, Do, Fault, Passing};

type Ask = fn(&mut Passing, &Connection) -> Do;
type Answer = fn(&Passing, &mut Passing);

/// A fault, its words, the clause that it breaks, and the check that it is run with where that is one alone.
pub struct Case {
    pub words: &'static str,
    pub clause: &'static str,
    pub fault: Fault,
    pub only: Option<&'static str>,
}

/// What a page has, and where the checks map.
const PAGE: u64 = 4096;
const IOVA: u64 = 0x4000_0000;

const BARE: &[u8] = b"{\"capabilities\":{}}\0";

fn data(message: &Passing) -> &[u8] {
    message.body.get(VersionMessage::BYTES..).unwrap_or_default()
}

fn is_bare(message: &Passing) -> bool {
    message.is(Command::VERSION) && data(message) == BARE
}

fn agreed(json: &str) -> Vec<u8> {
    [&[0, 0, 0, 0], json.as_bytes(), &[0]].concat()
}

fn when(holds: bool, otherwise: Do) -> Do {
    if holds { otherwise } else { Do::Pass }
}

fn is_refusal(reply: &Passing) -> bool {
    reply.header.flags & Header::ERROR != 0
}

/// Makes a success of a refusal.
fn allow(reply: &mut Passing, body: Vec<u8>) {
    reply.header.flags = Header::TYPE_REPLY;
    reply.header.error = 0;
    reply.set_body(body);
}

fn irq_flags(message: &Passing) -> IrqSetFlags {
    IrqSetFlags::from_bits_retain(message.u32(4))
}

/// One kind of data and one action, all of them assigned.
fn has_good_flags(message: &Passing) -> bool {
    let flags = message.u32(4);
    flags < 64 && (flags & 7).count_ones() == 1 && (flags >> 3).count_ones() == 1
}

fn fixed_bytes(command: Command) -> usize {
    match command {
        Command::DMA_MAP => 32,
        Command::DMA_UNMAP => 24,
        Command::DEVICE_GET_INFO => 4,
        Command::DEVICE_GET_REGION_INFO
        | Command::DEVICE_GET_REGION_IO_FDS
        | Command::DEVICE_GET_IRQ_INFO => 12,
        Command::DEVICE_SET_IRQS => 20,
        Command::REGION_READ | Command::REGION_WRITE => 16,
        Command::DEVICE_FEATURE | Command::MIG_DATA_READ | Command::MIG_DATA_WRITE => 8,
        _ => 0,
    }
}

fn is_unknown(command: Command) -> bool {
    command.0 == 0 || command == Command::DIRTY_PAGES || command.0 > Command::MIG_DATA_WRITE.0
}

fn info_bytes(command: Command) -> usize {
    match command {
        Command::DEVICE_GET_REGION_INFO => 32,
        Command::DEVICE_GET_INFO | Command::DEVICE_GET_REGION_IO_FDS | Command::DEVICE_GET_IRQ_INFO => 16,
        _ => 0,
    }
}

fn state_op(message: &Passing) -> FeatureOp {
    if message.is(Command::DEVICE_FEATURE) {
        FeatureOp::from_bits_retain(message.u32(4) & FeatureOp::all().bits())
    } else {
        FeatureOp::empty()
    }
}

/// Every fault.
pub fn all() -> Vec<Case> {
    let ask = |words, clause, fault: Ask| Case { words, clause, fault: Fault::Ask(fault), only: None };
    let answer =
        |words, clause, fault: Answer| Case { words, clause, fault: Fault::Answer(fault), only: None };
    let other = |words, clause, fault| Case { words, clause, fault, only: None };
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
        // Information
        answer("argsz is the client's", "argsz.reply", |m, r| {
            if m.is(Command::DEVICE_GET_INFO) && m.u32(0) == 4096 {
                r.body[..4].copy_from_slice(&4096u32.to_ne_bytes());
            }
        }),
        ask("argsz does not tell what is needed", "argsz.short", |m, _| {
            let short = m.body.len() >= 16 && (m.u32(0) as usize) < info_bytes(m.header.command);
            when(short, Do::Reply(m.u32(0).to_ne_bytes().to_vec()))
        }),
        ask("GET_REGION_IO_FDS ends the connection", "wire.answered", |m, _| {
            when(m.is(Command::DEVICE_GET_REGION_IO_FDS), Do::Close)
        }),
        answer("a region says that it has capabilities, and has none", "argsz.reply", |m, r| {
            if m.is(Command::DEVICE_GET_REGION_INFO) && r.body.len() >= 32 {
                r.body[..4].copy_from_slice(&64u32.to_ne_bytes());
            }
        }),
        answer("a region can be mapped without an fd", "region.fd", |m, r| {
            if m.is(Command::DEVICE_GET_REGION_INFO) && r.body.len() >= 32 {
                r.body[4] |= RegionFlags::MMAP.bits() as u8;
            }
        }),
        // Memory
        ask("memory with an fd is not mapped", "map.map", |m, _| {
            when(m.is(Command::DMA_MAP) && !m.fds.is_empty(), Do::Refuse(Errno::ENOTSUP))
        }),
        ask("memory without an fd is not mapped", "map.map", |m, _| {
            when(m.is(Command::DMA_MAP) && m.fds.is_empty(), Do::Refuse(Errno::ENOTSUP))
        }),
        ask("a neighbour is an overlap", "map.map", |m, _| {
            when(m.is(Command::DMA_MAP) && m.u64(16) == IOVA - PAGE, Do::Refuse(Errno::EEXIST))
        }),
        answer("a map over another succeeds", "map.exists", |m, r| {
            if m.is(Command::DMA_MAP) && is_refusal(r) && r.header.error == Errno::EEXIST.raw() {
                allow(r, Vec::new());
            }
        }),
        answer("a map over another is EINVAL", "map.exists", |m, r| {
            if m.is(Command::DMA_MAP) && is_refusal(r) {
                r.header.error = Errno::EINVAL.raw();
            }
        }),
        answer("a map of no range succeeds", "map.range", |m, r| {
            let other = is_refusal(r) && r.header.error != Errno::EEXIST.raw();
            if m.is(Command::DMA_MAP) && other && m.u32(4) != 0 && m.body.len() == 32 {
                allow(r, Vec::new());
            }
        }),
        ask("a map for neither reading nor writing succeeds", "map.flags", |m, _| {
            when(m.is(Command::DMA_MAP) && m.body.len() == 32 && m.u32(4) == 0, Do::Reply(Vec::new()))
        }),
        ask("a map of an odd offset ends the connection", "wire.answered", |m, _| {
            when(m.is(Command::DMA_MAP) && m.u64(8) == 512, Do::Close)
        }),
        ask("a map beyond the end of its file ends the connection", "wire.answered", |m, _| {
            when(m.is(Command::DMA_MAP) && m.u64(24) == 1 << 20, Do::Close)
        }),
        answer("an unmap says what was asked for", "unmap.exact", |m, r| {
            if m.is(Command::DMA_UNMAP) && m.body.len() == 24 && m.u64(16) != 0 {
                allow(r, m.body.clone());
            }
        }),
        answer("an unmap of nothing says that something is gone", "unmap.exact", |m, r| {
            if m.is(Command::DMA_UNMAP) && m.body.len() == 24 && m.u64(16) == 0 {
                let mut body = m.body.clone();
                body[16] = 1;
                allow(r, body);
            }
        }),
        answer("an unmap of two says that one is gone", "unmap.exact", |m, r| {
            if m.is(Command::DMA_UNMAP) && m.u64(16) == 2 * PAGE && r.body.len() == 24 {
                r.body[16..].copy_from_slice(&PAGE.to_ne_bytes());
            }
        }),
        answer("an unmap names another address", "unmap.exact", |m, r| {
            if m.is(Command::DMA_UNMAP) && r.body.len() == 24 {
                r.body[8] = 1;
            }
        }),
        ask("an unmap with a bitmap ends the connection", "wire.answered", |m, _| {
            when(m.is(Command::DMA_UNMAP) && m.u32(4) == 1, Do::Close)
        }),
        // Interrupts
        ask("eventfds cannot be taken away", "irqs.wire", |m, _| {
            let takes = irq_flags(m).contains(IrqSetFlags::DATA_EVENTFD) && m.fds.is_empty();
            when(m.is(Command::DEVICE_SET_IRQS) && takes && has_good_flags(m), Do::Refuse(Errno::EINVAL))
        }),
        ask("an index cannot be disabled", "irqs.wire", |m, _| {
            let disables = m.body.len() == 20 && m.u32(16) == 0;
            when(m.is(Command::DEVICE_SET_IRQS) && disables, Do::Refuse(Errno::EINVAL))
        }),
        ask("a trigger does nothing", "irqs.trigger", |m, _| {
            when(m.is(Command::DEVICE_SET_IRQS) && m.u32(4) == 0x21 && m.u32(16) == 1, Do::Reply(Vec::new()))
        }),
        ask("bools do not matter", "irqs.trigger", |m, _| {
            if m.is(Command::DEVICE_SET_IRQS) && m.u32(4) == 0x22 && m.body.len() == 22 {
                m.body[20..].fill(1);
            }
            Do::Pass
        }),
        ask("a disabled index signals on", "irqs.trigger", |m, _| {
            let disables = m.body.len() == 20 && m.u32(16) == 0;
            when(m.is(Command::DEVICE_SET_IRQS) && disables, Do::Reply(Vec::new()))
        }),
        answer("any vectors are taken", "irqs.range", |m, r| {
            if m.is(Command::DEVICE_SET_IRQS) && is_refusal(r) && has_good_flags(m) && m.fds.is_empty() {
                allow(r, Vec::new());
            }
        }),
        answer("any flags are taken", "irqs.flags", |m, r| {
            if m.is(Command::DEVICE_SET_IRQS) && is_refusal(r) && !has_good_flags(m) {
                allow(r, Vec::new());
            }
        }),
        answer("any number of eventfds is taken", "irqs.fds", |m, r| {
            if m.is(Command::DEVICE_SET_IRQS) && is_refusal(r) && !m.fds.is_empty() {
                allow(r, Vec::new());
            }
        }),
        ask("what is no eventfd ends the connection", "wire.answered", |m, _| {
            let pipe = m.fds.iter().any(|fd| {
                let mode = rustix::fs::fstat(fd.as_fd()).unwrap().st_mode;
                FileType::from_raw_mode(mode) == FileType::Fifo
            });
            when(m.is(Command::DEVICE_SET_IRQS) && pipe, Do::Close)
        }),
        answer("bools that are missing are 0", "irqs.bools", |m, r| {
            if m.is(Command::DEVICE_SET_IRQS) && is_refusal(r) && m.u32(4) == 0x22 {
                allow(r, Vec::new());
            }
        }),
        // Regions
        answer("a read names another count", "region.reply", |m, r| {
            if m.is(Command::REGION_READ) && r.body.len() == 20 {
                r.body[12] = 3;
            }
        }),
        answer("a write names another region", "region.reply", |m, r| {
            if m.is(Command::REGION_WRITE) && r.body.len() == 16 {
                r.body[8] ^= 1;
            }
        }),
        ask("a read of nothing ends the connection", "wire.answered", |m, _| {
            when(m.is(Command::REGION_READ) && m.body.len() == 16 && m.u32(12) == 0, Do::Close)
        }),
        answer("accesses beyond a region succeed", "region.bounds", |m, r| {
            let access = m.is(Command::REGION_READ) || m.is(Command::REGION_WRITE);
            if access && is_refusal(r) && m.u32(12) == 4 && m.body.len() != 18 && m.body.len() >= 16 {
                allow(r, m.body[..RegionAccess::BYTES].to_vec());
            }
        }),
        answer("long reads succeed", "region.limit", |m, r| {
            if m.is(Command::REGION_READ) && is_refusal(r) && m.u32(12) > 4096 {
                allow(r, m.body.clone());
            }
        }),
        ask("a write may have less data than it says", "region.data", |m, _| {
            let less = m.body.len() >= 16 && m.body.len() - 16 < m.u32(12) as usize;
            when(
                m.is(Command::REGION_WRITE) && less,
                Do::Reply(m.body.get(..16).unwrap_or_default().to_vec()),
            )
        }),
        ask("every REGION_WRITE_MULTI succeeds", "region.multi", |m, _| {
            when(m.is(Command::REGION_WRITE_MULTI), Do::Reply(m.body.get(..8).unwrap_or_default().to_vec()))
        }),
        // Migration
        answer("SET is answered by a header", "feature.reply", |m, r| {
            if state_op(m) == FeatureOp::SET && r.body.len() > 8 {
                r.set_body(r.body[..8].to_vec());
            }
        }),
        answer("PROBE is answered with data", "feature.reply", |m, r| {
            if state_op(m).contains(FeatureOp::PROBE) && !is_refusal(r) {
                r.set_body([&r.body[..], &[0; 8]].concat());
            }
        }),
        answer("GET does not say its size", "feature.reply", |m, r| {
            if state_op(m) == FeatureOp::GET && r.body.len() >= 8 {
                r.body[0] = 8;
            }
        }),
        answer("data is read at any time", "data.session", |m, r| {
            if m.is(Command::MIG_DATA_READ) && is_refusal(r) && m.u32(4) == 4096 {
                allow(r, [8u32.to_ne_bytes(), 0u32.to_ne_bytes()].concat());
            }
        }),
        answer("data is written at any time", "data.session", |m, r| {
            if m.is(Command::MIG_DATA_WRITE) && is_refusal(r) && m.u32(4) == 16 {
                allow(r, Vec::new());
            }
        }),
        answer("a read says more than it brings", "data.reply", |m, r| {
            if m.is(Command::MIG_DATA_READ) && r.body.len() >= 8 {
                r.body[4] = 65;
            }
        }),
        answer("a read of any size succeeds", "data.size", |m, r| {
            if m.is(Command::MIG_DATA_READ) && is_refusal(r) && m.u32(4) == u32::MAX {
                allow(r, [8u32.to_ne_bytes(), 0u32.to_ne_bytes()].concat());
            }
        }),
        ask("a read of nothing ends the session's connection", "wire.answered", |m, _| {
            when(m.is(Command::MIG_DATA_READ) && m.body.len() == 8 && m.u32(4) == 0, Do::Close)
        }),
        ask("a write may have less data than it says it has", "data.size", |m, _| {
            let less = m.body.len() >= 8 && m.body.len() - 8 < m.u32(4) as usize;
            when(m.is(Command::MIG_DATA_WRITE) && less, Do::Reply(Vec::new()))
        }),
        // Clients
        other("a device is reset when its client is gone", "gone.state", Fault::ResetsWhenGone),
        other("a device is stopped when its client is gone", "gone.state", Fault::StopsWhenGone),
        ask("mappings outlive their client", "gone.mappings", |m, c| {
            if !m.is(Command::DMA_MAP) || m.u64(16) != IOVA || c.messages != 1 {
                return Do::Pass;
            }
            let by = c.server.memory.swap(c.number, SeqCst);
            when(by + 1 == c.number, Do::Refuse(Errno::EEXIST))
        }),
        ask("eventfds outlive their client", "gone.interrupts", |m, c| {
            if m.is(Command::DEVICE_SET_IRQS) {
                let mut kept = c.server.kept.lock().unwrap();
                match m.u32(4) {
                    0x24 => kept.extend(m.fds.iter().map(|fd| fd.try_clone().unwrap())),
                    0x21 => kept.iter().for_each(|fd| {
                        // One that a check has no use for any more.
                        let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
                    }),
                    _ => {}
                }
            }
            Do::Pass
        }),
        Case {
            words: "a server serves twelve clients",
            clause: "gone.served",
            fault: Fault::Connections(12),
            only: Some("vfio-user.client-comes-and-goes"),
        },
        Case {
            words: "a client that says nothing kills the server",
            clause: "gone.served",
            fault: Fault::DiesAfter(0),
            only: Some("vfio-user.client-gone-before-its-version"),
        },
        other("a second client ends the first", "second.harmless", Fault::SecondEndsFirst),
    ]
}
