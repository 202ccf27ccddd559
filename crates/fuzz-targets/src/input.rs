//! Values from the front of a fuzzer's bytes.

use zerocopy::FromBytes;

/// What is left of the bytes. Where they have ended, values are zero.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// The next value, in host byte order.
    pub fn take<T: FromBytes>(&mut self) -> T {
        match T::read_from_prefix(self.0) {
            Ok((value, rest)) => {
                self.0 = rest;
                value
            }
            Err(_) => {
                self.0 = &[];
                T::new_zeroed()
            }
        }
    }

    /// What is left, as words; a part of a word is left out.
    pub fn words(self) -> Vec<u64> {
        self.0.as_chunks().0.iter().map(|bytes| u64::from_ne_bytes(*bytes)).collect()
    }
}
