//! Sources of dirty pages over a device that logs, with limits such as devices have.

use std::collections::BTreeSet;
use std::sync::Mutex;

use limosa_client::dirty::{DeviceLog, DirtySource, Fused};
use limosa_client::{
    Device, DeviceIdentity, DirtyBits, DmaMap, Error, FeatureReply, FeatureRequest, IrqAction, Refers,
    Region, Result,
};
use limosa_protocol::bitmap::{runs, set_range};
use limosa_protocol::feature::{DmaLoggingRange, FeatureDmaLoggingControl, FeatureDmaLoggingReport};
use limosa_protocol::info::{DeviceInfo, IrqInfo};
use limosa_protocol::{Errno, FeatureIndex, FeatureOp};
use zerocopy::{FromBytes, IntoBytes};

const PAGE: u64 = 4096;

/// A device that logs pages of one size, in a few ranges.
struct Logger {
    identity: DeviceIdentity,
    ranges_max: usize,
    refusal: Errno,
    page_size: u64,
    report_refusal: Option<Errno>,
    /// Whether it tells where its log has pages, and whether it refuses to after the log was started.
    has_blocks: bool,
    blocks_refusal: Option<Errno>,
    looks: Mutex<Vec<(u64, u64)>>,
    ranges: Mutex<Vec<(u64, u64)>>,
    written: Mutex<BTreeSet<u64>>,
    reports: Mutex<Vec<(u64, u64)>>,
}

impl Logger {
    fn new(ranges_max: usize) -> Logger {
        Logger {
            identity: DeviceIdentity::unique(),
            ranges_max,
            refusal: Errno::E2BIG,
            page_size: PAGE,
            report_refusal: None,
            has_blocks: false,
            blocks_refusal: None,
            looks: Mutex::default(),
            ranges: Mutex::default(),
            written: Mutex::default(),
            reports: Mutex::default(),
        }
    }

    fn write(&self, address: u64) {
        if self.ranges.lock().unwrap().iter().any(|&(iova, length)| (iova..iova + length).contains(&address))
        {
            self.written.lock().unwrap().insert(address / self.page_size);
        }
    }

    fn refused(&self, errno: Errno) -> Error {
        Error::Refused { device: "logger".into(), request: "FEATURE".into(), errno, hint: "".into() }
    }
}

impl Device for Logger {
    fn name(&self) -> &str {
        "logger"
    }

    fn identity(&self) -> Option<DeviceIdentity> {
        Some(self.identity)
    }

    fn feature(&self, request: &mut FeatureRequest<'_>) -> Result<FeatureReply> {
        match (request.index, &mut request.refers) {
            (FeatureIndex::DMA_LOGGING_START, Refers::In(bytes)) => {
                let ranges = <[DmaLoggingRange]>::ref_from_bytes(bytes).unwrap();
                if ranges.len() > self.ranges_max {
                    return Err(self.refused(self.refusal));
                }
                *self.ranges.lock().unwrap() =
                    ranges.iter().map(|range| (range.iova, range.length)).collect();
                let mut control = FeatureDmaLoggingControl::read_from_bytes(request.payload).unwrap();
                control.page_size = self.page_size;
                control.write_to(request.payload).unwrap();
            }
            (FeatureIndex::DMA_LOGGING_STOP, _) => self.ranges.lock().unwrap().clear(),
            (FeatureIndex::DMA_LOGGING_REPORT, Refers::Bitmap(words)) => {
                if let Some(errno) = self.report_refusal {
                    return Err(self.refused(errno));
                }
                let report = FeatureDmaLoggingReport::read_from_bytes(request.payload).unwrap();
                assert_eq!(report.page_size, self.page_size, "its own page size is what every device knows");
                self.reports.lock().unwrap().push((report.iova, report.length));
                words.fill(0);
                let last = report.iova + (report.length - 1);
                let reported = self.written.lock().unwrap().clone();
                for page in reported.range(report.iova / self.page_size..=last / self.page_size) {
                    let bit = page - report.iova / self.page_size;
                    words[(bit / 64) as usize] |= 1 << (bit % 64);
                    self.written.lock().unwrap().remove(page);
                }
            }
            (FeatureIndex::DIRTY_BLOCKS, refers) if self.has_blocks => {
                if request.op.contains(FeatureOp::PROBE) {
                    return Ok(FeatureReply::default());
                }
                if let Some(errno) = self.blocks_refusal {
                    return Err(self.refused(errno));
                }
                let Refers::Bitmap(words) = refers else { unreachable!() };
                let asked = FeatureDmaLoggingReport::read_from_bytes(request.payload).unwrap();
                self.looks.lock().unwrap().push((asked.iova, asked.length));
                words.fill(0);
                let last = asked.iova + (asked.length - 1);
                for page in self.written.lock().unwrap().iter() {
                    let (begin, end) = (page * self.page_size, (page + 1) * self.page_size - 1);
                    if end >= asked.iova && begin <= last {
                        let block = |byte: u64| (byte - asked.iova) / asked.page_size;
                        let (first, last) = (block(begin.max(asked.iova)), block(end.min(last)));
                        set_range(words, first, last - first + 1);
                    }
                }
            }
            (_, _) => return Err(self.refused(Errno::ENOTTY)),
        }
        Ok(FeatureReply::default())
    }

