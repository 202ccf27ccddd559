//! The migration stream.
//!
//! Input: how the rest is to be taken (u8), and in pieces of how many bytes (u8). Raw (0): the
//! stream. Framed (otherwise): frames to put after a preface, each of kind (u16), section (u32),
//! position (u64), length (u16, modulo 300) and payload, with the checksums that they need to come
//! through.

use limosa_stream::body::decode_abort;
use limosa_stream::{
    Answer, Decoded, Decoder, DeviceFacts, Header, Kind, MemoryFacts, MigrationId, Nonce, Offer, Order,
    Preface, PrefaceFlags, Proofs, Secret, Totals,
};

use crate::input::Input;

/// The id of the moves here, and the challenge or nonce.
const ID: MigrationId = MigrationId([7; 16]);
const NONCE: [u8; 32] = [8; 32];

/// The proofs of a move with this secret.
fn proofs(secret: &Secret) -> Proofs {
    Proofs::new(secret.clone(), ID, Nonce::new(NONCE))
}

/// See the module.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let raw = input.take::<u8>() == 0;
    let piece = usize::from(input.take::<u8>().max(1));
    if raw {
        read(input.0, piece);
    } else {
        let (stream, frames) = framed(input);
        assert_eq!(read(&stream, piece), frames, "right frames are read");
    }
}

/// A stream of what the input says, and how many frames of it are within the limits.
fn framed(mut input: Input<'_>) -> (Vec<u8>, u32) {
    let mut stream = Preface::new(ID, PrefaceFlags::empty()).encode().to_vec();
    let mut frames = 0;
    while !input.0.is_empty() {
        let kind = Kind(input.take());
        let (section, position) = (input.take(), input.take());
        let length = usize::from(input.take::<u16>()) % 300;
        let (payload, rest) = input.0.split_at(input.0.len().min(length));
        if kind.name().is_some() && kind.allows(payload.len()) {
            stream.extend(Header::new(kind, section, position, frames, payload).encode());
            stream.extend(payload);
            frames += 1;
        }
        input.0 = rest;
    }
    (stream, frames)
}

/// Reads a stream to its end or to what cannot be read on; gives the frames that were read.
fn read(stream: &[u8], piece: usize) -> u32 {
    let mut decoder = Decoder::new();
    let mut order = None;
    let (mut frames, mut bytes) = (0, 0);
    for piece in stream.chunks(piece) {
        decoder.push(piece);
        loop {
            match decoder.next() {
                Ok(None) => break,
                Err(damaged) if damaged.recoverable => {}
                Err(damaged) => {
                    assert_eq!(decoder.next(), Err(damaged.clone()), "lost for good");
                    assert_eq!(decoder.finish(), Err(damaged));
                    return frames;
                }
                Ok(Some(Decoded::Preface(_))) => assert_eq!(frames, 0),
                Ok(Some(Decoded::Frame { header, payload, .. })) => {
                    frames += 1;
                    bytes += payload.len();
                    follow(&mut order, &header, payload);
                }
            }
        }
    }
    assert!(bytes <= stream.len());
    let _ = decoder.finish();
    frames
}

/// As the two ends do: of the destination's frames each by itself, of the source's the offer first,
/// then what may follow it.
fn follow(order: &mut Option<Order>, header: &Header, payload: &[u8]) {
    match header.kind {
        Kind::ANSWER => {
            if let Ok(answer) = Answer::decode(payload) {
                assert_eq!(answer.encode().and_then(|bytes| Answer::decode(&bytes)), Ok(answer));
            }
        }
        Kind::ABORT => drop(decode_abort(payload)),
        kind if kind.proof_bytes() > 0 => {
            let proofs = proofs(&Secret::new([6; 32]));
            if let Ok(body) = proofs.check(kind, payload) {
                assert_eq!(proofs.prove(kind, body), payload, "there is one proof for each body");
            }
            let _ = Proofs::none().check(kind, payload);
        }
        _ => {}
    }
    match order {
        Some(order) => {
            let before = order.totals();
            if order.next(header, payload).is_err() {
                assert_eq!(order.totals(), before, "an error changes nothing");
            }
        }
        None if header.kind == Kind::OFFER => {
            if let Ok(offer) = Offer::decode(payload) {
                assert_eq!(offer.encode().and_then(|bytes| Offer::decode(&bytes)).as_ref(), Ok(&offer));
                let proofs = offer.secret.as_ref().map_or_else(Proofs::none, proofs);
                *order = Some(Order::new(&offer).with_proofs(proofs));
            }
        }
        None => {}
    }
}

