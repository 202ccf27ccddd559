//! The lab's own module fails, breaks, stalls and disappears when its tester wishes it to, and is as good as
//! new afterwards, whichever process used it and however that ended.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use limosa_client::{Chunk, Device, DeviceExt, IrqAction};
use limosa_lab::module::{self, Dma, Guest, IRQ_ERR, IRQ_REQ, ModuleDevice, Register};
use limosa_protocol::feature::DmaLoggingRange;
use limosa_protocol::{Errno, MigrationFlags, State, fsm};
use limosa_testing::{Process, this_test};
use limosa_vfio_kernel::KernelDevice;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

/// For a test that runs itself a second time: the UUID of the device that this child is to use.
const CHILD: &str = "LIMOSA_LAB_CHILD";

/// This test once more, in a process of its own that can be killed.
fn child(test: &str, module: &ModuleDevice) -> Process {
    Process::start(this_test(test).env(CHILD, module.uuid()))
}

/// An interrupt's eventfd, wired to the first vector of an index.
fn wired(device: &KernelDevice, index: u32) -> std::os::fd::OwnedFd {
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    device.set_irqs(index, 0, IrqAction::Wire(&[Some(event.as_fd())])).unwrap();
    event
}

/// Waits for an interrupt, and takes it.
fn comes(event: &impl AsFd) {
    let mut fds = [PollFd::new(event, PollFlags::IN)];
    let limit = rustix::event::Timespec { tv_sec: 20, tv_nsec: 0 };
    assert_eq!(poll(&mut fds, Some(&limit)).unwrap(), 1, "no interrupt");
    rustix::io::read(event, &mut [0; 8]).unwrap();
}

