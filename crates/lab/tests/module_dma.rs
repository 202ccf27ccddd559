//! The lab's own module writes its user's memory by DMA, and logs exactly what it wrote
//! (`vfio.h: VFIO_DEVICE_FEATURE_DMA_LOGGING_*`).

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use limosa_client::{Device, DeviceExt, DmaMap, DmaMemory};
use limosa_lab::module::{self, Dma, Guest, ModuleDevice, Register};
use limosa_protocol::feature::DmaLoggingRange;
use limosa_protocol::info::DmaMapFlags;
use limosa_protocol::{Errno, State};
use limosa_vfio_kernel::{Door, KernelDevice};

/// Where the guest's memory is, and how much of it there is.
const BASE: u64 = 0x10_0000;
const BYTES: u64 = 1 << 20;
const PAGE: u64 = 4096;

const WRITES: [Dma; 3] = [Dma::Write, Dma::WriteByCpu, Dma::WriteAndKeep];

/// A device with memory, through each door.
fn each_door(test: impl Fn(&ModuleDevice, &KernelDevice, &Guest)) {
    for door in [Door::Cdev, Door::Group] {
        let module = ModuleDevice::create("limosa-full");
        let device = module.open(door);
        let guest = Guest::new(BYTES);
        guest.map(&device, BASE);
        test(&module, &device, &guest);
    }
}

fn log_all(device: &KernelDevice, page_size: u64) -> u64 {
    device.dma_logging_start(page_size, &[DmaLoggingRange { iova: BASE, length: BYTES }]).unwrap()
}

/// The pages that a part of the log has, by their number in the guest's memory.
fn part_of_log(device: &KernelDevice, at: u64, length: u64, page_size: u64) -> Vec<u64> {
    let pages = length / page_size;
    let mut words = vec![0_u64; pages.div_ceil(64) as usize];
    device.dma_logging_report(BASE + at, length, page_size, &mut words).unwrap();
    let set = (0..pages).filter(|page| words[*page as usize / 64] >> (page % 64) & 1 == 1);
    set.map(|page| page + at / page_size).collect()
}

