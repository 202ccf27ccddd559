//! The hash of a page: two sums of NH under secret keys (*UMAC*, CRYPTO 1999, theorem 1).

use std::io;

use crate::memory::PAGE_BYTES;
use crate::memory::prints::Print;

/// Words of a page.
const WORDS: usize = (PAGE_BYTES / 8) as usize;

/// The secret keys of a move's fingerprints.
#[derive(Clone)]
pub struct FingerprintKey {
    keys: std::sync::Arc<[[u64; WORDS]; 2]>,
    /// The fingerprint of a page of zeroes.
    zero: [u64; 2],
}

impl FingerprintKey {
    /// New random keys. Fails when the system has no random numbers.
    pub fn random() -> io::Result<FingerprintKey> {
        let mut bytes = vec![0; 2 * PAGE_BYTES as usize];
        let mut filled = 0;
        while filled < bytes.len() {
            let flags = rustix::rand::GetRandomFlags::empty();
            filled += rustix::io::retry_on_intr(|| rustix::rand::getrandom(&mut bytes[filled..], flags))?;
        }
        let mut keys = [[0; WORDS]; 2];
        for (key, word) in keys.as_flattened_mut().iter_mut().zip(bytes.as_chunks().0) {
            *key = u64::from_le_bytes(*word);
        }
        let key = FingerprintKey { keys: std::sync::Arc::new(keys), zero: [0; 2] };
        Ok(FingerprintKey { zero: key.of(&[0; PAGE_BYTES as usize]), ..key })
    }

    /// The fingerprint of one page.
    pub(super) fn print(&self, page: &[u8]) -> Print {
        let sums = self.of(page);
        (sums != self.zero).then_some(sums)
    }

    pub(super) fn of(&self, page: &[u8]) -> [u64; 2] {
        let [one, other] = &*self.keys;
        let (mut sums, words) = ([0_u64; 2], page.as_chunks::<8>().0);
        for ((word, one), other) in words.iter().zip(one).zip(other) {
            let word = u64::from_le_bytes(*word);
            sums[0] = sums[0].wrapping_add(nh(word, *one));
            sums[1] = sums[1].wrapping_add(nh(word, *other));
        }
        sums
    }
}

impl std::fmt::Debug for FingerprintKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FingerprintKey")
    }
}

/// One step of NH: the product of two 32-bit sums.
fn nh(word: u64, key: u64) -> u64 {
    let half = |word: u64, key: u64| u64::from((word as u32).wrapping_add(key as u32));
    half(word, key).wrapping_mul(half(word >> 32, key >> 32))
}
