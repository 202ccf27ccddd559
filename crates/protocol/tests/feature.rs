//! The FEATURE multiplexer's rules against a statement of their own, and its payloads from any
//! bytes.

use limosa_protocol::feature::{
    DmaLoggingRange, FeatureBusMaster, FeatureDmaBuf, FeatureDmaLoggingControl, FeatureDmaLoggingReport,
    FeatureResetCount, PrecopyInfo, RegionDmaRange,
};
use limosa_protocol::{Errno, FeatureHeader, FeatureIndex, FeatureOp, FeaturePayload, Records};
use proptest::prelude::*;
use zerocopy::IntoBytes;

const GET: u32 = 1 << 16;
const SET: u32 = 1 << 17;
const PROBE: u32 = 1 << 18;

/// The standard's features: number, operations, bytes of the payload on the wire.
const FEATURES: [(u32, u32, u32); 13] = [
    (0, SET, 16),
    (1, GET, 8),
    (2, GET | SET, 8),
    (3, SET, 0),
    (4, SET, 8),
    (5, SET, 0),
    (6, SET, 16),
    (7, SET, 0),
    (8, GET, 24),
    (9, GET, 8),
    (10, SET, 4),
    (11, GET, 16),
    (12, SET, 0),
];

/// What Limosa makes of a header: `Ok(true)` for an operation to carry out, `Ok(false)` for a
/// successful PROBE.
fn outcome(argsz: u32, flags: u32) -> Result<bool, Errno> {
    let call = FeatureHeader { argsz, flags }.call()?;
    call.check(call.index.rules().ok_or(Errno::ENOTTY)?)
}

/// The same in the standard's words.
fn expected(argsz: u32, flags: u32) -> Result<bool, Errno> {
    let asks = |bit: u32| flags & bit != 0;
    if argsz < 8 || flags >> 19 != 0 {
        return Err(Errno::EINVAL);
    }
    if !asks(PROBE) && asks(GET) && asks(SET) {
        return Err(Errno::EINVAL);
    }
    let Some((_, ops, bytes)) = FEATURES.into_iter().find(|(index, ..)| *index == flags & 0xffff) else {
        return Err(Errno::ENOTTY);
    };
    for op in [GET, SET] {
        if asks(op) && ops & op == 0 {
            return Err(Errno::EINVAL);
        }
    }
    if asks(PROBE) {
        return Ok(false);
    }
    let asks_nothing = !asks(GET) && !asks(SET);
    if asks_nothing || argsz - 8 < bytes { Err(Errno::EINVAL) } else { Ok(true) }
}

#[test]
fn every_index_operation_and_near_size_has_the_outcome_that_the_standard_gives() {
    for index in 0..20 {
        for ops in 0..16 {
            for argsz in 0..50 {
                let flags = index | ops << 16;
                assert_eq!(outcome(argsz, flags), expected(argsz, flags), "argsz {argsz}, flags {flags:#x}");
            }
        }
    }
}

#[test]
fn a_header_is_built_as_it_is_read() {
    let header = FeatureHeader::new(FeatureIndex::MIG_DEVICE_STATE, FeatureOp::SET, 8);
    assert_eq!((header.argsz, header.flags), (16, SET | 2));
    let call = header.call().unwrap();
    assert_eq!(
        (call.index, call.op, call.payload_bytes),
        (FeatureIndex::MIG_DEVICE_STATE, FeatureOp::SET, 8)
    );
    assert_eq!(FeatureHeader::new(FeatureIndex(9), FeatureOp::GET, u32::MAX).argsz, u32::MAX);
}

#[test]
fn features_print_by_name_or_number() {
    assert_eq!(format!("{}", FeatureIndex::MIG_PRECOPY_INFO_V2), "MIG_PRECOPY_INFO_V2");
    assert_eq!(format!("{}", FeatureIndex(4711)), "feature 4711");
    assert_eq!(format!("{}", FeatureIndex::RESET_COUNT), "RESET_COUNT");
}

#[test]
fn the_standard_assigns_no_extension() {
    let extensions: Vec<_> = (0..=u16::MAX)
        .map(FeatureIndex)
        .filter_map(|index| index.extension_rules().map(|rules| (index, rules)))
        .inspect(|(index, _)| assert!(index.rules().is_none(), "{index}"))
        .map(|(index, rules)| (index.0, rules.name, rules.get, rules.set, rules.payload_bytes))
        .collect();
    assert_eq!(
        extensions,
        [
            (0xfe02, "RESET_COUNT", true, false, size_of::<FeatureResetCount>()),
            (0xfe07, "DIRTY_BLOCKS", true, false, size_of::<FeatureDmaLoggingReport>()),
        ]
    );
    assert_eq!(size_of::<FeatureResetCount>(), 8);
}

