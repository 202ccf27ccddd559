//! Round trips of every message, and arbitrary bytes.

use limosa_protocol::feature::FeatureHeader;
use limosa_protocol::info::{IrqSet, IrqSetFlags};
use proptest::prelude::*;
use zerocopy::IntoBytes;

use super::*;

fn join(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

fn decode(command: Command, body: &[u8]) -> Result<Request<'_>, DecodeError> {
    Request::decode(command, body, body.len())
}

#[test]
fn layouts_are_the_specifications() {
    assert_eq!(Header::BYTES, 16);
    assert_eq!(VersionMessage::BYTES, 4);
    assert_eq!(DmaMapMessage::BYTES, 32);
    assert_eq!(DmaUnmapMessage::BYTES, 24);
    assert_eq!(DirtyBitmap::BYTES, 16);
    assert_eq!(IoFdsMessage::BYTES, 16);
    assert_eq!(IoFd::BYTES, 40);
    assert_eq!(ShadowIoFd::BYTES, 48);
    assert_eq!(RegionAccess::BYTES, 16);
    assert_eq!(DmaAccess::BYTES, 16);
    assert_eq!(DmaWriteReply::BYTES, 12);
    assert_eq!(SingleWrite::BYTES, 24);
    assert_eq!(MigData::BYTES, 8);
    assert_eq!(size_of::<IrqSet>(), 20);
}

#[test]
fn headers_are_what_they_say() {
    let header = Header::command(7, Command::REGION_READ, 16).unwrap();
    assert_eq!((header.kind(), header.body_bytes()), (Ok(Kind::Command), Ok(16)));
    assert_eq!(header.posted().kind(), Ok(Kind::Posted));
    assert_eq!(header.reply(20).unwrap().kind(), Ok(Kind::Reply));
    let refusal = header.refusal(Errno::EBUSY);
    assert_eq!((refusal.kind(), refusal.body_bytes()), (Ok(Kind::Refusal(Errno::EBUSY)), Ok(0)));
    assert_eq!(Header { error: 0, ..refusal }.kind(), Ok(Kind::Refusal(Errno::EIO)), "the errno is optional");
    assert_eq!(Header { flags: 2, ..header }.kind(), Err(DecodeError::Type(2)));
    assert_eq!(Header { size: 15, ..header }.body_bytes(), Err(DecodeError::Size(15)));
    assert_eq!(Header::command(1, Command::REGION_WRITE, u32::MAX as usize), None);
}

#[test]
fn unknown_commands_keep_their_number() {
    assert_eq!(Command(99).to_string(), "message 99");
    assert_eq!(Command::ALL.len(), 18);
    assert!(matches!(decode(Command(99), &[0; 64]), Err(DecodeError::Unknown(Command(99)))));
    assert!(matches!(decode(Command::DMA_READ, &[0; 64]), Err(DecodeError::Unknown(_))));
}

#[test]
fn every_short_body_is_refused() {
    for &command in Command::ALL {
        if command == Command::DEVICE_RESET {
            continue;
        }
        for bytes in 0..4 {
            assert!(decode(command, &[0; 4][..bytes]).is_err(), "{command} with {bytes} bytes");
        }
    }
}

#[test]
fn a_write_must_have_the_length_it_names() {
    let access = RegionAccess { offset: 8, region: 1, count: 4 };
    let body = join(&[access.as_bytes(), b"abcd"]);
    assert_eq!(decode(Command::REGION_WRITE, &body), Ok(Request::RegionWrite(access, b"abcd")));
    // Only the head is at hand.
    assert_eq!(
        Request::decode(Command::REGION_WRITE, &body[..16], 20),
        Ok(Request::RegionWrite(access, b""))
    );
    for wrong in [19, 21, usize::MAX] {
        assert!(matches!(
            Request::decode(Command::REGION_WRITE, &body[..16], wrong),
            Err(DecodeError::Length { want: 20, .. })
        ));
    }
    let data = MigData { argsz: 8, size: u32::MAX };
    assert!(Request::decode(Command::MIG_DATA_WRITE, data.as_bytes(), 8).is_err());
}

#[test]
fn write_multi_must_have_the_writes_it_names() {
    let write = SingleWrite { offset: 4, region: 0, count: 8, data: [1; 8] };
    let body =
        |count: u64| join(&[RegionWriteMulti { count }.as_bytes(), write.as_bytes(), write.as_bytes()]);
    assert_eq!(decode(Command::REGION_WRITE_MULTI, &body(2)), Ok(Request::RegionWriteMulti(&[write, write])));
    assert!(decode(Command::REGION_WRITE_MULTI, &body(3)).is_err());
    assert!(decode(Command::REGION_WRITE_MULTI, &body(u64::MAX)).is_err());
    assert!(decode(Command::REGION_WRITE_MULTI, &body(2)[..40]).is_err());
    let long = SingleWrite { count: 9, ..write };
    assert!(decode(Command::REGION_WRITE_MULTI, &join(&[&1u64.to_ne_bytes(), long.as_bytes()])).is_err());
}

