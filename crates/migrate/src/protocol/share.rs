//! [`LinkShare`]: how memory and devices share the links before the stop.
//!
//! Threads take turns at a link frame by frame, and frames differ in size: memory with single zero pages in between
//! travels in frames of one page, and a device's data in frames of 512 KiB. So devices that always have data to send
//! would take nearly all of a slow link, mostly for data that changes again before the stop. While memory is sent, all
//! devices together may therefore send as many bytes as memory, and no more.

use std::time::{Duration, Instant};

/// Memory that has sent nothing for so long has nothing to send now, and a device does not wait for it.
pub(crate) const PAUSE_MAX: Duration = Duration::from_millis(10);
/// How many bytes memory may be ahead, for devices to catch up with.
const BEHIND_MAX: i64 = 1 << 20;

/// The bytes of devices and of memory against each other. It has no clock of its own.
#[derive(Debug, Default)]
pub(crate) struct LinkShare {
    /// How many bytes more the devices have sent than memory.
    ahead: i64,
    /// How many threads send memory now, or wait for a link to do so.
    senders: u32,
    /// When memory was sent last in this round.
    sent_at: Option<Instant>,
}

impl LinkShare {
    /// Memory is going to be sent.
    pub(crate) fn begin_memory(&mut self) {
        self.senders += 1;
    }

    /// Counts bytes of memory that were sent. Returns whether devices may have become free to send.
    pub(crate) fn end_memory(&mut self, bytes: usize, now: Instant) -> bool {
        let was_ahead = self.ahead > 0;
        self.senders = self.senders.saturating_sub(1);
        self.sent_at = Some(now);
        self.ahead = self.ahead.saturating_sub_unsigned(bytes as u64).max(-BEHIND_MAX);
        was_ahead && self.ahead <= 0
    }

    /// A round of memory has ended: devices have the links to themselves.
    pub(crate) fn end_round(&mut self) {
        (self.ahead, self.sent_at) = (0, None);
    }

    /// Whether devices may send now.
    pub(crate) fn is_free(&self, now: Instant) -> bool {
        let pauses = self.sent_at.is_none_or(|at| at + PAUSE_MAX <= now);
        self.ahead <= 0 || self.senders == 0 && pauses
    }

    /// Counts bytes that a device is going to send.
    pub(crate) fn device(&mut self, bytes: usize) {
        // Bytes that were sent while memory had nothing to send do not count against the devices.
        self.ahead = self.ahead.min(0).saturating_add_unsigned(bytes as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 4096;
    const CHUNK: usize = 512 << 10;

    #[test]
    fn devices_that_always_have_data_send_as_many_bytes_as_memory_in_frames_of_a_page() {
        let (mut share, now) = (LinkShare::default(), Instant::now());
        let (mut memory, mut devices) = (0, 0);
        for _ in 0..10_000 {
            share.begin_memory();
            while share.is_free(now) {
                share.device(CHUNK);
                devices += CHUNK;
            }
            share.end_memory(PAGE, now);
            memory += PAGE;
        }
        assert!(devices.abs_diff(memory) <= CHUNK, "{devices} {memory}");
    }

    #[test]
    fn devices_wait_neither_for_memory_that_pauses_nor_for_a_round_that_has_ended() {
        let (mut share, now) = (LinkShare::default(), Instant::now());
        assert!(share.is_free(now));
        share.device(CHUNK);
        share.begin_memory();
        assert!(!share.is_free(now + 2 * PAUSE_MAX), "it waits for a link");
        assert!(!share.end_memory(PAGE, now));
        assert!(!share.is_free(now));
        assert!(share.is_free(now + PAUSE_MAX));
        // A long pause leaves no debt behind.
        (0..1000).for_each(|_| share.device(CHUNK));
        assert!(share.end_memory(CHUNK, now));
        share.device(CHUNK);
        assert!(!share.is_free(now));
        share.end_round();
        assert!(share.is_free(now));
        // Nor does memory save up for more than a moment.
        share.end_memory(1 << 30, now);
        share.device(2 << 20);
        assert!(!share.is_free(now));
    }
}
