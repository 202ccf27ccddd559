//! What a device answers to requests of the FEATURE multiplexer and to region accesses, and the
//! errno for each misuse (`vfio.h: VFIO_DEVICE_FEATURE`).

use crate::common::{REGION_BYTES, Rig, feature, refused};
use limosa_client::{Device, DeviceExt, FeatureRequest, Refers};
use limosa_protocol::feature::{DmaLoggingRange, FeatureDmaLoggingControl, FeatureMigState};
use limosa_protocol::info::{DeviceFlags, RegionFlags};
use limosa_protocol::{Errno, FeatureIndex, FeatureOp, MigrationFlags, State};
use zerocopy::IntoBytes;

const ALL: MigrationFlags = MigrationFlags::SETS[3];
const GET: FeatureOp = FeatureOp::GET;
const SET: FeatureOp = FeatureOp::SET;
const PROBE: FeatureOp = FeatureOp::PROBE;

/// The features that every device with migration has, with GET and SET.
const HAS: [(u16, bool, bool); 8] = [
    (1, true, false),
    (2, true, true),
    (6, false, true),
    (7, false, true),
    (8, true, false),
    (9, true, false),
    (12, false, true),
    (0xfe02, true, false),
];

#[test]
fn probes_name_what_is_there_and_do_nothing() {
    let rig = Rig::new(ALL);
    for index in (0..32).chain([0xfe00, 0xfe01, 0xfe02, 0xfe03, 0xfff0, 0xffff]) {
        let has = HAS.iter().find(|(known, ..)| *known == index);
        for (op, there) in [
            (PROBE, has.is_some()),
            (PROBE | GET, has.is_some_and(|(_, get, _)| *get)),
            (PROBE | SET, has.is_some_and(|(_, _, set)| *set)),
            (PROBE | GET | SET, has.is_some_and(|(_, get, set)| *get && *set)),
        ] {
            let want = match (there, has) {
                (true, _) => Ok(0),
                (false, Some(_)) => Err(Errno::EINVAL),
                (false, None) => Err(Errno::ENOTTY),
            };
            assert_eq!(feature(&rig, index, op, &mut []), want, "{index} {op:?}");
        }
    }
    assert_eq!(rig.state(), State::Running);
    assert!(rig.calls().is_empty());
    let mut stream = rig.device.set_state(State::PreCopy).unwrap().unwrap();
    assert_eq!(stream.precopy_info().unwrap().flags, 0, "a probe does not opt in");
}

#[test]
fn a_device_without_migration_has_none_of_its_features() {
    let rig = Rig::without_migration();
    for index in [1, 2, 9, 12] {
        for op in [GET, SET, PROBE, PROBE | GET] {
            assert_eq!(feature(&rig, index, op, &mut [0; 64]), Err(Errno::ENOTTY), "{index} {op:?}");
        }
    }
    assert_eq!(rig.device.migration_flags().unwrap(), MigrationFlags::empty());
    assert_eq!(rig.device.mig_data_size().unwrap(), None);
    assert_eq!(feature(&rig, 6, PROBE | SET, &mut []), Ok(0), "it has DMA logging");
    rig.device.reset().unwrap();
    assert_eq!(rig.device.reset_count().unwrap(), Some(1), "it can be reset all the same");
}

#[test]
fn pre_copy_flags_are_for_devices_with_pre_copy() {
    let rig = Rig::new(MigrationFlags::SETS[1]);
    assert!(!rig.device.precopy_info_v2().unwrap());
    assert_eq!(feature(&rig, 12, PROBE | SET, &mut []), Err(Errno::ENOTTY));
}

