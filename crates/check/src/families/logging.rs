//! DMA logging (`vfio.h: VFIO_DEVICE_FEATURE_DMA_LOGGING_START`, `_STOP`, `_REPORT`).

use limosa_client::{Device, DeviceExt, FeatureRequest, Refers, Result};
use limosa_protocol::feature::{DmaLoggingRange, FeatureDmaLoggingReport};
use limosa_protocol::logging::RANGES_MAX;
use limosa_protocol::{Errno, FeatureIndex, FeatureOp, State};
use zerocopy::IntoBytes;

use crate::check::{Check, Family, Needs, Stop, Verdict, ensure, fail};
use crate::survey::LOGGED;
use crate::trial::{Trial, refused, refused_somehow};

const PAGE: u64 = 4096;

/// Starts logging the range of these checks; the page size that the device chose.
pub(super) fn start(t: &Trial) -> Result<u64, Stop> {
    let page_size = t.device()?.dma_logging_start(PAGE, &[LOGGED])?;
    ensure(page_size.is_power_of_two(), || {
        format!("START is answered with a page size of {page_size}, expected a power of two")
    })?;
    Ok(page_size)
}

fn report(t: &Trial, iova: u64, length: u64, page_size: u64) -> Result<Vec<u64>, Stop> {
    let mut words = vec![0; length.div_ceil(page_size).div_ceil(64) as usize];
    t.device()?.dma_logging_report(iova, length, page_size, &mut words)?;
    Ok(words)
}

/// A report whose arguments are passed on as they are, with room for its bitmap.
fn raw_report(t: &Trial, iova: u64, length: u64, page_size: u64) -> Result<Result<()>, Stop> {
    let mut payload = FeatureDmaLoggingReport { iova, length, page_size };
    let mut words = vec![0; 64];
    let request = &mut FeatureRequest {
        index: FeatureIndex::DMA_LOGGING_REPORT,
        op: FeatureOp::GET,
        payload: payload.as_mut_bytes(),
        refers: Refers::Bitmap(&mut words),
    };
    Ok(t.device()?.feature(request).map(drop))
}

fn range(iova: u64, length: u64) -> DmaLoggingRange {
    DmaLoggingRange { iova, length }
}

