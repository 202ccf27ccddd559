//! Stamps: memory that describes its own expected contents. Every block of the synthetic device's state and every
//! page that it writes by DMA is filled from a seed, its index and a sequence number, so that any holder can check
//! whether it is intact and which version it is.
//!
//! ```text
//! word 0   "LIMOSAST", little-endian
//! word 1   seed
//! word 2   index
//! word 3   sequence number (a block's generation, a page's DMA sequence number)
//! word n   base(seed, index, sequence) + (n - 4) * 0x9e3779b97f4a7c15
//! ```

/// The identity in a stamped piece of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Whose it is.
    pub seed: u64,
    /// Which block or page.
    pub index: u64,
    /// Which version of it.
    pub sequence: u64,
}

/// Why memory is not a whole stamped piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StampError {
    /// It holds no stamp: nothing was ever written there, or something else was.
    #[error("it holds no stamp")]
    Unstamped,
    /// Its length is not a multiple of 8 bytes, or below 32.
    #[error("{0} bytes cannot hold a stamp")]
    Length(usize),
    /// It is stamped, but the contents do not match the stamp.
    #[error("stamped as {0:?}, but its contents are damaged or torn")]
    Damaged(Stamp),
}

/// Bytes of a page that the device writes by DMA.
pub const PAGE_BYTES: usize = 4096;

const MAGIC: u64 = u64::from_le_bytes(*b"LIMOSAST");
const HEAD_WORDS: usize = 4;
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// Contents are filled and checked in rows, which compilers turn into vectors.
const ROW_WORDS: usize = 8;
const ROW_STEP: u64 = STEP.wrapping_mul(ROW_WORDS as u64);
const STEPS: [u64; ROW_WORDS] = {
    let mut steps = [0; ROW_WORDS];
    let mut at = 1;
    while at < ROW_WORDS {
        steps[at] = STEP.wrapping_add(steps[at - 1]);
        at += 1;
    }
    steps
};

/// Scatters the bits of a number; one to one.
pub(super) const fn mix(number: u64) -> u64 {
    let a = (number ^ (number >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    let b = (a ^ (a >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    b ^ (b >> 32)
}

impl Stamp {
    /// A number that stands for the three; the start of the contents.
    pub(super) const fn digest(self) -> u64 {
        mix(self.seed ^ mix(self.index.wrapping_add(1) ^ mix(self.sequence.wrapping_add(STEP))))
    }

    /// Fills memory of at least 4 words.
    pub(super) fn fill(self, words: &mut [u64]) {
        let base = self.digest();
        let (head, body) = words.split_at_mut(HEAD_WORDS);
        head.copy_from_slice(&[MAGIC, self.seed, self.index, self.sequence].map(u64::to_le));
        let (rows, rest) = body.as_chunks_mut::<ROW_WORDS>();
        let mut start = base;
        for row in rows {
            for (word, step) in row.iter_mut().zip(STEPS) {
                *word = start.wrapping_add(step).to_le();
            }
            start = start.wrapping_add(ROW_STEP);
        }
        for (word, step) in rest.iter_mut().zip(STEPS) {
            *word = start.wrapping_add(step).to_le();
        }
    }

    /// Reads the stamp of a piece of memory and checks every byte of it.
    pub fn verify(bytes: &[u8]) -> Result<Stamp, StampError> {
        let (words, rest) = bytes.as_chunks::<8>();
        if !rest.is_empty() || words.len() < HEAD_WORDS {
            return Err(StampError::Length(bytes.len()));
        }
        let word = |at: usize| u64::from_le_bytes(words[at]);
        if word(0) != MAGIC {
            return Err(StampError::Unstamped);
        }
        let stamp = Stamp { seed: word(1), index: word(2), sequence: word(3) };
        let base = stamp.digest();
        let (rows, rest) = words[HEAD_WORDS..].as_chunks::<ROW_WORDS>();
        let mut start = base;
        let mut wrong = [0; ROW_WORDS];
        for row in rows {
            for ((wrong, got), step) in wrong.iter_mut().zip(row).zip(STEPS) {
                *wrong |= u64::from_le_bytes(*got) ^ start.wrapping_add(step);
            }
            start = start.wrapping_add(ROW_STEP);
        }
        for ((wrong, got), step) in wrong.iter_mut().zip(rest).zip(STEPS) {
            *wrong |= u64::from_le_bytes(*got) ^ start.wrapping_add(step);
        }
        if wrong == [0; ROW_WORDS] { Ok(stamp) } else { Err(StampError::Damaged(stamp)) }
    }
}

/// Checks a page that the device wrote by DMA, all of its [`PAGE_BYTES`] bytes, and tells what it is:
/// the seed of the device, the page's index in the DMA window, and the sequence number of the write.
pub fn verify_page(page: &[u8]) -> Result<Stamp, StampError> {
    if page.len() != PAGE_BYTES {
        return Err(StampError::Length(page.len()));
    }
    Stamp::verify(page)
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    #[test]
    fn every_altered_byte_is_noticed() {
        let stamp = Stamp { seed: 7, index: 3, sequence: 9 };
        let mut words = [0; PAGE_BYTES / 8];
        stamp.fill(&mut words);
        assert_eq!(verify_page(words.as_bytes()), Ok(stamp));
        for at in 0..PAGE_BYTES {
            words.as_mut_bytes()[at] ^= 0x10;
            assert_ne!(verify_page(words.as_bytes()), Ok(stamp), "byte {at}");
            words.as_mut_bytes()[at] ^= 0x10;
        }
    }

    #[test]
    fn a_page_torn_between_two_versions_is_damaged() {
        let (mut old, mut new) = ([0; PAGE_BYTES / 8], [0; PAGE_BYTES / 8]);
        Stamp { seed: 7, index: 3, sequence: 9 }.fill(&mut old);
        let stamp = Stamp { seed: 7, index: 3, sequence: 10 };
        stamp.fill(&mut new);
        for cut in 4..new.len() - 1 {
            let mut torn = new;
            torn[cut..].copy_from_slice(&old[cut..]);
            assert_eq!(verify_page(torn.as_bytes()), Err(StampError::Damaged(stamp)));
        }
    }

    #[test]
    fn what_is_no_stamped_page_is_named() {
        assert_eq!(verify_page(&[0; PAGE_BYTES]), Err(StampError::Unstamped));
        assert_eq!(verify_page(&[0; 100]), Err(StampError::Length(100)));
        assert_eq!(Stamp::verify(&[]), Err(StampError::Length(0)));
    }
}