#[test]
fn the_wrong_operation_or_too_short_a_payload_is_einval() {
    let rig = Rig::new(ALL);
    for (index, get, set) in HAS {
        for (op, there) in [(GET, get), (SET, set)] {
            let index_rules = FeatureIndex(index).rules().or(FeatureIndex(index).extension_rules());
            let bytes = index_rules.unwrap().payload_bytes;
            if !there {
                assert_eq!(feature(&rig, index, op, &mut [0; 64]), Err(Errno::EINVAL), "{index} {op:?}");
            } else if bytes > 0 {
                let mut short = vec![0; bytes - 1];
                assert_eq!(feature(&rig, index, op, &mut short), Err(Errno::EINVAL), "{index} {op:?}");
            }
        }
    }
    // A call that promises more than it brings.
    let call = limosa_protocol::FeatureHeader::new(FeatureIndex::MIG_DEVICE_STATE, GET, 8).call().unwrap();
    assert_eq!(rig.machine.feature(call, &mut [0; 7], Refers::Nothing), Err(Errno::EINVAL));
}

#[test]
fn flags_state_and_size_are_answered() {
    for flags in MigrationFlags::SETS {
        let rig = Rig::new(flags);
        assert_eq!(rig.device.migration_flags().unwrap(), flags);
        assert_eq!(rig.device.state().unwrap(), State::Running);
        assert_eq!(rig.device.mig_data_size().unwrap(), Some(1234));
        // A longer payload is answered too, and the rest of it left alone.
        let mut long = [0xaa; 12];
        assert_eq!(feature(&rig, 2, GET, &mut long), Ok(8));
        assert_eq!(long[..8], [2, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(long[8..], [0xaa; 4]);
    }
}

#[test]
fn a_set_of_the_state_echoes_it_without_an_fd() {
    let rig = Rig::new(ALL);
    let mut payload = [0; 8];
    payload.copy_from_slice(FeatureMigState { device_state: 3, data_fd: 77 }.as_bytes());
    assert_eq!(feature(&rig, 2, SET, &mut payload), Ok(8));
    assert_eq!(payload, FeatureMigState::new(State::StopCopy).as_bytes());
    for number in [0, 8, 100, u32::MAX] {
        payload[..4].copy_from_slice(&number.to_ne_bytes());
        assert_eq!(feature(&rig, 2, SET, &mut payload), Err(Errno::EINVAL), "{number}");
        assert_eq!(rig.state(), State::StopCopy);
    }
}

#[test]
fn logging_wants_exactly_its_ranges() {
    let rig = Rig::new(ALL);
    let start = |num_ranges: u32, refers: Refers<'_>| {
        let mut control = FeatureDmaLoggingControl { page_size: 4096, num_ranges, reserved: 0 };
        rig.device
            .feature(&mut FeatureRequest {
                index: FeatureIndex::DMA_LOGGING_START,
                op: SET,
                payload: control.as_mut_bytes(),
                refers,
            })
            .map(drop)
    };
    let ranges = [DmaLoggingRange { iova: 0, length: 4096 }; 257];
    assert_eq!(refused(start(257, Refers::In(ranges.as_bytes()))), Errno::E2BIG);
    assert_eq!(refused(start(u32::MAX, Refers::In(ranges.as_bytes()))), Errno::E2BIG);
    assert_eq!(refused(start(2, Refers::In(&ranges.as_bytes()[..16]))), Errno::EINVAL);
    assert_eq!(refused(start(1, Refers::In(&ranges.as_bytes()[..17]))), Errno::EINVAL);
    assert_eq!(refused(start(1, Refers::Nothing)), Errno::EINVAL);
    assert_eq!(refused(start(1, Refers::Bitmap(&mut [0; 2]))), Errno::EINVAL);
}

#[test]
fn a_report_wants_a_bitmap_with_a_bit_for_each_page() {
    let rig = Rig::new(ALL);
    let report = |iova: u64, length: u64, page_size: u64, refers: Refers<'_>| {
        let mut payload = [0; 24];
        payload[..8].copy_from_slice(&iova.to_ne_bytes());
        payload[8..16].copy_from_slice(&length.to_ne_bytes());
        payload[16..].copy_from_slice(&page_size.to_ne_bytes());
        let op = GET;
        let index = FeatureIndex::DMA_LOGGING_REPORT;
        rig.device.feature(&mut FeatureRequest { index, op, payload: &mut payload, refers }).map(drop)
    };
    assert_eq!(refused(report(0, 4096, 4096, Refers::Nothing)), Errno::EINVAL);
    assert_eq!(refused(report(0, 4096, 4096, Refers::In(&[0; 8]))), Errno::EINVAL);
    assert_eq!(refused(report(0, 65 * 4096, 4096, Refers::Bitmap(&mut [0; 1]))), Errno::EINVAL);
    assert_eq!(refused(report(0, 4096, 0, Refers::Bitmap(&mut [0; 1]))), Errno::EINVAL);
    assert_eq!(refused(report(0, 4096, 4095, Refers::Bitmap(&mut [0; 1]))), Errno::EINVAL);
}

