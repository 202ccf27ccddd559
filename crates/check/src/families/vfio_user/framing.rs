//! Headers, and messages in a stream of bytes (`vfio-user.rst: Header, Command Concurrency`).

use limosa_protocol::info::{DeviceInfo, IrqInfo, RegionInfo};
use limosa_vfio_user::codec::{Command, Header};
use zerocopy::IntoBytes;

use super::{IOVA, PAGE, map, on_connection, on_wire, unmap};
use crate::check::{Check, Needs, Stop, Verdict, ensure, fail};
use crate::trial::Trial;
use crate::wire::{Answer, Message, Raw, info_request, next_client};

pub(super) fn checks() -> Vec<Check> {
    let none = Needs::empty();
    vec![
        on_connection("vfio-user.reply-echoes-the-header", none, &["wire.reply"], |_, raw| {
            let message = get_info(0xbeef);
            let body = raw.exchange(&message, &[])?.done("GET_INFO with id 0xbeef")?;
            ensure(body.bytes.len() == size_of::<DeviceInfo>(), || {
                format!("GET_INFO is answered by {} bytes, expected 16", body.bytes.len())
            })
        }),
        on_connection("vfio-user.ids-are-the-clients", none, &["wire.ids"], |_, raw| {
            let two = [get_info(7).bytes(), get_info(7).bytes()].concat();
            raw.send_bytes(&two, &[], "two GET_INFO with one id")?;
            for nth in ["first", "second"] {
                raw.answer(7, Command::DEVICE_GET_INFO)?.done(&format!("the {nth} GET_INFO of that id"))?;
            }
            Ok(())
        }),
        on_connection("vfio-user.error-field-of-a-command", none, &["wire.reserved"], |_, raw| {
            let mut message = get_info(raw.id());
            message.header.error = 22;
            raw.exchange(&message, &[])?.done("GET_INFO with its reserved error field set").map(drop)
        }),
        on_connection("vfio-user.flags-beyond-the-assigned", none, &["wire.answered"], |_, raw| {
            for flags in [1 << 5, 1 << 6, 1 << 31] {
                let mut message = get_info(raw.id());
                message.header.flags = flags;
                raw.exchange(&message, &[])?.answered(&format!("GET_INFO with the flags {flags:#x}"))?;
                raw.in_step()?;
            }
            Ok(())
        }),
        on_wire("vfio-user.size-of-nothing", none, &["wire.size"], |t| odd_size(t, 0)),
        on_wire("vfio-user.size-below-the-header", none, &["wire.size"], |t| odd_size(t, 15)),
        on_wire("vfio-user.size-beyond-everything", none, &["wire.survives"], |t| {
            let mut raw = Raw::open(t)?;
            let mut message = get_info(raw.id());
            message.header.size = u32::MAX;
            raw.send(&message, &[])?;
            drop(raw);
            next_client(t)
        }),
        on_wire("vfio-user.body-of-a-mebibyte", none, &["wire.survives"], |t| {
            let mut raw = Raw::open(t)?;
            let message = Message::command(raw.id(), Command::DEVICE_GET_INFO, &vec![0; 1 << 20]);
            let answer = raw.exchange(&message, &[])?;
            raw.goes_on(t, &answer)
        }),
        on_wire("vfio-user.reply-that-nobody-waits-for", none, &["wire.survives"], |t| {
            stray(t, Header::TYPE_REPLY, Command::DMA_READ)
        }),
        on_wire("vfio-user.type-that-is-not-assigned", none, &["wire.survives"], |t| {
            stray(t, 7, Command::DEVICE_GET_INFO)
        }),
        on_connection("vfio-user.cut-anywhere", none, &["wire.stream"], cut_anywhere),
        on_connection("vfio-user.two-messages-in-one-write", none, &["wire.stream"], |_, raw| {
            let (first, second) = (get_info(raw.id()), get_info(raw.id()));
            raw.send_bytes(&[first.bytes(), second.bytes()].concat(), &[], "two GET_INFO")?;
            for message in [first, second] {
                raw.answer(message.header.id, Command::DEVICE_GET_INFO)?.done("GET_INFO in a pair")?;
            }
            Ok(())
        }),
        on_connection("vfio-user.pipelined", none, &["wire.order"], pipelined),
        on_connection("vfio-user.posted-is-not-replied-to", none, &["wire.posted"], |_, raw| {
            posted(raw, get_info(0))
        }),
        on_connection("vfio-user.posted-is-not-refused", none, &["wire.posted"], |_, raw| {
            posted(raw, Message::command(0, Command(999), &[]))
        }),
        on_connection("vfio-user.posted-is-done-before-the-next", none, &["wire.posted"], |_, raw| {
            let mut message = Message::command(raw.id(), Command::DMA_MAP, map(IOVA, PAGE).as_bytes());
            message.header = message.header.posted();
            raw.send(&message, &[])?;
            let unmapped = raw.ask(Command::DMA_UNMAP, unmap(IOVA, PAGE).as_bytes())?;
            let body = unmapped.done("DMA_UNMAP of what a posted DMA_MAP had mapped")?;
            let entry = body.fixed::<limosa_vfio_user::codec::DmaUnmapMessage>()?;
            ensure(entry.size == PAGE, || {
                format!("DMA_UNMAP of what a posted DMA_MAP had mapped says {} bytes", entry.size)
            })
        }),
        on_wire("vfio-user.client-gone-within-a-header", none, &["wire.survives"], |t| cut(t, 7)),
        on_wire("vfio-user.client-gone-within-a-body", none, &["wire.survives"], |t| {
            cut(t, Header::BYTES + 4)
        }),
        on_wire("vfio-user.client-gone-before-its-reply", none, &["wire.survives"], |t| {
            cut(t, Header::BYTES + size_of::<DeviceInfo>())
        }),
    ]
}