/// See [`Target::seeds`](crate::Target::seeds).
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let device = DeviceFacts { id: 3, name: "uart".into(), flags: 7, ..DeviceFacts::default() };
    let memory = MemoryFacts { id: 4, address: 1 << 20, bytes: 1 << 20, page_bytes: 4096 };
    let offer = Offer { devices: vec![device], memory: vec![memory], ..Offer::default() };
    let offer = offer.encode().expect("within the limits");
    let move_of = |frames: &[(Kind, u32, u64, &[u8])]| {
        let mut bytes = vec![1, 64];
        for (kind, section, position, payload) in frames {
            bytes.extend(kind.0.to_ne_bytes());
            bytes.extend(section.to_ne_bytes());
            bytes.extend(position.to_ne_bytes());
            bytes.extend((payload.len() as u16).to_ne_bytes());
            bytes.extend(*payload);
        }
        bytes
    };
    // A run of zeroes, one behind a gap, and how many these are.
    let runs = [0, 1 | 1 << 31, 3, 2 | 1 << 31, 2].map(u32::to_le_bytes).concat();
    let whole = move_of(&[
        (Kind::OFFER, 0, 0, &offer),
        (Kind::DEVICE_BEGIN, 3, 0, &[]),
        (Kind::DEVICE_DATA, 3, 0, b"state"),
        (Kind::MEMORY_DATA, 4, 0x1000, &[5; 64]),
        (Kind::MEMORY_ZERO, 4, 0x2000, &4096u64.to_le_bytes()),
        (Kind::MEMORY_RUNS, 4, 0x4000, &runs),
        (Kind::ROUND, 0, 0, &[1; 16]),
        (Kind::STOPPED, 0, 0, &[]),
        (Kind::DEVICE_DATA, 3, 5, b"more"),
        (Kind::DEVICE_END, 3, 0, &[9; 16]),
        (Kind::SUM, 0, 0, &[0; 24]),
        (Kind::COMMIT, 0, 0, &[]),
    ]);
    let sealed = move_of(&[
        (Kind::OFFER, 0, 0, br#"{"devices":[]}"#),
        (Kind::SEAL, 0, 0, &[3; 40]),
        (Kind::STOPPED, 0, 0, &[]),
        (Kind::SUM, 0, 0, &[0; 24]),
        (Kind::SEAL, 0, 0, &[3; 40]),
        (Kind::PROGRESS, 0, 0, &[0; 8]),
        (Kind::COMMIT, 0, 0, &[]),
    ]);
    let secret = Secret::new([6; 32]);
    let own = proofs(&secret);
    let offer_with_secret = Offer { secret: Some(secret), needs: vec!["proofs".into()], ..Offer::default() };
    let offer_with_secret = offer_with_secret.encode().expect("within the limits");
    let prove = |kind, body: &[u8]| own.prove(kind, body);
    let proven = move_of(&[
        (Kind::JOIN, 0, 0, &prove(Kind::JOIN, &1_u32.to_le_bytes())),
        (Kind::OFFER, 0, 0, &offer_with_secret),
        (Kind::STOPPED, 0, 0, &[]),
        (Kind::SUM, 0, 0, &[0; 24]),
        (Kind::SUM, 0, 0, &prove(Kind::SUM, &Totals::default().encode())),
        (Kind::COMMIT, 0, 0, &prove(Kind::RUNNING, &[])),
        (Kind::COMMIT, 0, 0, &prove(Kind::COMMIT, &[])),
        (Kind::DONE, 0, 0, &prove(Kind::DONE, &[])),
    ]);
    let answer = Answer { accepted: true, challenge: Some(Nonce::new(NONCE)), ..Answer::default() };
    let proven_answers = move_of(&[
        (Kind::ANSWER, 0, 0, &answer.encode().expect("within the limits")),
        (Kind::READY, 0, 0, &prove(Kind::READY, &[])),
        (Kind::RUNNING, 0, 0, &prove(Kind::RUNNING, &[])),
        (Kind::REFUSED, 0, 0, &prove(Kind::REFUSED, b"\x02\0\0\0why")),
        (Kind::QUERY, 0, 0, &prove(Kind::QUERY, &NONCE)),
        (Kind::QUERY, 0, 0, &[]),
        (Kind::OUTCOME, 0, 0, &prove(Kind::OUTCOME, &2_u32.to_le_bytes())),
        (Kind::OUTCOME, 0, 0, &[0; 4]),
    ]);
    let mut raw = vec![0, 7];
    raw.extend(framed(Input(&whole[2..])).0);
    vec![
        ("whole_move", whole),
        ("data_before_offer", move_of(&[(Kind::DEVICE_DATA, 3, 0, b"state"), (Kind::OFFER, 0, 0, &offer)])),
        (
            "answers",
            move_of(&[
                (Kind::ANSWER, 0, 0, br#"{"accepted":false,"reasons":["no"]}"#),
                (Kind::READY, 0, 0, &[]),
                (Kind::ABORT, 0, 0, b"\x01\0\0\0why"),
            ]),
        ),
        ("raw", raw),
        ("sealed", sealed),
        ("proven", proven),
        ("proven_answers", proven_answers),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seed_is_a_whole_move() {
        let (_, seed) = seeds().remove(0);
        let (stream, frames) = framed(Input(&seed[2..]));
        assert_eq!((frames, read(&stream, 1)), (12, 12));
    }

    #[test]
    fn the_seeds_of_proofs_are_read_to_their_ends() {
        for (name, frames) in [("proven", 8), ("proven_answers", 8)] {
            let (_, seed) = seeds().into_iter().find(|(known, _)| *known == name).unwrap();
            let (stream, framed) = framed(Input(&seed[2..]));
            assert_eq!((framed, read(&stream, 1)), (frames, frames), "{name}");
        }
    }
}