fn log(device: &KernelDevice, page_size: u64) -> Vec<u64> {
    part_of_log(device, 0, BYTES, page_size)
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn dma_leaves_its_pattern_and_touches_nothing_else() {
    each_door(|_, device, guest| {
        for (at, write) in WRITES.into_iter().enumerate() {
            // Neither begins nor ends with a page.
            let offset = (10 * at as u64 + 1) * PAGE + 16;
            let bytes = 2 * PAGE + 8;
            module::dma(device, write, BASE + offset, bytes, 7).unwrap();
            assert_eq!(guest.read(offset, bytes), module::pattern(7, BASE + offset, bytes), "{write:?}");
            assert_eq!(guest.read(offset - 16, 16), [0; 16], "{write:?}");
            assert_eq!(guest.read(offset + bytes, 16), [0; 16], "{write:?}");
            for read in [Dma::Read, Dma::ReadByCpu] {
                module::dma(device, read, BASE + offset, bytes, 0).unwrap();
                let sum = module::read(device, Register::DmaCheck);
                assert_eq!(sum, module::sum(&guest.read(offset, bytes)), "{read:?} after {write:?}");
            }
        }
        assert_eq!(guest.written(), [1, 2, 3, 11, 12, 13, 21, 22, 23]);
    });
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn the_log_has_exactly_the_pages_that_were_written_and_tells_them_once() {
    each_door(|_, device, guest| {
        let mut words = [0; 4];
        let unasked = device.dma_logging_report(BASE, BYTES, PAGE, &mut words).unwrap_err();
        assert!(unasked.is_refused(Errno::EINVAL), "{unasked}");
        module::dma(device, Dma::Write, BASE, PAGE, 1).unwrap();
        assert_eq!(log_all(device, PAGE), PAGE);
        let again = device.dma_logging_start(PAGE, &[DmaLoggingRange { iova: BASE, length: BYTES }]);
        assert!(again.unwrap_err().is_refused(Errno::EBUSY));
        assert_eq!(log(device, PAGE), [], "what was written before the start");

        for (at, write) in WRITES.into_iter().enumerate() {
            let page = 60 + 20 * at as u64;
            module::dma(device, write, BASE + page * PAGE + 4088, 16, 2).unwrap();
            module::dma(device, write, BASE + (page + 5) * PAGE, 3 * PAGE, 2).unwrap();
            module::dma(device, Dma::Read, BASE, BYTES, 0).unwrap();
            let pages: Vec<u64> = [page, page + 1, page + 5, page + 6, page + 7].to_vec();
            assert_eq!(log(device, PAGE), pages, "{write:?}");
            assert_eq!(log(device, PAGE), [], "{write:?}");
            assert!(pages.iter().all(|page| guest.written().contains(page)), "{write:?}");
        }
        device.dma_logging_stop().unwrap();
        module::dma(device, Dma::Write, BASE, PAGE, 3).unwrap();
        log_all(device, PAGE);
        assert_eq!(log(device, PAGE), [], "what was written while the log was off");
    });
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_log_of_one_page_size_is_told_in_another() {
    each_door(|module, device, _| {
        let touch = |page: u64| module::dma(device, Dma::Write, BASE + page * PAGE, 8, 1).unwrap();
        log_all(device, PAGE);
        touch(5);
        touch(130);
        assert_eq!(log(device, 4 * PAGE), [1, 32]);
        touch(5);
        touch(6);
        assert_eq!(part_of_log(device, 6 * PAGE, 10 * PAGE, PAGE), [6]);
        assert_eq!(log(device, PAGE), [5]);
        device.dma_logging_stop().unwrap();

        // A granule of 16 pages is not forgotten before all of it was told.
        assert_eq!(log_all(device, 16 * PAGE), 16 * PAGE);
        touch(17);
        assert_eq!(part_of_log(device, 16 * PAGE, 2 * PAGE, PAGE), [16, 17]);
        assert_eq!(log(device, PAGE), Vec::from_iter(16..32));
        assert_eq!(log(device, PAGE), []);
        device.dma_logging_stop().unwrap();

        // The page size of a start is a hint.
        module.wish("log_page_bytes", 2 * PAGE);
        assert_eq!(log_all(device, PAGE), 2 * PAGE);
    });
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn only_the_ranges_of_the_start_are_logged_wider_where_the_device_has_room_for_few() {
    each_door(|module, device, _| {
        let ranges = [0, 2, 100].map(|page| DmaLoggingRange { iova: BASE + page * PAGE, length: PAGE });
        for (room, pages) in [(0, vec![0, 2, 100]), (2, vec![0, 1, 2, 100])] {
            module.wish("log_ranges_max", room);
            device.dma_logging_start(PAGE, &ranges).unwrap();
            module::dma(device, Dma::Write, BASE, BYTES, 1).unwrap();
            assert_eq!(log(device, PAGE), pages, "room for {room}");
            device.dma_logging_stop().unwrap();
        }
    });
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn memory_that_is_not_there_is_refused_and_what_was_written_before_it_is_logged() {
    each_door(|_, device, guest| {
        log_all(device, PAGE);
        for (write, page) in WRITES.into_iter().zip([254, 253, 252]) {
            let bytes = BYTES - page * PAGE + 8;
            module::dma(device, write, BASE + page * PAGE, bytes, 9).unwrap_err();
            assert_eq!(log(device, PAGE), Vec::from_iter(page..256), "{write:?}");
        }
        assert_eq!(guest.written(), [252, 253, 254, 255]);
        for (iova, bytes) in [(BASE, 0), (BASE + 4, 8), (BASE, 12), (u64::MAX - 7, 16), (BASE, 1 << 31)] {
            let refused = module::dma(device, Dma::Write, iova, bytes, 1);
            assert_eq!(refused, Err(Errno::EINVAL), "{bytes} bytes at {iova:#x}");
        }
        assert_eq!(log(device, PAGE), []);
    });
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn an_unmap_takes_away_what_was_left_pinned() {
    each_door(|module, device, guest| {
        module::dma(device, Dma::WriteAndKeep, BASE, 16 * PAGE, 1).unwrap();
        assert_eq!(module.number("pinned"), 16);
        device.dma_unmap(BASE, BYTES, None).unwrap();
        assert_eq!(module.number("pinned"), 0);
        for write in WRITES {
            module::dma(device, write, BASE, PAGE, 2).unwrap_err();
        }
        assert_eq!(guest.read(0, PAGE), module::pattern(1, BASE, PAGE));
        guest.map(device, BASE);
        module::dma(device, Dma::WriteAndKeep, BASE, PAGE, 3).unwrap();
        module::dma(device, Dma::Unpin, 0, 0, 0).unwrap();
        assert_eq!(module.number("pinned"), 0);
        module::dma(device, Dma::WriteAndKeep, BASE, PAGE, 3).unwrap();
        device.reset().unwrap();
        assert_eq!(module.number("pinned"), 0);
    });
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn memory_that_is_mapped_to_be_read_was_written_through_a_page_that_was_left_pinned() {
    let path = std::env::temp_dir().join("read-only");
    let before = vec![0x41; 2 * PAGE as usize];
    std::fs::write(&path, &before).unwrap();
    let file = File::open(&path).unwrap();
    for door in [Door::Cdev, Door::Group] {
        let module = ModuleDevice::create("limosa-plain");
        let device = module.open(door);
        let memory = DmaMemory::File { fd: file.as_fd(), offset: 0 };
        device.dma_map(&DmaMap { iova: BASE, size: 2 * PAGE, flags: DmaMapFlags::READ, memory }).unwrap();
        module::dma(&device, Dma::ReadAndKeep, BASE, PAGE, 0).unwrap();
        assert_eq!(module.number("pinned"), 1);
        for write in WRITES {
            // One page that is pinned already, one that is not, and both.
            for (page, pages) in [(0, 1), (1, 1), (0, 2)] {
                let refused = module::dma(&device, write, BASE + page * PAGE, pages * PAGE, 7);
                assert_eq!(refused, Err(Errno::EPERM), "{door}: {write:?} of {pages} from {page}");
            }
        }
        assert!(std::fs::read(&path).unwrap() == before, "{door}: it was written");
        assert_eq!(module.number("pinned"), 1);
        module::dma(&device, Dma::Read, BASE, 2 * PAGE, 0).unwrap();
        assert_eq!(module::read(&device, Register::DmaCheck), module::sum(&before), "{door}");
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_page_that_was_pinned_to_be_read_is_written_where_its_mapping_allows_it() {
    each_door(|module, device, guest| {
        log_all(device, PAGE);
        module::dma(device, Dma::ReadAndKeep, BASE, 2 * PAGE, 0).unwrap();
        module::dma(device, Dma::Write, BASE, PAGE, 4).unwrap();
        module::dma(device, Dma::WriteAndKeep, BASE + PAGE, PAGE, 5).unwrap();
        assert_eq!(log(device, PAGE), [0, 1]);
        let written = [module::pattern(4, BASE, PAGE), module::pattern(5, BASE + PAGE, PAGE)].concat();
        assert!(guest.read(0, 2 * PAGE) == written);
        module::dma(device, Dma::Read, BASE, 2 * PAGE, 0).unwrap();
        assert_eq!(module::read(device, Register::DmaCheck), module::sum(&written));
        assert_eq!(module.number("pinned"), 2, "each page once");
        module::dma(device, Dma::Unpin, 0, 0, 0).unwrap();
        assert_eq!(module.number("pinned"), 0);
        // Had one of them been left pinned, this would not return.
        device.dma_unmap(BASE, BYTES, None).unwrap();
    });
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn memory_that_is_mapped_to_be_written_is_written_and_not_read() {
    for door in [Door::Cdev, Door::Group] {
        let module = ModuleDevice::create("limosa-plain");
        let device = module.open(door);
        let file = limosa_testing::memfd(PAGE);
        let memory = DmaMemory::File { fd: file.as_fd(), offset: 0 };
        device.dma_map(&DmaMap { iova: BASE, size: PAGE, flags: DmaMapFlags::WRITE, memory }).unwrap();
        for write in [Dma::Write, Dma::WriteAndKeep] {
            module::dma(&device, write, BASE, PAGE, write as u64).unwrap();
            let mut found = vec![0; PAGE as usize];
            file.read_exact_at(&mut found, 0).unwrap();
            assert!(found == module::pattern(write as u64, BASE, PAGE), "{door}: {write:?}");
        }
        assert_eq!(module::dma(&device, Dma::Read, BASE, PAGE, 0), Err(Errno::EPERM), "{door}");
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn in_p2p_states_dma_waits_and_in_stopped_ones_it_is_not_even_heard() {
    each_door(|module, device, guest| {
        for (state, back) in [(State::RunningP2p, State::Running), (State::PreCopyP2p, State::PreCopy)] {
            let _session = device.set_state(state).unwrap();
            let ignored = module.number("ignored");
            module::command(device, Dma::Write, BASE, PAGE, 1);
            assert_eq!(module::read(device, Register::DmaCommand), Dma::Write as u64, "{state}");
            assert_eq!(guest.written(), [], "{state}");
            assert_eq!(module.number("ignored"), ignored, "{state}");
            device.set_state(back).unwrap();
            assert_eq!(module::read(device, Register::DmaCommand), 0, "{state}");
            assert_eq!(guest.read(0, PAGE), module::pattern(1, BASE, PAGE), "{state}");
            device.reset().unwrap();
            module::dma(device, Dma::Write, BASE, PAGE, 0).unwrap();
            guest.clear();
        }
        for state in [State::Stop, State::StopCopy, State::Resuming] {
            let _session = device.set_state(state).unwrap();
            let ignored = module.number("ignored");
            let check = module.number("check");
            module::command(device, Dma::Write, BASE, PAGE, 1);
            module::write(device, Register::Dirty, 5);
            module::write(device, Register::Seed, 5);
            assert_eq!(module.number("ignored"), ignored + 6, "{state}");
            assert_eq!(module.number("check"), check, "{state}");
            device.reset().unwrap();
            assert_eq!(guest.written(), [], "{state}");
        }
    });
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_command_that_waits_moves_and_is_done_by_the_other_device() {
    each_door(|_, source, here| {
        source.set_state(State::RunningP2p).unwrap();
        module::command(source, Dma::Write, BASE + PAGE, PAGE, 4);
        let mut stream = source.set_state(State::StopCopy).unwrap().unwrap();
        let module = ModuleDevice::create("limosa-full");
        let (target, there) = (module.open(None), Guest::new(BYTES));
        there.map(&target, BASE);
        let mut loading = target.set_state(State::Resuming).unwrap().unwrap();
        let mut data = vec![0; 1 << 20];
        while let limosa_client::Chunk::Data(bytes) = stream.read(&mut data).unwrap() {
            loading.write(&data[..bytes]).unwrap();
        }
        target.set_state(State::RunningP2p).unwrap();
        assert_eq!(there.written(), []);
        target.set_state(State::Running).unwrap();
        assert_eq!(there.read(PAGE, PAGE), module::pattern(4, BASE + PAGE, PAGE));
        assert_eq!((there.written(), here.written()), (vec![1], vec![]));
    });
}
