//! [`PassedOver`]: how many clients were passed over, and which of them have a line in the log. A client that connects again
//! and again must not fill a disk with lines.

use std::time::{Duration, Instant};

/// The number of lines that may come at once. After that there is one for each interval.
pub(super) const LINES_AT_ONCE: u32 = 10;
/// The interval at which one line more may come.
pub(super) const LINE_EVERY: Duration = Duration::from_secs(1);

/// Counts the clients that were passed over. It has no clock of its own.
#[derive(Debug)]
pub(super) struct PassedOver {
    all: u64,
    /// The clients since the last line, which have none.
    unnamed: u64,
    /// How many lines may come now.
    lines: u32,
    /// When the last line was allowed.
    since: Option<Instant>,
}

impl PassedOver {
    pub(super) fn new() -> PassedOver {
        PassedOver { all: 0, unnamed: 0, lines: LINES_AT_ONCE, since: None }
    }

    /// How many clients there were.
    pub(super) fn all(&self) -> u64 {
        self.all
    }

    /// One more client. Returns whether it has a line, and how many others that line stands for.
    pub(super) fn one_more(&mut self, now: Instant) -> Option<u64> {
        self.all += 1;
        match self.has_line(now) {
            true => Some(std::mem::take(&mut self.unnamed)),
            false => {
                self.unnamed += 1;
                None
            }
        }
    }

    /// How many clients without a line there were, once a line for them is due.
    pub(super) fn rest(&mut self, now: Instant) -> Option<u64> {
        (self.unnamed > 0 && self.has_line(now)).then(|| std::mem::take(&mut self.unnamed))
    }

    /// When [`PassedOver::rest`] is due, if there are any clients without a line.
    pub(super) fn due(&self) -> Option<Instant> {
        self.since.filter(|_| self.unnamed > 0).map(|since| since + LINE_EVERY)
    }

    /// Takes a line, if there is one.
    fn has_line(&mut self, now: Instant) -> bool {
        let since = *self.since.get_or_insert(now);
        let intervals = now.saturating_duration_since(since).as_nanos() / LINE_EVERY.as_nanos();
        let more = u32::try_from(intervals).unwrap_or(u32::MAX).min(LINES_AT_ONCE);
        if more > 0 {
            self.since = Some(if more == LINES_AT_ONCE { now } else { since + LINE_EVERY * more });
            self.lines = (self.lines + more).min(LINES_AT_ONCE);
        }
        let has_line = self.lines > 0;
        self.lines = self.lines.saturating_sub(1);
        has_line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_flood_a_few_are_named_at_once_and_then_one_each_second_stands_for_the_others() {
        let mut passed_over = PassedOver::new();
        let began = Instant::now();
        let mut lines = Vec::new();
        for millis in 0..5_000 {
            let now = began + Duration::from_millis(millis);
            lines.extend(passed_over.rest(now).into_iter().chain(passed_over.one_more(now)));
        }
        assert!((14..=16).contains(&lines.len()), "{lines:?}");
        assert_eq!(&lines[..10], [0; 10]);
        let due = passed_over.due().unwrap();
        assert!(due <= began + Duration::from_secs(6) && passed_over.rest(due - LINE_EVERY / 2).is_none());
        let rest = passed_over.rest(due).unwrap();
        let named = lines.len() as u64;
        assert!(named + lines.iter().sum::<u64>() + rest >= 5_000, "none is left out: {lines:?} {rest}");
        assert_eq!((passed_over.all(), passed_over.due()), (5_000, None));
    }

    #[test]
    fn a_few_clients_are_named_one_by_one_and_quiet_times_are_not_saved_up() {
        let mut passed_over = PassedOver::new();
        let mut now = Instant::now();
        for _ in 0..30 {
            now += LINE_EVERY;
            assert_eq!(passed_over.one_more(now), Some(0));
        }
        now += Duration::from_secs(86_400);
        let named = (0..100).filter(|_| passed_over.one_more(now).is_some()).count();
        assert_eq!(named, LINES_AT_ONCE as usize);
    }
}
