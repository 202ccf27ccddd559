//! Memory in address spaces, through both doors.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use limosa_client::{Device, DeviceLog, DirtyBits, DirtySource, DmaMap, DmaMemory, DmaTarget, Error};
use limosa_lab::Mdev;
use limosa_lab::module::{self, Dma, ModuleDevice};
use limosa_protocol::Errno;
use limosa_protocol::feature::DmaLoggingRange;
use limosa_protocol::info::DmaMapFlags;
use limosa_vfio_kernel::{AddressSpace, Door, KernelDevice, Options};

use crate::host_memory::HostMemory;
use crate::mock_iommu::{APERTURE, MockDevice};
use crate::page_tables::attach;
use crate::{PAGE, file, memfd, report, set};

const BASE: u64 = 0x10_0000;
const DOORS: [Door; 2] = [Door::Cdev, Door::Group];

fn in_space(module: &ModuleDevice, space: &AddressSpace) -> KernelDevice {
    let options = Options { space: Some(space.clone()), ..Options::default() };
    KernelDevice::open(module.uuid(), &options).unwrap()
}

fn device(path: impl AsRef<Path>) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn memory_is_mapped_before_and_after_devices_come_and_unmapped_in_its_pieces() {
    for door in DOORS {
        let mtty = Mdev::create("mtty", "mtty-1");
        let space = AddressSpace::new(door).unwrap();
        let guest = memfd(1 << 20);
        space.map("dev", &file(&guest, 0x10_0000, 0x10000)).unwrap();
        let again = space.map("dev", &file(&guest, 0x10_f000, 0x1000)).unwrap_err();
        assert_eq!(again.errno(), Some(Errno::EEXIST), "{again}");
        let opened = match door {
            Door::Cdev => {
                let cdev = device(mtty.cdev());
                space.attach_cdev("dev", cdev.as_fd()).unwrap();
                cdev
            }
            Door::Group => {
                let group = device(format!("/dev/vfio/{}", mtty.group()));
                space.attach_group("dev", group.as_fd()).unwrap();
                group
            }
        };
        let again = space.map("dev", &file(&guest, 0x10_f000, 0x1000)).unwrap_err();
        assert_eq!(again.errno(), Some(Errno::EEXIST), "{again}");
        space.map("dev", &file(&guest, 0x20_0000, 0x10000)).unwrap();
        let odd = space.map("dev", &file(&guest, 0x30_0000, 0x1001)).unwrap_err();
        assert_eq!(odd.errno(), Some(Errno::EINVAL), "{odd}");
        let part = space.unmap("dev", 0x10_0000, 0x1000, None).unwrap_err();
        assert_eq!(part.errno(), Some(Errno::EINVAL), "{part}");
        space.unmap("dev", 0x10_0000, 0x10000, None).unwrap();
        let gone = space.unmap("dev", 0x10_0000, 0x10000, None).unwrap_err();
        assert_eq!(gone.errno(), Some(Errno::ENOENT), "{gone}");
        assert_eq!(space.iova_ranges().unwrap().alignment, 4096);
        drop(opened);
        space.unmap("dev", 0x20_0000, 0x10000, None).unwrap();
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn every_device_of_a_space_reaches_its_memory_whenever_it_came() {
    for door in DOORS {
        let modules = ["limosa-full", "limosa-plain"].map(ModuleDevice::create);
        let space = AddressSpace::new(door).unwrap();
        let guest = memfd(64 * PAGE);
        space.map("early", &file(&guest, BASE, 16 * PAGE)).unwrap();
        let devices = modules.each_ref().map(|module| in_space(module, &space));
        space.map("late", &file(&guest, BASE + 16 * PAGE, 16 * PAGE)).unwrap();
        for device in &devices {
            module::dma(device, Dma::Write, BASE + 15 * PAGE, 2 * PAGE, 1).unwrap();
            let beyond = module::dma(device, Dma::Write, BASE + 32 * PAGE, 8, 1);
            assert!(beyond.is_err(), "{door}: nothing is mapped there");
        }
        drop(devices);
        // A space outlives its devices.
        let device = in_space(&modules[1], &space);
        module::dma(&device, Dma::Write, BASE, 32 * PAGE, 1).unwrap();
        space.unmap("early", BASE, 16 * PAGE, None).unwrap();
        assert!(module::dma(&device, Dma::Write, BASE, 8, 1).is_err(), "{door}: unmapped");
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn memory_of_every_kind_is_what_the_device_finds() {
    // A file that the kernel cannot pin as such: this program.
    let program = File::open(std::env::current_exe().unwrap()).unwrap();
    for door in DOORS {
        let module = ModuleDevice::create("limosa-plain");
        let device = module.open(door);
        let shared = memfd(4 * PAGE);
        device
            .dma_map(&DmaMap {
                memory: DmaMemory::File { fd: shared.as_fd(), offset: PAGE },
                ..file(&shared, BASE, 2 * PAGE)
            })
            .unwrap();
        module::dma(&device, Dma::Write, BASE, 2 * PAGE, 7).unwrap();
        let mut found = vec![0; 4 * PAGE as usize];
        shared.read_exact_at(&mut found, 0).unwrap();
        assert!(
            found[PAGE as usize..3 * PAGE as usize] == module::pattern(7, BASE, 2 * PAGE),
            "{door}: a memfd"
        );
        assert!(found[..PAGE as usize].iter().chain(&found[3 * PAGE as usize..]).all(|byte| *byte == 0));

        let host = HostMemory::new(2 * PAGE as usize);
        let memory = DmaMemory::Address(host.address());
        let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
        let iova = BASE + 16 * PAGE;
        device.dma_map(&DmaMap { iova, size: 2 * PAGE, flags, memory }).unwrap();
        module::dma(&device, Dma::Write, iova, 2 * PAGE, 8).unwrap();
        assert!(host.read() == module::pattern(8, iova, 2 * PAGE), "{door}: an address");

        let memory = DmaMemory::File { fd: program.as_fd(), offset: PAGE };
        let iova = BASE + 32 * PAGE;
        device.dma_map(&DmaMap { iova, size: PAGE, flags: DmaMapFlags::READ, memory }).unwrap();
        module::dma(&device, Dma::Read, iova, PAGE, 0).unwrap();
        let mut found = vec![0; PAGE as usize];
        program.read_exact_at(&mut found, PAGE).unwrap();
        assert_eq!(
            module::read(&device, module::Register::DmaCheck),
            module::sum(&found),
            "{door}: a program"
        );
        assert!(module::dma(&device, Dma::Write, iova, 8, 1).is_err(), "{door}: not to be written");
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn what_cannot_be_mapped_is_refused_with_a_reason() {
    struct Nothing;
    impl DmaTarget for Nothing {
        fn read(&self, _: u64, _: &mut [u8]) -> std::io::Result<()> {
            unreachable!()
        }
        fn write(&self, _: u64, _: &[u8]) -> std::io::Result<()> {
            unreachable!()
        }
    }
    let messages = Arc::new(Nothing) as Arc<dyn DmaTarget>;
    for door in DOORS {
        let module = ModuleDevice::create("limosa-plain");
        let device = module.open(door);
        let guest = memfd(4 * PAGE);
        let refused = |map: DmaMap<'_>, what: &str| {
            let error = device.dma_map(&map).unwrap_err();
            assert!(error.to_string().contains(what), "{door}: {error}");
        };
        refused(
            DmaMap { memory: DmaMemory::Messages(&messages), ..file(&guest, BASE, PAGE) },
            "give it a file",
        );
        refused(DmaMap { flags: DmaMapFlags::empty(), ..file(&guest, BASE, PAGE) }, "READ, WRITE or both");
        refused(file(&guest, BASE, 0), "0x0 bytes");
        refused(file(&guest, u64::MAX - PAGE + 1, 2 * PAGE), "0x2000 bytes at 0xfffffffffffff000");
        refused(file(&guest, BASE + 8, PAGE), "multiples of 0x1000");
        device.dma_map(&file(&guest, BASE, PAGE)).unwrap();
        refused(file(&guest, BASE, PAGE), "memory is mapped there already");
        let other = match door {
            Door::Cdev => Door::Group,
            Door::Group => Door::Cdev,
        };
        let space = AddressSpace::new(other).unwrap();
        let options = Options { door: Some(door), space: Some(space) };
        drop(device);
        let error = KernelDevice::open(module.uuid(), &options).unwrap_err();
        assert!(matches!(error, Error::Usage { .. }), "{error}");
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_space_that_is_dropped_takes_away_what_it_mapped_and_nothing_else() {
    let vmm = AddressSpace::new(Door::Cdev).unwrap();
    let module = ModuleDevice::create("limosa-plain");
    let device = in_space(&module, &vmm);
    let guest = memfd(64 * PAGE);
    vmm.map("vmm", &file(&guest, BASE, 16 * PAGE)).unwrap();
    let (iommufd, ioas) = vmm.ioas().unwrap();
    let space = AddressSpace::from_iommufd(iommufd, ioas).unwrap();
    space.map("dev", &file(&guest, BASE + 16 * PAGE, 16 * PAGE)).unwrap();
    module::dma(&device, Dma::Write, BASE, 32 * PAGE, 1).unwrap();
    drop(space);
    module::dma(&device, Dma::Write, BASE, 16 * PAGE, 1).unwrap();
    assert!(module::dma(&device, Dma::Write, BASE + 16 * PAGE, 8, 1).is_err(), "its own");
    assert_eq!(vmm.iova_ranges().unwrap().alignment, PAGE, "still there");
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn an_unmap_asks_whoever_knows_what_was_written() {
    let unmap = |device: &KernelDevice| {
        let mut words = [0];
        let done = device.dma_unmap(BASE, 16 * PAGE, Some(DirtyBits { page_size: PAGE, words: &mut words }));
        done.map(|()| set(&words))
    };
    for door in DOORS {
        let guest = memfd(64 * PAGE);
        let module = ModuleDevice::create("limosa-full");
        let device = module.open(door);
        device.dma_map(&file(&guest, BASE, 16 * PAGE)).unwrap();
        let range = DmaLoggingRange { iova: BASE, length: 64 * PAGE };
        let log = DeviceLog::new(&device);
        log.start(PAGE, &[range]).unwrap();
        module::dma(&device, Dma::Write, BASE + 3 * PAGE, 8, 1).unwrap();
        assert_eq!(unmap(&device).unwrap(), [3], "{door}: its own log");
        assert!(report(&log, BASE, 64).is_empty(), "told once");
        device.dma_map(&file(&guest, BASE, 16 * PAGE)).unwrap();
        log.stop().unwrap();
        assert_eq!(
            unmap(&device).unwrap(),
            (0..16).collect::<Vec<_>>(),
            "{door}: a log that is off knows nothing"
        );

        let module = ModuleDevice::create("limosa-plain");
        let device = module.open(door);
        device.dma_map(&file(&guest, BASE, 16 * PAGE)).unwrap();
        let error = unmap(&device).unwrap_err();
        assert!(matches!(error, Error::Usage { .. }), "{door}: nobody logs: {error}");
        module::dma(&device, Dma::Write, BASE, 8, 1).unwrap();
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn unmapping_nothing_was_refused_while_the_log_was_off_and_ok_while_it_was_on() {
    let (vmm, container) = (AddressSpace::new(Door::Cdev).unwrap(), device("/dev/vfio/vfio"));
    let (iommufd, ioas) = vmm.ioas().unwrap();
    let mock = MockDevice::new(iommufd, ioas, true);
    let page_table = attach(&vmm, "mock", &mock);
    let modules = ["limosa-plain", "limosa-plain"].map(ModuleDevice::create);
    let spaces = [
        AddressSpace::from_page_tables(iommufd, ioas, &[page_table]).unwrap(),
        AddressSpace::from_container(container.as_fd()).unwrap(),
        AddressSpace::new(Door::Group).unwrap(),
        vmm.clone(),
    ];
    let _devices = [in_space(&modules[0], &spaces[1]), in_space(&modules[1], &spaces[2])];
    let guest = memfd(16 * PAGE);
    for (at, space) in spaces.iter().enumerate() {
        let map = || space.map("dev", &file(&guest, APERTURE, 16 * PAGE)).unwrap();
        let refused = |iova, with_bits: bool| {
            let bits = DirtyBits { page_size: PAGE, words: &mut [0] };
            let error = space.unmap("dev", iova, 16 * PAGE, with_bits.then_some(bits)).unwrap_err();
            assert_eq!(error.errno(), Some(Errno::ENOENT), "space {at}: {error}");
        };
        map();
        refused(2 * APERTURE, false);
        let log = space.dirty_log();
        log.start(PAGE, &[]).unwrap();
        for _ in 0..2 {
            refused(2 * APERTURE, false);
            refused(2 * APERTURE, true);
        }
        space.unmap("dev", APERTURE, 16 * PAGE, None).unwrap();
        refused(APERTURE, true);
        log.stop().unwrap();
        refused(APERTURE, false);
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn what_a_vmm_hands_over_is_looked_at_first() {
    let (container, null) = (device("/dev/vfio/vfio"), device("/dev/null"));
    let vmm = AddressSpace::new(Door::Cdev).unwrap();
    let (iommufd, ioas) = vmm.ioas().unwrap();
    let refused = |space: limosa_client::Result<AddressSpace>| space.unwrap_err().errno().unwrap();
    assert_eq!(refused(AddressSpace::from_iommufd(iommufd, ioas + 1)), Errno::ENOENT);
    assert_eq!(refused(AddressSpace::from_iommufd(null.as_fd(), ioas)), Errno::ENOTTY);
    assert_eq!(refused(AddressSpace::from_container(null.as_fd())), Errno::ENOTTY);
    AddressSpace::from_container(container.as_fd()).unwrap();
    let space = AddressSpace::from_page_tables(iommufd, ioas, &[ioas + 1]).unwrap();
    let error = space.dirty_log().start(PAGE, &[]).unwrap_err();
    assert_eq!(error.errno(), Some(Errno::ENOENT), "{error}");
}
