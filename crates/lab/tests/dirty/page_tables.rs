//! Dirty pages from the page tables of an IOMMU (`iommufd.h: IOMMU_HWPT_GET_DIRTY_BITMAP`), here mock ones.

use limosa_client::{DirtyBits, DirtySource, DmaMap, DmaMemory};
use limosa_device::{Loopback, Machine};
use limosa_lab::Mdev;
use limosa_models::uart::{Line, Uart};
use limosa_protocol::info::DmaMapFlags;
use limosa_vfio_kernel::{AddressSpace, Door, KernelDevice, Options};

use crate::host_memory::HostMemory;
use crate::mock_iommu::{self, APERTURE, HUGE_PAGE_BYTES, MockDevice};
use crate::{PAGE, file, memfd, report, set};

/// A device object of this name, for the space to know it by.
fn named(name: &str) -> Loopback {
    Loopback::new(name, Machine::simple(Uart::new(vec![Line::Echo]).unwrap()))
}

/// Attaches a mock device to the space, and returns the page table that it came to.
pub fn attach(space: &AddressSpace, name: &str, device: &MockDevice<'_>) -> u32 {
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
    let guest = memfd(1 << 20);
    // Two pieces of memory, and a hole between them.
    let iova = APERTURE;
    space.map("dev", &file(&guest, iova, 64 * PAGE)).unwrap();
    space.map("dev", &file(&guest, iova + 80 * PAGE, 100 * PAGE)).unwrap();
    let log = space.dirty_log();
    let (known, namesake) = (named("dev"), named("dev"));
    space.has_device(&known);
    assert!(log.sees(&known) && !log.sees(&namesake));
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
fn a_report_of_a_part_of_a_huge_page_lost_the_rest_of_it() {
    let vmm = AddressSpace::new(Door::Cdev).unwrap();
    let (iommufd, ioas) = vmm.ioas().unwrap();
    let page_table = mock_iommu::huge_page_table(iommufd, ioas);
    // One page of the IOMMU's.
    let (bytes, pages) = (HUGE_PAGE_BYTES, HUGE_PAGE_BYTES / PAGE);
    let memory = DmaMemory::Address(HostMemory::contiguous(bytes as usize));
    let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
    vmm.map("vmm", &DmaMap { iova: APERTURE, size: bytes, flags, memory }).unwrap();
    let space = AddressSpace::from_page_tables(iommufd, ioas, &[page_table]).unwrap();
    let log = space.dirty_log();
    log.start(PAGE, &[]).unwrap();
    for (written, asked) in [(0, 200), (255, 100), (7, 0), (8, 255)] {
        mock_iommu::write(iommufd, page_table, APERTURE, &[written]);
        assert_eq!(report(&log, APERTURE + asked * PAGE, 1), [0], "{asked} is in the page of {written}");
        let rest: Vec<u64> = (0..pages).filter(|page| *page != asked).collect();
        assert_eq!(report(&log, APERTURE, pages), rest, "{written} after {asked}");
        assert!(report(&log, APERTURE, pages).is_empty(), "told once");
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
    let guest = memfd(1 << 20);
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
    let seen = ["first", "second", "third"].map(|name| {
        let device = named(name);
        space.has_device(&device);
        log.sees(&device)
    });
    assert_eq!(seen, [true, true, false]);
    assert!(!log.sees(&fourth));
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
    let guest = memfd(1 << 20);
    // Mapped by the VMM, in pieces and with holes.
    for (page, pages) in [(0, 3), (5, 1), (6, 10), (40, 20)] {
        vmm.map("vmm", &file(&guest, APERTURE + page * PAGE, pages * PAGE)).unwrap();
    }
    // And by the space.
    space.map("dev", &file(&guest, APERTURE + 62 * PAGE, PAGE)).unwrap();
    let known = named("dev");
    space.has_device(&known);
    let log = space.dirty_log();
    assert!(log.sees(&known));
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
