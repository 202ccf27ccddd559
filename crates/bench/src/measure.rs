//! Times contenders in turns, so that what disturbs the machine disturbs all of them alike.

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
    /// One in a hundred was slower.
    pub p99_ns: u64,
    /// How many were timed.
    pub operations: usize,
}

/// Turns that every contender gets; the first is not counted.
const TURNS: u32 = 16;

/// The most operations timed for each contender in one turn: bounds memory, not accuracy.
const OPERATIONS_PER_TURN_MAX: usize = 1 << 16;

/// Times each contender for about `each`, in turns.
pub fn in_turns(contenders: &mut [Contender<'_>], each: Duration) -> anyhow::Result<Vec<Timing>> {
    let mut samples = vec![Vec::new(); contenders.len()];
    for turn in 0..=TURNS {
        for (contender, samples) in contenders.iter_mut().zip(&mut samples) {
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
        }
    }
    Ok(contenders.iter().zip(samples).map(|(contender, samples)| timing(contender.name, samples)).collect())
}

fn timing(name: &'static str, mut samples: Vec<u64>) -> Timing {
    samples.sort_unstable();
    let at = |percent: usize| samples[(samples.len() - 1) * percent / 100];
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
        assert!(timings.iter().all(|t| t.operations >= TURNS as usize));
    }

    #[test]
    fn a_failing_contender_ends_the_run() {
        let failing = Contender::new("x", || anyhow::bail!("no"));
        assert!(in_turns(&mut [failing], Duration::from_millis(1)).is_err());
    }
}
