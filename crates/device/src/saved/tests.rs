//! What holds for saved states.

use limosa_protocol::Errno;
use proptest::prelude::*;

use super::*;

const KIND: &str = "test.device";
const REGISTERS: Section = Section::message("registers", 3).reads_from(2);
const QUEUE: Section = Section::message("queue", 1).repeated().bytes_max(256);
const MEMORY: Section = Section::bulk("memory", 1, 4096);
const SECTIONS: [Section; 3] = [REGISTERS, QUEUE, MEMORY];
const MEMORY_BYTES: usize = 2048;

#[derive(Clone, PartialEq, prost::Message)]
struct Registers {
    #[prost(uint32, tag = "1")]
    control: u32,
    #[prost(bytes = "vec", tag = "2")]
    fifo: Vec<u8>,
}

/// What the device of these tests makes of a state.
#[derive(Debug, Default, PartialEq)]
struct Staged {
    registers: Option<(u32, Registers)>,
    queues: Vec<Vec<u8>>,
    memory: Vec<u8>,
}

impl Staged {
    fn new() -> Staged {
        Staged { memory: vec![0; MEMORY_BYTES], ..Staged::default() }
    }

    fn take(&mut self, item: Item<'_>) -> Result<(), Refusal> {
        match item.section.name() {
            "registers" => self.registers = Some((item.version, item.decode()?)),
            "queue" => self.queues.push(item.bytes.to_vec()),
            "memory" => {
                let from = usize::try_from(item.place.saturating_add(item.offset)).unwrap_or(usize::MAX);
                let to = self.memory.get_mut(from..).and_then(|to| to.get_mut(..item.bytes.len()));
                to.ok_or(Refusal::unfit("memory", "outside the memory"))?.copy_from_slice(item.bytes);
            }
            other => panic!("{other} was handed out"),
        }
        Ok(())
    }
}

fn load_with(sections: &[Section], bytes: &[u8], cuts: &[usize]) -> Result<Staged, Refusal> {
    let mut staged = Staged::new();
    let mut reader = Reader::new(KIND, sections, 1 << 20);
    let mut rest = bytes;
    for cut in cuts.iter().cycle().take_while(|_| !cuts.is_empty()) {
        if rest.is_empty() {
            break;
        }
        let (piece, after) = rest.split_at((*cut).clamp(1, rest.len()));
        reader.push(piece, |item| staged.take(item))?;
        rest = after;
    }
    reader.push(rest, |item| staged.take(item))?;
    reader.finish()?;
    Ok(staged)
}

fn load(bytes: &[u8]) -> Result<Staged, Refusal> {
    load_with(&SECTIONS, bytes, &[])
}

fn registers(control: u32) -> Registers {
    Registers { control, fifo: vec![1, 2, 3] }
}

/// A state as a device makes it: memory, then some of it again, then the rest.
fn example() -> Vec<u8> {
    let mut writer = Writer::new(KIND);
    writer.section(&MEMORY, 0, &[0xaa; 100]);
    writer.section(&QUEUE, 0, b"one");
    writer.section(&MEMORY, 50, &[0xbb; 10]);
    writer.section(&QUEUE, 0, b"");
    writer.message(&REGISTERS, &registers(7));
    writer.finish()
}

#[test]
fn a_state_comes_back_as_it_was() {
    let staged = load(&example()).unwrap();
    assert_eq!(staged.registers, Some((3, registers(7))));
    assert_eq!(staged.queues, [b"one".to_vec(), vec![]]);
    assert_eq!(staged.memory[..110], [&[0xaa; 50][..], &[0xbb; 10], &[0xaa; 40], &[0; 10]].concat());
}

#[test]
fn the_format_is_the_one_that_is_documented() {
    let mut writer = Writer::new("a.b");
    writer.section(&Section::message("x", 2).optional(), 0x1122, &[0xee]);
    let bytes = writer.finish();
    // Every other part ends with a checksum, of all parts so far.
    let parts = [
        &b"LIMOSADS\x01\0\0\0\x03\0\0\0a.b"[..],
        b"x\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x02\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\x22\x11\0\0\0\0\0\0\x01\0\0\0\0\0\0\0",
        b"\xee",
        b"end\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\0",
        b"\x01\0\0\0\0\0\0\0\x50\0\0\0\0\0\0\0",
    ];
    let (mut expected, mut summed) = (vec![], vec![]);
    for part in parts {
        summed.extend_from_slice(part);
        expected.extend_from_slice(part);
        expected.extend_from_slice(&castagnoli(&summed).to_le_bytes());
    }
    assert_eq!(bytes, expected);
}

