//! Everything malformed that a client can send: a clear refusal, and the connection in step
//! afterwards.

#[macro_use]
#[path = "../common/mod.rs"]
mod common;
mod deaths;
mod framing;

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use common::Served;
use common::device::*;
use common::raw::*;
use limosa_vfio_user::connection::ConnectionError;
use limosa_vfio_user::server::{Options, ShutdownHandle, serve_connection};
use proptest::prelude::*;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, Mode, OFlags, ftruncate, memfd_create};

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

fn memory() -> OwnedFd {
    let fd = memfd_create("memory", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, 1 << 20).unwrap();
    fd
}

/// A write end whose closing can be seen.
struct Seen {
    read: OwnedFd,
    write: OwnedFd,
}

impl Seen {
    fn new() -> Seen {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        Seen { read, write }
    }
    /// Waits until nobody else holds the write end.
    fn assert_closed(self) {
        drop(self.write);
        assert_eq!(rustix::io::read(&self.read, &mut [0; 1]), Ok(0));
    }
}

/// One well-formed request of each kind, with how many bytes of its body it cannot do without.
fn well_formed() -> Vec<(u16, Vec<u8>, usize)> {
    let mut write = bytes![0u64, BAR0, 4u32];
    write.extend([1, 2, 3, 4]);
    let mut bools = bytes![21u32, 0x22u32, MSI, 0u32, 1u32];
    bools.push(1);
    vec![
        (DMA_MAP, bytes![32u32, 3u32, 0u64, 0u64, 4096u64], 32),
        (DMA_UNMAP, bytes![24u32, 0u32, 0u64, 4096u64], 24),
        (DMA_UNMAP, bytes![48u32, 1u32, 0u64, 4096u64, 4096u64, 8u64], 40),
        (GET_INFO, bytes![16u32, 0u32, 0u32, 0u32], 4),
        (GET_REGION_INFO, bytes![32u32, 0u32, 0u32, 0u32, 0u64, 0u64], 12),
        (GET_REGION_IO_FDS, bytes![16u32, 0u32, 0u32, 0u32], 16),
        (GET_IRQ_INFO, bytes![16u32, 0u32, 0u32, 0u32], 12),
        (SET_IRQS, bytes![20u32, 0x21u32, MSI, 0u32, 1u32], 20),
        (SET_IRQS, bools, 21),
        (REGION_READ, bytes![0u64, BAR0, 4u32], 16),
        (REGION_WRITE, write, 20),
        (REGION_WRITE_MULTI, bytes![1u64, 0u64, BAR0, 4u32, 1u64], 32),
        (FEATURE, bytes![16u32, SET | 2, RUNNING, -1i32], 16),
        (FEATURE, bytes![24u32, SET | 6, 4096u64, 0u32, 0u32], 24),
        (FEATURE, bytes![1000u32, GET | 8, 0u64, 4096u64, 4096u64], 32),
        (MIG_DATA_READ, bytes![108u32, 100u32], 8),
        (MIG_DATA_WRITE, [bytes![12u32, 4u32], vec![0; 4]].concat(), 12),
    ]
}

#[test]
fn bodies_cut_short_at_every_byte_are_refused() {
    let served = Served::new();
    let mut raw = served.peer();
    for (command, body, needed) in well_formed() {
        for length in 0..needed {
            let reply = raw.call(command, &body[..length]);
            assert_eq!(reply.refused(), EINVAL, "command {command}, {length} bytes of body");
        }
        raw.assert_usable();
    }
}

