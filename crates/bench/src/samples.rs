//! [`Sampler`]: the times of one measure, taken within its share, and their statistics.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use crate::document::{Beside, Measure};
use crate::floor::Floor;

/// The most operations of one measure: bounds memory, not accuracy.
const SAMPLES_MAX: usize = 1 << 18;

/// With this many operations or more the first one is not counted: caches were cold.
const WARM: usize = 8;

/// Parts of a run whose medians make the spread, and the fewest samples that have one.
const PARTS: usize = 8;
const SPREAD_SAMPLES_MIN: usize = 3;

/// A histogram's significant digits.
const DIGITS: u8 = 2;

/// Bounds of the sampling of one measure.
#[derive(Clone, Debug)]
pub(crate) struct Sampler {
    /// The share of the measure. It is exceeded by one operation at most.
    pub each: Duration,
    /// Set to end it.
    pub cancel: Arc<AtomicBool>,
}

/// The time of one operation, and the bytes that it moved.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Took {
    pub time: Duration,
    pub bytes: u64,
}

/// A baseline, timed alternately with a measure.
pub(crate) struct Baseline<'a> {
    pub name: &'static str,
    pub run: &'a mut dyn FnMut() -> anyhow::Result<()>,
}

/// Times a call.
pub(crate) fn timed<T, E>(bytes: u64, call: impl FnOnce() -> Result<T, E>) -> Result<(T, Took), E> {
    let began = Instant::now();
    let value = call()?;
    Ok((value, Took { time: began.elapsed(), bytes }))
}

impl Sampler {
    /// Runs operations until the share is used, at least one, and alternates with operations of the floor if there is one. The
    /// preparation of an operation counts against the share, but not as its time.
    pub fn run(
        &self,
        id: impl Into<String>,
        floor: Option<&mut Floor>,
        operation: impl FnMut() -> anyhow::Result<Took>,
    ) -> anyhow::Result<Measure> {
        let Some(floor) = floor else { return self.run_beside(id, None, operation) };
        let mut round_trip = || floor.round_trip();
        self.run_beside(id, Some(Baseline { name: "floor", run: &mut round_trip }), operation)
    }

    /// The same beside another baseline.
    pub fn run_beside(
        &self,
        id: impl Into<String>,
        mut baseline: Option<Baseline<'_>>,
        mut operation: impl FnMut() -> anyhow::Result<Took>,
    ) -> anyhow::Result<Measure> {
        let (mut times, mut beside, mut bytes) = (Vec::new(), Vec::new(), 0_u64);
        let began = Instant::now();
        loop {
            let took = operation()?;
            times.push(nanoseconds(took.time));
            bytes += took.bytes;
            if let Some(baseline) = &mut baseline {
                let ((), took) = timed(0, &mut *baseline.run)?;
                beside.push(nanoseconds(took.time));
            }
            let is_over = began.elapsed() >= self.each || self.cancel.load(Ordering::Relaxed);
            if is_over || times.len() == SAMPLES_MAX {
                break;
            }
        }
        let mean = bytes / times.len() as u64;
        let beside = baseline.map(|baseline| Beside {
            name: baseline.name.into(),
            p50_ns: median(&beside),
            samples: beside.len() as u64,
        });
        Ok(Measure { beside, ..measure(id.into(), mean, times) })
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// The median of some numbers; 0 if there are none.
fn median(times: &[u64]) -> u64 {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len().saturating_sub(1) / 2).copied().unwrap_or(0)
}

/// The measure of these times in ns, which are in the order in which they were taken.
pub(crate) fn measure(id: String, bytes: u64, mut times: Vec<u64>) -> Measure {
    if times.len() >= WARM {
        times.remove(0);
    }
    let spread_ns = (times.len() >= SPREAD_SAMPLES_MIN).then(|| {
        let part = times.len().div_ceil(PARTS);
        let medians: Vec<u64> = times.chunks(part).map(median).collect();
        (medians.iter().copied().min().unwrap_or(0), medians.iter().copied().max().unwrap_or(0))
    });
    let mut histogram = Histogram::<u64>::new(DIGITS).expect("0 to 5 digits are right");
    for time in &times {
        // It resizes itself for its values, which does not fail for values of 62 bits.
        let _ = histogram.record((*time).min(1 << 62));
    }
    let at = |quantile: f64| histogram.value_at_quantile(quantile);
    let buckets = histogram
        .iter_recorded()
        .map(|bucket| (bucket.value_iterated_to(), bucket.count_since_last_iteration()));
    Measure {
        id,
        bytes,
        samples: times.len() as u64,
        best_ns: times.iter().copied().min().unwrap_or(0),
        p50_ns: median(&times),
        p90_ns: at(0.9),
        p99_ns: at(0.99),
        max_ns: times.iter().copied().max().unwrap_or(0),
        spread_ns,
        histogram: buckets.collect(),
        beside: None,
        note: (times.len() == 1).then(|| "one sample".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(each: Duration) -> Sampler {
        Sampler { each, cancel: Arc::default() }
    }

    #[test]
    fn a_slow_operation_is_sampled_once_and_says_so() {
        let mut runs = 0;
        let measure = sampler(Duration::from_nanos(1)).run("slow", None, || {
            runs += 1;
            Ok(Took { time: Duration::from_secs(3), bytes: 7 })
        });
        let measure = measure.unwrap();
        assert_eq!((runs, measure.samples, measure.p50_ns, measure.bytes), (1, 1, 3_000_000_000, 7));
        assert_eq!((measure.spread_ns, measure.note.as_deref()), (None, Some("one sample")));
    }

    #[test]
    fn one_that_is_called_off_ends_and_one_that_fails_fails() {
        let sampler = sampler(Duration::from_secs(86_400));
        let cancel = Arc::clone(&sampler.cancel);
        let mut runs = 0;
        let measure = sampler.run("x", None, || {
            runs += 1;
            cancel.store(runs == 5, Ordering::Relaxed);
            Ok(Took { time: Duration::from_nanos(runs), bytes: 0 })
        });
        assert_eq!(measure.unwrap().samples, 5);
        assert!(sampler.run("x", None, || anyhow::bail!("no")).is_err());
    }

    #[test]
    fn the_spread_is_that_of_the_parts_and_quantiles_are_ordered() {
        // The machine was disturbed for an eighth of the run.
        let times = (0..801).map(|at| if at < 701 { 1000 } else { 2000 }).collect();
        let measured = measure("x".into(), 0, times);
        assert_eq!((measured.samples, measured.p50_ns, measured.spread_ns), (800, 1000, Some((1000, 2000))));
        assert!(measured.best_ns <= measured.p50_ns && measured.p50_ns <= measured.p99_ns);
        let counted: u64 = measured.histogram.iter().map(|bucket| bucket.1).sum();
        assert_eq!(counted, 800);
        assert!((1980..=2020).contains(&measured.p99_ns), "{}", measured.p99_ns);
        assert!(measured.histogram.windows(2).all(|two| two[0].0 < two[1].0));
        let three = measure("x".into(), 0, vec![3, 1, 2]);
        assert_eq!((three.samples, three.best_ns, three.p50_ns, three.max_ns), (3, 1, 2, 3));
        assert_eq!(three.spread_ns, Some((1, 3)));
        let largest = measure("x".into(), 0, vec![u64::MAX]);
        assert_eq!(largest.max_ns, u64::MAX);
    }
}
