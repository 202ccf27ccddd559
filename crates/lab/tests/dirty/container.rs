//! Dirty pages from containers (`vfio.h: VFIO_IOMMU_DIRTY_PAGES`): those that a mediated device pins, and those that
//! the kernel writes for it.

use std::fs::OpenOptions;
use std::os::fd::AsFd;

use limosa_client::{Device, DirtyBits, DirtySource};
use limosa_device::{Loopback, Machine};
use limosa_lab::Mdev;
use limosa_lab::module::{self, Dma, ModuleDevice};
use limosa_models::uart::{Line, Uart};
use limosa_protocol::Errno;
use limosa_vfio_kernel::{AddressSpace, Door, KernelDevice, Options};

use crate::{PAGE, file, memfd, report, set};

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_container_logs_for_its_devices() {
    let mtty = Mdev::create("mtty", "mtty-1");
    let space = AddressSpace::new(Door::Group).unwrap();
    let log = space.dirty_log();
    assert!(log.start(PAGE, &[]).is_err(), "it has no IOMMU before its first device");
    let options = Options { space: Some(space.clone()), ..Options::default() };
    let device = KernelDevice::open(mtty.uuid(), &options).unwrap();
    let guest = memfd(1 << 20);
    space.map("dev", &file(&guest, 0x10_0000, 16 * PAGE)).unwrap();
    assert_eq!(log.start(PAGE, &[]).unwrap(), PAGE);
    assert!(log.sees(&device));
    space.map("dev", &file(&guest, 0x10_0000 + 16 * PAGE, 16 * PAGE)).unwrap();
    assert!(report(&log, 0x10_0000, 32).is_empty(), "mtty writes nothing");
    assert!(report(&log, 0x10_0000 + 8 * PAGE, 16).is_empty(), "though it cuts two mappings");
    let mut words = [0];
    space.unmap("dev", 0x10_0000, 16 * PAGE, Some(DirtyBits { page_size: PAGE, words: &mut words })).unwrap();
    assert_eq!(words, [0]);
    // With its last device a container loses its IOMMU and what that knew.
    drop(device);
    let lost = log.report(0x10_0000, 32 * PAGE, PAGE, &mut [0]).unwrap_err();
    assert_eq!(lost.errno(), Some(Errno::EINVAL), "{lost}");
    let device = KernelDevice::open(mtty.uuid(), &options).unwrap();
    assert!(log.sees(&device));
    assert_eq!(report(&log, 0x10_0000, 32), (16..32).collect::<Vec<_>>(), "all that was mapped");
    assert!(report(&log, 0x10_0000, 32).is_empty(), "and is logged again");
    log.stop().unwrap();
}

/// The first address of what is mapped.
const BASE: u64 = 0x10_0000;

/// A device that does not log, in a container.
fn silent(module: &ModuleDevice) -> KernelDevice {
    module.open(Door::Group)
}