    fn reset(&self) -> Result<()> {
        unreachable!()
    }
    fn info(&self) -> Result<DeviceInfo> {
        unreachable!()
    }
    fn region(&self, _: u32) -> Result<Region> {
        unreachable!()
    }
    fn irq(&self, _: u32) -> Result<IrqInfo> {
        unreachable!()
    }
    fn region_read(&self, _: u32, _: u64, _: &mut [u8]) -> Result<()> {
        unreachable!()
    }
    fn region_write(&self, _: u32, _: u64, _: &[u8]) -> Result<()> {
        unreachable!()
    }
    fn set_irqs(&self, _: u32, _: u32, _: IrqAction<'_>) -> Result<()> {
        unreachable!()
    }
    fn dma_map(&self, _: &DmaMap<'_>) -> Result<()> {
        unreachable!()
    }
    fn dma_unmap(&self, _: u64, _: u64, _: Option<DirtyBits<'_>>) -> Result<()> {
        unreachable!()
    }
}

fn ranges(at: impl IntoIterator<Item = (u64, u64)>) -> Vec<DmaLoggingRange> {
    at.into_iter().map(|(iova, length)| DmaLoggingRange { iova, length }).collect()
}

/// The pages of a report, by number from `iova` on.
fn report(source: &dyn DirtySource, iova: u64, length: u64, page_size: u64) -> Result<Vec<u64>> {
    let mut words = vec![0; length.div_ceil(page_size).div_ceil(64) as usize];
    source.report(iova, length, page_size, &mut words)?;
    Ok(runs(&words).flat_map(|(page, pages)| page..page + pages).collect())
}

#[test]
fn a_device_with_few_ranges_logs_more_never_less() {
    // A thousand pages, each apart.
    let pages = ranges((0..1000).map(|at| (at * 3 * PAGE, PAGE)));
    for (ranges_max, refusal) in
        [(256, Errno::E2BIG), (255, Errno::EINVAL), (8, Errno::ENOTSUP), (1, Errno::ENOSPC)]
    {
        let logger = Logger { refusal, ..Logger::new(ranges_max) };
        let log = DeviceLog::new(&logger);
        assert_eq!(log.start(PAGE, &pages).unwrap(), PAGE);
        let taken = logger.ranges.lock().unwrap().len();
        assert!(taken <= ranges_max && taken * 2 >= ranges_max, "{taken} of {ranges_max}");
        for range in &pages {
            logger.write(range.iova);
            assert_eq!(report(&log, range.iova, PAGE, PAGE).unwrap(), [0], "{:#x}", range.iova);
        }
        log.stop().unwrap();
        assert!(logger.ranges.lock().unwrap().is_empty());
        log.stop().unwrap();
    }
}