#[test]
fn wrong_fields_are_refused_with_the_errno_for_it() {
    let served = Served::new();
    let mut raw = served.peer();
    let max = u32::MAX;
    let multi = |count: u64, bytes: u32, region: u32| bytes![count, 0u64, region, bytes, 0u64];
    let cases: Vec<(&str, u16, Vec<u8>, u32)> = vec![
        ("argsz", DMA_MAP, bytes![31u32, 3u32, 0u64, 0u64, 4096u64], EINVAL),
        ("no access", DMA_MAP, bytes![32u32, 0u32, 0u64, 0u64, 4096u64], EINVAL),
        ("unknown flag", DMA_MAP, bytes![32u32, 0x13u32, 0u64, 0u64, 4096u64], EINVAL),
        ("size 0", DMA_MAP, bytes![32u32, 3u32, 0u64, 0u64, 0u64], EINVAL),
        ("beyond 2^64", DMA_MAP, bytes![32u32, 3u32, 0u64, u64::MAX - 4095, 8192u64], EINVAL),
        ("size 0", DMA_UNMAP, bytes![24u32, 0u32, 0u64, 0u64], EINVAL),
        ("argsz", DMA_UNMAP, bytes![23u32, 0u32, 0u64, 4096u64], EINVAL),
        ("unknown flag", DMA_UNMAP, bytes![24u32, 4u32, 0u64, 4096u64], EINVAL),
        ("all of a range", DMA_UNMAP, bytes![24u32, 2u32, 0u64, 4096u64], EINVAL),
        ("all with a bitmap", DMA_UNMAP, bytes![100u32, 3u32, 0u64, 0u64, 4096u64, 8u64], EINVAL),
        ("bitmap without logging", DMA_UNMAP, bytes![100u32, 1u32, 0u64, 4096u64, 4096u64, 8u64], EINVAL),
        ("argsz", GET_INFO, bytes![15u32, 0u32, 0u32, 0u32], EINVAL),
        ("argsz", GET_REGION_INFO, bytes![31u32, 0u32, 0u32, 0u32, 0u64, 0u64], EINVAL),
        ("index", GET_REGION_INFO, bytes![32u32, 0u32, 9u32, 0u32, 0u64, 0u64], EINVAL),
        ("index", GET_REGION_INFO, bytes![32u32, 0u32, max, 0u32, 0u64, 0u64], EINVAL),
        ("argsz", GET_REGION_IO_FDS, bytes![15u32, 0u32, 0u32, 0u32], EINVAL),
        ("index", GET_REGION_IO_FDS, bytes![16u32, 0u32, 9u32, 0u32], EINVAL),
        ("argsz", GET_IRQ_INFO, bytes![15u32, 0u32, 0u32, 0u32], EINVAL),
        ("index", GET_IRQ_INFO, bytes![16u32, 0u32, 5u32, 0u32], EINVAL),
        ("index", SET_IRQS, bytes![20u32, 0x21u32, 5u32, 0u32, 1u32], EINVAL),
        ("start", SET_IRQS, bytes![20u32, 0x21u32, MSI, 4u32, 1u32], EINVAL),
        ("count", SET_IRQS, bytes![20u32, 0x21u32, MSI, 0u32, 5u32], EINVAL),
        ("start and count overflow", SET_IRQS, bytes![20u32, 0x21u32, MSI, max, max], EINVAL),
        ("count", SET_IRQS, bytes![20u32, 0x24u32, MSI, 0u32, max], EINVAL),
        ("argsz", SET_IRQS, bytes![19u32, 0x21u32, MSI, 0u32, 1u32], EINVAL),
        ("argsz", SET_IRQS, bytes![0u32, 0x24u32, MSI, 0u32, 1u32], EINVAL),
        ("argsz without the bools", SET_IRQS, bytes![20u32, 0x22u32, MSI, 0u32, 1u32, 1u8], EINVAL),
        ("bools missing", SET_IRQS, bytes![20u32, 0x22u32, MSI, 0u32, 4u32], EINVAL),
        ("bools missing", SET_IRQS, bytes![20u32, 0x22u32, MSI, 0u32, max], EINVAL),
        ("no data flag", SET_IRQS, bytes![20u32, 0x20u32, MSI, 0u32, 1u32], EINVAL),
        ("two data flags", SET_IRQS, bytes![20u32, 0x23u32, MSI, 0u32, 1u32], EINVAL),
        ("no action", SET_IRQS, bytes![20u32, 0x01u32, MSI, 0u32, 1u32], EINVAL),
        ("two actions", SET_IRQS, bytes![20u32, 0x19u32, MSI, 0u32, 1u32], EINVAL),
        ("unknown flag", SET_IRQS, bytes![20u32, 0x61u32, MSI, 0u32, 1u32], EINVAL),
        ("mask nothing", SET_IRQS, bytes![20u32, 0x09u32, MSI, 0u32, 0u32], EINVAL),
        ("disable from 1", SET_IRQS, bytes![20u32, 0x21u32, MSI, 1u32, 0u32], EINVAL),
        ("not maskable", SET_IRQS, bytes![20u32, 0x09u32, MSIX, 0u32, 1u32], ENOTTY),
        ("eventfd for unmask", SET_IRQS, bytes![20u32, 0x14u32, INTX, 0u32, 1u32], ENOTTY),
        ("region", REGION_READ, bytes![0u64, 9u32, 4u32], EINVAL),
        ("region", REGION_READ, bytes![0u64, max, 4u32], EINVAL),
        ("region not there", REGION_READ, bytes![0u64, BAR4, 1u32], EINVAL),
        ("beyond the end", REGION_READ, bytes![(1u64 << 20) - 3, BAR0, 4u32], EINVAL),
        ("offset overflow", REGION_READ, bytes![u64::MAX, BAR0, 4u32], EINVAL),
        ("count", REGION_READ, bytes![0u64, BAR2, (1u32 << 20) + 1], EINVAL),
        ("count", REGION_READ, bytes![0u64, BAR0, max], EINVAL),
        ("region", REGION_WRITE, bytes![0u64, 9u32, 4u32, 0u32], EINVAL),
        ("read-only", REGION_WRITE, bytes![0u64, BAR3, 4u32, 0u32], EINVAL),
        ("beyond the end", REGION_WRITE, bytes![(1u64 << 20) - 3, BAR0, 4u32, 0u32], EINVAL),
        ("count above the body", REGION_WRITE, bytes![0u64, BAR0, 8u32, 0u32], EINVAL),
        ("count below the body", REGION_WRITE, bytes![0u64, BAR0, 2u32, 0u32], EINVAL),
        ("count", REGION_WRITE, bytes![0u64, BAR0, max, 0u32], EINVAL),
        ("count", REGION_WRITE_MULTI, multi(2, 4, BAR0), EINVAL),
        ("count", REGION_WRITE_MULTI, multi(0, 4, BAR0), EINVAL),
        ("count", REGION_WRITE_MULTI, multi(u64::MAX, 4, BAR0), EINVAL),
        ("9 bytes", REGION_WRITE_MULTI, multi(1, 9, BAR0), EINVAL),
        ("read-only", REGION_WRITE_MULTI, multi(1, 4, BAR3), EINVAL),
        ("argsz", FEATURE, bytes![7u32, GET | 1], EINVAL),
        ("argsz", FEATURE, bytes![15u32, GET | 1], EINVAL),
        ("no operation", FEATURE, bytes![16u32, 1u32], EINVAL),
        ("GET and SET", FEATURE, bytes![16u32, GET | SET | 2, 0u64], EINVAL),
        ("unknown operation", FEATURE, bytes![16u32, GET | 1 << 19 | 1], EINVAL),
        ("SET of what can only be got", FEATURE, bytes![16u32, SET | 1, 0u64], EINVAL),
        ("GET of what can only be set", FEATURE, bytes![24u32, GET | 6, 0u64, 0u64], EINVAL),
        ("unknown", FEATURE, bytes![16u32, GET | 0xffff, 0u64], ENOTTY),
        ("SET without data", FEATURE, bytes![16u32, SET | 2], EINVAL),
        ("SET with half its data", FEATURE, bytes![16u32, SET | 2, STOP], EINVAL),
        ("state", FEATURE, bytes![16u32, SET | 2, 8u32, -1i32], EINVAL),
        ("state", FEATURE, bytes![16u32, SET | 2, max, -1i32], EINVAL),
        ("stop without start", FEATURE, bytes![8u32, SET | 7], EINVAL),
        ("ranges missing", FEATURE, bytes![24u32, SET | 6, 4096u64, 1u32, 0u32], EINVAL),
        ("too many ranges", FEATURE, bytes![24u32, SET | 6, 4096u64, max, 0u32], 7),
        ("empty range", FEATURE, bytes![40u32, SET | 6, 4096u64, 1u32, 0u32, 0u64, 0u64], EINVAL),
        ("report without start", FEATURE, bytes![4096u32, GET | 8, 0u64, 4096u64, 4096u64], EINVAL),
        ("no session", MIG_DATA_READ, bytes![108u32, 100u32], ENODEV),
        ("size 0", MIG_DATA_READ, bytes![8u32, 0u32], EINVAL),
        ("argsz below size", MIG_DATA_READ, bytes![107u32, 100u32], EINVAL),
        ("size", MIG_DATA_READ, bytes![max, max], EINVAL),
        ("size", MIG_DATA_READ, bytes![max, (1u32 << 20) + 1], EINVAL),
        ("no session", MIG_DATA_WRITE, bytes![12u32, 4u32, 0u32], ENODEV),
        ("size above the body", MIG_DATA_WRITE, bytes![12u32, 5u32, 0u32], EINVAL),
        ("size below the body", MIG_DATA_WRITE, bytes![12u32, 3u32, 0u32], EINVAL),
        ("size", MIG_DATA_WRITE, bytes![12u32, max, 0u32], EINVAL),
        ("a second time", VERSION, bytes![0u16, 0u16], EINVAL),
        ("not sent by clients", DMA_READ, bytes![0u64, 4u64], ENOSYS),
        ("not sent by clients", DMA_WRITE, bytes![0u64, 4u64, 0u32], ENOSYS),
        ("unknown", 0, vec![0; 100], ENOSYS),
        ("no longer there", 14, vec![0; 100], ENOSYS),
        ("unknown", 19, vec![], ENOSYS),
        ("unknown", u16::MAX, vec![0; 60_000], ENOSYS),
    ];
    for (what, command, body, errno) in &cases {
        let reply = raw.call(*command, body);
        assert_eq!(reply.flags, REPLY | ERROR, "command {command} was accepted: {what}: {body:?}");
        assert_eq!(reply.refused(), *errno, "command {command}: {what}: {body:?}");
        // The same, when nobody wants to know.
        raw.post(*command, body);
    }
    raw.assert_usable();
    assert_eq!(raw.state(), RUNNING);
}

