//! FLUSH and FLUSHED, matched by number and link (`docs/stream.md: FLUSH`).

use limosa_stream::{Damage, Kind, LINKS_MAX};

/// The current flush, and which links have answered it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Flushes {
    number: u64,
    /// One bit for each link that the flush was sent on and that has not answered.
    unanswered: u32,
}

impl Flushes {
    /// Begins the next flush, over this many links, and returns its number.
    pub(crate) fn begin(&mut self, links: usize) -> u64 {
        debug_assert!(links <= LINKS_MAX as usize);
        self.number += 1;
        self.unanswered = (1_u32 << links) - 1;
        self.number
    }

    /// Takes an answer. An answer to an earlier flush is ignored. An answer that no flush asked for is refused.
    pub(crate) fn answered(&mut self, link: u32, number: u64) -> Result<(), Damage> {
        if number < self.number {
            return Ok(());
        }
        let bit = 1_u32.checked_shl(link).unwrap_or(0);
        if number > self.number || self.unanswered & bit == 0 {
            let why = format!("flush {number} on link {link} is not waiting for an answer");
            return Err(Damage::Misplaced { kind: Kind::FLUSHED, why });
        }
        self.unanswered &= !bit;
        Ok(())
    }

    /// Whether every link has answered.
    pub(crate) fn is_done(&self) -> bool {
        self.unanswered == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_link_answers_once() {
        let mut flushes = Flushes::default();
        assert!(flushes.is_done());
        let number = flushes.begin(2);
        flushes.answered(1, number).unwrap();
        assert!(!flushes.is_done());
        assert!(flushes.answered(1, number).is_err(), "two answers of one link are not two links'");
        assert!(flushes.answered(2, number).is_err(), "no such link");
        assert!(flushes.answered(40, number).is_err());
        assert!(flushes.answered(0, number + 1).is_err(), "not begun");
        flushes.answered(0, number).unwrap();
        assert!(flushes.is_done());
        let next = flushes.begin(1);
        flushes.answered(0, number).unwrap();
        assert!(!flushes.is_done(), "a late answer to an earlier flush");
        flushes.answered(0, next).unwrap();
        assert!(flushes.is_done());
    }
}
