//! A device's saved state.
//!
//! Input: how the rest is to be taken (u8), and in pieces of how many bytes (u8). Raw (0): the
//! state. Written (otherwise): which byte of the state to alter (u16), and sections, each of what it
//! is (u8), place (u64), length (u16, modulo 200) and payload.

use limosa_device::saved::{Reader, Refusal, Section, Writer};

use crate::input::Input;

const KIND: &str = "limosa.fuzz";
const BYTES_MAX: u64 = 1 << 16;
const SMALL: Section = Section::message("small", 2).reads_from(1).repeated();
const BULK: Section = Section::bulk("bulk", 1, 1 << 12);
/// One that the reader does not know.
const FOREIGN: Section = Section::message("foreign", 1).optional();

/// See the module.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let raw = input.take::<u8>() == 0;
    let piece = usize::from(input.take::<u8>().max(1));
    if raw {
        if let Ok(read) = read(input.0, piece) {
            assert_eq!(self::read(input.0, usize::MAX), Ok(read), "in one piece or in many");
        }
        return;
    }
    let at = usize::from(input.take::<u16>());
    let (mut state, written) = write(input);
    assert_eq!(read(&state, piece).as_ref(), Ok(&written));
    let at = at % state.len();
    state[at] ^= 0x40;
    assert!(read(&state, piece).is_err(), "altered at {at}");
    assert!(read(&state[..at], piece).is_err(), "cut at {at}");
}

/// What was handed out: whether it is bulk, its place, its bytes.
type Sections = Vec<(bool, u64, Vec<u8>)>;

fn read(state: &[u8], piece: usize) -> Result<Sections, Refusal> {
    let mut sections = Sections::new();
    let mut reader = Reader::new(KIND, &[SMALL, BULK], BYTES_MAX);
    for piece in state.chunks(piece) {
        reader.push(piece, |item| {
            let bulk = item.section.name() == BULK.name();
            match sections.last_mut() {
                Some((_, _, bytes)) if item.offset > 0 => bytes.extend_from_slice(item.bytes),
                _ => sections.push((bulk, item.place, item.bytes.to_vec())),
            }
            Ok(())
        })?;
    }
    reader.finish().map(|()| sections)
}

fn write(mut input: Input<'_>) -> (Vec<u8>, Sections) {
    let mut writer = Writer::new(KIND);
    let mut sections = Sections::new();
    // All of it stays below the reader's limit.
    while !input.0.is_empty() && sections.len() < 100 {
        let what = input.take::<u8>() % 3;
        let place = input.take();
        let length = usize::from(input.take::<u16>()) % 200;
        let (payload, rest) = input.0.split_at(input.0.len().min(length));
        writer.section([&SMALL, &BULK, &FOREIGN][usize::from(what)], place, payload);
        // Bulk without bytes hands out nothing.
        if what == 0 || (what == 1 && !payload.is_empty()) {
            sections.push((what == 1, place, payload.to_vec()));
        }
        input.0 = rest;
    }
    (writer.finish(), sections)
}

/// See [`Target::seeds`](crate::Target::seeds).
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let sections = |sections: &[(u8, u64, &[u8])]| {
        let mut bytes = Vec::new();
        for (what, place, payload) in sections {
            bytes.push(*what);
            bytes.extend(place.to_ne_bytes());
            bytes.extend((payload.len() as u16).to_ne_bytes());
            bytes.extend(*payload);
        }
        bytes
    };
    let some = sections(&[(0, 0, b"registers"), (1, 4096, &[7; 100]), (2, 0, b"foreign"), (1, 8192, b"")]);
    let state = write(Input(&some)).0;
    vec![
        ("sections", [&[1, 13, 40, 0][..], &some].concat()),
        ("none", vec![1, 1, 0, 0]),
        ("raw", [&[0, 5][..], &state].concat()),
        ("raw_cut", [&[0, 5][..], &state[..state.len() / 2]].concat()),
    ]
}
