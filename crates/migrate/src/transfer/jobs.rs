//! [`JobCount`]: how many jobs of all devices are not done, so that only the last of them wakes the thread that waits for all.

use super::team::{Shared, Team};
use crate::Result;

/// The jobs of all devices of a source together.
pub(crate) struct JobCount {
    counts: Shared<Counts>,
    devices: usize,
}

#[derive(Default)]
struct Counts {
    /// The jobs that are not done.
    left: usize,
    /// The devices in STOP_COPY.
    stopped: usize,
}

impl JobCount {
    pub(crate) fn new(team: &Team, devices: usize) -> JobCount {
        JobCount { counts: team.share(Counts::default()), devices }
    }

    /// Devices are given this many jobs.
    pub(crate) fn add(&self, jobs: usize) {
        self.counts.lock().left += jobs;
    }

    /// A job is done.
    pub(crate) fn is_done(&self) {
        let mut counts = self.counts.lock();
        counts.left -= 1;
        if counts.left == 0 {
            drop(counts);
            self.counts.notify_all();
        }
    }

    /// One more device is in STOP_COPY. Returns whether all are.
    pub(crate) fn device_stopped(&self) -> bool {
        let mut counts = self.counts.lock();
        counts.stopped += 1;
        counts.stopped == self.devices
    }

    /// Waits until all jobs are done.
    pub(crate) fn wait(&self, team: &Team) -> Result<()> {
        team.wait(&self.counts, self.counts.lock(), None, |counts| counts.left == 0).map(drop)
    }

    /// Waits until all jobs are done, also after the work of the team has ended.
    pub(crate) fn wait_to_the_end(&self) {
        let mut counts = self.counts.lock();
        while counts.left > 0 {
            (counts, _) = self.counts.wait(counts, None);
        }
    }
}
