//! Memory for a message, aligned to 8 bytes and reused: it grows to the longest message so far and is never larger than
//! the longest allowed one.

use zerocopy::IntoBytes;

/// The memory.
#[derive(Default)]
pub(super) struct Buffer {
    words: Vec<u64>,
}

impl Buffer {
    /// The first `bytes` bytes, to be overwritten. They have old contents.
    pub(super) fn bytes(&mut self, bytes: usize) -> &mut [u8] {
        let words = bytes.div_ceil(8);
        if self.words.len() < words {
            self.words.resize(words, 0);
        }
        &mut self.words.as_mut_bytes()[..bytes]
    }

    /// The same, to be read.
    pub(super) fn held(&self, bytes: usize) -> &[u8] {
        &self.words.as_bytes()[..bytes]
    }

    /// The first `words` words, all zero.
    pub(super) fn zeroed(&mut self, words: usize) -> &mut [u64] {
        if self.words.len() < words {
            self.words.resize(words, 0);
        }
        let words = &mut self.words[..words];
        words.fill(0);
        words
    }
}