#[test]
fn a_refusal_names_the_request_in_the_standards_words() {
    let rig = Rig::new(ALL);
    let said = rig.device.set_state(State::Error).err().unwrap().to_string();
    assert!(said.starts_with("test: SET MIG_DEVICE_STATE ERROR refused: EINVAL"), "{said}");
    let said = rig.device.bus_master(true).unwrap_err().to_string();
    assert!(said.starts_with("test: SET BUS_MASTER refused: ENOTTY"), "{said}");
}

#[test]
fn regions_are_read_and_written_within_their_bounds() {
    let rig = Rig::new(ALL);
    rig.device.region_write(0, 8, b"abc").unwrap();
    let mut data = [0; 3];
    rig.device.region_read(0, 8, &mut data).unwrap();
    assert_eq!(&data, b"abc");
    rig.device.region_write(0, REGION_BYTES - 1, b"z").unwrap();
    rig.calls();
    rig.device.region_read(0, REGION_BYTES, &mut []).unwrap();
    assert!(rig.calls().is_empty(), "nothing to read is nothing to ask");
}

#[test]
fn region_accesses_that_are_out_of_bounds_never_reach_the_model() {
    let rig = Rig::new(ALL);
    let end = REGION_BYTES;
    for (region, offset, bytes) in [
        (0, end, 1),
        (0, end - 1, 2),
        (0, u64::MAX, 1),
        (0, u64::MAX - 3, 8),
        (0, 0, end as usize + 1),
        (3, 0, 1),
        (3, 0, 0),
        (4, 0, 1),
        (u32::MAX, 0, 1),
    ] {
        let mut data = vec![0; bytes];
        assert_eq!(refused(rig.device.region_read(region, offset, &mut data)), Errno::EINVAL);
        assert_eq!(refused(rig.device.region_write(region, offset, &data)), Errno::EINVAL);
    }
    assert_eq!(refused(rig.device.region_write(1, 0, b"x")), Errno::EINVAL, "read-only");
    assert_eq!(refused(rig.device.region_read(2, 0, &mut [0])), Errno::EINVAL, "write-only");
    assert!(rig.calls().is_empty());
}

#[test]
fn the_description_is_told_in_the_standards_structures() {
    let rig = Rig::new(ALL);
    let info = rig.device.info().unwrap();
    assert_eq!((info.argsz, info.num_regions, info.num_irqs), (16, 4, 0));
    assert_eq!(info.flags, DeviceFlags::RESET.bits());
    let region = rig.device.region(1).unwrap();
    assert_eq!((region.info.argsz, region.info.index, region.info.size), (32, 1, REGION_BYTES));
    assert_eq!(region.info.flags, RegionFlags::READ.bits());
    assert!(region.mappable.is_empty() && region.fd.is_none());
    assert_eq!(rig.device.region(3).unwrap().info.size, 0);
    assert_eq!(refused(rig.device.region(4)), Errno::EINVAL);
    assert_eq!(refused(rig.device.irq(0)), Errno::EINVAL);
}
