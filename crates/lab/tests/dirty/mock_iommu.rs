//! The devices and IOMMUs that the kernel makes up for tests of iommufd (`CONFIG_IOMMUFD_TEST`,
//! `drivers/iommu/iommufd/iommufd_test.h: IOMMU_TEST_CMD`), and what else the suites ask of iommufd directly.
//!
//! The one place in the lab with `unsafe` code: a device that writes where it is told to cannot be had otherwise.

use std::os::fd::BorrowedFd;

use limosa_protocol::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

const HWPT_ALLOC: Opcode = opcode::none(b';', 0x89);
const OPTION: Opcode = opcode::none(b';', 0x87);
const TEST_CMD: Opcode = opcode::none(b';', 0xa0);

/// `IOMMU_TEST_OP_*`.
const MOCK_DOMAIN_REPLACE: u32 = 10;
const MOCK_DOMAIN_FLAGS: u32 = 12;
const DIRTY: u32 = 13;

/// `MOCK_FLAGS_DEVICE_NO_DIRTY` and `MOCK_FLAGS_DEVICE_HUGE_IOVA`.
const DEVICE_NO_DIRTY: u32 = 1;
const DEVICE_HUGE_IOVA: u32 = 2;
/// `IOMMU_HWPT_ALLOC_DIRTY_TRACKING` and `IOMMU_HWPT_DATA_SELFTEST`.
const HWPT_ALLOC_DIRTY_TRACKING: u32 = 1 << 1;
const HWPT_DATA_SELFTEST: u32 = 0xdead;
/// `IOMMU_OPTION_HUGE_PAGES`.
const OPTION_HUGE_PAGES: u32 = 1;

/// The first address that a mock IOMMU translates.
pub const APERTURE: u64 = 1 << 24;

/// The size of the pages in a [`huge_page_table`] (`MOCK_HUGE_PAGE_SIZE`).
pub const HUGE_PAGE_BYTES: u64 = 1 << 20;

/// `struct iommu_test_cmd`. What follows `reserved` is a union; `words` are those of its 48 bytes.
#[derive(Default)]
#[repr(C)]
struct TestCommand {
    size: u32,
    op: u32,
    id: u32,
    reserved: u32,
    words: [u64; 6],
    last: u64,
}

/// `struct iommu_option`.
#[repr(C)]
struct OptionCommand {
    size: u32,
    option_id: u32,
    op: u16,
    reserved: u16,
    object_id: u32,
    value: u64,
}

/// `struct iommu_hwpt_alloc`.
#[derive(Default)]
#[repr(C)]
struct HwptAllocCommand {
    size: u32,
    flags: u32,
    dev_id: u32,
    pt_id: u32,
    out_hwpt_id: u32,
    reserved: u32,
    data_type: u32,
    data_len: u32,
    data_uptr: u64,
    fault_id: u32,
    reserved2: u32,
}

/// A device that is bound to an iommufd, behind a mock IOMMU.
pub struct MockDevice<'a> {
    iommufd: BorrowedFd<'a>,
    /// By which tests name it.
    id: u32,
    /// Its id as a bound device.
    pub device_id: u32,
}

