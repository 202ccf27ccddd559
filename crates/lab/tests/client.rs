//! The client on every kind of device through both doors: FEATURE and what it refuses, sessions and their data,
//! regions, interrupts, memory, and devices that are open elsewhere or gone.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::thread;

use limosa_client::{
    Chunk, DataStream, Device, DeviceExt, DmaMap, DmaMemory, Error, FeatureRequest, IrqAction, Refers, Result,
};
use limosa_lab::{Kind, Mdev, kinds};
use limosa_protocol::feature::{DmaLoggingRange, FeatureDmaLoggingReport};
use limosa_protocol::info::{DeviceFlags, DmaMapFlags, IrqFlags, RegionFlags};
use limosa_protocol::{Errno, FeatureIndex, FeatureOp, MigrationFlags, State, pci_index};
use limosa_vfio_kernel::{AddressSpace, Door, KernelDevice, Options};
use rustix::event::EventfdFlags;
use zerocopy::IntoBytes;

const DOORS: [Door; 2] = [Door::Cdev, Door::Group];

/// A device under test, closed before it is removed.
struct Subject {
    what: String,
    device: KernelDevice,
    mdev: Mdev,
    is_ours: bool,
    flags: MigrationFlags,
}

fn open(mdev: &Mdev, door: Door) -> Result<KernelDevice> {
    KernelDevice::open(mdev.uuid(), &Options { door: Some(door), ..Options::default() })
}

fn subject(kind: &Kind, door: Door) -> Subject {
    let mdev = kind.create();
    let device = open(&mdev, door).unwrap();
    let flags = device.migration_flags().unwrap();
    let what = format!("{} through its {door}", kind.name);
    Subject { what, device, mdev, is_ours: kind.parent == "limosa", flags }
}

fn all() -> impl Iterator<Item = Subject> {
    kinds().into_iter().flat_map(|kind| DOORS.map(|door| subject(&kind, door)))
}

/// Those with migration.
fn movable() -> impl Iterator<Item = Subject> {
    all().filter(|subject| !subject.flags.is_empty())
}

fn of_type(name: &str) -> impl Iterator<Item = Subject> + use<'_> {
    let kind = kinds().into_iter().find(|kind| kind.name == name).unwrap();
    DOORS.into_iter().map(move |door| subject(&kind, door))
}

impl Subject {
    /// A request as it is, and its errno if it is refused.
    fn feature(&self, index: FeatureIndex, op: FeatureOp, payload: &mut [u8]) -> Result<usize, Errno> {
        let reply = self.device.feature(&mut FeatureRequest { index, op, payload, refers: Refers::Nothing });
        reply.map(|reply| reply.payload_bytes).map_err(|error| refusal(&self.what, &error))
    }

    /// Everything up to the end, in reads of so many bytes.
    fn drain(&self, stream: &mut dyn DataStream, bytes: usize) -> Vec<u8> {
        let mut data = Vec::new();
        let mut chunk = vec![0; bytes];
        loop {
            match stream.read(&mut chunk).unwrap_or_else(|error| panic!("{}: {error}", self.what)) {
                Chunk::Data(bytes) => data.extend_from_slice(&chunk[..bytes]),
                Chunk::End => return data,
                Chunk::NothingForNow => panic!("{}: nothing for now in STOP_COPY", self.what),
            }
        }
    }
}

/// The errno of a refusal; anything else ends the test.
fn refusal(what: &str, error: &Error) -> Errno {
    match error {
        Error::Refused { errno, .. } => *errno,
        other => panic!("{what}: no refusal: {other}"),
    }
}

