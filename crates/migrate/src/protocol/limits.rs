//! Every time limit of a move, in one place (`docs/failure.md: Limits`).

use std::time::Duration;

use crate::Options;

/// The longest interval between two keep-alives.
const KEEP_ALIVE_MAX: Duration = Duration::from_millis(250);
/// How long a side that ends a move waits for its peer to read the reason, or for the peer's own reason.
const LAST_WORDS_MAX: Duration = Duration::from_secs(2);

/// The time limits of one side.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Longest time without a byte from the peer, on each link.
    pub(crate) silence_max: Duration,
    /// Longest time for the peer to answer the offer or to load, even while it sends keep-alives.
    pub(crate) load_max: Duration,
    /// Longest time for which a source sends nothing but keep-alives before its SUM.
    pub(crate) idle_max: Duration,
    /// Longest time from the OFFER to SUM.
    pub(crate) move_max: Duration,
    /// Longest time from READY to COMMIT, and from COMMIT to RUNNING.
    pub(crate) commit_max: Duration,
    /// Longest time from the stop to COMMIT. Nothing renews it.
    pub(crate) standstill_max: Duration,
    /// Longest time to exchange the reason for ending a move.
    pub(crate) last_words_max: Duration,
    /// The interval between keep-alives on an idle link.
    pub(crate) keep_alive: Duration,
}

impl Limits {
    pub(crate) fn new(options: &Options) -> Limits {
        Limits {
            silence_max: options.silence_max,
            load_max: options.load_max,
            idle_max: options.idle_max,
            move_max: options.move_max,
            commit_max: options.commit_max.max(options.silence_max),
            standstill_max: options.standstill_max,
            last_words_max: LAST_WORDS_MAX.min(options.silence_max),
            keep_alive: KEEP_ALIVE_MAX.min(options.silence_max / 4),
        }
    }
}
