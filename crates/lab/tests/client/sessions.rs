//! Sessions and their data (`vfio.h: VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`, `VFIO_MIG_GET_PRECOPY_INFO`).

use std::thread;

use limosa_client::{Chunk, Device, DeviceExt, Error};
use limosa_lab::kinds;
use limosa_protocol::{Errno, FeatureIndex, FeatureOp, MigrationFlags, State, pci_index};
use limosa_vfio_kernel::Door;

use crate::{DOORS, Subject, movable, of_type, open, refusal, subject};

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_session_gives_all_of_the_state_and_another_device_takes_it() {
    for kind in kinds() {
        for (door, other) in [(Door::Cdev, Door::Group), (Door::Group, Door::Cdev)] {
            let (source, target) = (subject(&kind, door), subject(&kind, other));
            if source.flags.is_empty() {
                continue;
            }
            let what = &source.what;
            if source.is_ours {
                source.mdev.set("limosa/seed", 77);
                source.device.region_write(pci_index::BAR0, 0xc0, &0x1234_5678_u64.to_le_bytes()).unwrap();
                assert_ne!(source.mdev.get("limosa/check"), target.mdev.get("limosa/check"));
            } else {
                // A byte in the FIFO, which mtty keeps for its reader.
                source.device.region_write(pci_index::BAR0, 0, b"x").unwrap();
            }
            let size = source.device.mig_data_size().unwrap().unwrap();
            let mut stream = source.device.set_state(State::StopCopy).unwrap().unwrap();
            let saved = source.drain(&mut *stream, 61);
            assert!(
                saved.len() as u64 <= size && size <= 2 * saved.len() as u64,
                "{what}: {} of {size}",
                saved.len()
            );
            // The end stays the end, and the device where it is.
            assert_eq!(stream.read(&mut [0; 8]).unwrap(), Chunk::End, "{what}");
            assert_eq!(source.device.state().unwrap(), State::StopCopy, "{what}");
            assert_eq!(refusal(what, &stream.write(b"x").unwrap_err()), Errno::EBADF, "{what}");
            assert_eq!(refusal(what, &stream.precopy_info().unwrap_err()), Errno::EINVAL, "{what}");
            assert!(matches!(stream.read(&mut []), Err(Error::Usage { .. })), "{what}");

            let mut sink = target.device.set_state(State::Resuming).unwrap().unwrap();
            assert_eq!(refusal(what, &sink.read(&mut [0]).unwrap_err()), Errno::EBADF, "{what}");
            for piece in saved.chunks(1000) {
                sink.write(piece).unwrap();
            }
            assert!(target.device.set_state(State::Running).unwrap().is_none(), "{what}");
            let over = sink.write(&saved[..1]).unwrap_err();
            assert!(over.is_refused(Errno::ENODEV) && over.to_string().contains("over"), "{what}: {over}");
            if source.is_ours {
                assert_eq!(source.mdev.get("limosa/check"), target.mdev.get("limosa/check"), "{what}");
                let mut scratch = [0; 8];
                target.device.region_read(pci_index::BAR0, 0xc0, &mut scratch).unwrap();
                assert_eq!(u64::from_le_bytes(scratch), 0x1234_5678, "{what}");
            } else {
                let mut byte = [0];
                target.device.region_read(pci_index::BAR0, 0, &mut byte).unwrap();
                assert_eq!(&byte, b"x", "{what}");
            }
            source.device.set_state(State::Running).unwrap();
            assert_eq!(refusal(what, &stream.read(&mut [0]).unwrap_err()), Errno::ENODEV, "{what}");
        }
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn pre_copy_has_no_end_before_stop_copy() {
    for subject in movable().filter(|subject| subject.flags.contains(MigrationFlags::PRE_COPY)) {
        let Subject { what, device, .. } = &subject;
        let mut stream = device.set_state(State::PreCopy).unwrap().unwrap();
        let info = stream.precopy_info().unwrap();
        assert!(info.initial_bytes > 0 && info.argsz == 24 && !info.reinit(), "{what}: {info:?}");
        let mut data = Vec::new();
        let mut chunk = [0; 1000];
        while let Chunk::Data(bytes) = stream.read(&mut chunk).unwrap() {
            data.extend_from_slice(&chunk[..bytes]);
        }
        assert_eq!(data.len() as u64, info.initial_bytes, "{what}");
        // mtty says 0 where ENOMSG is due; it is no end.
        assert_eq!(stream.read(&mut chunk).unwrap(), Chunk::NothingForNow, "{what}");
        let info = stream.precopy_info().unwrap();
        assert_eq!((info.initial_bytes, info.dirty_bytes), (0, 0), "{what}");
        if subject.flags.contains(MigrationFlags::P2P) {
            assert!(device.set_state(State::PreCopyP2p).unwrap().is_none(), "{what}");
            assert_eq!(stream.read(&mut chunk).unwrap(), Chunk::NothingForNow, "{what}");
        }
        assert!(device.set_state(State::StopCopy).unwrap().is_none(), "{what}: the session goes on");
        assert_eq!(refusal(what, &stream.precopy_info().unwrap_err()), Errno::EINVAL, "{what}");
        data.extend(subject.drain(&mut *stream, 4096));
        device.set_state(State::Stop).unwrap();
        // mtty looks at the state first.
        let over = if subject.is_ours { Errno::ENODEV } else { Errno::EINVAL };
        assert_eq!(refusal(what, &stream.precopy_info().unwrap_err()), over, "{what}");
        let mut sink = device.set_state(State::Resuming).unwrap().unwrap();
        sink.write(&data).unwrap();
        device.set_state(State::Running).unwrap();
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn reinit_is_told_to_who_opted_in_to_it() {
    // Linux 6.12 does not know it yet.
    let mut is_known = false;
    for subject in of_type("limosa-full") {
        let Subject { what, device, mdev, .. } = &subject;
        is_known = device.probe(FeatureIndex::MIG_PRECOPY_INFO_V2, FeatureOp::SET).unwrap();
        for opts_in in [false, is_known] {
            if opts_in {
                assert!(device.precopy_info_v2().unwrap(), "{what}");
            }
            let mut stream = device.set_state(State::PreCopy).unwrap().unwrap();
            let whole = stream.precopy_info().unwrap().initial_bytes;
            let mut chunk = vec![0; 1 << 20];
            while let Chunk::Data(_) = stream.read(&mut chunk).unwrap() {}
            mdev.set("limosa/reinit", 1);
            let info = stream.precopy_info().unwrap();
            assert_eq!(info.reinit(), opts_in, "{what}: {info:?}");
            let (fresh, empty) = if opts_in {
                (info.initial_bytes, info.dirty_bytes)
            } else {
                (info.dirty_bytes, info.initial_bytes)
            };
            assert!(fresh > whole / 2 && empty == 0, "{what}: {info:?} after {whole}");
            assert!(!stream.precopy_info().unwrap().reinit(), "{what}: told once");
            device.set_state(State::Running).unwrap();
        }
    }
    // A kind without pre-copy has nothing to opt in to.
    for subject in of_type("limosa-plain") {
        let answer = subject.feature(FeatureIndex::MIG_PRECOPY_INFO_V2, FeatureOp::SET, &mut []);
        assert_eq!(answer, Err(if is_known { Errno::EINVAL } else { Errno::ENOTTY }), "{}", subject.what);
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn data_that_a_device_does_not_take_end_the_session_for_writing() {
    for subject in movable() {
        let Subject { what, device, is_ours, .. } = &subject;
        let mut stream = device.set_state(State::StopCopy).unwrap().unwrap();
        let saved = subject.drain(&mut *stream, 4096);
        let damaged: Vec<u8> = saved.iter().map(|byte| byte ^ 0x5a).collect();
        let longer = [saved.as_slice(), &[0; 64]].concat();
        // mtty answers ENOMEM to more than it has, and EFAULT to a header that is not its own.
        let (foreign, beyond) =
            if *is_ours { (Errno::EINVAL, Errno::EBADMSG) } else { (Errno::EFAULT, Errno::ENOMEM) };
        for (data, errno) in [(&damaged, foreign), (&longer, beyond)] {
            let mut sink = device.set_state(State::Resuming).unwrap().unwrap();
            let error = sink.write(data).unwrap_err();
            assert_eq!(refusal(what, &error), errno, "{what}");
            assert!(error.to_string().contains("another kind"), "{what}: {error}");
            // What comes next would be out of place, even if the device took it.
            assert_eq!(refusal(what, &sink.write(&saved).unwrap_err()), errno, "{what}");
            device.reset().unwrap();
            assert_eq!(device.state().unwrap(), State::Running, "{what}");
        }
        // Nothing or half of it is not enough.
        for part in [0, saved.len() / 2] {
            let mut sink = device.set_state(State::Resuming).unwrap().unwrap();
            sink.write(&saved[..part]).unwrap();
            let error = device.set_state(State::Stop).err().unwrap();
            assert!(
                error.is_refused(Errno::EINVAL) && error.to_string().contains("incomplete"),
                "{what}: {error}"
            );
            assert_eq!(device.state().unwrap(), State::Resuming, "{what}");
            sink.write(&saved[part..]).unwrap();
            device.set_state(State::Running).unwrap();
        }
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn requests_that_fail_do_not_touch_a_session_that_another_thread_reads() {
    for subject in movable() {
        let Subject { what, device, mdev, is_ours, .. } = &subject;
        let mut stream = device.set_state(State::StopCopy).unwrap().unwrap();
        if *is_ours {
            // The reader stands in the midst of its data while the requests fail.
            mdev.set("limosa/hold", "read@4096");
        }
        let data = thread::scope(|scope| {
            let reader = scope.spawn(|| subject.drain(&mut *stream, 512));
            if *is_ours {
                assert_eq!(mdev.get("limosa/await"), "read@4096", "{what}");
            }
            for _ in 0..50 {
                let refused = device.set_state(State::PreCopy).err().unwrap();
                assert!(refused.is_refused(Errno::EINVAL), "{what}: {refused}");
                assert!(device.set_state(State::StopCopy).unwrap().is_none(), "{what}: nothing to do");
                subject.feature(FeatureIndex(999), FeatureOp::GET, &mut [0; 8]).unwrap_err();
                device.region(99).unwrap_err();
                assert_eq!(device.state().unwrap(), State::StopCopy, "{what}");
            }
            if *is_ours {
                mdev.set("limosa/hold", "none");
            }
            reader.join().unwrap()
        });
        let mut sink = device.set_state(State::Resuming).unwrap().unwrap();
        sink.write(&data).unwrap();
        device.set_state(State::Running).unwrap();
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn reads_and_writes_in_small_pieces_lose_nothing() {
    for subject in of_type("limosa-full") {
        let Subject { what, device, mdev, .. } = &subject;
        mdev.set("limosa/read_bytes_max", 333);
        mdev.set("limosa/write_bytes_max", 217);
        let check = mdev.get("limosa/check");
        let mut stream = device.set_state(State::StopCopy).unwrap().unwrap();
        let saved = subject.drain(&mut *stream, 1 << 16);
        device.reset().unwrap();
        let mut sink = device.set_state(State::Resuming).unwrap().unwrap();
        sink.write(&saved).unwrap();
        device.set_state(State::Running).unwrap();
        assert_eq!(mdev.get("limosa/check"), check, "{what}");
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_stream_that_outlives_its_device_says_that_the_session_is_over() {
    for kind in kinds() {
        for door in DOORS {
            let subject = subject(&kind, door);
            if subject.flags.is_empty() {
                continue;
            }
            let Subject { what, device, mdev, .. } = subject;
            let mut stream = device.set_state(State::StopCopy).unwrap().unwrap();
            drop(device);
            assert_eq!(refusal(&what, &stream.read(&mut [0]).unwrap_err()), Errno::ENODEV, "{what}");
            // It does not hold the device either.
            open(&mdev, door).unwrap().reset().unwrap();
        }
    }
}
