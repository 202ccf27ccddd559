//! The state: blocks that are a function of seed, index and generation, and a checksum over all
//! of them that is kept up to date as they change.

use zerocopy::IntoBytes;

use super::stamp::{Stamp, StampError};

/// Whether the system gives memory for a state of this size. An allocation that it refuses later would end the process.
pub(super) fn has_room(state_bytes: u64) -> bool {
    usize::try_from(state_bytes).is_ok_and(|bytes| Vec::<u8>::new().try_reserve_exact(bytes).is_ok())
}

pub(super) struct Blocks {
    words: Vec<u64>,
    block_bytes: usize,
    pub(super) seed: u64,
    generations: Vec<u64>,
    /// The wrapping sum of every block's digest.
    checksum: u64,
    /// How many times a block changed.
    pub(super) dirtied: u64,
    /// The block to change next.
    pub(super) cursor: usize,
}

impl Blocks {
    pub(super) fn new(seed: u64, count: usize, block_bytes: usize) -> Blocks {
        let words = vec![0; count * block_bytes / 8];
        let generations = vec![0; count];
        let mut blocks = Blocks { words, block_bytes, seed, generations, checksum: 0, dirtied: 0, cursor: 0 };
        (0..count).for_each(|index| blocks.write(index));
        blocks.checksum = blocks.sum();
        blocks
    }

    /// The state as it was received. Its contents are not looked at.
    pub(super) fn from_parts(
        words: Vec<u64>,
        block_bytes: usize,
        seed: u64,
        generations: Vec<u64>,
        dirtied: u64,
        cursor: usize,
    ) -> Blocks {
        let mut blocks = Blocks { words, block_bytes, seed, generations, checksum: 0, dirtied, cursor };
        blocks.checksum = blocks.sum();
        blocks
    }

    /// Memory for a state of this size, to load another into.
    pub(super) fn into_words(self) -> Vec<u64> {
        self.words
    }

    pub(super) fn count(&self) -> usize {
        self.generations.len()
    }

    pub(super) fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    pub(super) fn checksum(&self) -> u64 {
        self.checksum
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.words.as_bytes()
    }

    fn stamp(&self, index: usize) -> Stamp {
        Stamp { seed: self.seed, index: index as u64, sequence: self.generations[index] }
    }

    fn sum(&self) -> u64 {
        checksum(self.seed, &self.generations)
    }

    fn write(&mut self, index: usize) {
        let stamp = self.stamp(index);
        let words = self.block_bytes / 8;
        stamp.fill(&mut self.words[index * words..(index + 1) * words]);
    }

    /// Takes a block to a later generation.
    fn advance(&mut self, index: usize, by: u64) {
        self.checksum = self.checksum.wrapping_sub(self.stamp(index).digest());
        // What a peer sent may be anywhere near the end.
        self.generations[index] = self.generations[index].wrapping_add(by);
        self.checksum = self.checksum.wrapping_add(self.stamp(index).digest());
        self.dirtied = self.dirtied.wrapping_add(by);
        self.write(index);
    }

    /// Changes `changes` blocks, round and round, but not the one that is `kept`; tells of each.
    /// However many changes there are, no block is written more than twice.
    pub(super) fn dirty(&mut self, changes: u64, kept: Option<usize>, mut tell: impl FnMut(usize)) {
        let count = self.count() as u64;
        if kept.is_some() && count == 1 {
            return;
        }
        if changes >= count {
            for index in (0..self.count()).filter(|index| Some(*index) != kept) {
                self.advance(index, changes / count);
                tell(index);
            }
        }
        for _ in 0..changes % count {
            if Some(self.cursor) == kept {
                self.cursor = (self.cursor + 1) % self.count();
            }
            let index = self.cursor;
            self.cursor = (index + 1) % self.count();
            self.advance(index, 1);
            tell(index);
        }
    }

    /// Back to generation 0.
    pub(super) fn reset(&mut self, seed: u64) {
        let all = self.seed != seed;
        self.seed = seed;
        (self.dirtied, self.cursor) = (0, 0);
        for index in 0..self.count() {
            if all || self.generations[index] != 0 {
                self.generations[index] = 0;
                self.write(index);
            }
        }
        self.checksum = self.sum();
    }

    /// Checks every byte of every block, and how many are not what they should be.
    pub(super) fn bad(&self) -> u64 {
        let blocks = self.bytes().chunks_exact(self.block_bytes).enumerate();
        blocks.filter(|(index, block)| Stamp::verify(block) != Ok(self.stamp(*index))).count() as u64
    }
}

/// What the checksum of blocks of these generations is.
pub(super) fn checksum(seed: u64, generations: &[u64]) -> u64 {
    generations.iter().enumerate().fold(0, |sum, (index, sequence)| {
        let stamp = Stamp { seed, index: index as u64, sequence: *sequence };
        sum.wrapping_add(stamp.digest())
    })
}

/// Checks a block that was received and tells its generation.
pub(super) fn received(block: &[u8], seed: u64, index: usize) -> Result<u64, String> {
    match Stamp::verify(block) {
        Ok(stamp) if (stamp.seed, stamp.index) == (seed, index as u64) => Ok(stamp.sequence),
        Ok(stamp) => Err(format!("block {index} is another one: {stamp:?}")),
        Err(error @ (StampError::Unstamped | StampError::Length(_) | StampError::Damaged(_))) => {
            Err(format!("block {index}: {error}"))
        }
    }
}

/// The generation that a block's stamp names, unchecked.
pub(super) fn generation(block: &[u8]) -> u64 {
    block.get(24..32).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_go_round_and_the_checksum_follows() {
        let mut blocks = Blocks::new(5, 4, 4096);
        let mut told = Vec::new();
        blocks.dirty(3, None, |index| told.push(index));
        blocks.dirty(2, Some(3), |index| told.push(index));
        assert_eq!(told, [0, 1, 2, 0, 1]);
        assert_eq!(blocks.dirtied, 5);
        blocks.dirty(4_000_000_001, None, |_| ());
        assert_eq!(blocks.generations, [1_000_000_002, 1_000_000_002, 1_000_000_002, 1_000_000_000]);
        assert_eq!(blocks.checksum(), blocks.sum());
        assert_eq!(blocks.bad(), 0);
        blocks.words[700] ^= 1;
        assert_eq!(blocks.bad(), 1);
        blocks.reset(5);
        assert_eq!(blocks.checksum(), Blocks::new(5, 4, 4096).checksum());
        assert_eq!(blocks.bad(), 0);
    }

    #[test]
    fn a_single_block_in_flight_is_left_alone() {
        let mut blocks = Blocks::new(5, 1, 4096);
        blocks.dirty(10, Some(0), |_| panic!("it is in flight"));
        assert_eq!(blocks.dirtied, 0);
    }
}