/// CRC-32C by its definition, bit by bit.
fn castagnoli(bytes: &[u8]) -> u32 {
    let step = |sum: u32, _| if sum & 1 == 0 { sum >> 1 } else { sum >> 1 ^ 0x82f6_3b78 };
    !bytes.iter().fold(!0, |sum, byte| (0..8).fold(sum ^ u32::from(*byte), step))
}

/// Written by the first version. Whatever the format becomes, this must load; new versions add files of their own.
#[test]
fn states_of_earlier_versions_load() {
    assert_eq!(load(include_bytes!("golden/version-1.bin")).unwrap(), load(&example()).unwrap());
}

#[test]
fn any_state_can_be_outlined() {
    let mut outline = Outline::default();
    let bytes = example();
    for piece in bytes.chunks(9) {
        outline.push(piece).unwrap();
    }
    outline.finish().unwrap();
    let lines: Vec<_> = outline
        .sections()
        .iter()
        .map(|section| (&*section.name, section.version, section.count, section.bytes))
        .collect();
    assert_eq!(outline.kind(), KIND);
    assert_eq!(lines, [("memory", 1, 2, 110), ("queue", 1, 2, 3), ("registers", 3, 1, 7)]);
    let mut cut = Outline::default();
    cut.push(&bytes[..bytes.len() - 1]).unwrap();
    assert!(cut.finish().is_err());
    let mut altered = bytes.clone();
    altered[100] ^= 1;
    assert!(Outline::default().push(&altered).is_err());
}

#[test]
fn the_outline_of_a_state_with_endless_sections_stays_small() {
    let (mut outline, mut writer) = (Outline::default(), Writer::new(KIND));
    for version in 1..1000 {
        writer.section(&Section { version, ..REGISTERS }, 0, &[]);
        outline.push(writer.take(usize::MAX)).unwrap();
    }
    assert_eq!(outline.sections().len(), 256);
}

#[test]
fn a_truncated_state_is_refused_wherever_it_ends() {
    let bytes = example();
    for end in 0..bytes.len() {
        let refusal = load(&bytes[..end]).unwrap_err();
        assert!(
            matches!(refusal, Refusal::Truncated { bytes, .. } if bytes == end as u64),
            "{end}: {refusal}"
        );
        assert_eq!(refusal.errno(), Errno::EBADMSG);
    }
}

#[test]
fn any_single_altered_byte_is_refused() {
    let bytes = example();
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut altered = bytes.clone();
            altered[at] ^= 1 << bit;
            assert!(load(&altered).is_err(), "byte {at}, bit {bit}");
        }
    }
}

#[test]
fn an_altered_payload_is_refused_with_the_name_of_its_section() {
    let mut bytes = example();
    let at = bytes.windows(3).position(|three| three == b"one").unwrap();
    bytes[at] ^= 1;
    let refusal = load(&bytes).unwrap_err();
    assert_eq!(refusal.to_string(), "the state was altered: wrong checksum in section \"queue\"");
}

#[test]
fn more_after_the_end_is_refused() {
    let mut bytes = example();
    bytes.push(0);
    assert_eq!(load(&bytes), Err(Refusal::AfterEnd));
}

/// Where the sections of a state begin, with its length at the end.
fn boundaries(state: &[u8]) -> Vec<usize> {
    let mut at = 16 + KIND.len() + 4;
    let mut boundaries = vec![at];
    while at < state.len() {
        at += 56 + u64::from_le_bytes(state[at + 40..][..8].try_into().unwrap()) as usize;
        boundaries.push(at);
    }
    boundaries
}

#[test]
fn sections_that_are_moved_left_out_or_doubled_are_refused() {
    let bytes = example();
    let at = boundaries(&bytes);
    let part = |n: usize| &bytes[at[n]..at[n + 1]];
    let (head, tail) = (&bytes[..at[0]], &bytes[at[2]..]);
    for middle in [vec![part(1), part(0)], vec![part(0)], vec![part(1)], vec![part(0), part(0), part(1)]] {
        let bytes = [head, &middle.concat(), tail].concat();
        assert_eq!(load(&bytes).unwrap_err().errno(), Errno::EBADMSG);
    }
}

#[test]
fn a_section_of_another_state_is_refused() {
    let state = |fill: u8| {
        let mut writer = Writer::new(KIND);
        writer.section(&MEMORY, 0, &[fill; 10]);
        writer.message(&REGISTERS, &registers(7));
        writer.finish()
    };
    let (one, two) = (state(1), state(2));
    let at = boundaries(&one)[1];
    let spliced = [&one[..at], &two[at..]].concat();
    assert!(matches!(load(&spliced), Err(Refusal::Altered { .. })));
}

