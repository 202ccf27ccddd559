//! Dirty pages that devices log themselves (`vfio.h: VFIO_DEVICE_FEATURE_DMA_LOGGING_START`).

use limosa_client::{Device, DeviceExt, DeviceLog, DirtySource};
use limosa_lab::module::{self, Dma, Guest, ModuleDevice};
use limosa_protocol::Errno;
use limosa_protocol::feature::DmaLoggingRange;
use limosa_vfio_kernel::Door;

use crate::{PAGE, report};

const BASE: u64 = 0x10_0000;

fn ranges(at: impl IntoIterator<Item = (u64, u64)>) -> Vec<DmaLoggingRange> {
    let range = |(page, pages)| DmaLoggingRange { iova: BASE + page * PAGE, length: pages * PAGE };
    at.into_iter().map(range).collect()
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_device_tells_exactly_what_it_wrote() {
    for door in [Door::Cdev, Door::Group] {
        let module = ModuleDevice::create("limosa-full");
        let device = module.open(door);
        let guest = Guest::new(64 * PAGE);
        guest.map(&device, BASE);
        let log = DeviceLog::new(&device);
        assert!(log.is_supported().unwrap() && log.sees(&device));
        module::dma(&device, Dma::Write, BASE, PAGE, 1).unwrap();
        assert_eq!(log.start(PAGE, &ranges([(0, 64)])).unwrap(), PAGE);
        assert_eq!(module.number("logging"), 1);
        module::dma(&device, Dma::Write, BASE + 2 * PAGE + 8, PAGE, 2).unwrap();
        module::dma(&device, Dma::WriteByCpu, BASE + 63 * PAGE, 8, 3).unwrap();
        module::dma(&device, Dma::Read, BASE + 30 * PAGE, PAGE, 0).unwrap();
        assert_eq!(report(&log, BASE, 64), [2, 3, 63]);
        assert!(report(&log, BASE, 64).is_empty(), "told once");
        module::dma(&device, Dma::WriteAndKeep, BASE + 9 * PAGE, PAGE, 4).unwrap();
        device.dma_unmap(BASE, 64 * PAGE, None).unwrap();
        assert_eq!(report(&log, BASE + 8 * PAGE, 2), [1], "its log outlives the memory");
        log.stop().unwrap();
        assert_eq!(module.number("logging"), 0);
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn more_ranges_than_the_kernel_takes_are_logged_all_the_same() {
    let pages: Vec<_> = (0..300).map(|at| at * 3).collect();
    let ranges = ranges(pages.iter().map(|page| (*page, 1)));
    for log_ranges_max in [0, 4] {
        let module = ModuleDevice::create("limosa-full");
        module.wish("log_ranges_max", log_ranges_max);
        let device = module.open(None);
        let guest = Guest::new(1024 * PAGE);
        guest.map(&device, BASE);
        let refused = device.dma_logging_start(PAGE, &ranges).unwrap_err();
        assert!(refused.is_refused(Errno::E2BIG), "{refused}");
        let log = DeviceLog::new(&device);
        log.start(PAGE, &ranges).unwrap();
        for page in &pages {
            module::dma(&device, Dma::Write, BASE + page * PAGE, 8, 1).unwrap();
        }
        for page in &pages {
            assert_eq!(report(&log, BASE + page * PAGE, 1), [0], "page {page}");
        }
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_coarse_log_tells_whole_granules() {
    let module = ModuleDevice::create("limosa-p2p");
    module.wish("log_page_bytes", 16 * PAGE);
    let device = module.open(None);
    let guest = Guest::new(64 * PAGE);
    guest.map(&device, BASE);
    let log = DeviceLog::new(&device);
    assert_eq!(log.start(PAGE, &ranges([(0, 64)])).unwrap(), 16 * PAGE);
    module::dma(&device, Dma::Write, BASE + 20 * PAGE, 8, 1).unwrap();
    assert_eq!(report(&log, BASE, 64), (16..32).collect::<Vec<_>>());
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_report_that_fails_is_an_error_and_logging_goes_on() {
    let module = ModuleDevice::create("limosa-full");
    let device = module.open(None);
    let guest = Guest::new(64 * PAGE);
    guest.map(&device, BASE);
    let log = DeviceLog::new(&device);
    log.start(PAGE, &ranges([(0, 64)])).unwrap();
    module.wish("fail", "report:5:1");
    let error = log.report(BASE, 64 * PAGE, PAGE, &mut [0]).unwrap_err();
    assert!(error.is_refused(Errno::EIO), "{error}");
    module::dma(&device, Dma::Write, BASE + PAGE, 8, 1).unwrap();
    assert_eq!(report(&log, BASE, 64), [1]);
}
