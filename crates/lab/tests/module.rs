//! The lab's own module keeps the migration protocol (`vfio.h: enum vfio_device_mig_state`) and does what its
//! tester wishes. Other suites rely on that.

use std::time::Instant;

use limosa_client::{Chunk, DataStream, Device, DeviceExt, Error};
use limosa_lab::module::{self, BAR2, ModuleDevice, Register, TYPES};
use limosa_protocol::{Errno, FeatureIndex, FeatureOp, MigrationFlags, State, fsm};
use limosa_vfio_kernel::KernelDevice;

/// Reads until there is nothing, for now or for ever.
fn read_all(stream: &mut dyn DataStream, at_once: usize) -> (Vec<u8>, Chunk) {
    let (mut all, mut data) = (Vec::new(), vec![0; at_once]);
    loop {
        match stream.read(&mut data).unwrap() {
            Chunk::Data(bytes) => all.extend_from_slice(&data[..bytes]),
            end => return (all, end),
        }
    }
}

/// The whole state, as a stopped device gives it.
fn saved(device: &KernelDevice) -> Vec<u8> {
    let mut stream = device.set_state(State::StopCopy).unwrap().unwrap();
    let (all, end) = read_all(&mut *stream, 1 << 20);
    assert_eq!(end, Chunk::End);
    device.set_state(State::Running).unwrap();
    all
}

/// Loads a stream and says how it went: the refusal by a write, and that of RESUMING to STOP.
fn load(device: &KernelDevice, stream: &[u8]) -> (Option<Errno>, Option<Errno>) {
    let mut session = device.set_state(State::Resuming).unwrap().unwrap();
    let errno = |error: Error| error.errno().expect("a refusal");
    let written = session.write(stream).err().map(errno);
    (written, device.set_state(State::Stop).err().map(errno))
}