#[test]
fn a_foreign_device_is_named() {
    let bytes = Writer::new("other.device").finish();
    let refusal = load(&bytes).unwrap_err();
    let text = r#"the state belongs to a "other.device", this device is a "test.device""#;
    assert_eq!((refusal.to_string().as_str(), refusal.errno()), (text, Errno::EINVAL));
    assert_eq!(load(b"QEVM and what comes after that"), Err(Refusal::NotAState));
    let mut newer = example();
    newer[8] = 2;
    assert_eq!(load(&newer), Err(Refusal::OtherFormat { found: 2, supported: 1 }));
}

#[test]
fn versions_are_read_from_the_oldest_to_the_newest_that_is_known() {
    let load = |version: u32, optional: bool| {
        let section = Section { version, optional, ..REGISTERS };
        let mut writer = Writer::new(KIND);
        writer.message(&section, &registers(1));
        load_with(&SECTIONS, &writer.finish(), &[])
    };
    assert_eq!(load(2, false).unwrap().registers.unwrap().0, 2);
    assert_eq!(load(3, false).unwrap().registers.unwrap().0, 3);
    let (newer, older) = (load(4, false).unwrap_err(), load(1, false).unwrap_err());
    let text = "section \"registers\" has version 4, newer than version 3 that this device reads";
    assert_eq!((newer.to_string().as_str(), newer.errno()), (text, Errno::EINVAL));
    let text = "section \"registers\" has version 1, older than version 2 that this device still reads";
    assert_eq!((older.to_string().as_str(), older.errno()), (text, Errno::EINVAL));
    assert_eq!(load(4, true), Err(Refusal::Missing { name: "registers".into() }), "ignored, and then missed");
}

#[test]
fn an_unknown_section_is_refused_unless_it_is_optional() {
    let state = |section: Section| {
        let mut writer = Writer::new(KIND);
        writer.section(&section, 0, &[9; 50]);
        writer.section(&section, 0, &[]);
        writer.message(&REGISTERS, &registers(1));
        writer.finish()
    };
    let unknown = Section::message("novelty", 9);
    let refusal = load(&state(unknown)).unwrap_err();
    assert_eq!(refusal, Refusal::UnknownSection { name: "novelty".into(), version: 9 });
    assert_eq!(refusal.errno(), Errno::EINVAL);
    assert!(load(&state(unknown.optional())).is_ok());
    let mut altered = state(unknown.optional());
    let at = boundaries(&altered)[0] + 60;
    altered[at] ^= 1;
    assert!(load(&altered).is_err(), "also what is ignored must be whole");
}

#[test]
fn sections_come_as_often_as_they_may() {
    let mut writer = Writer::new(KIND);
    writer.message(&REGISTERS, &registers(1));
    writer.message(&REGISTERS, &registers(2));
    assert_eq!(load(&writer.finish()), Err(Refusal::Repeated { name: "registers".into() }));
    assert_eq!(load(&Writer::new(KIND).finish()), Err(Refusal::Missing { name: "registers".into() }));
}

#[test]
fn more_than_the_device_allows_is_refused_before_it_comes() {
    let long = Section { bytes_max: u64::MAX, ..REGISTERS };
    let mut writer = Writer::new(KIND);
    writer.begin(&long, 0, u64::MAX - 1000);
    let refusal = load(writer.untaken()).unwrap_err();
    assert!(matches!(refusal, Refusal::TooLarge { .. }), "{refusal}");
    let mut writer = Writer::new(KIND);
    writer.begin(&long, 0, MESSAGE_BYTES_MAX + 1);
    let refusal = load(writer.untaken()).unwrap_err();
    assert_eq!(refusal.to_string(), "section \"registers\" has 65537 bytes, more than 65536");
    assert_eq!(refusal.errno(), Errno::EINVAL);
    // A state without end, of sections without content.
    let mut reader = Reader::new(KIND, &SECTIONS, 1000);
    let mut writer = Writer::new(KIND);
    let refusal = loop {
        writer.section(&MEMORY, 0, &[]);
        if let Err(refusal) = reader.push(writer.take(usize::MAX), |_| Ok(())) {
            break refusal;
        }
    };
    assert!(matches!(refusal, Refusal::TooLarge { bytes_max: 1000, .. }), "{refusal}");
}

#[test]
fn a_payload_that_is_no_message_is_refused() {
    let mut writer = Writer::new(KIND);
    writer.section(&REGISTERS, 0, &[0xff; 5]);
    let refusal = load(&writer.finish()).unwrap_err();
    assert!(matches!(&refusal, Refusal::Malformed { name, .. } if name == "registers"), "{refusal}");
}

