//! Credit: how much of a device's data may be on its way (`docs/stream.md: CREDIT`). Each side has its own count.

use limosa_stream::{Damage, DeviceFacts, Kind, WINDOW_BYTES_MIN};

use crate::Options;

/// The most that is read from a device at once, so that it stays in a core's cache on the way.
pub(crate) const READ_BYTES_MAX: usize = 512 << 10;

/// The largest window of a device in bytes at first.
pub(crate) const WINDOW_BYTES_MAX: u64 = 4 << 20;
/// The largest window in bytes to which that of a device can grow.
pub(crate) const GROWN_BYTES_MAX: u64 = 64 << 20;
/// Smaller pieces of a device's data all go over the same link, so that few pieces are ahead of others
/// (`docs/stream.md: Several links`).
pub(crate) const SMALL_BYTES: usize = 4 << 10;

/// The window of each of these devices at first: an equal part of [`Options::windows_bytes`], or what the device gives in the stop
/// that says most, as far as the windows may grow. A device whose data fits into its window does not wait for credit, of which each
/// wait in the stop costs two threads a wake-up.
pub(crate) fn window(devices: &[DeviceFacts], options: &Options) -> u64 {
    let part = |bytes: u64| bytes / devices.len().max(1) as u64;
    let most = devices.iter().filter_map(|facts| facts.data_bytes).max().unwrap_or(0);
    // A device's own figure is an estimate.
    let wanted = most.saturating_add(most / 4).min(part(options.windows_bytes_max));
    part(options.windows_bytes).max(wanted).clamp(WINDOW_BYTES_MIN, WINDOW_BYTES_MAX)
}

/// How many bytes a source with this window reads from a device at once: two reads fit into the window.
pub(crate) fn read_bytes(window: u64) -> usize {
    READ_BYTES_MAX.min(window as usize / 2).max(1)
}

/// The source's count of one device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SendWindow {
    /// How many bytes may be sent and not taken; `None` if no peer answers.
    window: Option<u64>,
    /// Whether the destination can make it larger.
    grows: bool,
    /// The bytes that were sent when the destination was last told that the window is full.
    asked: Option<u64>,
    sent: u64,
    taken: u64,
}

impl SendWindow {
    pub(crate) fn new(window: Option<u64>, grows: bool) -> SendWindow {
        SendWindow { window, grows, asked: None, sent: 0, taken: 0 }
    }

    /// The bytes that were sent.
    pub(crate) fn sent(&self) -> u64 {
        self.sent
    }

    /// The bytes that the destination's device has taken; without a peer, the bytes that were sent.
    pub(crate) fn taken(&self) -> u64 {
        if self.window.is_some() { self.taken } else { self.sent }
    }

    /// The bytes that are on their way.
    pub(crate) fn on_the_way(&self) -> u64 {
        self.sent - self.taken()
    }

    /// Whether the stream may be sent up to this byte now.
    pub(crate) fn has_room(&self, end: u64) -> bool {
        self.window.is_none_or(|window| end <= self.taken.saturating_add(window))
    }

    /// Whether to tell the destination now that the window is full: once, until it has taken all that was on its way then.
    pub(crate) fn ask(&mut self) -> bool {
        let asks = self.grows && self.asked.is_none_or(|asked| asked <= self.taken);
        if asks {
            self.asked = Some(self.sent);
        }
        asks
    }

    /// Takes a WINDOW.
    pub(crate) fn grow(&mut self, to: u64) -> Result<(), Damage> {
        let misplaced = |why: String| Err(Damage::Misplaced { kind: Kind::WINDOW, why });
        match &mut self.window {
            Some(window) if self.grows && to >= *window => {
                *window = to;
                Ok(())
            }
            Some(window) if self.grows => misplaced(format!("{to} bytes are less than the {window} before")),
            _ => misplaced("nothing was asked for".into()),
        }
    }

    /// The stream is sent up to this byte.
    pub(crate) fn send(&mut self, end: u64) {
        self.sent = self.sent.max(end);
    }

    /// Takes a CREDIT.
    pub(crate) fn credit(&mut self, taken: u64) -> Result<(), Damage> {
        if taken > self.sent {
            let why = format!("{taken} bytes are taken of {} that were sent", self.sent);
            return Err(Damage::Misplaced { kind: Kind::CREDIT, why });
        }
        self.taken = self.taken.max(taken);
        Ok(())
    }
}

/// The destination's count of one device.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ReceiveWindow {
    window: u64,
    taken: u64,
    /// The position of the last CREDIT.
    told: u64,
    /// A FLUSH asks for a CREDIT once this many bytes are taken.
    asked: Option<u64>,
    ended: bool,
}

impl ReceiveWindow {
    pub(crate) fn new(window: u64) -> ReceiveWindow {
        ReceiveWindow { window, ..ReceiveWindow::default() }
    }