fn writes(device: &KernelDevice, dma: Dma, page: u64, pages: u64) {
    module::dma(device, dma, BASE + page * PAGE, pages * PAGE, 0x5eed).unwrap();
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn pages_that_a_device_pinned_or_had_written_are_dirty() {
    let module = ModuleDevice::create("limosa-plain");
    let device = silent(&module);
    let space = device.address_space().unwrap();
    let guest = memfd(64 * PAGE);
    space.map("dev", &file(&guest, BASE, 64 * PAGE)).unwrap();
    writes(&device, Dma::Write, 60, 1);
    let log = space.dirty_log();
    log.start(PAGE, &[]).unwrap();
    assert!(report(&log, BASE, 64).is_empty(), "clean at the start");
    writes(&device, Dma::Write, 3, 2);
    writes(&device, Dma::WriteByCpu, 40, 1);
    module::dma(&device, Dma::Write, BASE + 63 * PAGE + 8, 8, 1).unwrap();
    assert_eq!(report(&log, BASE, 64), [3, 4, 40, 63]);
    assert!(report(&log, BASE, 64).is_empty(), "told once");
    writes(&device, Dma::WriteAndKeep, 10, 2);
    for _ in 0..2 {
        assert_eq!(
            report(&log, BASE, 64),
            [10, 11],
            "as long as they are pinned nobody knows that they are clean"
        );
    }
    module::dma(&device, Dma::Unpin, 0, 0, 0).unwrap();
    assert_eq!(report(&log, BASE, 64), [10, 11], "once more");
    assert!(report(&log, BASE, 64).is_empty());
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_report_may_cut_mappings_and_what_lies_beside_it_is_in_the_next_one() {
    let module = ModuleDevice::create("limosa-plain");
    let device = silent(&module);
    let space = device.address_space().unwrap();
    let guest = memfd(64 * PAGE);
    for page in [0, 16, 32, 48] {
        space.map("dev", &file(&guest, BASE + page * PAGE, 16 * PAGE)).unwrap();
    }
    let log = space.dirty_log();
    log.start(PAGE, &[]).unwrap();
    writes(&device, Dma::Write, 0, 64);
    assert_eq!(report(&log, BASE + 20 * PAGE, 20), (0..20).collect::<Vec<_>>());
    assert_eq!(report(&log, BASE, 64), (0..20).chain(40..64).collect::<Vec<_>>());
    assert!(report(&log, BASE, 64).is_empty(), "told once");
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_report_of_more_than_one_bitmap_holds_is_made_of_several() {
    let module = ModuleDevice::create("limosa-plain");
    let device = silent(&module);
    let space = device.address_space().unwrap();
    let guest = memfd(16 * PAGE);
    // 2^31 - 1 pages, 8 TiB, are all that the kernel takes at once.
    let (apart, gigabyte) = (12 << 40, 1 << 30);
    for iova in [BASE, BASE + apart] {
        space.map("dev", &file(&guest, iova, 16 * PAGE)).unwrap();
    }
    let log = space.dirty_log();
    log.start(PAGE, &[]).unwrap();
    module::dma(&device, Dma::Write, BASE + apart + PAGE, 8, 1).unwrap();
    let mut words = vec![0; (16 << 40) / gigabyte as usize / 64];
    log.report(0, 16 << 40, gigabyte, &mut words).unwrap();
    assert_eq!(set(&words), [apart / gigabyte]);
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn what_is_unmapped_in_a_container_is_in_its_bitmap_and_in_the_next_report() {
    let module = ModuleDevice::create("limosa-plain");
    let device = silent(&module);
    let space = device.address_space().unwrap();
    let guest = memfd(16 * PAGE);
    for page in [0, 16, 32] {
        space.map("dev", &file(&guest, BASE + page * PAGE, 16 * PAGE)).unwrap();
    }
    let log = space.dirty_log();
    log.start(PAGE, &[]).unwrap();
    writes(&device, Dma::Write, 5, 1);
    writes(&device, Dma::WriteAndKeep, 15, 2);
    writes(&device, Dma::Write, 40, 1);
    // In pages of 8 KiB, to a bitmap that has a bit already.
    let mut words = [1];
    device.dma_unmap(BASE, 16 * PAGE, Some(DirtyBits { page_size: 2 * PAGE, words: &mut words })).unwrap();
    assert_eq!(set(&words), [0, 2, 7]);
    device.dma_unmap(BASE + 16 * PAGE, 32 * PAGE, None).unwrap();
    assert_eq!(module.number("pinned"), 0, "an unmap takes pages away");
    let refused = module::dma(&device, Dma::Write, BASE, 8, 1).unwrap_err();
    assert_ne!(refused, Errno::from_raw(0));
    space.map("dev", &file(&guest, BASE, 16 * PAGE)).unwrap();
    assert_eq!(report(&log, BASE, 48), [5, 15, 16, 40]);
    assert!(report(&log, BASE, 48).is_empty(), "told once");
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn an_unmap_lost_the_pages_that_a_report_of_other_memory_had_read() {
    let module = ModuleDevice::create("limosa-plain");
    let device = silent(&module);
    let space = device.address_space().unwrap();
    let guest = memfd(64 * PAGE);
    space.map("dev", &file(&guest, BASE, 32 * PAGE)).unwrap();
    let log = space.dirty_log();
    log.start(PAGE, &[]).unwrap();
    writes(&device, Dma::Write, 20, 3);
    assert!(report(&log, BASE, 16).is_empty(), "none was written there");
    writes(&device, Dma::Write, 30, 1);
    let mut words = [0];
    device.dma_unmap(BASE, 32 * PAGE, Some(DirtyBits { page_size: PAGE, words: &mut words })).unwrap();
    assert_eq!(set(&words), [20, 21, 22, 30]);
    assert_eq!(report(&log, BASE, 32), [20, 21, 22, 30], "and in the next report");
    assert!(report(&log, BASE, 32).is_empty(), "told once");
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn the_container_of_a_vmm_is_read_as_it_is() {
    let module = ModuleDevice::create("limosa-plain");
    let container = OpenOptions::new().read(true).write(true).open("/dev/vfio/vfio").unwrap();
    let space = AddressSpace::from_container(container.as_fd()).unwrap();
    let options = Options { space: Some(space.clone()), ..Options::default() };
    let device = KernelDevice::open(module.uuid(), &options).unwrap();
    let guest = memfd(64 * PAGE);
    let vmm = AddressSpace::from_container(container.as_fd()).unwrap();
    vmm.map("vmm", &file(&guest, BASE, 64 * PAGE)).unwrap();
    let log = space.dirty_log();
    log.start(PAGE, &[]).unwrap();
    assert!(log.sees(&device));
    let namesake = Loopback::new(module.uuid(), Machine::simple(Uart::new(vec![Line::Echo]).unwrap()));
    assert!(!log.sees(&namesake), "a device of the same name elsewhere");
    writes(&device, Dma::Write, 7, 2);
    assert_eq!(report(&log, BASE, 64), [7, 8]);
    let cut = log.report(BASE, 8 * PAGE, PAGE, &mut [0]).unwrap_err();
    assert_eq!(cut.errno(), Some(Errno::EINVAL), "{cut}");
    writes(&device, Dma::Write, 9, 1);
    space.unmap("dev", BASE, 64 * PAGE, None).unwrap();
    assert_eq!(report(&log, BASE, 64), [9]);
}
