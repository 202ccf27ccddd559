//! Codec properties: what is encoded is decoded, and any bytes are read or refused.

use proptest::prelude::*;

use super::*;
use crate::ITEM_BYTES_MAX;
use crate::body::{END_BYTES, End, Hello, ITEM_HEAD_BYTES, ItemHead, Part, Refusal};

fn header() -> impl Strategy<Value = Header> {
    (1_u16..=10, 0..=FRAME_FDS_MAX, 0..=LENGTH_MAX).prop_map(|(kind, fds, length)| Header {
        kind: Kind::of(kind).unwrap(),
        length: length.max(fds * 4),
        fds,
    })
}

proptest! {
    #[test]
    fn headers_are_read_as_they_were_written(header in header()) {
        prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
    }

    #[test]
    fn any_header_is_read_or_refused(bytes: [u8; HEADER_BYTES]) {
        if let Ok(header) = Header::decode(&bytes) {
            prop_assert_eq!(header.encode(), bytes);
        }
    }

    #[test]
    fn an_altered_header_is_another_or_refused(header in header(), at in 0..HEADER_BYTES, with: u8) {
        let mut bytes = header.encode();
        bytes[at] = with;
        if let Ok(read) = Header::decode(&bytes) {
            prop_assert_eq!(read.encode(), bytes);
            prop_assert!(read.length <= LENGTH_MAX && read.fds <= FRAME_FDS_MAX && read.fds * 4 <= read.length);
        }
    }

    #[test]
    fn items_are_read_as_they_were_written(
        kind: u16,
        device: u16,
        inline in proptest::collection::vec(any::<u8>(), 0..300),
        large in 1..=ITEM_BYTES_MAX,
        is_in_memfd: bool,
        fds in 0..=ITEM_FDS_MAX,
    ) {
        let bytes = if is_in_memfd { large } else { inline.len() };
        let head = ItemHead { kind, device, bytes, is_in_memfd };
        let mut body = head.encode().to_vec();
        if !is_in_memfd {
            body.extend(&inline);
        }
        let all_fds = fds + usize::from(is_in_memfd);
        let (read, rest) = ItemHead::decode(&body, all_fds).unwrap();
        prop_assert_eq!(read, head);
        prop_assert_eq!(rest, if is_in_memfd { &[][..] } else { &inline[..] });
        prop_assert!(ItemHead::decode(&body[..body.len() - 1], all_fds).is_err());
        body.push(0);
        prop_assert!(ItemHead::decode(&body, all_fds).is_err());
    }

    #[test]
    fn any_body_is_read_or_refused(body in proptest::collection::vec(any::<u8>(), 0..100), fds in 0..200_usize) {
        if let Ok((head, inline)) = ItemHead::decode(&body, fds) {
            prop_assert_eq!([&head.encode()[..], inline].concat(), body.clone());
        }
        if let Ok(end) = End::decode(&body) {
            prop_assert_eq!(end.encode().to_vec(), body.clone());
        }
        if let Ok(part) = Part::decode(&body) {
            prop_assert_eq!(part.encode().to_vec(), body.clone());
        }
        if let Ok(hello) = Hello::decode(&body) {
            prop_assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
        }
        if let Ok(refusal) = Refusal::decode(&body) {
            prop_assert_eq!(Refusal::decode(&refusal.encode()), Ok(refusal));
        }
    }

    #[test]
    fn ends_are_read_as_they_were_written(part in 1_u16..=3, items: u32, fds: u32, bytes: u64) {
        let end = End { part: Part::decode(&part.to_le_bytes()).unwrap(), items, fds, bytes };
        prop_assert_eq!(End::decode(&end.encode()), Ok(end));
    }

    #[test]
    fn reasons_of_any_length_can_be_sent_and_printed(reason in ".{0,2000}", device: Option<u16>) {
        let read = Refusal::decode(&Refusal { device, reason }.encode()).unwrap();
        prop_assert_eq!(read.device, device);
        prop_assert!(!read.reason.chars().any(char::is_control));
    }
}

#[test]
fn a_text_from_a_peer_cannot_move_the_cursor() {
    let reason = Refusal::new("\x1b[2J\u{202e}it's \"C:\\x\"");
    let read = Refusal::decode(&reason.encode()).unwrap();
    assert_eq!(read.reason, "\\u{1b}[2J\\u{202e}it's \"C:\\x\"");
    assert_eq!(Refusal::of_device(3, "newer state").to_string(), "device 3: newer state");
}

#[test]
fn the_bounds_in_messages_are_the_bounds() {
    assert_eq!((LENGTH_MAX, FRAME_FDS_MAX, ITEM_BYTES_MAX), (69_632, 129, 16_777_216));
    assert_eq!((HEADER_BYTES, ITEM_HEAD_BYTES, END_BYTES), (16, 12, 24));
    // The largest item fits.
    const { assert!(ITEM_HEAD_BYTES + INLINE_BYTES_MAX + FRAME_FDS_MAX * 4 <= LENGTH_MAX) };
}

#[test]
fn numbers_of_fds_are_not_negative() {
    let header = Header { kind: Kind::Item, length: 8, fds: 2 };
    assert_eq!(split_numbers(&header, &[1, 0, 0, 0, 2, 0, 0, 0]), Ok((vec![1, 2], &[][..])));
    assert!(split_numbers(&header, &[1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]).is_err());
    assert!(split_numbers(&header, &[1, 0, 0, 0]).is_err());
}

#[test]
fn the_documentation_draws_what_the_code_has() {
    let page = include_str!("../../../docs/switch-over.md");
    let has = |row: &str| assert!(page.contains(row), "docs/switch-over.md has no row {row:?}");
    for number in 1.. {
        let Some(kind) = Kind::of(number) else {
            assert_eq!(number, 11, "the page has ten kinds");
            break;
        };
        has(&format!("| {number} | {} |", format!("{kind:?}").to_uppercase()));
    }
    for (what, bound) in [
        ("items of a switch-over", crate::ITEMS_MAX as u64),
        ("fds of all items", crate::FDS_MAX as u64),
        ("fds of one item", crate::ITEM_FDS_MAX as u64),
        ("bytes of one item", ITEM_BYTES_MAX as u64),
        ("bytes of all items", crate::BYTES_MAX),
        ("bytes of a frame after its header", LENGTH_MAX as u64),
        ("bytes of a name or reason", TEXT_BYTES_MAX as u64),
        ("connections without HELLO", crate::PENDING_MAX as u64),
    ] {
        has(&format!("| {what} | {bound} |"));
    }
    use crate::word::{KEPT, OPEN, TAKEN, WITHDRAWN};
    for (name, value) in [("KEPT", KEPT), ("OPEN", OPEN), ("TAKEN", TAKEN), ("WITHDRAWN", WITHDRAWN)] {
        has(&format!("| {name} | {value:#x} |"));
    }
    let (old, new) = (crate::GiveLimits::default(), crate::TakeLimits::default());
    for (step, old, new) in [
        ("HELLO", old.hello, new.hello),
        ("offer", old.offer, new.offer),
        ("transfer while devices run, all rounds", old.prepare, new.prepare),
        ("freeze, rest, load and commit together", old.freeze, new.rest),
    ] {
        has(&format!("| {step} | {} s | {} s", old.as_secs(), new.as_secs()));
    }
}