#[test]
fn payloads_that_count_entries_hold_all_of_them_or_are_refused() {
    let control = FeatureDmaLoggingControl { page_size: 4096, num_ranges: 2, reserved: 0 };
    let ranges = [DmaLoggingRange { iova: 0, length: 1 }, DmaLoggingRange { iova: 2, length: 3 }];
    let bytes = [control.as_bytes(), ranges.as_bytes()].concat();
    let read = FeaturePayload::read(FeatureIndex::DMA_LOGGING_START, &bytes);
    let Ok(FeaturePayload::DmaLoggingStart(_, read)) = read else { panic!("{read:?}") };
    assert!(read.iter().eq(ranges));
    let cut = FeaturePayload::read(FeatureIndex::DMA_LOGGING_START, &bytes[..bytes.len() - 1]);
    assert_eq!(cut, Err(Errno::EINVAL));

    let mut buf = FeatureDmaBuf { nr_ranges: u32::MAX, ..FeatureDmaBuf::default() };
    assert_eq!(FeaturePayload::read(FeatureIndex::DMA_BUF, buf.as_bytes()), Err(Errno::EINVAL));
    buf.nr_ranges = 0;
    assert!(FeaturePayload::read(FeatureIndex::DMA_BUF, buf.as_bytes()).is_ok());
}

#[test]
fn a_dma_buf_lies_in_its_region() {
    let check = |flags, ranges: &[(u64, u64)]| {
        let ranges: Vec<_> = ranges
            .iter()
            .map(|(offset, length)| RegionDmaRange { offset: *offset, length: *length })
            .collect();
        let buf = FeatureDmaBuf { flags, nr_ranges: ranges.len() as u32, ..FeatureDmaBuf::default() };
        buf.check(&Records::read(ranges.as_bytes(), buf.nr_ranges).unwrap(), 0x4000)
    };
    assert_eq!(check(0, &[(0, 0x4000), (0x3fff, 1)]), Ok(()));
    assert_eq!(check(1, &[(0, 1)]), Err(Errno::EINVAL), "flags");
    for bad in [&[][..], &[(0, 0)], &[(0x3fff, 2)], &[(0x4000, 1)], &[(u64::MAX, 1)], &[(1, u64::MAX)]] {
        assert_eq!(check(0, bad), Err(Errno::EINVAL), "{bad:?}");
    }
}

#[test]
fn bus_master_knows_two_operations() {
    let on = |op| FeatureBusMaster { op }.on();
    assert_eq!((on(0), on(1), on(2)), (Ok(false), Ok(true), Err(Errno::EINVAL)));
}

#[test]
fn reinit_is_a_flag_among_others() {
    let info = |flags| PrecopyInfo { flags, ..PrecopyInfo::default() }.reinit();
    assert_eq!((info(0), info(1), info(2), info(3)), (false, true, false, true));
}

#[test]
fn a_report_knows_the_size_of_its_bitmap() {
    let report = FeatureDmaLoggingReport { iova: 0, length: 65 << 12, page_size: 4096 };
    assert_eq!((report.check(), report.bitmap_bytes()), (Ok(()), 16));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn any_header_has_the_outcome_that_the_standard_gives(
        argsz in prop_oneof![0u32..64, any::<u32>()],
        flags in prop_oneof![any::<u32>(), (0u32..16, 0u32..16).prop_map(|(ops, index)| ops << 16 | index)],
    ) {
        prop_assert_eq!(outcome(argsz, flags), expected(argsz, flags));
    }

    #[test]
    fn any_payload_is_refused_or_written_back_as_it_was(
        index in prop_oneof![4 => 0u16..14, 1 => any::<u16>()],
        mut bytes in prop::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..100),
        entries in 0u32..7,
    ) {
        // A small count, so that lists are read too: START's at 8, DMA_BUF's at 12.
        if bytes.len() >= 16 {
            bytes[8..12].copy_from_slice(&entries.to_ne_bytes());
            bytes[12..16].copy_from_slice(&entries.to_ne_bytes());
        }
        let index = FeatureIndex(index);
        match FeaturePayload::read(index, &bytes) {
            Err(errno) => {
                prop_assert_eq!(errno, Errno::EINVAL);
                let fixed = index.rules().expect("unknown features take any bytes").payload_bytes;
                prop_assert!(bytes.len() < fixed + entries as usize * 16);
            }
            Ok(payload) => {
                prop_assert_eq!(payload.index(), index);
                let mut written = Vec::new();
                payload.write(&mut written);
                prop_assert_eq!(&written[..], &bytes[..written.len()]);
                if index.rules().is_none() {
                    prop_assert_eq!(written.len(), bytes.len());
                }
            }
        }
    }
}