/// A device that is not as after power-on.
fn used(device: &KernelDevice) {
    module::write(device, Register::Seed, 0x5eed);
    module::write(device, Register::Dirty, 3);
    module::write(device, Register::Scratch, 0xabc);
    device.region_write(BAR2, 2 * 4096 + 5, b"on a page that cannot be mapped").unwrap();
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn every_type_has_what_its_name_says() {
    let (stop_copy, p2p) = (MigrationFlags::STOP_COPY, MigrationFlags::P2P);
    let flags = [
        stop_copy | p2p | MigrationFlags::PRE_COPY,
        stop_copy | MigrationFlags::PRE_COPY,
        stop_copy | p2p,
        stop_copy,
        MigrationFlags::empty(),
    ];
    for (name, flags) in TYPES.into_iter().zip(flags) {
        let module = ModuleDevice::create(name);
        let device = module.open(None);
        assert_eq!(device.migration_flags().unwrap(), flags, "{name}");
        let logs = device.probe(FeatureIndex::DMA_LOGGING_START, FeatureOp::SET).unwrap();
        assert_eq!(logs, ["limosa-full", "limosa-p2p"].contains(&name), "{name}");
        if flags.is_empty() {
            assert!(device.state().unwrap_err().is_refused(Errno::ENOTTY));
            continue;
        }
        // Whatever the flags, the machine is the one of the standard.
        for (from, to) in State::ALL.into_iter().flat_map(|from| State::ALL.map(|to| (from, to))) {
            if !flags.has(from) || [from, to].contains(&State::Error) || from == State::Resuming {
                continue;
            }
            device.reset().unwrap();
            let session = device.set_state(from).unwrap();
            let opened = device.set_state(to);
            match fsm::path(flags, from, to) {
                Ok(path) => {
                    assert_eq!(opened.unwrap().is_some(), path.opens_session(), "{name}: {from} to {to}");
                    assert_eq!(device.state().unwrap(), to, "{name}: {from} to {to}");
                }
                Err(_) => {
                    assert!(opened.err().unwrap().is_refused(Errno::EINVAL), "{name}: {from} to {to}");
                    assert_eq!(device.state().unwrap(), from, "{name}: {from} to {to}");
                }
            }
            drop(session);
        }
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_state_of_any_size_moves_whole_between_any_two_types() {
    let sizes = [
        (8, 64),
        (64, 64),
        (72, 64),
        (4096, 4096),
        (262_144, 4096),
        (3 * 65536 + 8, 65536),
        (5 << 20, 1 << 20),
    ];
    for (at, (state_bytes, block_bytes)) in sizes.into_iter().enumerate() {
        let from = ModuleDevice::with_state(TYPES[at % 4], state_bytes, block_bytes);
        let to = ModuleDevice::with_state(TYPES[(at + 1) % 4], state_bytes, block_bytes);
        let (source, target) = (from.open(None), to.open(None));
        used(&source);
        let check = from.number("check");
        assert_ne!(to.number("check"), check);

        let estimate = source.mig_data_size().unwrap().unwrap();
        let stream = saved(&source);
        assert_eq!(stream.len() as u64, estimate, "{state_bytes} bytes");
        assert_eq!(load(&target, &stream), (None, None), "{state_bytes} bytes");
        assert_eq!(to.number("check"), check, "{state_bytes} bytes");
        target.set_state(State::Running).unwrap();
        assert_eq!(module::read(&target, Register::Scratch), 0xabc);
        let mut text = [0; 9];
        target.region_read(BAR2, 2 * 4096 + 5, &mut text).unwrap();
        assert_eq!(&text, b"on a page");
        assert_eq!(saved(&target), stream, "{state_bytes} bytes");
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn pre_copy_counts_down_to_nothing_and_counts_changes_exactly() {
    for name in ["limosa-full", "limosa-precopy"] {
        let (from, to) =
            (ModuleDevice::with_state(name, 65536, 1024), ModuleDevice::with_state(name, 65536, 1024));
        let (source, target) = (from.open(None), to.open(None));
        let mut stream = source.set_state(State::PreCopy).unwrap().unwrap();
        let whole = 64 + 64 * (40 + 1024);
        let info = stream.precopy_info().unwrap();
        assert_eq!((info.initial_bytes, info.dirty_bytes), (whole, 0));

        let mut data = vec![0; 1000];
        assert_eq!(stream.read(&mut data).unwrap(), Chunk::Data(1000));
        assert_eq!(stream.precopy_info().unwrap().initial_bytes, whole - 1000);
        // Not yet sent, so no change to what was sent.
        from.wish("dirty", 64);
        assert_eq!(stream.precopy_info().unwrap().dirty_bytes, 1064);
        let (rest, end) = read_all(&mut *stream, 777);
        assert_eq!(end, Chunk::NothingForNow);
        data.extend(rest);
        assert_eq!(data.len() as u64, whole + 1064);

        from.wish("dirty", 3);
        let info = stream.precopy_info().unwrap();
        assert_eq!((info.initial_bytes, info.dirty_bytes), (0, 3 * 1064));
        let estimate = source.mig_data_size().unwrap().unwrap();
        assert!(source.set_state(State::StopCopy).unwrap().is_none(), "a second stream for one session");
        assert!(stream.precopy_info().unwrap_err().is_refused(Errno::EINVAL));
        let (rest, end) = read_all(&mut *stream, 777);
        assert_eq!(end, Chunk::End);
        assert_eq!(rest.len() as u64, estimate);
        data.extend(rest);

        assert_eq!(load(&target, &data), (None, None));
        assert_eq!(to.number("check"), from.number("check"));
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn pre_copy_ends_if_the_device_changes_slower_than_it_is_sent_and_only_then() {
    let module = ModuleDevice::with_state("limosa-full", 1 << 20, 1024);
    let device = module.open(None);
    for (percent, ends) in [(50, true), (90, true), (100, false), (150, false)] {
        module.wish("dirty_percent", percent);
        let mut stream = device.set_state(State::PreCopy).unwrap().unwrap();
        let mut data = vec![0; 1 << 20];
        let mut left = 64 << 20;
        while left > 0 {
            match stream.read(&mut data).unwrap() {
                Chunk::Data(bytes) => left -= bytes.min(left),
                end => {
                    assert_eq!(end, Chunk::NothingForNow);
                    break;
                }
            }
        }
        assert_eq!(left > 0, ends, "{percent} %");
        device.set_state(State::Running).unwrap();
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_new_configuration_in_pre_copy_is_told_once_and_only_to_who_opted_in() {
    let module = ModuleDevice::with_state("limosa-full", 65536, 1024);
    let device = module.open(None);
    let mut stream = device.set_state(State::PreCopy).unwrap().unwrap();
    read_all(&mut *stream, 1 << 20);
    module.wish("reinit", 1);
    let info = stream.precopy_info().unwrap();
    assert_eq!((info.reinit(), info.initial_bytes, info.dirty_bytes), (false, 0, 64 * 1064));
    read_all(&mut *stream, 1 << 20);

    if !device.precopy_info_v2().unwrap() {
        // A kernel from before MIG_PRECOPY_INFOv2.
        return;
    }
    module.wish("dirty", 5);
    module.wish("reinit", 1);
    let info = stream.precopy_info().unwrap();
    assert_eq!((info.reinit(), info.initial_bytes, info.dirty_bytes), (true, 64 * 1064, 0));
    let info = stream.precopy_info().unwrap();
    assert_eq!((info.reinit(), info.initial_bytes, info.dirty_bytes), (false, 64 * 1064, 0));
    read_all(&mut *stream, 1 << 20);
    let info = stream.precopy_info().unwrap();
    assert_eq!((info.initial_bytes, info.dirty_bytes), (0, 0));
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn reads_and_writes_that_move_little_move_it_all() {
    let (from, to) = (ModuleDevice::create("limosa-plain"), ModuleDevice::create("limosa-plain"));
    let (source, target) = (from.open(None), to.open(None));
    used(&source);
    from.wish("read_bytes_max", 777);
    to.wish("write_bytes_max", 333);
    let mut stream = source.set_state(State::StopCopy).unwrap().unwrap();
    let mut data = vec![0; 4096];
    assert_eq!(stream.read(&mut data).unwrap(), Chunk::Data(777));
    data.truncate(777);
    data.extend(read_all(&mut *stream, 4096).0);
    assert_eq!(load(&target, &data), (None, None));
    assert_eq!(to.number("check"), from.number("check"));
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_stream_with_a_bit_flipped_anywhere_or_a_byte_missing_is_refused_and_nothing_of_it_applied() {
    let from = ModuleDevice::with_state("limosa-plain", 64, 64);
    let source = from.open(None);
    module::write(&source, Register::Seed, 9);
    module::write(&source, Register::Scratch, 10);
    let good = saved(&source);
    let to = ModuleDevice::with_state("limosa-plain", 64, 64);
    let target = to.open(None);
    let before = to.number("check");
    let refuses = |stream: &[u8], what: String| {
        let (_, left) = load(&target, stream);
        assert!(left.is_some(), "{what}");
        assert_eq!(target.state().unwrap(), State::Resuming, "{what}");
        assert_eq!(to.number("check"), before, "{what}");
        target.reset().unwrap();
        left.unwrap()
    };
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        refuses(&bad, format!("bit {} of byte {at} flipped", at % 8));
        assert_eq!(refuses(&good[..at], format!("only {at} bytes")), Errno::EINVAL);
        bad.remove(at);
        refuses(&bad, format!("byte {at} missing"));
    }
    let more = [&good[..], &[0]].concat();
    assert_eq!(refuses(&more, "a byte more".into()), Errno::EBADMSG);
    assert_eq!(load(&target, &good), (None, None));
    assert_eq!(to.number("check"), from.number("check"));
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn streams_of_other_devices_and_of_newer_ones_are_refused_by_the_first_write() {
    let (from, to) =
        (ModuleDevice::create("limosa-full"), ModuleDevice::with_state("limosa-full", 65536, 4096));
    let (source, target) = (from.open(None), to.open(None));
    let good = saved(&source);
    let mtty = limosa_lab::Mdev::create("mtty", "mtty-1");
    let serial = KernelDevice::open(mtty.uuid(), &limosa_vfio_kernel::Options::default()).unwrap();
    let foreign = [saved(&serial), vec![0; 4096]].concat();
    let mut newer = good.clone();
    newer[8] += 1;
    for (stream, device, what) in [
        (&foreign, &source, "the serial port's"),
        (&newer, &source, "a newer version's"),
        (&good, &target, "one of another size"),
    ] {
        device.reset().unwrap();
        let mut session = device.set_state(State::Resuming).unwrap().unwrap();
        let refused = session.write(&stream[..64]).unwrap_err();
        assert!(refused.is_refused(Errno::EINVAL), "{what}: {refused}");
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_gigabyte_moves_between_two_devices() {
    let bytes = 1 << 30;
    let (from, to) = (
        ModuleDevice::with_state("limosa-plain", bytes, 65536),
        ModuleDevice::with_state("limosa-plain", bytes, 65536),
    );
    let (source, target) = (from.open(None), to.open(None));
    used(&source);
    let mut read = source.set_state(State::StopCopy).unwrap().unwrap();
    let mut write = target.set_state(State::Resuming).unwrap().unwrap();
    let (mut data, mut moved, began) = (vec![0; 1 << 20], 0, Instant::now());
    while let Chunk::Data(bytes) = read.read(&mut data).unwrap() {
        write.write(&data[..bytes]).unwrap();
        moved += bytes as u64;
    }
    target.set_state(State::Running).unwrap();
    println!("{moved} bytes of state in {:?}", began.elapsed());
    assert!(moved > bytes);
    assert_eq!(to.number("check"), from.number("check"));
}
