//! Address spaces of the kernel's and the dirty pages that they log.

mod mock_iommu;

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;

use limosa_client::{Device, DirtyBits, DirtySource, DmaMap, DmaMemory};
use limosa_lab::Mdev;
use limosa_protocol::Errno;
use limosa_protocol::info::DmaMapFlags;
use limosa_vfio_kernel::{AddressSpace, Door, KernelDevice, Options};
use mock_iommu::{APERTURE, MockDevice};

fn device(path: impl AsRef<std::path::Path>) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

/// A file of guest memory.
fn memory(bytes: u64) -> File {
    let memory = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let memory = File::from(memory);
    memory.set_len(bytes).unwrap();
    memory
}

fn file(memory: &File, iova: u64, size: u64) -> DmaMap<'_> {
    let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
    DmaMap { iova, size, flags, memory: DmaMemory::File { fd: memory.as_fd(), offset: 0 } }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn memory_is_mapped_before_and_after_devices_come_and_unmapped_in_its_pieces() {
    for door in [Door::Cdev, Door::Group] {
        let mtty = Mdev::create("mtty", "mtty-1");
        let space = AddressSpace::new(door).unwrap();
        let guest = memory(1 << 20);
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

const PAGE: u64 = 4096;

/// The pages of a report, by number from `iova` on.
fn report(source: &dyn DirtySource, iova: u64, pages: u64) -> Vec<u64> {
    let mut words = vec![0; pages.div_ceil(64) as usize];
    source.report(iova, pages * PAGE, PAGE, &mut words).unwrap();
    set(&words)
}

fn set(words: &[u64]) -> Vec<u64> {
    (0..words.len() as u64 * 64).filter(|bit| words[(bit / 64) as usize] >> (bit % 64) & 1 == 1).collect()
}

/// Attaches a mock device to the space, and returns the page table that it came to.
fn attach(space: &AddressSpace, name: &str, device: &MockDevice<'_>) -> u32 {
    let mut page_table = 0;
    let mut attach = |id| {
        page_table = id;
        device.attach(id)
    };
    space.attach_bound(name, device.device_id, &mut attach).unwrap();
    page_table
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn page_tables_tell_what_was_written() {
    let space = AddressSpace::new(Door::Cdev).unwrap();
    let (iommufd, ioas) = space.ioas().unwrap();
    mock_iommu::no_huge_pages(iommufd, ioas);
    let device = MockDevice::new(iommufd, ioas, true);
    let page_table = attach(&space, "dev", &device);
    assert_ne!(page_table, ioas, "its IOMMU tracks dirty pages");
    let guest = memory(1 << 20);
    // Two pieces of memory, and a hole between them.
    let iova = APERTURE;
    space.map("dev", &file(&guest, iova, 64 * PAGE)).unwrap();
    space.map("dev", &file(&guest, iova + 80 * PAGE, 100 * PAGE)).unwrap();
    let log = space.dirty_log();
    assert!(log.sees("dev") && !log.sees("another"));
    assert_eq!(log.start(PAGE, &[]).unwrap(), PAGE);
    assert!(report(&log, iova, 180).is_empty(), "all clean at the start");
    mock_iommu::write(iommufd, page_table, iova, &[0, 2, 63, 80, 81, 179]);
    assert_eq!(report(&log, iova, 180), [0, 2, 63, 80, 81, 179], "behind the hole too");
    assert!(report(&log, iova, 180).is_empty(), "told once");
    mock_iommu::write(iommufd, page_table, iova, &[3, 4, 5, 90]);
    assert_eq!(report(&log, iova + 4 * PAGE, 8), [0, 1], "a part of the mapping");
    let mut words = [0b1000];
    log.report(iova, 64 * 4 * PAGE, 4 * PAGE, &mut words).unwrap();
    assert_eq!(set(&words), [0, 3, 22], "in larger pages, beside what was set");
    log.stop().unwrap();
    assert!(log.report(iova, PAGE, PAGE, &mut [0]).is_err());
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn page_tables_with_huge_pages_tell_at_least_what_was_written() {
    let space = AddressSpace::new(Door::Cdev).unwrap();
    let (iommufd, ioas) = space.ioas().unwrap();
    let device = MockDevice::new(iommufd, ioas, true);
    let page_table = attach(&space, "dev", &device);
    let guest = memory(4 << 20);
    space.map("dev", &file(&guest, APERTURE, 4 << 20)).unwrap();
    let log = space.dirty_log();
    log.start(PAGE, &[]).unwrap();
    for page in [0, 1, 511, 512, 1000] {
        mock_iommu::write(iommufd, page_table, APERTURE, &[page]);
        let told = report(&log, APERTURE, 1024);
        assert!(told.contains(&page), "{page}: {told:?}");
        assert!(report(&log, APERTURE, 1024).is_empty(), "told once");
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn what_is_unmapped_in_an_ioas_is_in_its_bitmap_and_in_the_next_report() {
    let space = AddressSpace::new(Door::Cdev).unwrap();
    let (iommufd, ioas) = space.ioas().unwrap();
    mock_iommu::no_huge_pages(iommufd, ioas);
    let device = MockDevice::new(iommufd, ioas, true);
    let page_table = attach(&space, "dev", &device);
    let guest = memory(1 << 20);
    let (one, other) = (APERTURE, APERTURE + 32 * PAGE);
    for iova in [one, other] {
        space.map("dev", &file(&guest, iova, 16 * PAGE)).unwrap();
    }
    let mut words = [0];
    let bits = DirtyBits { page_size: PAGE, words: &mut words };
    assert!(space.unmap("dev", one, 16 * PAGE, Some(bits)).is_err(), "nothing is logged yet");
    let log = space.dirty_log();
    log.start(PAGE, &[]).unwrap();
    mock_iommu::write(iommufd, page_table, one, &[1, 15, 32, 33]);
    let bits = DirtyBits { page_size: PAGE, words: &mut words };
    space.unmap("dev", one, 16 * PAGE, Some(bits)).unwrap();
    assert_eq!(set(&words), [1, 15]);
    space.unmap("dev", other, 16 * PAGE, None).unwrap();
    // Something else lies there now, written by nobody.
    space.map("dev", &file(&guest, one, 64 * PAGE)).unwrap();
    assert_eq!(report(&log, one, 40), [1, 15, 32, 33]);
    assert!(report(&log, one, 64).is_empty(), "told once");
    mock_iommu::write(iommufd, page_table, one, &[50]);
    log.stop().unwrap();
    log.start(PAGE, &[]).unwrap();
    assert!(report(&log, one, 64).is_empty(), "a new start is clean");
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn devices_share_a_page_table_where_they_can_and_who_is_not_seen_is_known() {
    let space = AddressSpace::new(Door::Cdev).unwrap();
    let (iommufd, ioas) = space.ioas().unwrap();
    let devices: Vec<_> = [true, true, false].map(|tracks| MockDevice::new(iommufd, ioas, tracks)).into();
    let log = space.dirty_log();
    assert!(log.start(PAGE, &[]).is_err(), "nothing to log with");
    let first = attach(&space, "first", &devices[0]);
    log.start(PAGE, &[]).unwrap();
    assert!(space.dirty_log().start(PAGE, &[]).is_err(), "one reader");
    assert_eq!(attach(&space, "second", &devices[1]), first, "the same page table");
    assert_eq!(attach(&space, "third", &devices[2]), ioas, "the IOMMU has no dirty tracking");
    // A mediated device has no IOMMU of its own.
    let mtty = Mdev::create("mtty", "mtty-1");
    let options = Options { space: Some(space.clone()), ..Options::default() };
    let fourth = KernelDevice::open(mtty.uuid(), &options).unwrap();
    let seen = ["first", "second", "third", fourth.name()].map(|name| log.sees(name));
    assert_eq!(seen, [true, true, false, false]);
    assert_eq!(fourth.door(), Some(Door::Cdev));
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn the_page_tables_of_a_vmm_are_read_whatever_it_mapped_and_stay_its_own() {
    let vmm = AddressSpace::new(Door::Cdev).unwrap();
    let (iommufd, ioas) = vmm.ioas().unwrap();
    mock_iommu::no_huge_pages(iommufd, ioas);
    let device = MockDevice::new(iommufd, ioas, true);
    let page_table = attach(&vmm, "dev", &device);
    let space = AddressSpace::from_page_tables(iommufd, ioas, &[page_table]).unwrap();
    let guest = memory(1 << 20);
    // Mapped by the VMM, in pieces and with holes.
    for (page, pages) in [(0, 3), (5, 1), (6, 10), (40, 20)] {
        vmm.map("vmm", &file(&guest, APERTURE + page * PAGE, pages * PAGE)).unwrap();
    }
    // And by the space.
    space.map("dev", &file(&guest, APERTURE + 62 * PAGE, PAGE)).unwrap();
    space.has_device("dev");
    let log = space.dirty_log();
    assert!(log.sees("dev"));
    log.start(PAGE, &[]).unwrap();
    let pages = [0, 2, 5, 6, 15, 40, 59, 62];
    mock_iommu::write(iommufd, page_table, APERTURE, &pages);
    assert_eq!(report(&log, APERTURE, 64), pages);
    mock_iommu::write(iommufd, page_table, APERTURE, &[41, 62]);
    space.unmap("dev", APERTURE + 62 * PAGE, PAGE, None).unwrap();
    space.unmap("dev", APERTURE + 40 * PAGE, 20 * PAGE, None).unwrap();
    assert_eq!(report(&log, APERTURE, 64), [41, 62]);
    drop((log, space));
    // Still there.
    let log = vmm.dirty_log();
    log.start(PAGE, &[]).unwrap();
    mock_iommu::write(iommufd, page_table, APERTURE, &[1]);
    assert_eq!(report(&log, APERTURE, 16), [1]);
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_container_logs_for_its_devices() {
    let mtty = Mdev::create("mtty", "mtty-1");
    let space = AddressSpace::new(Door::Group).unwrap();
    let log = space.dirty_log();
    assert!(log.start(PAGE, &[]).is_err(), "it has no IOMMU before its first device");
    let options = Options { space: Some(space.clone()), ..Options::default() };
    let device = KernelDevice::open(mtty.uuid(), &options).unwrap();
    let guest = memory(1 << 20);
    space.map("dev", &file(&guest, 0x10_0000, 16 * PAGE)).unwrap();
    assert_eq!(log.start(PAGE, &[]).unwrap(), PAGE);
    assert!(log.sees(device.name()) && !log.sees("another"));
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
    let _device = KernelDevice::open(mtty.uuid(), &options).unwrap();
    assert_eq!(report(&log, 0x10_0000, 32), (16..32).collect::<Vec<_>>(), "all that was mapped");
    assert!(report(&log, 0x10_0000, 32).is_empty(), "and is logged again");
    log.stop().unwrap();
}
