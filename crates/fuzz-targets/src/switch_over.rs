//! What one server reads of another as it takes over: frames and their bodies.
//!
//! Input: frames one after the other, each a header of 16 bytes and its payload. Framed (first byte other than 0): kind (u16),
//! fds (u16, modulo the bound), length (u16, modulo 600) and payload, under the header that they need to come through.

use limosa_switch_over::body::{End, Hello, ItemHead, Part, decode_door};
use limosa_switch_over::frame::{FRAME_FDS_MAX, HEADER_BYTES, Header, Kind, LENGTH_MAX, split_numbers};
use limosa_switch_over::{Refusal, Totals};

use crate::input::Input;

/// See the module.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    if input.take::<u8>() == 0 {
        read(input.0);
    } else {
        let (stream, frames) = framed(input);
        assert_eq!(read(&stream), frames, "right frames are read");
    }
}

/// Frames as the input says, and how many.
fn framed(mut input: Input<'_>) -> (Vec<u8>, usize) {
    let (mut stream, mut frames) = (Vec::new(), 0);
    while !input.0.is_empty() {
        let kind: u16 = input.take();
        let fds = usize::from(input.take::<u16>()) % (FRAME_FDS_MAX + 1);
        let length = usize::from(input.take::<u16>()) % 600;
        let (body, rest) = input.0.split_at(input.0.len().min(length));
        input.0 = rest;
        let mut header = Header { kind: Kind::Item, length: fds * 4 + body.len(), fds }.encode();
        header[6..8].copy_from_slice(&(1 + kind % 10).to_le_bytes());
        stream.extend(header);
        (0..fds as i32).for_each(|number| stream.extend(number.to_le_bytes()));
        stream.extend(body);
        frames += 1;
    }
    (stream, frames)
}

/// Reads frames to the end, or to one that cannot be read on from; gives how many were read.
fn read(mut stream: &[u8]) -> usize {
    let (mut frames, mut totals) = (0, Totals::default());
    while let Some((head, rest)) = stream.split_first_chunk::<HEADER_BYTES>() {
        let Ok(header) = Header::decode(head) else { break };
        assert!(header.length <= LENGTH_MAX && header.fds <= FRAME_FDS_MAX);
        assert_eq!(header.encode(), *head, "there is one header for each frame");
        let Some((payload, rest)) = rest.split_at_checked(header.length) else { break };
        let Ok((numbers, body)) = split_numbers(&header, payload) else { break };
        assert_eq!((numbers.len(), numbers.len() * 4 + body.len()), (header.fds, payload.len()));
        decode(header.kind, body, header.fds, &mut totals);
        stream = rest;
        frames += 1;
    }
    frames
}

fn decode(kind: Kind, body: &[u8], fds: usize, totals: &mut Totals) {
    match kind {
        Kind::Door => drop(decode_door(body)),
        Kind::Hello => {
            if let Ok(hello) = Hello::decode(body) {
                assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
            }
        }
        Kind::Item => {
            if let Ok((head, inline)) = ItemHead::decode(body, fds) {
                assert_eq!([&head.encode()[..], inline].concat(), body);
                let before = *totals;
                let own = fds - usize::from(head.is_in_memfd);
                if totals.add(head.kind, head.device, head.bytes as u64, own).is_err() {
                    assert_eq!(*totals, before, "an error changes nothing");
                }
            }
        }
        Kind::End => {
            if let Ok(end) = End::decode(body) {
                assert_eq!(end.encode(), body);
            }
        }
        Kind::Ready => {
            if let Ok(part) = Part::decode(body) {
                assert_eq!(part.encode(), body);
            }
        }
        Kind::Refused => {
            if let Ok(refusal) = Refusal::decode(body) {
                assert!(!refusal.reason.chars().any(char::is_control), "a terminal is safe");
                let again = Refusal::decode(&refusal.encode()).expect("it can be passed on");
                assert_eq!(again.device, refusal.device);
            }
        }
        Kind::Word | Kind::Batch | Kind::Pulled | Kind::Running => {}
    }
}

/// See [`Target::seeds`](crate::Target::seeds).
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let frames = |frames: &[(Kind, u16, &[u8])]| {
        let mut bytes = vec![1];
        for (kind, fds, body) in frames {
            bytes.extend((*kind as u16 - 1).to_ne_bytes());
            bytes.extend(fds.to_ne_bytes());
            bytes.extend((body.len() as u16).to_ne_bytes());
            bytes.extend(*body);
        }
        bytes
    };
    let hello = Hello { token: [7; 16], sends_fds: false, name: "limosa 0.1.0".into() }.encode();
    let item = |bytes, is_in_memfd| ItemHead { kind: 1, device: 2, bytes, is_in_memfd }.encode();
    let inline = [&item(5, false)[..], b"state"].concat();
    let end = |part, items, fds, bytes| End { part, items, fds, bytes }.encode();
    let from_old = frames(&[
        (Kind::Door, 1, &[7; 16]),
        (Kind::Hello, 0, &hello),
        (Kind::Word, 1, b""),
        (Kind::Item, 0, &inline),
        (Kind::End, 0, &end(Part::Offer, 1, 0, 5)),
        (Kind::Item, 3, &item(100_000, true)),
        (Kind::Batch, 0, b""),
        (Kind::End, 0, &end(Part::Prepare, 2, 2, 100_005)),
        (Kind::End, 0, &end(Part::Rest, 2, 2, 100_005)),
    ]);
    let refused = Refusal::of_device(2, "the state is newer: \x1b[1m version 3").encode();
    let from_new = frames(&[
        (Kind::Hello, 0, &hello),
        (Kind::Ready, 0, &Part::Offer.encode()),
        (Kind::Pulled, 0, b""),
        (Kind::Ready, 0, &Part::Prepare.encode()),
        (Kind::Running, 0, b""),
        (Kind::Refused, 0, &refused),
        (Kind::Refused, 0, &Refusal::new("no").encode()),
    ]);
    let mut raw = vec![0];
    raw.extend(framed(Input(&from_old[1..])).0);
    vec![("from_old", from_old), ("from_new", from_new), ("raw", raw)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_are_read_to_their_ends() {
        for (name, frames) in [("from_old", 9), ("from_new", 7)] {
            let (_, seed) = seeds().into_iter().find(|(known, _)| *known == name).unwrap();
            let (stream, made) = framed(Input(&seed[1..]));
            assert_eq!((made, read(&stream)), (frames, frames), "{name}");
        }
    }
}
