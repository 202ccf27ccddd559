//! FEATURE and what it refuses (`vfio.h: VFIO_DEVICE_FEATURE`).

use limosa_client::{Chunk, Device, DeviceExt, Error, FeatureRequest, Refers};
use limosa_protocol::feature::{DmaLoggingRange, FeatureDmaLoggingReport};
use limosa_protocol::{Errno, FeatureIndex, FeatureOp, MigrationFlags, State};
use zerocopy::IntoBytes;

use crate::{Subject, all, movable, of_type, refusal};

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn features_are_those_of_the_kind() {
    for subject in all() {
        let Subject { what, device, flags, .. } = &subject;
        let all = MigrationFlags::STOP_COPY | MigrationFlags::P2P | MigrationFlags::PRE_COPY;
        let expected = match what.split(' ').next().unwrap() {
            "limosa-precopy" => MigrationFlags::STOP_COPY | MigrationFlags::PRE_COPY,
            "limosa-p2p" => MigrationFlags::STOP_COPY | MigrationFlags::P2P,
            "limosa-plain" => MigrationFlags::STOP_COPY,
            "limosa-none" => MigrationFlags::empty(),
            _ => all,
        };
        assert_eq!(*flags, expected, "{what}");
        let movable = !flags.is_empty();
        assert_eq!(device.probe(FeatureIndex::MIGRATION, FeatureOp::GET).unwrap(), movable, "{what}");
        let both = FeatureOp::GET | FeatureOp::SET;
        assert_eq!(device.probe(FeatureIndex::MIG_DEVICE_STATE, both).unwrap(), movable, "{what}");
        assert!(!device.probe(FeatureIndex::MIGRATION, FeatureOp::SET).unwrap(), "{what}");
        assert!(!device.probe(FeatureIndex(0xfff), FeatureOp::GET).unwrap(), "{what}");
        assert_eq!(device.mig_data_size().unwrap().is_some(), movable, "{what}");
        if movable {
            assert_eq!(device.state().unwrap(), State::Running, "{what}");
        } else {
            let error = device.state().unwrap_err();
            assert!(
                error.is_refused(Errno::ENOTTY) && error.to_string().contains("driver"),
                "{what}: {error}"
            );
        }
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_misuse_of_feature_is_refused_and_harms_nothing() {
    for subject in movable() {
        let what = &subject.what;
        let (get, set) = (FeatureOp::GET, FeatureOp::SET);
        let state = FeatureIndex::MIG_DEVICE_STATE;
        for (index, op, bytes, errno) in [
            (state, get | set, 8, Errno::EINVAL),
            (state, FeatureOp::empty(), 8, Errno::EINVAL),
            (state, FeatureOp::from_bits_retain(1 << 19) | get, 8, Errno::EINVAL),
            (state, get, 7, Errno::EINVAL),
            (state, get, 0, Errno::EINVAL),
            (state, set, 4, Errno::EINVAL),
            (FeatureIndex::MIGRATION, set, 8, Errno::EINVAL),
            (FeatureIndex::MIGRATION, get, 4, Errno::EINVAL),
            (FeatureIndex::MIG_DATA_SIZE, set, 8, Errno::EINVAL),
            (FeatureIndex::PCI_VF_TOKEN, set, 16, Errno::ENOTTY),
            (FeatureIndex::BUS_MASTER, set, 4, Errno::ENOTTY),
            (FeatureIndex(13), get, 8, Errno::ENOTTY),
            (FeatureIndex(0xffff), set, 64, Errno::ENOTTY),
        ] {
            let mut payload = vec![0; bytes];
            let answer = subject.feature(index, op, &mut payload);
            assert_eq!(answer, Err(errno), "{what}: {op:?} of {index} with {bytes} bytes");
        }
        // More room than is needed is no misuse.
        let mut payload = [0xff; 64];
        assert_eq!(subject.feature(state, get, &mut payload), Ok(8), "{what}");
        assert_eq!(payload[..8], [2, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], "{what}: RUNNING, and no fd");
        assert!(payload[8..].iter().all(|&byte| byte == 0xff), "{what}: beyond the answer");
        assert_eq!(subject.device.state().unwrap(), State::Running, "{what}");
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn dma_logging_is_refused_as_the_standard_has_it() {
    for subject in all() {
        let Subject { what, device, .. } = &subject;
        let logs = device.probe(FeatureIndex::DMA_LOGGING_START, FeatureOp::SET).unwrap();
        let range = |iova, length| DmaLoggingRange { iova, length };
        let ok = [range(0x10_0000, 0x1_0000)];
        if !logs {
            let error = device.dma_logging_start(4096, &ok).unwrap_err();
            assert!(
                error.is_refused(Errno::ENOTTY) && error.to_string().contains("IOMMU"),
                "{what}: {error}"
            );
            continue;
        }
        let many: Vec<_> = (0..257).map(|at| range(at * 0x2000, 0x1000)).collect();
        for (ranges, errno) in [
            (&[][..], Errno::EINVAL),
            (&many, Errno::E2BIG),
            (&[range(0x800, 0x1000)], Errno::EINVAL),
            (&[range(0x1000, 0x800)], Errno::EINVAL),
            (&[range(u64::MAX - 0xfff, 0x2000)], Errno::EOVERFLOW),
            (&[range(0x1000, 0x2000), range(0x2000, 0x1000)], Errno::EINVAL),
        ] {
            let error = device.dma_logging_start(4096, ranges).unwrap_err();
            assert_eq!(refusal(what, &error), errno, "{what}: {} ranges: {error}", ranges.len());
        }
        assert!(device.dma_logging_start(4096, &ok).unwrap().is_power_of_two(), "{what}");
        let mut words = [u64::MAX];
        device.dma_logging_report(0x10_0000, 0x1_0000, 4096, &mut words).unwrap();
        assert_eq!(words, [0], "{what}: nothing was written");
        let mut payload = FeatureDmaLoggingReport { iova: 0x10_0000, length: 0x1_0000, page_size: 4096 };
        for (length, page_size, errno) in [
            (0x1_0000, 2048, Errno::EINVAL),
            (0x1_0000, 5000, Errno::EINVAL),
            (u64::MAX, 4096, Errno::EOVERFLOW),
        ] {
            (payload.length, payload.page_size) = (length, page_size);
            let mut words = [0; 2];
            let error = device.feature(&mut FeatureRequest {
                index: FeatureIndex::DMA_LOGGING_REPORT,
                op: FeatureOp::GET,
                payload: payload.as_mut_bytes(),
                refers: Refers::Bitmap(&mut words),
            });
            assert_eq!(refusal(what, &error.unwrap_err()), errno, "{what}: pages of {page_size}");
        }
        // What the kernel would write beyond is not asked for.
        payload = FeatureDmaLoggingReport { iova: 0, length: 65 * 4096, page_size: 4096 };
        for refers in [Refers::Nothing, Refers::Bitmap(&mut [0])] {
            let error = device.feature(&mut FeatureRequest {
                index: FeatureIndex::DMA_LOGGING_REPORT,
                op: FeatureOp::GET,
                payload: payload.as_mut_bytes(),
                refers,
            });
            assert!(matches!(error, Err(Error::Usage { .. })), "{what}: {error:?}");
        }
        device.dma_logging_stop().unwrap();
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn an_arc_that_fails_keeps_its_errno_and_leaves_a_state_that_get_tells() {
    for subject in of_type("limosa-full") {
        let Subject { what, device, mdev, .. } = &subject;
        mdev.set("limosa/fail", "STOP>STOP_COPY:5:1");
        let error = device.set_state(State::StopCopy).err().unwrap();
        assert!(error.is_refused(Errno::EIO) && error.to_string().contains("STOP_COPY"), "{what}: {error}");
        assert_eq!(device.state().unwrap(), State::Stop, "{what}");
        mdev.set("limosa/error", "STOP>STOP_COPY:5:1");
        let error = device.set_state(State::StopCopy).err().unwrap();
        assert!(error.to_string().contains("reset"), "{what}: {error}");
        assert_eq!(device.state().unwrap(), State::Error, "{what}");
        device.reset().unwrap();
        mdev.set("limosa/fail", "read@1000:5:1");
        let mut stream = device.set_state(State::StopCopy).unwrap().unwrap();
        let mut read = 0;
        let error = loop {
            match stream.read(&mut [0; 4096]) {
                Ok(Chunk::Data(bytes)) => read += bytes,
                Ok(other) => panic!("{what}: {other:?}"),
                Err(error) => break error,
            }
        };
        assert!(error.is_refused(Errno::EIO) && read == 1000, "{what}: {error} after {read}");
    }
}
