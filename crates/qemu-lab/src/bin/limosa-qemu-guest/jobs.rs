//! Jobs: each on a thread of its own, again and again.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use limosa_qemu_lab::{GuestJob, JobCounts};

use crate::dma::Dma;
use crate::messages::Messages;
use crate::serial::Serial;

/// How long a device may take for what it does in milliseconds, on a busy machine and with its server replaced meanwhile.
const PATIENCE: Duration = Duration::from_secs(20);

/// How many faults are kept in words.
const FAULTS_MAX: usize = 8;

/// One round of a job.
pub(crate) trait Job: Send + 'static {
    /// What was not as it had to be.
    fn round(&mut self, round: u64) -> Result<(), String>;
}

#[derive(Default)]
pub(crate) struct Jobs {
    running: Vec<(GuestJob, Arc<Counter>)>,
}

#[derive(Default)]
struct Counter {
    counts: Mutex<JobCounts>,
    news: Condvar,
}

impl Jobs {
    pub(crate) fn start(&mut self, job: GuestJob) -> Result<(), String> {
        let mut work: Box<dyn Job> = match job {
            GuestJob::Serial => Box::new(Serial::find()?),
            GuestJob::Dma => Box::new(Dma::find()?),
            GuestJob::Messages => Box::new(Messages::find()?),
        };
        let counter = Arc::new(Counter::default());
        self.running.push((job, Arc::clone(&counter)));
        std::thread::spawn(move || {
            for round in 0.. {
                let done = work.round(round);
                let mut counts = counter.lock();
                counts.rounds += 1;
                if let Err(fault) = done {
                    println!("{job:?}, round {round}: {fault}");
                    counts.wrong += 1;
                    if counts.faults.len() < FAULTS_MAX {
                        counts.faults.push(format!("round {round}: {fault}"));
                    }
                }
                counter.news.notify_all();
            }
        });
        Ok(())
    }

    /// Waits until each job has done this many rounds more.
    pub(crate) fn advance(&self, rounds: u64) -> Vec<(GuestJob, JobCounts)> {
        let targets: Vec<u64> =
            self.running.iter().map(|(_, counter)| counter.lock().rounds + rounds).collect();
        let mut found = Vec::new();
        for ((job, counter), target) in self.running.iter().zip(targets) {
            let mut counts = counter.lock();
            while counts.rounds < target {
                counts = counter.news.wait(counts).unwrap_or_else(PoisonError::into_inner);
            }
            found.push((*job, counts.clone()));
        }
        found
    }
}

impl Counter {
    fn lock(&self) -> MutexGuard<'_, JobCounts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Looks until `is_done`. A device tells a guest without a driver nothing, so the guest has to look.
pub(crate) fn look_until(what: &str, mut is_done: impl FnMut() -> bool) -> Result<(), String> {
    let until = Instant::now() + PATIENCE;
    while !is_done() {
        if Instant::now() >= until {
            return Err(format!("{what}: nothing within {PATIENCE:?}"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