pub(super) fn checks() -> Vec<Check> {
    let check = |id: &'static str, needs, clauses: &[&'static str], body: fn(&mut Trial) -> Verdict| {
        Check::new(Family::Logging, id, needs, clauses, body)
    };
    let (logging, migration) = (Needs::LOGGING, Needs::LOGGING | Needs::MIGRATION);
    let kernel = Needs::LOGGING | Needs::KERNEL_RANGES;
    let mut checks = vec![
        check("logging.start-and-stop", logging, &["log.start-stop"], |t| {
            for _ in 0..5 {
                start(t)?;
                t.device()?.dma_logging_stop()?;
            }
            Ok(())
        }),
        check("logging.page-size", logging, &["log.page-size"], |t| {
            let page_size = start(t)?;
            ensure(page_size >= PAGE, || format!("the log's pages have {page_size} bytes"))
        }),
        check("logging.page-size-hint-64k", logging, &["log.page-size"], |t| {
            let page_size = t.device()?.dma_logging_start(64 << 10, &[LOGGED])?;
            ensure(page_size.is_power_of_two(), || {
                format!("START with a hint of 64 KiB is answered with {page_size}, expected a power of two")
            })
        }),
        check("logging.start-twice", logging, &["log.twice"], |t| {
            start(t)?;
            refused_somehow(t.device()?.dma_logging_start(PAGE, &[LOGGED]), "a second START")?;
            report(t, LOGGED.iova, LOGGED.length, PAGE).map(drop)
        }),
        check("logging.several-ranges", logging, &["log.start-stop", "log.report"], |t| {
            let ranges = [range(0x1000_0000, 0x10_0000), range(0x2000_0000, 0x10_0000)];
            t.device()?.dma_logging_start(PAGE, &ranges)?;
            ranges.iter().try_for_each(|range| report(t, range.iova, range.length, PAGE).map(drop))
        }),
        check("logging.neighbouring-ranges", logging, &["log.start-stop"], |t| {
            let ranges = [range(0x1000_0000, 0x10_0000), range(0x1010_0000, 0x10_0000)];
            t.device()?.dma_logging_start(PAGE, &ranges).map(drop).map_err(Into::into)
        }),
        check("logging.empty-range", logging, &["log.empty"], |t| {
            match t.device()?.dma_logging_start(PAGE, &[range(LOGGED.iova, 0)]) {
                Ok(_) => Ok(()),
                refusal => refused(refusal, "an empty range", &[Errno::EINVAL]),
            }
        }),
        check("logging.misaligned-iova", logging, &["log.ranges"], |t| {
            let answer = t.device()?.dma_logging_start(PAGE, &[range(LOGGED.iova + 1, PAGE)]);
            refused(answer, "a range that begins within a page", &[Errno::EINVAL])
        }),
        check("logging.misaligned-length", logging, &["log.ranges"], |t| {
            let answer = t.device()?.dma_logging_start(PAGE, &[range(LOGGED.iova, PAGE + 1)]);
            refused(answer, "a range that ends within a page", &[Errno::EINVAL])
        }),
        check("logging.overlapping-ranges", logging, &["log.ranges"], |t| {
            let ranges = [range(LOGGED.iova, 4 * PAGE), range(LOGGED.iova + PAGE, PAGE)];
            refused(t.device()?.dma_logging_start(PAGE, &ranges), "ranges that overlap", &[Errno::EINVAL])
        }),
        check("logging.same-range-twice", logging, &["log.ranges"], |t| {
            let answer = t.device()?.dma_logging_start(PAGE, &[LOGGED, LOGGED]);
            refused(answer, "a range twice", &[Errno::EINVAL])
        }),
        check("logging.no-ranges", kernel, &["log.ranges"], |t| {
            refused(t.device()?.dma_logging_start(PAGE, &[]), "START without ranges", &[Errno::EINVAL])
        }),
        check("logging.range-overflows", logging, &["log.overflow"], |t| {
            let answer = t.device()?.dma_logging_start(PAGE, &[range(u64::MAX - PAGE + 1, 2 * PAGE)]);
            refused(answer, "a range that ends beyond 2^64", &[Errno::EOVERFLOW])
        }),
        check("logging.too-many-ranges", kernel, &["log.too-many"], |t| {
            let ranges: Vec<_> = (0..=RANGES_MAX as u64).map(|n| range(n * 2 * PAGE, PAGE)).collect();
            refused(t.device()?.dma_logging_start(PAGE, &ranges), "257 ranges", &[Errno::E2BIG])
        }),
        check("logging.refused-start-leaves-it-off", logging, &["log.start-stop"], |t| {
            let _ = t.device()?.dma_logging_start(PAGE, &[range(LOGGED.iova + 1, PAGE)]);
            start(t).map(drop)
        }),
        check("logging.report", logging, &["log.report"], |t| {
            start(t)?;
            report(t, LOGGED.iova, LOGGED.length, PAGE).map(drop)
        }),
        check("logging.report-of-a-part", logging, &["log.report"], |t| {
            start(t)?;
            report(t, LOGGED.iova + 16 * PAGE, PAGE, PAGE)?;
            report(t, LOGGED.iova + LOGGED.length - 3 * PAGE, 3 * PAGE, PAGE).map(drop)
        }),
        check("logging.report-clears", logging, &["log.read-clear"], |t| {
            start(t)?;
            report(t, LOGGED.iova, LOGGED.length, PAGE)?;
            // No memory is mapped there: the device cannot write it.
            let again = report(t, LOGGED.iova, LOGGED.length, PAGE)?;
            let set: u32 = again.iter().map(|word| word.count_ones()).sum();
            ensure(set == 0, || {
                let word = again.iter().zip(0u64..).find(|(word, _)| **word != 0);
                let first = word.map_or(0, |(word, at)| 64 * at + u64::from(word.trailing_zeros()));
                let first = LOGGED.iova + first * PAGE;
                format!(
                    "a second report has {set} pages, the first of them at {first:#x}, expected none: nothing wrote meanwhile"
                )
            })
        }),
        check("logging.report-stays-in-its-range", logging, &["log.report-bounds"], |t| {
            start(t)?;
            let mut words = [0u64; 4];
            t.device()?.dma_logging_report(LOGGED.iova, 3 * PAGE, PAGE, &mut words)?;
            ensure(words[0] & !7 == 0 && words[1..] == [0; 3], || {
                format!("a report of 3 pages set bits beyond them: {words:x?}")
            })
        }),
        check("logging.report-while-off", logging, &["log.report-off"], |t| {
            refused_somehow(raw_report(t, LOGGED.iova, PAGE, PAGE)?, "a report while logging is off")
        }),
        check("logging.report-after-stop", logging, &["log.report-off", "log.start-stop"], |t| {
            start(t)?;
            t.device()?.dma_logging_stop()?;
            refused_somehow(raw_report(t, LOGGED.iova, PAGE, PAGE)?, "a report after STOP")
        }),
        check("logging.report-of-nothing", logging, &["log.report-args"], |t| {
            start(t)?;
            refused(raw_report(t, LOGGED.iova, 0, PAGE)?, "a report of no bytes", &[Errno::EINVAL])
        }),
        check("logging.report-overflows", logging, &["log.report-args"], |t| {
            start(t)?;
            let answer = raw_report(t, u64::MAX - PAGE + 1, 2 * PAGE, PAGE)?;
            refused(answer, "a report that ends beyond 2^64", &[Errno::EOVERFLOW])
        }),
        check("logging.goes-on-while-stopped", migration, &["log.states"], |t| {
            start(t)?;
            t.go(State::Stop)?;
            report(t, LOGGED.iova, LOGGED.length, PAGE)?;
            let _stream = t.session(State::StopCopy)?;
            report(t, LOGGED.iova, LOGGED.length, PAGE)?;
            t.go(State::Running)?;
            report(t, LOGGED.iova, LOGGED.length, PAGE).map(drop)
        }),
        check("logging.starts-in-stop", migration, &["log.states"], |t| {
            t.go(State::Stop)?;
            start(t)?;
            t.go(State::Running)?;
            report(t, LOGGED.iova, LOGGED.length, PAGE).map(drop)
        }),
        check("logging.absent", Needs::NO_LOGGING, &["log.absent"], |t| {
            let answer = t.device()?.dma_logging_start(PAGE, &[LOGGED]);
            refused(answer, "START", &[Errno::ENOTTY, Errno::EINVAL])?;
            refused(t.device()?.dma_logging_stop(), "STOP", &[Errno::ENOTTY, Errno::EINVAL])
        }),
    ];
    for page_size in [0u64, 1, 2048, 4095, 5000, 12288] {
        let id = format!("logging.report-pages-of-{page_size}");
        checks.push(Check::new(Family::Logging, id, logging, &["log.report-args"], move |t| {
            start(t)?;
            let what = format!("a report with pages of {page_size} bytes");
            refused(raw_report(t, LOGGED.iova, 16 * PAGE, page_size)?, &what, &[Errno::EINVAL])
        }));
    }
    for page_size in [PAGE, 2 * PAGE, 64 << 10, 2 << 20] {
        let id = format!("logging.report-in-pages-of-{page_size}");
        checks.push(Check::new(Family::Logging, id, logging, &["log.report-pages"], move |t| {
            start(t)?;
            match report(t, LOGGED.iova, LOGGED.length, page_size) {
                Ok(_) => Ok(()),
                Err(Stop::Fail(what)) => fail(what),
                Err(skip) => Err(skip),
            }
        }));
    }
    checks
}
