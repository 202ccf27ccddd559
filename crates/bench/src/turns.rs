//! Times contenders in turns, so that a disturbance of the machine affects all of them alike.

use std::time::{Duration, Instant};

use serde::Serialize;

/// One thing to time.
pub struct Contender<'a> {
    /// Its name in the table.
    pub name: &'static str,
    /// Called before each operation, not timed.
    pub prepare: Box<dyn FnMut() -> anyhow::Result<()> + 'a>,
    /// One operation.
    pub run: Box<dyn FnMut() -> anyhow::Result<()> + 'a>,
}

impl<'a> Contender<'a> {
    /// A contender of this name, with nothing to prepare.
    pub fn new(name: &'static str, run: impl FnMut() -> anyhow::Result<()> + 'a) -> Contender<'a> {
        Contender { name, prepare: Box::new(|| Ok(())), run: Box::new(run) }
    }
}

/// What one contender took for an operation, in nanoseconds.
#[derive(Clone, Debug, Serialize)]
pub struct Timing {
    /// Its name.
    pub name: &'static str,
    /// The fastest.
    pub best_ns: u64,
    /// The median.
    pub p50_ns: u64,
    /// The 99th percentile.
    pub p99_ns: u64,
    /// How many were timed.
    pub operations: usize,
}

/// Turns that every contender gets; the first is not counted.
const TURNS: u32 = 16;

/// The least number of turns, however long an operation takes: with three there is a median.
const TURNS_MIN: u32 = 3;

/// The most operations timed for each contender in one turn: bounds memory, not accuracy.
const OPERATIONS_PER_TURN_MAX: usize = 1 << 16;

/// Times each contender for about `each`, in turns; for longer only where three operations take longer.
pub fn in_turns(contenders: &mut [Contender<'_>], each: Duration) -> anyhow::Result<Vec<Timing>> {
    let mut samples = vec![Vec::new(); contenders.len()];
    let mut used = vec![Duration::ZERO; contenders.len()];
    for turn in 0..=TURNS {
        // A contender whose operations take longer than its share of a turn finishes before the others.
        if turn > TURNS_MIN && used.iter().any(|used| *used >= each) {
            break;
        }
        for ((contender, samples), used) in contenders.iter_mut().zip(&mut samples).zip(&mut used) {
            let began = Instant::now();
            let mut operations = 0;
            while operations < OPERATIONS_PER_TURN_MAX && (operations == 0 || began.elapsed() < each / TURNS)
            {
                (contender.prepare)()?;
                let before = Instant::now();
                (contender.run)()?;
                let took = before.elapsed();
                if turn > 0 {
                    samples.push(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
                }
                operations += 1;
            }
            if turn > 0 {
                *used += began.elapsed();
            }
        }
    }
    Ok(contenders.iter().zip(samples).map(|(contender, samples)| timing(contender.name, samples)).collect())
}

fn timing(name: &'static str, mut samples: Vec<u64>) -> Timing {
    samples.sort_unstable();
    let at = |percent: usize| samples[(samples.len() * percent).div_ceil(100).max(1) - 1];
    Timing { name, best_ns: at(0), p50_ns: at(50), p99_ns: at(99), operations: samples.len() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_contender_gets_its_turns_and_quantiles_are_ordered() {
        let (mut a, mut b) = (0_usize, 0_usize);
        let timings = in_turns(
            &mut [
                Contender::new("a", || {
                    a += 1;
                    Ok(())
                }),
                Contender::new("b", || {
                    b += 1;
                    Ok(())
                }),
            ],
            Duration::from_millis(1),
        )
        .unwrap();
        assert!(timings.iter().all(|t| t.best_ns <= t.p50_ns && t.p50_ns <= t.p99_ns));
        assert!(a > timings[0].operations && b > timings[1].operations, "the first turn is not counted");
        assert!(timings.iter().all(|t| t.operations >= TURNS_MIN as usize));
    }

    #[test]
    fn one_that_takes_longer_than_all_of_its_time_is_not_run_once_a_turn_for_that() {
        let mut slow = 0;
        let timings = in_turns(
            &mut [
                Contender::new("slow", || {
                    slow += 1;
                    std::thread::sleep(Duration::from_millis(2));
                    Ok(())
                }),
                Contender::new("fast", || Ok(())),
            ],
            Duration::from_micros(1),
        )
        .unwrap();
        assert_eq!((slow, timings[0].operations), (1 + TURNS_MIN, TURNS_MIN as usize));
        assert!(timings[0].p50_ns <= timings[0].p99_ns && timings[1].operations > 0);
    }

    #[test]
    fn of_few_samples_the_slowest_is_the_hundredth() {
        let three = timing("three", vec![3, 1, 2]);
        assert_eq!((three.best_ns, three.p50_ns, three.p99_ns), (1, 2, 3));
        let one = timing("one", vec![5]);
        assert_eq!((one.best_ns, one.p50_ns, one.p99_ns), (5, 5, 5));
        let many = timing("many", (1..=1000).collect());
        assert_eq!((many.p50_ns, many.p99_ns), (500, 990));
    }

    #[test]
    fn a_failing_contender_ends_the_run() {
        let failing = Contender::new("x", || anyhow::bail!("no"));
        assert!(in_turns(&mut [failing], Duration::from_millis(1)).is_err());
    }
}
