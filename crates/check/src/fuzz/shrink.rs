//! Shrinking: requests are left out, many at first and then one by one, as long as the same difference shows.

use std::time::{Duration, Instant};

use super::Player;
use super::request::Script;

/// The most scripts that are played to shrink one, and how long that may take.
const TRIES_MAX: u32 = 400;
const TIME_MAX: Duration = Duration::from_secs(60);
/// How often a script with several threads is played before it counts as one without the difference: their timing varies.
const TRIES_WITH_THREADS: u32 = 4;

/// The shortest script that was found to show this difference.
pub(super) fn shrink(player: &mut Player, script: &Script, signature: &str) -> Script {
    let begun = Instant::now();
    let mut best = script.clone();
    let mut tries = 0;
    let mut piece = best.len().div_ceil(2);
    while piece > 0 {
        let mut at = 0;
        let before = best.len();
        while at < best.len() {
            if tries >= TRIES_MAX || begun.elapsed() > TIME_MAX {
                return best;
            }
            tries += 1;
            let mut shorter = best.clone();
            shorter.0.drain(at..(at + piece).min(best.len()));
            if shows(player, &shorter, signature) {
                best = shorter;
            } else {
                at += piece;
            }
        }
        // One by one until nothing can be left out any more.
        piece = if piece == 1 && best.len() < before { 1 } else { piece / 2 };
    }
    best
}

fn shows(player: &mut Player, script: &Script, signature: &str) -> bool {
    let times = if script.threads() > 1 { TRIES_WITH_THREADS } else { 1 };
    (0..times).any(|_| matches!(player.play(script), Ok(Some(found)) if found.signature == signature))
}