#[test]
fn reports_are_refused_as_a_whole() {
    let served = Served::new();
    let mut raw = served.peer();
    raw.dma_map(0, 1 << 20, 0, Some(memory().as_fd())).ok();
    raw.feature(SET | 6, &bytes![4096u64, 0u32, 0u32], 24).ok();
    assert_ne!(raw.feature(SET | 6, &bytes![4096u64, 0u32, 0u32], 24).refused(), 0, "a second start");
    let bitmap = 32;
    for (what, argsz, data) in [
        ("argsz", 32 + bitmap - 1, bytes![0u64, 1u64 << 20, 4096u64]),
        ("argsz", 32, bytes![0u64, 1u64 << 20, 4096u64]),
        ("data cut short", 64, bytes![0u64, 1u64 << 20]),
        ("page size", 4096, bytes![0u64, 1u64 << 20, 4095u64]),
        ("page size", 4096, bytes![0u64, 1u64 << 20, 0u64]),
        ("page size", 4096, bytes![0u64, 1u64 << 20, 2048u64]),
        ("no length", 4096, bytes![0u64, 0u64, 4096u64]),
        ("beyond 2^64", u32::MAX, bytes![u64::MAX - 4095, 8192u64, 4096u64]),
        ("a bitmap of 2^49 bytes", u32::MAX, bytes![0u64, u64::MAX, 4096u64]),
    ] {
        assert_ne!(raw.feature(GET | 8, &data, argsz).refused(), 0, "{what}");
    }
    assert_eq!(raw.feature(GET | 8, &bytes![0u64, 1u64 << 20, 4096u64], 32 + bitmap).ok().body.len(), 64);
    raw.assert_usable();
}