#[test]
fn a_device_that_is_busy_is_not_asked_again_with_fewer_ranges() {
    let logger = Logger { refusal: Errno::EBUSY, ..Logger::new(0) };
    let log = DeviceLog::new(&logger);
    let error = log.start(PAGE, &ranges([(0, PAGE), (2 * PAGE, PAGE)])).unwrap_err();
    assert_eq!(error.errno(), Some(Errno::EBUSY));
    assert!(matches!(report(&log, 0, PAGE, PAGE), Err(Error::Usage { .. })), "its log is off");
}

#[test]
fn pages_of_any_size_come_out_as_pages_of_any_size() {
    let length = 64 * PAGE;
    for log_page_size in [PAGE, 2 * PAGE, 16 * PAGE, 256 * PAGE] {
        for page_size in [PAGE, 4 * PAGE, 64 * PAGE] {
            let logger = Logger { page_size: log_page_size, ..Logger::new(1) };
            let log = DeviceLog::new(&logger);
            let iova = 256 * PAGE;
            assert_eq!(log.start(PAGE, &ranges([(iova, length)])).unwrap(), log_page_size);
            let at = 37 * PAGE;
            logger.write(iova + at);
            let pages = report(&log, iova, length, page_size).unwrap();
            assert!(pages.contains(&(at / page_size)), "{pages:?}");
            let most = (log_page_size.min(length) / page_size).max(1);
            assert_eq!(pages.len() as u64, most, "no more than the log's page: {pages:?}");
            assert!(report(&log, iova, length, page_size).unwrap().is_empty(), "cleared");
        }
    }
}

#[test]
fn a_report_adds_to_the_bitmap() {
    let logger = Logger::new(1);
    let log = DeviceLog::new(&logger);
    log.start(PAGE, &ranges([(0, 8 * PAGE)])).unwrap();
    logger.write(PAGE);
    let mut words = [0b1000_0000_0100];
    log.report(0, 8 * PAGE, PAGE, &mut words).unwrap();
    assert_eq!(words, [0b1000_0000_0110]);
}

#[test]
fn a_long_report_is_made_of_several() {
    let logger = Logger::new(1);
    let log = DeviceLog::new(&logger);
    let length = 40 << 30;
    log.start(PAGE, &ranges([(1 << 40, length)])).unwrap();
    let pages = [0, 4 << 20, (4 << 20) + 1, (10 << 20) - 1];
    pages.iter().for_each(|page| logger.write((1 << 40) + page * PAGE));
    assert_eq!(report(&log, 1 << 40, length, PAGE).unwrap(), pages);
    let reports = logger.reports.lock().unwrap();
    assert_eq!(reports.len(), 3, "{reports:?}");
    assert_eq!(reports.iter().map(|(_, length)| length).sum::<u64>(), length);
}