impl<'a> MockDevice<'a> {
    /// A new one, attached to the IOAS. It goes away with the iommufd.
    pub fn new(iommufd: BorrowedFd<'a>, ioas: u32, tracks_dirty: bool) -> MockDevice<'a> {
        MockDevice::with_flags(iommufd, ioas, if tracks_dirty { 0 } else { DEVICE_NO_DIRTY })
    }

    fn with_flags(iommufd: BorrowedFd<'a>, ioas: u32, flags: u32) -> MockDevice<'a> {
        MockDevice::try_new(iommufd, ioas, flags)
            .expect("a mock device; does the kernel have CONFIG_IOMMUFD_TEST?")
    }

    fn try_new(iommufd: BorrowedFd<'a>, ioas: u32, flags: u32) -> Result<MockDevice<'a>, Errno> {
        // Ids come back in the first three halves of the union's words; flags are its fourth.
        let mut command = TestCommand {
            op: MOCK_DOMAIN_FLAGS,
            id: ioas,
            words: [0, u64::from(flags) << 32, 0, 0, 0, 0],
            ..TestCommand::default()
        };
        test(iommufd, &mut command)?;
        Ok(MockDevice { iommufd, id: command.words[0] as u32, device_id: command.words[1] as u32 })
    }

    /// Attaches it to another page table.
    pub fn attach(&self, page_table: u32) -> Result<(), Errno> {
        let words = [page_table.into(), 0, 0, 0, 0, 0];
        test(
            self.iommufd,
            &mut TestCommand { op: MOCK_DOMAIN_REPLACE, id: self.id, words, ..Default::default() },
        )
    }
}

/// A page table of the IOAS that tracks dirty pages, of [`HUGE_PAGE_BYTES`] where memory lies so, with a device attached.
pub fn huge_page_table(iommufd: BorrowedFd<'_>, ioas: u32) -> u32 {
    // In older kernels devices have such page tables, in newer ones (6.19) they are asked for.
    let old = MockDevice::try_new(iommufd, ioas, DEVICE_HUGE_IOVA);
    let is_old = old.is_ok();
    let device = old.unwrap_or_else(|_| MockDevice::new(iommufd, ioas, true));
    // `struct iommu_hwpt_selftest`: iotlb, pagetable_type (`MOCK_IOMMUPT_HUGE`).
    let data = [0_u32, 1];
    let mut command = HwptAllocCommand {
        size: size_of::<HwptAllocCommand>() as u32,
        flags: HWPT_ALLOC_DIRTY_TRACKING,
        dev_id: device.device_id,
        pt_id: ioas,
        data_type: if is_old { 0 } else { HWPT_DATA_SELFTEST },
        data_len: if is_old { 0 } else { size_of_val(&data) as u32 },
        data_uptr: if is_old { 0 } else { data.as_ptr() as u64 },
        ..HwptAllocCommand::default()
    };
    // SAFETY: the argument is the command's. The only address in it is that of the data, of the length beside it.
    let updater = unsafe { Updater::<HWPT_ALLOC, HwptAllocCommand>::new(&mut command) };
    // SAFETY: as above.
    unsafe { ioctl(iommufd, updater) }.expect("a page table with huge pages");
    device.attach(command.out_hwpt_id).expect("the page table of this device");
    command.out_hwpt_id
}

/// Marks pages of 4096 bytes as a device that wrote them would have, in a page table of a mock IOMMU.
pub fn write(iommufd: BorrowedFd<'_>, page_table: u32, iova: u64, pages: &[u64]) {
    let count = pages.iter().max().map_or(0, |last| last + 1);
    let mut bits = vec![0_u64; count.div_ceil(64) as usize];
    pages.iter().for_each(|page| bits[(page / 64) as usize] |= 1 << (page % 64));
    let mark = |bits: &[u64], page: u64| {
        let words = [0, iova, count * 4096, page, bits.as_ptr() as u64, 0];
        let mut command = TestCommand { op: DIRTY, id: page_table, words, ..TestCommand::default() };
        test(iommufd, &mut command).expect("marking pages dirty");
        command.words[5]
    };
    let mut marked = mark(&bits, 4096);
    if marked == 0 {
        // The mock of older kernels has pages of half a page and finds no others.
        let mut halves = vec![0_u64; (2 * count).div_ceil(64) as usize];
        pages.iter().for_each(|page| halves[(page / 32) as usize] |= 1 << (page % 32 * 2));
        marked = mark(&halves, 2048);
    }
    assert_eq!(marked, pages.len() as u64, "pages marked");
}

/// Has every page mapped on its own, so that it is dirty on its own.
pub fn no_huge_pages(iommufd: BorrowedFd<'_>, ioas: u32) {
    let mut command = OptionCommand {
        size: size_of::<OptionCommand>() as u32,
        option_id: OPTION_HUGE_PAGES,
        op: 0,
        reserved: 0,
        object_id: ioas,
        value: 0,
    };
    // SAFETY: the argument is the command's, without addresses in it.
    let updater = unsafe { Updater::<OPTION, OptionCommand>::new(&mut command) };
    // SAFETY: as above.
    unsafe { ioctl(iommufd, updater) }.expect("IOMMU_OPTION_HUGE_PAGES");
}

fn test(iommufd: BorrowedFd<'_>, command: &mut TestCommand) -> Result<(), Errno> {
    command.size = size_of::<TestCommand>() as u32;
    // SAFETY: the argument is the command's. The only address in it is that of the bits in `write`, of as many as the
    // length beside it has pages, and the kernel reads them.
    let updater = unsafe { Updater::<TEST_CMD, TestCommand>::new(command) };
    // SAFETY: as above.
    let answer = unsafe { ioctl(iommufd, updater) };
    answer.map_err(|error| Errno::from_raw(error.raw_os_error().unsigned_abs()))
}