#[test]
fn commands_before_version_are_refused_and_it_may_still_come() {
    let served = Served::new();
    let mut raw = Raw::connect(served.path());
    for (command, body, _) in well_formed() {
        assert_eq!(raw.call(command, &body).refused(), EINVAL, "command {command}");
    }
    assert_eq!(raw.call(RESET, &[]).refused(), EINVAL);
    raw.negotiate();
    raw.assert_usable();
}

#[test]
fn malformed_versions_are_refused_and_a_better_one_may_follow() {
    let served = Served::new();
    let mut raw = Raw::connect(served.path());
    let deep = format!("{}{}", "[".repeat(1500), "]".repeat(1500));
    let huge = format!("{{\"a\":\"{}\"}}", "x".repeat(50_000));
    let json = [
        "[]",
        "1",
        "{",
        "{\"capabilities\":3}",
        "{\"capabilities\":{\"max_msg_fds\":-1}}",
        "{\"capabilities\":{\"max_data_xfer_size\":0}}",
        "{\"capabilities\":{\"twin_socket\":{\"supported\":\"yes\"}}}",
        "{\"a\":\0}",
        &deep,
        &huge,
    ];
    for json in json {
        let short: String = json.chars().take(40).collect();
        assert_eq!(raw.version(json).refused(), EINVAL, "{short}");
    }
    let without_nul = [&bytes![0u16, 0u16][..], b"{}"].concat();
    assert_eq!(raw.call(VERSION, &without_nul).refused(), EINVAL);
    let not_utf8 = [&bytes![0u16, 0u16][..], b"{\"a\":\"\xff\"}\0"].concat();
    assert_eq!(raw.call(VERSION, &not_utf8).refused(), EINVAL);
    assert_eq!(raw.call(VERSION, &bytes![1u16, 0u16]).refused(), EINVAL);
    assert_eq!(raw.call(VERSION, &bytes![0u16]).refused(), EINVAL);
    raw.negotiate();
    raw.assert_usable();
}