#[test]
fn a_report_in_large_pages_was_one_request_with_a_bitmap_of_32_mib() {
    let bitmap_bytes_max = 512 << 10;
    for (log_page_size, page_size) in [(PAGE, PAGE), (PAGE, 2 << 20), (PAGE, 1 << 30), (2 << 20, PAGE)] {
        let logger = Logger { page_size: log_page_size, ..Logger::new(1) };
        let log = DeviceLog::new(&logger);
        // Begins and ends within pages of the caller's, and of the log's where these are large.
        let (iova, length) = ((1 << 40) + 3 * PAGE, (40 << 30) + 2 * PAGE);
        log.start(PAGE, &ranges([(iova, length)])).unwrap();
        let written = [0, 16 << 30, (16 << 30) + 5 * PAGE, length - 1];
        written.iter().for_each(|at| logger.write(iova + at));
        let pages = report(&log, iova, length, page_size).unwrap();
        let missing = written.iter().find(|at| !pages.contains(&(*at / page_size)));
        assert_eq!(missing, None, "{page_size} of {log_page_size}");
        let reports = logger.reports.lock().unwrap();
        let bytes = |length: u64| length.div_ceil(log_page_size).div_ceil(64) * 8;
        assert!(reports.iter().all(|(_, length)| bytes(*length) <= bitmap_bytes_max), "{reports:?}");
        assert_eq!(reports.len(), if log_page_size == PAGE { 3 } else { 1 }, "{reports:?}");
        // They follow one another, and none begins within a page of the log that the one before has had.
        assert_eq!(reports.iter().map(|(_, length)| length).sum::<u64>(), length);
        assert!(reports[1..].iter().all(|(iova, _)| iova.is_multiple_of(log_page_size)), "{reports:?}");
    }
}

#[test]
fn a_stop_read_the_whole_log_of_a_device_that_had_written_nothing() {
    let (iova, length) = (1 << 40, 1 << 40);
    let log_of = |logger| (Logger { has_blocks: true, ..logger }, ranges([(iova, length)]));
    let (logger, logged) = log_of(Logger::new(1));
    let log = DeviceLog::new(&logger);
    log.start(PAGE, &logged).unwrap();
    assert!(log.state().unwrap().has_blocks);
    let mut pieces = Vec::new();
    log.report_in_pieces(iova, length, &mut Vec::new(), |_, _, _| panic!("nothing was written")).unwrap();
    assert_eq!(logger.looks.lock().unwrap().len(), 4, "256 GiB each");
    assert!(logger.reports.lock().unwrap().is_empty());

    // The first and the last page, and some that are close to each other.
    let written = [0, 300 << 30, (300 << 30) + (17 << 20), (300 << 30) + (200 << 20), length - PAGE];
    written.iter().for_each(|at| logger.write(iova + at));
    let take = |from: limosa_protocol::bitmap::Grid, bytes, words: &mut [u64]| {
        pieces.extend(runs(words).flat_map(|(page, pages)| page..page + pages).map(|page| {
            assert!(page * PAGE < bytes);
            from.iova - iova + page * PAGE
        }));
        words.fill(0);
    };
    log.report_in_pieces(iova, length, &mut Vec::new(), take).unwrap();
    assert_eq!(pieces, written);
    let block = 16 << 20;
    let expected = [(0, block), (300 << 30, 13 * block), (length - block, block)];
    assert_eq!(*logger.reports.lock().unwrap(), expected.map(|(at, bytes)| (iova + at, bytes)));
    assert!(logger.written.lock().unwrap().is_empty(), "cleared");
}

#[test]
fn a_device_that_no_longer_tells_its_blocks_is_read_as_a_whole() {
    let length = 40 << 30;
    let logger = Logger { has_blocks: true, blocks_refusal: Some(Errno::ENOTTY), ..Logger::new(1) };
    let log = DeviceLog::new(&logger);
    log.start(PAGE, &ranges([(0, length)])).unwrap();
    logger.write(30 << 30);
    assert_eq!(report(&log, 0, length, PAGE).unwrap(), [(30 << 30) / PAGE]);
    assert_eq!(logger.reports.lock().unwrap().iter().map(|(_, bytes)| bytes).sum::<u64>(), length);
}