fn get_info(id: u16) -> Message {
    Message::command(id, Command::DEVICE_GET_INFO, info_request().as_bytes())
}

/// A header with an impossible size: the beginning of the next message is unknown, so it may be refused or end the
/// connection.
fn odd_size(t: &Trial, size: u32) -> Verdict {
    let mut raw = Raw::open(t)?;
    let mut message = Message::command(raw.id(), Command::DEVICE_GET_INFO, &[]);
    message.header.size = size;
    let answer = raw.exchange(&message, &[])?.not_done(&format!("a message of size {size}"))?;
    raw.goes_on(t, &answer)
}

/// A message that is not a command: it is ignored or refused, or ends the connection.
fn stray(t: &Trial, kind: u32, command: Command) -> Verdict {
    let mut raw = Raw::open(t)?;
    let mut message = Message::command(raw.id(), command, info_request().as_bytes());
    message.header.flags = kind;
    let next = get_info(raw.id());
    if !raw.send(&message, &[])? || !raw.send(&next, &[])? {
        return raw.goes_on(t, &Answer::Closed);
    }
    while let Some((header, answer)) = raw.next_reply("GET_INFO")? {
        if header.id == next.header.id {
            answer.done("GET_INFO after it")?;
            return raw.in_step();
        }
        ensure(header.id == message.header.id && matches!(answer, Answer::Refused(_)), || {
            format!(
                "a message of type {kind} with id {} is answered by {answer:?} with id {}, expected a refusal of it or nothing",
                message.header.id, header.id
            )
        })?;
    }
    raw.goes_on(t, &Answer::Closed)
}

/// A message and the beginning of the next in one write, and the rest after the first is replied to: the server has it in
/// two pieces, cut at every byte in turn.
fn cut_anywhere(_: &Trial, raw: &mut Raw) -> Verdict {
    let mut message = get_info(raw.id());
    let mut rest = message.bytes();
    for at in 1..rest.len() {
        let next = get_info(raw.id());
        let bytes = next.bytes();
        rest.extend_from_slice(&bytes[..at]);
        raw.send_bytes(&rest, &[], &format!("GET_INFO, and {at} bytes of the next"))?;
        let answer = raw.answer(message.header.id, Command::DEVICE_GET_INFO)?;
        answer.done(&format!("GET_INFO with {at} bytes of the next"))?;
        rest = bytes[at..].to_vec();
        message = next;
    }
    raw.send_bytes(&rest, &[], "the rest")?;
    raw.answer(message.header.id, Command::DEVICE_GET_INFO)?.done("the last GET_INFO").map(drop)
}

/// Commands of several kinds in one write are answered one by one, in order.
fn pipelined(_: &Trial, raw: &mut Raw) -> Verdict {
    let region = RegionInfo { argsz: size_of::<RegionInfo>() as u32, ..RegionInfo::default() };
    let irq = IrqInfo { argsz: size_of::<IrqInfo>() as u32, ..IrqInfo::default() };
    let mut sent = Vec::new();
    for _ in 0..16 {
        sent.push(get_info(raw.id()));
        sent.push(Message::command(raw.id(), Command::DEVICE_GET_REGION_INFO, region.as_bytes()));
        sent.push(Message::command(raw.id(), Command::DEVICE_GET_IRQ_INFO, irq.as_bytes()));
        sent.push(Message::command(raw.id(), Command(999), &[]));
    }
    let bytes: Vec<u8> = sent.iter().flat_map(Message::bytes).collect();
    raw.send_bytes(&bytes, &[], &format!("{} commands", sent.len()))?;
    for message in &sent {
        match raw.answer(message.header.id, message.header.command)? {
            Answer::Closed => return fail("the connection was closed while commands were to be answered"),
            Answer::Reply(_) if message.header.command == Command(999) => {
                return fail("message 999 succeeded, expected a refusal");
            }
            _ => {}
        }
    }
    raw.in_step()
}

/// A command that wants no reply gets none, not even a refusal.
fn posted(raw: &mut Raw, mut message: Message) -> Verdict {
    message.header.id = raw.id();
    message.header = message.header.posted();
    raw.send(&message, &[])?;
    let next = get_info(raw.id());
    raw.send(&next, &[])?;
    match raw.next_reply("GET_INFO")? {
        Some((header, answer)) if header.id == next.header.id => answer.done("GET_INFO").map(drop),
        Some((header, _)) if header.id == message.header.id => {
            fail(format!("a {} that wants no reply got one", header.command))
        }
        _ => fail("no reply to the command after one that wants none"),
    }
}

/// A client that disconnects within a message does not end the server.
fn cut(t: &Trial, bytes: usize) -> Result<(), Stop> {
    let mut raw = Raw::open(t)?;
    let message = get_info(raw.id());
    raw.send_bytes(&message.bytes()[..bytes], &[], &format!("{bytes} bytes of GET_INFO"))?;
    drop(raw);
    next_client(t)
}