#[test]
fn set_irqs_has_one_action_and_one_kind_of_data() {
    let set = |flags: u32, count: u32| IrqSet { argsz: 20, flags, index: 2, start: 1, count };
    let trigger = IrqSetFlags::ACTION_TRIGGER.bits();
    for flags in 0..64u32 {
        let ok = (flags & 7).count_ones() == 1 && (flags >> 3).count_ones() == 1;
        assert_eq!(decode(Command::DEVICE_SET_IRQS, set(flags, 0).as_bytes()).is_ok(), ok, "{flags:#x}");
    }
    assert!(decode(Command::DEVICE_SET_IRQS, set(trigger | 1 | 64, 0).as_bytes()).is_err(), "unknown flag");
    assert!(decode(Command::DEVICE_SET_IRQS, set(trigger | 1, u32::MAX).as_bytes()).is_err(), "beyond 2^32");
    let bools = IrqSet { argsz: 23, ..set(trigger | 2, 3) };
    let body = join(&[bools.as_bytes(), &[0, 1, 1]]);
    let Ok(Request::SetIrqs(irqs)) = decode(Command::DEVICE_SET_IRQS, &body) else { panic!() };
    assert_eq!(irqs.data, IrqData::Bools(&[0, 1, 1]));
    assert!(decode(Command::DEVICE_SET_IRQS, &body[..22]).is_err(), "bools missing");
    let short = join(&[set(trigger | 2, 3).as_bytes(), &[0, 1, 1]]);
    assert!(decode(Command::DEVICE_SET_IRQS, &short).is_err(), "argsz without the bools");
}

#[test]
fn unmap_carries_its_bitmap() {
    let unmap = |flags| DmaUnmapMessage { argsz: 24, flags, address: 0, size: 4096 };
    let bitmap = DirtyBitmap { page_size: 4096, size: 8 };
    assert_eq!(decode(Command::DMA_UNMAP, unmap(0).as_bytes()), Ok(Request::DmaUnmap(unmap(0), None)));
    let body = join(&[unmap(1).as_bytes(), bitmap.as_bytes()]);
    assert_eq!(decode(Command::DMA_UNMAP, &body), Ok(Request::DmaUnmap(unmap(1), Some(bitmap))));
    assert!(decode(Command::DMA_UNMAP, unmap(1).as_bytes()).is_err(), "no bitmap structure");
    assert!(decode(Command::DMA_UNMAP, unmap(4).as_bytes()).is_err(), "unknown flag");
}

#[test]
fn both_replies_to_dma_write_are_read() {
    let access = DmaAccess { address: 4096, count: 64 };
    assert_eq!(DmaWriteReply::decode(access.as_bytes()), Ok(access));
    let short = DmaWriteReply { address: 4096, count: 64 };
    assert_eq!(DmaWriteReply::decode(short.as_bytes()), Ok(access));
    assert!(DmaWriteReply::decode(&short.as_bytes()[..11]).is_err());
}

proptest! {
    #[test]
    fn a_header_survives_a_round_trip(id: u16, command: u16, size: u32, flags: u32, error: u32) {
        let header = Header { id, command: Command(command), size, flags, error };
        let (read, rest) = fixed::<Header>(header.as_bytes()).unwrap();
        prop_assert_eq!(read, header);
        prop_assert!(rest.is_empty());
        let _ = (read.kind(), read.body_bytes());
    }

    #[test]
    fn no_bytes_make_decode_panic(command in 0u16..24, body in prop::collection::vec(any::<u8>(), 0..200), at in 0usize..200, total: usize) {
        let _ = decode(Command(command), &body);
        let _ = Request::decode(Command(command), &body[at.min(body.len())..], total);
        let _ = Request::decode(Command(command), &body, body.len() + 7);
    }

    #[test]
    fn fixed_parts_survive_a_round_trip(argsz: u32, flags in 0u32..4, a: u64, b: u64, c: u64, index: u32) {
        let map = DmaMapMessage { argsz, flags, offset: a, address: b, size: c };
        prop_assert_eq!(decode(Command::DMA_MAP, map.as_bytes()), Ok(Request::DmaMap(map)));
        let read = RegionAccess { offset: a, region: index, count: argsz };
        prop_assert_eq!(decode(Command::REGION_READ, read.as_bytes()), Ok(Request::RegionRead(read)));
        let data = MigData { argsz, size: index };
        prop_assert_eq!(decode(Command::MIG_DATA_READ, data.as_bytes()), Ok(Request::MigDataRead(data)));
        let feature = FeatureHeader { argsz, flags: index };
        let body = join(&[feature.as_bytes(), &a.to_ne_bytes()]);
        prop_assert_eq!(decode(Command::DEVICE_FEATURE, &body), Ok(Request::Feature(feature, &a.to_ne_bytes())));
    }
}