#[test]
fn a_log_is_told_the_same_with_blocks_and_without() {
    let mut seed = 1_u64;
    for case in 0..200 {
        let mut random = |below: u64| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) % below
        };
        let page_size = PAGE << random(10);
        let (iova, length) = (random(1 << 20) * page_size, (1 + random(1 << 24)) * PAGE);
        let loggers = [true, false].map(|has_blocks| Logger { has_blocks, page_size, ..Logger::new(1) });
        let logs = loggers.each_ref().map(|logger| DeviceLog::new(logger));
        logs.iter()
            .for_each(|log| assert_eq!(log.start(PAGE, &ranges([(iova, length)])).unwrap(), page_size));
        for _ in 0..random(30) {
            let at = iova + random(length / PAGE) * PAGE;
            loggers.iter().for_each(|logger| logger.write(at));
        }
        let caller = PAGE << random(12);
        let [with, without] = logs.each_ref().map(|log| report(log, iova, length, caller).unwrap());
        assert_eq!(with, without, "case {case}: {length:#x} bytes at {iova:#x}, pages of {page_size}");
        assert!(loggers[0].written.lock().unwrap().is_empty(), "case {case}");
    }
}

#[test]
fn what_cannot_be_reported_is_refused_before_the_device_is_asked() {
    let logger = Logger::new(1);
    let log = DeviceLog::new(&logger);
    log.start(PAGE, &ranges([(0, 65 * PAGE)])).unwrap();
    for (iova, length, page_size, words) in [
        (0, 0, PAGE, 1),
        (0, PAGE, 1000, 1),
        (0, PAGE, 2048, 1),
        (0, 65 * PAGE, PAGE, 1),
        (u64::MAX, 2, PAGE, 1),
    ] {
        let error = log.report(iova, length, page_size, &mut vec![0; words]).unwrap_err();
        assert!(matches!(error, Error::Usage { .. }), "{error}");
    }
    assert!(logger.reports.lock().unwrap().is_empty());
}

#[test]
fn several_sources_are_one() {
    let (fine, coarse) = (Logger::new(8), Logger { page_size: 4 * PAGE, ..Logger::new(8) });
    let (fine_log, coarse_log) = (DeviceLog::new(&fine), DeviceLog::new(&coarse));
    let both = Fused::new(vec![&fine_log, &coarse_log]);
    assert!(both.sees(&fine) && both.sees(&coarse));
    assert_eq!(both.start(PAGE, &ranges([(0, 64 * PAGE)])).unwrap(), 4 * PAGE);
    fine.write(PAGE);
    coarse.write(9 * PAGE);
    assert_eq!(report(&both, 0, 64 * PAGE, PAGE).unwrap(), [1, 8, 9, 10, 11]);
    both.stop().unwrap();
    assert!(fine.ranges.lock().unwrap().is_empty() && coarse.ranges.lock().unwrap().is_empty());
}

#[test]
fn a_device_of_the_same_name_as_another_is_not_taken_for_it() {
    let (logger, namesake) = (Logger::new(1), Logger::new(1));
    let log = DeviceLog::new(&logger);
    assert_eq!(logger.name(), namesake.name());
    assert!(log.sees(&logger) && !log.sees(&namesake));
    assert!(!Fused::new(vec![&log]).sees(&namesake));
}

#[test]
fn a_source_that_fails_makes_its_range_dirty_and_no_more() {
    let (works, fails) = (Logger::new(8), Logger { report_refusal: Some(Errno::EIO), ..Logger::new(8) });
    let (works_log, fails_log) = (DeviceLog::new(&works), DeviceLog::new(&fails));
    let both = Fused::new(vec![&fails_log, &works_log]);
    both.start(PAGE, &ranges([(0, 64 * PAGE)])).unwrap();
    assert_eq!(report(&both, 0, 5 * PAGE, PAGE).unwrap(), [0, 1, 2, 3, 4]);
}

#[test]
fn a_source_that_does_not_start_stops_the_others() {
    let (works, fails) = (Logger::new(8), Logger { refusal: Errno::EBUSY, ..Logger::new(0) });
    let (works_log, fails_log) = (DeviceLog::new(&works), DeviceLog::new(&fails));
    let both = Fused::new(vec![&works_log, &fails_log]);
    both.start(PAGE, &ranges([(0, 64 * PAGE)])).unwrap_err();
    assert!(works.ranges.lock().unwrap().is_empty(), "stopped");
}