    /// Its size in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.window
    }

    /// By how many bytes to make it larger when the source finds it full, and this many bytes have arrived and are not taken. A
    /// device that is slower than the link would only have more data that waits.
    pub(crate) fn wants(&self, waiting: u64) -> u64 {
        let is_short = waiting <= self.window / 2;
        if is_short { self.window.min(GROWN_BYTES_MAX.saturating_sub(self.window)) } else { 0 }
    }

    /// Makes it larger.
    pub(crate) fn grow(&mut self, bytes: u64) {
        self.window += bytes;
    }

    /// The position up to which the source may send.
    pub(crate) fn end(&self) -> u64 {
        self.taken.saturating_add(self.window)
    }

    /// The device has taken this many more bytes.
    pub(crate) fn take(&mut self, bytes: u64) {
        self.taken += bytes;
    }

    /// A FLUSH has arrived after this many bytes that the device has not taken yet.
    pub(crate) fn ask(&mut self, waiting: u64) {
        self.asked = Some(self.taken.saturating_add(waiting));
    }

    /// The end of the device's data has arrived: the source needs no more credit.
    pub(crate) fn end_of_data(&mut self) {
        self.ended = true;
    }

    /// The credit to send now, if half of the window was taken, or the bytes for which a FLUSH asked.
    pub(crate) fn due(&mut self) -> Option<u64> {
        let is_answer = self.asked.is_some_and(|asked| asked <= self.taken);
        if is_answer {
            self.asked = None;
        }
        let new = self.taken - self.told;
        let is_due = new > 0 && (is_answer || !self.ended && new > self.window / 2);
        is_due.then(|| {
            self.told = self.taken;
            self.taken
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_sends_no_more_than_its_window_and_believes_no_credit_beyond_what_it_sent() {
        let mut window = SendWindow::new(Some(100), false);
        assert!(window.has_room(100) && !window.has_room(101));
        window.send(100);
        assert_eq!(window.on_the_way(), 100);
        window.credit(60).unwrap();
        window.credit(40).unwrap();
        assert_eq!((window.taken(), window.on_the_way()), (60, 40), "credit never shrinks");
        assert!(window.has_room(160) && !window.has_room(161));
        assert!(window.credit(101).is_err());
        let mut file = SendWindow::new(None, false);
        assert!(file.has_room(u64::MAX));
        file.send(10);
        assert_eq!((file.taken(), file.on_the_way()), (10, 0));
    }

    #[test]
    fn a_source_says_once_that_its_window_is_full_and_only_where_it_can_grow() {
        let mut window = SendWindow::new(Some(100), true);
        window.send(100);
        assert!(window.ask() && !window.ask());
        window.credit(50).unwrap();
        window.send(150);
        assert!(!window.ask(), "the destination has not seen all of what was on its way");
        window.credit(100).unwrap();
        assert!(window.ask());
        window.grow(200).unwrap();
        assert!(window.has_room(300) && !window.has_room(301));
        assert!(window.grow(199).is_err(), "what is on its way already may be more");
        let mut fixed = SendWindow::new(Some(100), false);
        assert!(!fixed.ask() && fixed.grow(200).is_err());
        assert!(SendWindow::new(None, true).grow(200).is_err(), "no peer");
    }

    #[test]
    fn a_window_doubles_up_to_its_maximum_as_long_as_the_device_is_as_fast_as_the_link() {
        let mut window = ReceiveWindow::new(WINDOW_BYTES_MAX);
        assert_eq!(window.wants(WINDOW_BYTES_MAX / 2 + 1), 0, "the device is the slower one");
        while let more @ 1.. = window.wants(0) {
            assert_eq!(more, window.bytes());
            window.grow(more);
        }
        assert_eq!(window.bytes(), GROWN_BYTES_MAX);
        assert_eq!(window.end(), GROWN_BYTES_MAX);
    }

    #[test]
    fn devices_whose_data_was_larger_than_their_window_waited_for_credit_in_the_stop() {
        let facts = |bytes| DeviceFacts { data_bytes: bytes, ..DeviceFacts::default() };
        let of = |devices: usize, bytes, options: &Options| window(&vec![facts(bytes); devices], options);
        let options = Options::default();
        assert_eq!(of(64, None, &options), 512 << 10, "an equal part");
        assert_eq!(
            of(64, Some(1 << 20), &options),
            (1 << 20) + (1 << 18),
            "all data of each, with a reserve"
        );
        assert_eq!(of(64, Some(1), &options), 512 << 10, "never less than without");
        assert_eq!(of(64, Some(u64::MAX), &options), 4 << 20, "no more than may grow");
        assert_eq!(of(256, Some(64 << 20), &options), 1 << 20, "no more than may grow");
        let fixed = options.with_windows_bytes_max(0);
        assert_eq!(of(64, Some(1 << 20), &fixed), 512 << 10, "where nothing grows");
        let mixed = [facts(None), facts(Some(3 << 20)), facts(Some(1 << 20))];
        assert_eq!(window(&mixed, &Options::default()), 4 << 20);
        assert_eq!(window(&[], &Options::default()), 4 << 20);
    }

    #[test]
    fn credit_is_due_at_half_a_window_and_when_a_flush_has_asked() {
        let mut window = ReceiveWindow::new(100);
        window.take(50);
        assert_eq!(window.due(), None);
        window.take(1);
        assert_eq!(window.due(), Some(51));
        assert_eq!(window.due(), None, "once");
        window.ask(9);
        window.take(5);
        assert_eq!(window.due(), None, "not all of what came before the FLUSH is taken");
        // More comes behind the FLUSH.
        window.take(10);
        assert_eq!(window.due(), Some(66));
        window.end_of_data();
        window.take(90);
        assert_eq!(window.due(), None, "nobody needs it");
    }
}
