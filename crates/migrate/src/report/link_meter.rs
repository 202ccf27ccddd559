//! [`LinkMeter`]: the bytes and times of one link.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::LinkReport;
use super::record::{nanoseconds, ns};
use crate::lock::lock;

/// Counts the traffic of one link, from any thread.
#[derive(Clone, Debug)]
pub(crate) struct LinkMeter {
    began: Instant,
    link: Arc<Mutex<LinkReport>>,
}

impl LinkMeter {
    pub(super) fn new(began: Instant, link: Arc<Mutex<LinkReport>>) -> LinkMeter {
        LinkMeter { began, link }
    }

    /// Bytes were written, in a call that began then.
    pub(crate) fn sent(&self, bytes: usize, since: Instant) {
        self.add(bytes, since, |link| link.sent_bytes += bytes as u64);
    }

    /// Bytes were read, in a call that began then.
    pub(crate) fn received(&self, bytes: usize, since: Instant) {
        self.add(bytes, since, |link| link.received_bytes += bytes as u64);
    }

    fn add(&self, bytes: usize, since: Instant, count: impl FnOnce(&mut LinkReport)) {
        let now = limosa_clockwork::now();
        let at = now.saturating_duration_since(self.began);
        let mut link = lock(&self.link);
        if link.sent_bytes == 0 && link.received_bytes == 0 {
            link.start_ns = nanoseconds(at);
        }
        count(&mut link);
        link.duration_ns = nanoseconds(at).saturating_sub(link.start_ns);
        link.waited_ns = link.waited_ns.saturating_add(ns(since, now));
        link.throughput.add(at, bytes as u64);
    }
}