#[test]
fn a_refusal_is_final() {
    let mut reader = Reader::new(KIND, &SECTIONS, 1 << 20);
    let refusal = Refusal::unfit("memory", "no");
    let mut bytes = example();
    assert_eq!(reader.push(&bytes, |_| Err(refusal.clone())), Err(refusal.clone()));
    bytes.truncate(10);
    assert_eq!(reader.push(&bytes, |_| Ok(())), Err(refusal.clone()));
    assert_eq!(reader.finish(), Err(refusal));
    assert!(reader.ahead().is_none());
}

#[test]
fn bulk_payload_is_lent_and_received_where_it_lies() {
    let source: Vec<u8> = (0..MEMORY_BYTES).map(|n| (n * 7) as u8).collect();
    let mut writer = Writer::new(KIND);
    let mut staged = Staged::new();
    let mut reader = Reader::new(KIND, &SECTIONS, 1 << 20);
    writer.begin(&MEMORY, 0, MEMORY_BYTES as u64);
    while !writer.untaken().is_empty() {
        reader.push(writer.take(5), |_| panic!("nothing is complete")).unwrap();
    }
    for piece in source.chunks(300) {
        writer.lend(piece);
        let ahead = reader.ahead().unwrap();
        let at = (ahead.place + ahead.offset) as usize;
        assert_eq!((ahead.section.name(), ahead.length), ("memory", MEMORY_BYTES as u64));
        staged.memory[at..at + piece.len()].copy_from_slice(piece);
        reader.push(&staged.memory[at..at + piece.len()], |_| Ok(())).unwrap();
    }
    assert_eq!(writer.to_lend(), 0);
    assert!(reader.ahead().is_none());
    writer.message(&REGISTERS, &registers(5));
    writer.end();
    assert!(writer.has_ended());
    reader.push(&writer.finish(), |item| staged.take(item)).unwrap();
    reader.finish().unwrap();
    assert_eq!(staged.memory, source);
}

#[test]
#[should_panic(expected = "were not taken")]
fn a_piece_cannot_overtake_what_comes_before_it() {
    let mut writer = Writer::new(KIND);
    writer.begin(&MEMORY, 0, 10);
    writer.lend(&[0; 10]);
}

fn any_state() -> impl Strategy<Value = (Vec<u8>, Staged)> {
    let section = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..200).prop_map(|bytes| (0, 0, bytes)),
        (0..MEMORY_BYTES - 300, prop::collection::vec(any::<u8>(), 0..300))
            .prop_map(|(place, bytes)| (1, place, bytes)),
    ];
    (prop::collection::vec(section, 0..8), any::<u32>()).prop_map(|(sections, control)| {
        let (mut writer, mut staged) = (Writer::new(KIND), Staged::new());
        for (which, place, bytes) in sections {
            if which == 0 {
                writer.section(&QUEUE, 0, &bytes);
                staged.queues.push(bytes);
            } else {
                writer.section(&MEMORY, place as u64, &bytes);
                staged.memory[place..place + bytes.len()].copy_from_slice(&bytes);
            }
        }
        writer.message(&REGISTERS, &registers(control));
        staged.registers = Some((3, registers(control)));
        (writer.finish(), staged)
    })
}

proptest! {
    #[test]
    fn any_state_comes_back_in_any_segmentation(
        (bytes, staged) in any_state(),
        cuts in prop::collection::vec(1usize..200, 0..8),
    ) {
        prop_assert_eq!(load_with(&SECTIONS, &bytes, &cuts), Ok(staged));
    }

    #[test]
    fn any_altered_or_cut_state_is_refused(
        (mut bytes, _) in any_state(),
        at in any::<prop::sample::Index>(),
        by in 1u8..,
        cut in any::<bool>(),
        cuts in prop::collection::vec(1usize..200, 0..8),
    ) {
        let at = at.index(bytes.len());
        if cut { bytes.truncate(at) } else { bytes[at] ^= by }
        prop_assert!(load_with(&SECTIONS, &bytes, &cuts).is_err());
    }

    #[test]
    fn arbitrary_bytes_are_refused_without_panic_or_growth(
        tail in prop::collection::vec(any::<u8>(), 0..300),
        (state, _) in any_state(),
        keep in any::<prop::sample::Index>(),
    ) {
        // Behind a good beginning, so that every kind of part meets them.
        let bytes = [&state[..keep.index(state.len())], &tail].concat();
        let mut reader = Reader::new(KIND, &SECTIONS, 1 << 20);
        let _ = reader.push(&bytes, |_| Ok(()));
        prop_assert!(reader.held() <= 2 * (MESSAGE_BYTES_MAX as usize + 4));
    }
}
