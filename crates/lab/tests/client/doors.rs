//! The doors to a device: its names, who has it open, fds that somebody else holds, a device that is gone.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;

use limosa_client::{Chunk, Device, DeviceExt, DmaMap, DmaMemory, Error, IrqAction};
use limosa_lab::{Mdev, kinds};
use limosa_protocol::info::DmaMapFlags;
use limosa_protocol::{Errno, State, pci_index};
use limosa_testing::{Process, this_test};
use limosa_vfio_kernel::{AddressSpace, Door, KernelDevice, Options};
use rustix::event::EventfdFlags;

use crate::{DOORS, Subject, of_type, open, refusal, subject};

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
fn a_device_taken_over_from_its_owner_stays_his() {
    for kind in kinds() {
        for door in DOORS {
            let subject = subject(&kind, door);
            let Subject { what, device, .. } = &subject;
            let taken = KernelDevice::from_fd("taken", device.as_fd(), None).unwrap();
            assert_eq!((taken.name(), taken.door()), ("taken", None), "{what}");
            assert_eq!(taken.info().unwrap(), device.info().unwrap(), "{what}");
            let memory = limosa_testing::memfd(4096);
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

/// Runs one of these tests again in a process of its own, which finds `value` in this variable.
fn again(test: &str, value: &str, uid: u32) {
    let ended = Process::start(this_test(test).env(AGAIN, value).uid(uid).gid(uid)).end();
    assert!(ended.code == 0 && ended.out.contains("1 passed"), "{value}: {ended:?}");
}

const AGAIN: &str = "LIMOSA_LAB_AGAIN";

/// How many fds this process has.
fn fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn no_fd_is_left_behind_whatever_fails() {
    // In a process of its own, where nobody else opens anything.
    if std::env::var_os(AGAIN).is_none() {
        return again("doors::no_fd_is_left_behind_whatever_fails", "alone", 0);
    }
    for kind in kinds() {
        let mdev = kind.create();
        let before = fds();
        for door in DOORS {
            for _ in 0..3 {
                let device = open(&mdev, door).unwrap();
                let taken = KernelDevice::from_fd("taken", device.as_fd(), None).unwrap();
                open(&mdev, Door::Cdev).unwrap_err();
                open(&mdev, Door::Group).unwrap_err();
                device.region(2).unwrap();
                device.region(99).unwrap_err();
                if !device.migration_flags().unwrap().is_empty() {
                    let open = fds();
                    let stream = device.set_state(State::StopCopy).unwrap();
                    assert_eq!(fds(), open + 1, "{kind:?}: one session, one fd");
                    device.set_state(State::PreCopy).err().unwrap();
                    device.set_state(State::StopCopy).unwrap();
                    taken.set_state(State::Stop).unwrap();
                    drop(stream);
                    assert_eq!(fds(), open, "{kind:?}: none without");
                    // Nobody takes the stream.
                    device.set_state(State::Resuming).unwrap();
                    assert_eq!(fds(), open, "{kind:?}: none that nobody wants");
                    device.reset().unwrap();
                }
            }
        }
        assert_eq!(fds(), before, "{kind:?}");
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn another_user_is_told_how_to_get_a_device_and_enters_by_the_door_that_is_his() {
    const NOBODY: u32 = 65534;
    if let Ok(asked) = std::env::var(AGAIN) {
        let (uuid, expected) = asked.split_once(' ').unwrap();
        match KernelDevice::open(uuid, &Options::default()) {
            Ok(device) => assert_eq!(device.door().unwrap().to_string(), expected),
            Err(error) => {
                assert_eq!(expected, "none", "{error}");
                assert_eq!(error.errno(), Some(Errno::EACCES), "{error}");
                assert!(error.to_string().contains("chown USER /dev/vfio/devices/vfio"), "{error}");
            }
        }
        return;
    }
    for kind in kinds() {
        let mdev = kind.create();
        let try_it = |expected: &str| {
            let test = "doors::another_user_is_told_how_to_get_a_device_and_enters_by_the_door_that_is_his";
            again(test, &format!("{} {expected}", mdev.uuid()), NOBODY);
        };
        let give = |node: &Path| std::os::unix::fs::chown(node, Some(NOBODY), None).unwrap();
        try_it("none");
        give(Path::new(&format!("/dev/vfio/{}", mdev.group())));
        try_it("group");
        give(&mdev.cdev());
        // Without the iommufd, the cdev is of no use.
        try_it("group");
        let iommu = Path::new("/dev/iommu");
        give(iommu);
        try_it("cdev");
        std::os::unix::fs::chown(iommu, Some(0), None).unwrap();
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_device_that_is_asked_for_tells_its_user_and_serves_him_until_he_lets_go() {
    for subject in of_type("limosa-full") {
        let Subject { what, device, mdev, .. } = subject;
        // It blocks, as there is something to wait for.
        let asked = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        device.set_irqs(pci_index::IRQ_REQ, 0, IrqAction::Wire(&[Some(asked.as_fd())])).unwrap();
        let mut stream = device.set_state(State::StopCopy).unwrap().unwrap();
        let removed = mdev.unplug();
        rustix::io::read(&asked, &mut [0; 8]).unwrap();
        assert!(matches!(stream.read(&mut [0; 64]).unwrap(), Chunk::Data(64)), "{what}");
        assert_eq!(device.state().unwrap(), State::StopCopy, "{what}");
        assert!(removed.try_recv().is_err(), "{what}: removed from under its user");
        // Nobody else finds it any more.
        let error = open(&mdev, device.door().unwrap()).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::ENOENT), "{what}: {error}");
        drop(device);
        removed.recv().unwrap().unwrap();
        assert_eq!(refusal(&what, &stream.read(&mut [0]).unwrap_err()), Errno::ENODEV, "{what}");
    }
}