fn in_use() -> (ModuleDevice, KernelDevice) {
    let module = ModuleDevice::create("limosa-full");
    let device = module.open(None);
    (module, device)
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn an_arc_that_fails_leaves_the_state_before_it_and_can_be_tried_again() {
    let (module, device) = in_use();
    let flags = device.migration_flags().unwrap();
    let pairs = State::ALL.into_iter().flat_map(|from| State::ALL.map(|to| (from, to)));
    for (from, to) in pairs.filter(|(from, _)| *from != State::Resuming) {
        let Ok(path) = fsm::path(flags, from, to) else { continue };
        for arc in path.arcs() {
            device.reset().unwrap();
            let _session = device.set_state(from).unwrap();
            module.wish("fail", format!("{}>{}:5:1", arc.from, arc.to));
            let failed = device.set_state(to).err().unwrap();
            assert!(failed.is_refused(Errno::EIO), "{from} to {to}: {failed}");
            assert_eq!(device.state().unwrap(), arc.from, "{from} to {to}");
            let opened = device.set_state(to).unwrap();
            assert_eq!(device.state().unwrap(), to, "{from} to {to}");
            let rest = fsm::path(flags, arc.from, to).unwrap();
            assert_eq!(opened.is_some(), rest.opens_session(), "{from} to {to}");
        }
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_device_that_breaks_is_in_error_until_it_is_reset() {
    let (module, device) = in_use();
    let event = wired(&device, IRQ_ERR);
    for spontaneous in [false, true] {
        let mut stream = device.set_state(State::PreCopy).unwrap().unwrap();
        if spontaneous {
            module.wish("state", "ERROR");
        } else {
            module.wish("error", "PRE_COPY>PRE_COPY_P2P:110:1");
            let failed = device.set_state(State::StopCopy).err().unwrap();
            assert!(failed.is_refused(Errno::ETIMEDOUT), "{failed}");
        }
        comes(&event);
        assert_eq!(device.state().unwrap(), State::Error);
        assert!(stream.read(&mut [0; 8]).unwrap_err().is_refused(Errno::ENODEV));
        for state in State::ALL {
            let refused = device.set_state(state).err();
            assert!(state == State::Error || refused.unwrap().is_refused(Errno::EINVAL), "{state}");
        }
        device.reset().unwrap();
        assert_eq!(device.state().unwrap(), State::Running);
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn every_call_can_be_made_to_fail_once() {
    let (module, device) = in_use();
    let mut words = [0; 1];
    let fails = |point: &str, call: &mut dyn FnMut() -> limosa_client::Result<()>| {
        module.wish("fail", format!("{point}:61:1"));
        let failed = call().unwrap_err();
        assert!(failed.is_refused(Errno::from_raw(61)), "{point}: {failed}");
        assert_eq!(module.told("fail"), "none", "{point}");
        call().unwrap_or_else(|error| panic!("{point}: {error}"));
    };
    fails("get", &mut || device.state().map(drop));
    fails("size", &mut || device.mig_data_size().map(drop));
    fails("reset", &mut || device.reset());
    let range = [DmaLoggingRange { iova: 0, length: 4096 }];
    fails("start", &mut || device.dma_logging_start(4096, &range).map(drop));
    fails("report", &mut || device.dma_logging_report(0, 4096, 4096, &mut words));
    fails("stop", &mut || device.dma_logging_stop());
    let mut stream = device.set_state(State::PreCopy).unwrap().unwrap();
    let mut data = [0; 1000];
    fails("info", &mut || stream.precopy_info().map(drop));
    fails("read", &mut || stream.read(&mut data).map(drop));
    // A read ends where the rule begins.
    module.wish("fail", "read@1100:61:1");
    assert_eq!(stream.read(&mut data).unwrap(), Chunk::Data(100));
    assert!(stream.read(&mut data).unwrap_err().is_refused(Errno::from_raw(61)));
    assert_eq!(stream.read(&mut data).unwrap(), Chunk::Data(1000));
    let mut stream = device.set_state(State::Resuming).unwrap().unwrap();
    module.wish("fail", "write@10:61:1");
    assert!(stream.write(&[0; 64]).unwrap_err().is_refused(Errno::from_raw(61)));
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn an_arc_is_held_until_it_is_let_go_or_the_device_is_reset() {
    let (module, device) = in_use();
    let device = &device;
    for reset in [false, true] {
        module.wish("hold", "RUNNING_P2P>STOP");
        thread::scope(|scope| {
            let arc = scope.spawn(|| device.set_state(State::Stop).map(drop));
            assert_eq!(module.told("await"), "RUNNING_P2P>STOP");
            // Another thread sees how far it has come.
            assert_eq!(device.state().unwrap(), State::RunningP2p);
            if reset {
                device.reset().unwrap();
                assert!(arc.join().unwrap().unwrap_err().is_refused(Errno::ECANCELED));
                assert_eq!(device.state().unwrap(), State::Running);
            } else {
                module.wish("hold", "none");
                arc.join().unwrap().unwrap();
                assert_eq!(device.state().unwrap(), State::Stop);
                device.set_state(State::Running).unwrap();
            }
        });
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_stream_is_held_after_exactly_so_many_bytes_and_then_goes_on() {
    let (module, device) = in_use();
    let mut stream = device.set_state(State::StopCopy).unwrap().unwrap();
    module.wish("hold", "read@5000");
    let mut data = vec![0; 1 << 20];
    assert_eq!(stream.read(&mut data).unwrap(), Chunk::Data(5000));
    let reader = thread::spawn(move || {
        let chunk = stream.read(&mut data).unwrap();
        (stream, data, chunk)
    });
    assert_eq!(module.told("await"), "read@5000");
    assert_eq!(module.told("held"), "read@5000");
    module.wish("hold", "none");
    let (mut stream, mut data, chunk) = reader.join().unwrap();
    assert!(matches!(chunk, Chunk::Data(bytes) if bytes > 5000), "{chunk:?}");
    while stream.read(&mut data).unwrap() != Chunk::End {}

    module.wish("hold", "write@10");
    let mut stream = device.set_state(State::Resuming).unwrap().unwrap();
    let writer = thread::spawn(move || stream.write(&[0; 200]).unwrap_err());
    assert_eq!(module.told("await"), "write@10");
    device.reset().unwrap();
    let refused = writer.join().unwrap();
    assert!(refused.is_refused(Errno::ENODEV), "{refused}");
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_device_that_is_gone_answers_nobody_and_lets_go_of_those_it_held() {
    let (module, device) = in_use();
    let guest = Guest::new(1 << 20);
    guest.map(&device, 0);
    let mut stream = device.set_state(State::PreCopy).unwrap().unwrap();
    module.wish("hold", "read");
    let reader = thread::spawn(move || {
        let refused = stream.read(&mut [0; 8]).unwrap_err();
        (stream, refused)
    });
    module.told("await");
    module.wish("gone", 1);
    let (mut stream, refused) = reader.join().unwrap();
    assert!(refused.is_refused(Errno::ENODEV), "{refused}");
    let range = [DmaLoggingRange { iova: 0, length: 4096 }];
    let answers = [
        stream.read(&mut [0; 8]).map(drop),
        stream.precopy_info().map(drop),
        device.state().map(drop),
        device.set_state(State::Running).map(drop),
        device.mig_data_size().map(drop),
        device.dma_logging_start(4096, &range).map(drop),
        device.reset(),
        device.info().map(drop),
        device.region(0).map(drop),
        device.irq(0).map(drop),
        device.region_read(0, 0, &mut [0; 8]),
        device.region_write(0, 0, &[0; 8]),
    ];
    for answer in answers {
        let refused = answer.unwrap_err();
        assert!(refused.is_refused(Errno::ENODEV) || refused.is_connection_lost(), "{refused}");
    }
    drop(device);
    module.wish("gone", 0);
    module.wish("hold", "none");
    assert_eq!(module.open(None).state().unwrap(), State::Running);
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_device_that_was_gone_in_resuming_lost_its_session_and_does_not_look_for_it() {
    let (module, device) = in_use();
    for state in [State::Resuming, State::PreCopy, State::StopCopy] {
        let mut stream = device.set_state(state).unwrap().unwrap();
        module.wish("gone", 1);
        module.wish("gone", 0);
        assert_eq!(device.state().unwrap(), State::Running, "{state}");
        assert!(stream.write(&[0; 64]).is_err(), "{state}");
        assert!(stream.read(&mut [0; 64]).is_err(), "{state}");
        assert!(device.set_state(state).unwrap().is_some(), "{state}");
        device.reset().unwrap();
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_slow_device_takes_its_time_for_each_arc_and_each_read() {
    let (module, device) = in_use();
    let delay = Duration::from_millis(30);
    module.wish("arc_delay_ms", delay.as_millis());
    let began = Instant::now();
    let mut stream = device.set_state(State::StopCopy).unwrap().unwrap();
    assert!(began.elapsed() >= 3 * delay, "three arcs in {:?}", began.elapsed());
    module.wish("arc_delay_ms", 0);
    module.wish("read_delay_ms", delay.as_millis());
    let began = Instant::now();
    stream.read(&mut [0; 8]).unwrap();
    assert!(began.elapsed() >= delay, "a read in {:?}", began.elapsed());
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn whoever_has_the_device_open_is_asked_for_it_when_it_is_pulled_out() {
    let (module, device) = in_use();
    let event = wired(&device, IRQ_REQ);
    let removed = module.unplug();
    comes(&event);
    assert!(removed.try_recv().is_err(), "removed while it is open");
    drop(device);
    removed.recv().unwrap().unwrap();
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_stream_that_outlives_its_device_says_that_it_is_gone() {
    let (module, device) = in_use();
    let mut stream = device.set_state(State::PreCopy).unwrap().unwrap();
    drop(device);
    assert!(stream.read(&mut [0; 8]).unwrap_err().is_refused(Errno::ENODEV));
    drop(module);
    assert!(stream.read(&mut [0; 8]).unwrap_err().is_refused(Errno::ENODEV));
    assert!(stream.precopy_info().unwrap_err().is_refused(Errno::ENODEV));
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_user_killed_at_any_moment_leaves_a_device_that_can_be_used() {
    const NAME: &str = "a_user_killed_at_any_moment_leaves_a_device_that_can_be_used";
    if let Ok(uuid) = env::var(CHILD) {
        let device = KernelDevice::open(&uuid, &limosa_vfio_kernel::Options::default()).unwrap();
        let guest = Guest::new(1 << 20);
        guest.map(&device, 0);
        device.dma_logging_start(4096, &[DmaLoggingRange { iova: 0, length: 1 << 20 }]).unwrap();
        module::dma(&device, Dma::WriteAndKeep, 0, 1 << 20, 1).unwrap();
        let mut stream = device.set_state(State::PreCopy).unwrap().unwrap();
        let mut data = vec![0; 1 << 20];
        while let Chunk::Data(_) = stream.read(&mut data).unwrap() {}
        device.set_state(State::StopCopy).unwrap();
        while let Chunk::Data(_) = stream.read(&mut data).unwrap() {}
        let mut stream = device.set_state(State::Resuming).unwrap().unwrap();
        let written = stream.write(&data);
        panic!("not killed, but {written:?}");
    }

    let module = ModuleDevice::with_state("limosa-full", 64 << 20, 4096);
    // On the way that the child takes.
    let points = [
        "start",
        "RUNNING>PRE_COPY",
        "read@0",
        "read@33000000",
        "PRE_COPY>PRE_COPY_P2P",
        "PRE_COPY_P2P>STOP_COPY",
        "STOP_COPY>STOP",
        "STOP>RESUMING",
        "write@0",
    ];
    for point in points {
        module.wish("hold", point);
        let child = child(NAME, &module);
        assert_eq!(module.told("await"), point);
        assert!(module.number("pinned") == 256 || point == "start", "{point}");
        child.kill();
        module.wish("hold", "none");
        assert_eq!((module.number("pinned"), module.number("opened")), (0, 0), "{point}");
        assert_eq!((module.number("logging"), module.told("held").as_str()), (0, "none"), "{point}");
        let device = module.open(None);
        assert_eq!(device.state().unwrap(), State::Running, "{point}");
        let flags = device.migration_flags().unwrap();
        assert!(flags.contains(MigrationFlags::PRE_COPY), "{point}");
        assert!(device.set_state(State::StopCopy).unwrap().is_some(), "{point}");
        assert_eq!(module::read(&device, Register::State), u64::from(State::StopCopy.raw()), "{point}");
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn wishes_that_make_no_sense_are_refused() {
    let (module, device) = in_use();
    let attribute = |name: &str| format!("/sys/bus/mdev/devices/{}/limosa/{name}", module.uuid());
    let refused = |name: &str, value: &str, errno: i32| {
        let error = fs::write(attribute(name), value).expect_err(value);
        assert_eq!(error.raw_os_error(), Some(errno), "{name}: `{value}`: {error}");
    };
    const EBUSY: i32 = 16;
    const EINVAL: i32 = 22;
    const EFBIG: i32 = 27;
    for value in ["RUNNING", "RUNNING>", "RUNNING>STOPP", "read@", "read@x", "info@5", "arc", "read:5"] {
        refused("hold", value, EINVAL);
    }
    for value in
        ["RUNNING>STOP", "RUNNING>STOP:", "RUNNING>STOP:0", "RUNNING>STOP:-5", "read:5:0", "read:5:1:1"]
    {
        refused("fail", value, EINVAL);
    }
    assert_eq!(module.told("hold"), "none");
    refused("state", "RUNNING", EINVAL);
    refused("state_bytes", "4096", EBUSY);
    refused("block_bytes", "64", EBUSY);
    refused("reinit", "1", EBUSY);
    device.set_state(State::Stop).unwrap();
    refused("dirty", "1", EBUSY);
    refused("seed", "1", EBUSY);
    drop(device);
    for value in ["0", "1", "12", "-8", "18446744073709551616", "x"] {
        assert!(fs::write(attribute("state_bytes"), value).is_err(), "{value}");
    }
    refused("state_bytes", "0xfffffffffffffff8", EFBIG);
    for value in ["0", "32", "65", "4097", "2097152"] {
        refused("block_bytes", value, EINVAL);
    }
    assert_eq!((module.number("state_bytes"), module.number("block_bytes")), (262_144, 4096));
}