#[test]
fn a_model_that_panics_costs_its_request_and_a_reset() {
    let served = Served::new();
    let mut raw = served.peer();
    assert_eq!(raw.region_write(BAR2, 0, &bytes![PANIC, 0u64, 0u64]).refused(), 5);
    assert_eq!(raw.state(), 0);
    raw.call(RESET, &[]).ok();
    assert_eq!(raw.state(), RUNNING);
    raw.assert_usable();
}

#[test]
fn random_messages_each_get_one_reply() {
    let served = Served::device(TestDevice::new().state_bytes(10_000));
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut raw = served.peer();
    for i in 0..20_000u32 {
        let command = random() as u16 % 20;
        let mut body = Vec::new();
        for _ in 0..random() % 12 {
            let word = match random() % 8 {
                0 => u32::MAX,
                1 => random() as u32,
                2 => 1 << (random() % 32),
                3 => (1 << 16 << (random() % 3)) | (random() as u32 % 14),
                4 => 4096,
                5 => 16 + random() as u32 % 48,
                _ => random() as u32 % 10,
            };
            body.extend(word.to_ne_bytes());
        }
        body.truncate(body.len() - (random() as usize % 4).min(body.len()));
        let id = i as u16;
        raw.send(&message(id, command, 0, &body), &[]);
        // A mapping without an fd, and the engine: it may ask for memory, which it does not get.
        let reply = loop {
            let message = raw.receive();
            if message.flags & 0xf == REPLY {
                break message;
            }
            raw.send(&message_refusing(&message), &[]);
        };
        assert_eq!((reply.id, reply.command), (id, command), "{body:?}");
    }
    raw.call(RESET, &[]).ok();
    raw.assert_usable();
}

fn message_refusing(command: &Message) -> Vec<u8> {
    let mut refusal = header(command.id, command.command, 16, REPLY | ERROR);
    refusal[12..].copy_from_slice(&EINVAL.to_ne_bytes());
    refusal
}

/// What a message is made of, mostly well-formed.
fn any_message() -> impl Strategy<Value = Vec<u8>> {
    let word = prop_oneof![
        3 => 0..20u32,
        1 => Just(u32::MAX),
        1 => Just(4096u32),
        1 => any::<u32>(),
        1 => (0..14u32, 16..19u32).prop_map(|(index, op)| 1 << op | index),
    ];
    let body = prop::collection::vec(word, 0..12);
    let size =
        prop_oneof![12 => Just(None), 1 => any::<u32>().prop_map(Some), 1 => (0..64u32).prop_map(Some)];
    (0..20u16, body, size, prop_oneof![8 => Just(0), 1 => Just(NO_REPLY), 1 => any::<u32>()]).prop_map(
        |(command, body, size, flags)| {
            let body: Vec<u8> = body.iter().flat_map(|word| word.to_ne_bytes()).collect();
            let mut bytes = header(1, command, size.unwrap_or(16 + body.len() as u32), flags);
            bytes.extend(body);
            bytes
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn no_bytes_make_the_server_fail(
        version in any::<bool>(),
        messages in prop::collection::vec(any_message(), 0..40),
        rest in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut bytes = if version { message(1, VERSION, 0, &[0; 4]) } else { Vec::new() };
        bytes.extend(messages.concat());
        bytes.extend(rest);
        Raw::new(ours.try_clone().unwrap()).send(&bytes, &[]);
        ours.shutdown(std::net::Shutdown::Write).unwrap();
        // Nobody takes the replies: more than the socket holds ends the connection soon.
        let limit = Duration::from_millis(5);
        let options = Options { message_limit: limit, dma_limit: limit, ..Options::default() };
        let machine = TestDevice::new().state_bytes(5000).machine();
        let shutdown = ShutdownHandle::new().unwrap();
        let end = serve_connection(theirs, &machine, &options, &shutdown).unwrap();
        prop_assert_ne!(end, ConnectionError::Broken("a request that the server failed on"));
        machine.reset().unwrap();
    }
}