fn eventfd() -> OwnedFd {
    rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

/// How often an eventfd was signalled since it was asked last.
fn signals(fd: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    match rustix::io::read(fd, &mut count) {
        Ok(_) => u64::from_ne_bytes(count),
        Err(rustix::io::Errno::AGAIN) => 0,
        Err(error) => panic!("{error}"),
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_device_opens_by_every_form_of_its_name() {
    for kind in kinds() {
        let mdev = kind.create();
        let group = mdev.group();
        let names = [
            (mdev.uuid().to_owned(), Door::Cdev),
            (mdev.uuid().to_uppercase(), Door::Cdev),
            (mdev.cdev().display().to_string(), Door::Cdev),
            (format!("/dev/vfio/{group}"), Door::Group),
            (group.to_string(), Door::Group),
        ];
        for (name, expected) in names {
            let device = KernelDevice::open(&name, &Options::default()).unwrap();
            assert_eq!((device.name(), device.door()), (name.as_str(), Some(expected)), "{kind:?}");
            assert_eq!(device.address_space().unwrap().door(), expected);
            assert_eq!(device.group_fd().is_some(), expected == Door::Group);
            drop(device);
            // Any name through any door.
            for door in DOORS {
                let options = Options { door: Some(door), ..Options::default() };
                assert_eq!(KernelDevice::open(&name, &options).unwrap().door(), Some(door));
                let options = Options { space: Some(AddressSpace::new(door).unwrap()), ..Options::default() };
                assert_eq!(KernelDevice::open(&name, &options).unwrap().door(), Some(door));
            }
        }
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_name_without_a_device_is_refused_with_what_to_do() {
    for (name, errno) in [
        ("00000000-0000-4000-8000-000000000000", Errno::ENOENT),
        ("ffff:ff:1f.7", Errno::ENOENT),
        ("/dev/vfio/devices/vfio4000000", Errno::ENOENT),
        ("/dev/vfio/4000000", Errno::ENOENT),
        ("noiommu-4000000", Errno::ENOENT),
    ] {
        let error = KernelDevice::open(name, &Options::default()).unwrap_err();
        assert_eq!(error.errno(), Some(errno), "{error}");
        assert!(error.to_string().contains("limosa probe"), "{error}");
    }
    let error = KernelDevice::open("/run/no.sock", &Options::default()).unwrap_err();
    assert!(matches!(error, Error::Usage { .. }), "{error}");
    let mdev = Mdev::create("mtty", "mtty-1");
    let space = Some(AddressSpace::new(Door::Group).unwrap());
    let error = KernelDevice::open(mdev.uuid(), &Options { door: Some(Door::Cdev), space }).unwrap_err();
    assert!(matches!(error, Error::Usage { .. }), "{error}");
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_device_that_is_open_is_busy_through_every_door_and_says_so() {
    for kind in kinds() {
        for first in DOORS {
            let mdev = kind.create();
            let device = open(&mdev, first).unwrap();
            for second in [None, Some(Door::Cdev), Some(Door::Group)] {
                let options = Options { door: second, ..Options::default() };
                let error = KernelDevice::open(mdev.uuid(), &options).unwrap_err();
                let text = format!("{kind:?}, {first} and then {second:?}: {error}");
                assert!(
                    error.errno().is_some_and(|errno| matches!(errno, Errno::EBUSY | Errno::EINVAL)),
                    "{text}"
                );
                assert!(text.contains("open") || text.contains("in use"), "{text}");
            }
            // Nothing of that has harmed the one who has it.
            device.info().unwrap();
            drop(device);
            for door in DOORS {
                open(&mdev, door).unwrap().info().unwrap();
            }
        }
    }
}

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
    for subject in of_type("limosa-full") {
        let Subject { what, device, mdev, .. } = &subject;
        for opts_in in [false, true] {
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
        assert_eq!(answer, Err(Errno::EINVAL), "{}", subject.what);
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
                error.is_refused(Errno::EINVAL) && error.to_string().contains("not whole"),
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
            mdev_release(mdev, *is_ours);
            reader.join().unwrap()
        });
        let mut sink = device.set_state(State::Resuming).unwrap().unwrap();
        sink.write(&data).unwrap();
        device.set_state(State::Running).unwrap();
    }
}

fn mdev_release(mdev: &Mdev, is_ours: bool) {
    if is_ours {
        mdev.set("limosa/hold", "none");
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

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_device_that_is_gone_is_not_just_a_refusal() {
    for subject in of_type("limosa-full") {
        let Subject { what, device, mdev, .. } = &subject;
        let mut stream = device.set_state(State::StopCopy).unwrap().unwrap();
        mdev.set("limosa/gone", 1);
        for error in [
            device.state().unwrap_err(),
            device.set_state(State::Running).err().unwrap(),
            device.info().unwrap_err(),
            device.region_read(pci_index::BAR0, 0, &mut [0; 8]).unwrap_err(),
            device.reset().unwrap_err(),
        ] {
            assert!(error.is_connection_lost() && error.to_string().contains("unplugged"), "{what}: {error}");
        }
        assert_eq!(refusal(what, &stream.read(&mut [0]).unwrap_err()), Errno::ENODEV, "{what}");
        mdev.set("limosa/gone", 0);
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

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn regions_are_those_of_the_kind_and_keep_within_their_bounds() {
    for subject in all() {
        let Subject { what, device, is_ours, .. } = &subject;
        let info = device.info().unwrap();
        assert!(DeviceFlags::from_bits_retain(info.flags).contains(DeviceFlags::PCI), "{what}: {info:?}");
        assert_eq!(
            (info.num_regions, info.num_irqs),
            (pci_index::NUM_REGIONS, pci_index::NUM_IRQS),
            "{what}"
        );
        for index in 0..info.num_regions {
            let region = device.region(index).unwrap();
            assert_eq!(region.info.index, index, "{what}");
            let sparse: &[(u64, u64)] =
                if *is_ours && index == 2 { &[(0x1000, 0x1000), (0x3000, 0x1000)] } else { &[] };
            assert_eq!(region.mappable, sparse, "{what}: region {index}");
            assert_eq!(region.fd.is_some(), !sparse.is_empty(), "{what}: region {index}");
            // Beyond the end of a region begins the next one.
            let size = region.info.size;
            for (offset, bytes) in [(size, 1), (1 << 40, 1), (u64::MAX, 1), (size.saturating_sub(1), 2)] {
                let mut data = vec![0; bytes];
                let error = device.region_read(index, offset, &mut data).unwrap_err();
                assert!(matches!(error, Error::Usage { .. }), "{what}: {error}");
                let error = device.region_write(index, offset, &data).unwrap_err();
                assert!(matches!(error, Error::Usage { .. }), "{what}: {error}");
            }
        }
        assert_eq!(refusal(what, &device.region(info.num_regions).unwrap_err()), Errno::EINVAL, "{what}");
        let config = device.region(pci_index::CONFIG).unwrap().info;
        let flags = RegionFlags::from_bits_retain(config.flags);
        // mtty's lacks the last byte.
        let size = if *is_ours { 256 } else { 255 };
        assert!(config.size == size && flags.contains(RegionFlags::READ | RegionFlags::WRITE), "{what}");
        let mut id = [0; 4];
        device.region_read(pci_index::CONFIG, 0, &mut id).unwrap();
        let expected = if *is_ours { [0x69, 0x4c, 0x6f, 0x6d] } else { [0x48, 0x43, 0x53, 0x32] };
        assert_eq!(id, expected, "{what}");
        device.region_write(pci_index::CONFIG, 0x3c, &[0x2b]).unwrap();
        let mut line = [0];
        device.region_read(pci_index::CONFIG, 0x3c, &mut line).unwrap();
        assert_eq!(line, [0x2b], "{what}");
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn interrupts_reach_the_eventfds_that_they_are_wired_to() {
    for subject in all() {
        let Subject { what, device, is_ours, .. } = &subject;
        let intx = pci_index::IRQ_INTX;
        let info = device.irq(intx).unwrap();
        let flags = IrqFlags::EVENTFD | IrqFlags::MASKABLE | IrqFlags::AUTOMASKED;
        assert_eq!((info.count, IrqFlags::from_bits_retain(info.flags)), (1, flags), "{what}");
        // Nothing is wired: there is nothing to unwire, and nothing to trigger.
        device.set_irqs(intx, 0, IrqAction::Disable).unwrap();
        device.set_irqs(intx, 0, IrqAction::Wire(&[])).unwrap();
        let fd = eventfd();
        device.set_irqs(intx, 0, IrqAction::Wire(&[Some(fd.as_fd())])).unwrap();
        device.set_irqs(intx, 0, IrqAction::Trigger(1)).unwrap();
        assert_eq!(signals(&fd), 1, "{what}");
        // It masks itself as it fires.
        device.set_irqs(intx, 0, IrqAction::Trigger(1)).unwrap();
        assert_eq!(signals(&fd), 0, "{what}: masked");
        device.set_irqs(intx, 0, IrqAction::Unmask(1)).unwrap();
        signals(&fd);
        device.set_irqs(intx, 0, IrqAction::Unmask(1)).unwrap();
        device.set_irqs(intx, 0, IrqAction::Mask(1)).unwrap();
        device.set_irqs(intx, 0, IrqAction::Trigger(1)).unwrap();
        assert_eq!(signals(&fd), 0, "{what}: masked");
        device.set_irqs(intx, 0, IrqAction::Unmask(1)).unwrap();
        let error = device.set_irqs(intx, 1, IrqAction::Mask(1)).unwrap_err();
        assert_eq!(refusal(what, &error), Errno::EINVAL, "{what}");
        device.set_irqs(intx, 0, IrqAction::Disable).unwrap();
        device.set_irqs(intx, 0, IrqAction::Disable).unwrap();

        let (index, vectors) = if *is_ours { (pci_index::IRQ_MSIX, 4) } else { (pci_index::IRQ_MSI, 1) };
        assert_eq!(device.irq(index).unwrap().count, vectors, "{what}");
        let fds: Vec<OwnedFd> = (0..vectors).map(|_| eventfd()).collect();
        let wires: Vec<_> = fds.iter().map(|fd| Some(fd.as_fd())).collect();
        device.set_irqs(index, 0, IrqAction::Wire(&wires)).unwrap();
        device.set_irqs(index, 0, IrqAction::Trigger(vectors)).unwrap();
        assert!(fds.iter().all(|fd| signals(fd) == 1), "{what}");
        if *is_ours {
            device.set_irqs(index, 1, IrqAction::Wire(&[None, Some(fds[0].as_fd())])).unwrap();
            device.set_irqs(index, 1, IrqAction::Trigger(2)).unwrap();
            assert_eq!(fds.iter().map(signals).collect::<Vec<_>>(), [1, 0, 0, 0], "{what}");
            // Vector 2 of index 2, raised by the device itself.
            device.region_write(pci_index::BAR0, 0x58, &(2 | 2u64 << 32).to_le_bytes()).unwrap();
            assert_eq!(signals(&fds[0]), 1, "{what}");
        }
        device.set_irqs(index, 0, IrqAction::Disable).unwrap();
        for (index, start) in [(index, vectors), (pci_index::NUM_IRQS, 0), (u32::MAX, 0)] {
            let fd = [Some(fds[0].as_fd())];
            let error = device.set_irqs(index, start, IrqAction::Wire(&fd)).unwrap_err();
            assert_eq!(refusal(what, &error), Errno::EINVAL, "{what}: index {index} from {start}");
        }
        assert_eq!(refusal(what, &device.irq(pci_index::NUM_IRQS).unwrap_err()), Errno::EINVAL, "{what}");
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn memory_that_is_mapped_is_reached_and_when_unmapped_no_more() {
    for subject in all() {
        let Subject { what, device, is_ours, .. } = &subject;
        let memory = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        memory.set_len(1 << 16).unwrap();
        let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
        let file = DmaMemory::File { fd: memory.as_fd(), offset: 0 };
        let map = DmaMap { iova: 0x10_0000, size: 1 << 16, flags, memory: file };
        device.dma_map(&map).unwrap();
        let again = device.dma_map(&map).unwrap_err();
        assert_eq!(again.errno(), Some(Errno::EEXIST), "{what}: {again}");
        let dma = || {
            let write =
                |at, value: u64| device.region_write(pci_index::BAR0, at, &value.to_le_bytes()).unwrap();
            write(0x60, 0x10_1000);
            write(0x68, 4096);
            write(0x70, 7);
            write(0x78, 1);
            let mut status = [0; 8];
            device.region_read(pci_index::BAR0, 0x80, &mut status).unwrap();
            i64::from_le_bytes(status)
        };
        if *is_ours {
            assert_eq!(dma(), 0, "{what}");
            let mut page = [0; 4096];
            memory.read_exact_at(&mut page, 0x1000).unwrap();
            assert!(page.iter().any(|&byte| byte != 0), "{what}: the device wrote nothing");
        }
        device.dma_unmap(0x10_0000, 1 << 16, None).unwrap();
        if *is_ours {
            assert_ne!(dma(), 0, "{what}: it still reaches what was unmapped");
        }
        let gone = device.dma_unmap(0x10_0000, 1 << 16, None).unwrap_err();
        assert_eq!(gone.errno(), Some(Errno::ENOENT), "{what}: {gone}");
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
fn a_device_taken_over_from_its_owner_stays_his() {
    for kind in kinds() {
        for door in DOORS {
            let subject = subject(&kind, door);
            let Subject { what, device, .. } = &subject;
            let taken = KernelDevice::from_fd("taken", device.as_fd(), None).unwrap();
            assert_eq!((taken.name(), taken.door()), ("taken", None), "{what}");
            assert_eq!(taken.info().unwrap(), device.info().unwrap(), "{what}");
            let memory = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
            rustix::fs::ftruncate(&memory, 4096).unwrap();
            let file = DmaMemory::File { fd: memory.as_fd(), offset: 0 };
            let map = DmaMap { iova: 0x1000, size: 4096, flags: DmaMapFlags::READ, memory: file };
            let error = taken.dma_map(&map).unwrap_err();
            assert!(
                matches!(error, Error::Usage { .. }) && error.to_string().contains("from_fd"),
                "{what}: {error}"
            );
            if !subject.flags.is_empty() {
                let mut stream = taken.set_state(State::StopCopy).unwrap().unwrap();
                assert!(matches!(stream.read(&mut [0; 8]).unwrap(), Chunk::Data(8)), "{what}");
                assert_eq!(device.state().unwrap(), State::StopCopy, "{what}");
                drop(taken);
                assert!(matches!(stream.read(&mut [0; 8]).unwrap(), Chunk::Data(8)), "{what}: still his");
                device.set_state(State::Running).unwrap();
            } else {
                drop(taken);
            }
            device.info().unwrap();
            // With the address space that it is attached to.
            let space = device.address_space().cloned();
            let taken = KernelDevice::from_fd("taken", device.as_fd(), space).unwrap();
            assert_eq!(taken.door(), Some(door), "{what}");
            taken.dma_map(&map).unwrap();
            device.dma_unmap(0x1000, 4096, None).unwrap();
        }
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_file_that_is_no_device_or_not_bound_yet_is_refused() {
    let file = File::open("/dev/null").unwrap();
    let error = KernelDevice::from_fd("null", file.as_fd(), None).unwrap_err();
    assert!(error.is_refused(Errno::ENOTTY) && error.to_string().contains("VFIO device"), "{error}");
    for kind in kinds() {
        let mdev = kind.create();
        let cdev = OpenOptions::new().read(true).write(true).open(mdev.cdev()).unwrap();
        let error = KernelDevice::from_fd("cdev", cdev.as_fd(), None).unwrap_err();
        assert!(
            error.is_refused(Errno::EINVAL) && error.to_string().contains("iommufd"),
            "{kind:?}: {error}"
        );
    }
}
