//! [`BitmapLog`]: KVM's bitmap of the pages that vCPUs write (`api.rst: KVM_GET_DIRTY_LOG`, `KVM_CLEAR_DIRTY_LOG`).

use std::io;
use std::os::fd::AsFd;

use limosa_migrate::DirtyLog;
use limosa_protocol::bitmap::{DirtyBitmap, words_for};

use crate::ioctl;
use crate::slots::{Slot, Slots};

/// How many pages one `KVM_CLEAR_DIRTY_LOG` protects at most: KVM holds a lock meanwhile that vCPUs take for their page faults.
const CLEARED_PAGES_MAX: u64 = 1 << 16;

/// The log of what vCPUs write, as bitmaps of the VM's slots.
///
/// Where KVM has manual protection (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`), it is turned on for the VM: pages are then protected in pieces
/// of 256 MiB, and vCPUs do not wait for a whole bitmap. A VMM that reads the log itself at other times has to clear it as well then.
#[derive(Debug)]
pub struct BitmapLog {
    slots: Slots,
    /// Whether reading a bitmap leaves it as it is.
    is_manual: bool,
    words: Vec<u64>,
}

impl BitmapLog {
    /// The log of these slots, which is off. `vm` is the VM's descriptor.
    ///
    /// # Errors
    ///
    /// Of `KVM_CHECK_EXTENSION` and `KVM_ENABLE_CAP`; `InvalidInput` for a slot that is not made of whole pages; `Unsupported` on a
    /// host whose pages do not have 4 KiB.
    ///
    /// # Safety
    ///
    /// The VM has each of these slots with this number, guest address, host address and size, and keeps it until the log is
    /// dropped.
    pub unsafe fn new(vm: &impl AsFd, slots: Vec<Slot>) -> io::Result<BitmapLog> {
        let flags = ioctl::MANUAL_PROTECT_ENABLE | ioctl::INITIALLY_SET;
        let has = u64::from(ioctl::extension(vm.as_fd(), ioctl::CAP_MANUAL_PROTECT)?) & flags;
        let is_manual = has & ioctl::MANUAL_PROTECT_ENABLE != 0;
        if is_manual {
            ioctl::enable(vm.as_fd(), ioctl::CAP_MANUAL_PROTECT, has)?;
        }
        // SAFETY: as this function's.
        let slots = unsafe { Slots::new(vm, slots) }?;
        let largest = slots.slots.iter().map(Slot::pages).max().unwrap_or(0);
        Ok(BitmapLog { slots, is_manual, words: vec![0; words_for(largest)] })
    }

    /// Takes the marks of a slot, and gives its words to `take`.
    fn take(&mut self, slot: &Slot, take: impl FnOnce(&[u64])) -> io::Result<()> {
        let pages = slot.pages();
        let words = &mut self.words[..words_for(pages)];
        let vm = self.slots.vm.as_fd();
        ioctl::dirty_log(vm, slot.number, pages, words)?;
        if self.is_manual {
            for (first, count) in pieces(words, pages) {
                let words = &words[(first / 64) as usize..];
                ioctl::clear_dirty_log(vm, slot.number, first, count as u32, words)?;
            }
        }
        take(words);
        Ok(())
    }
}

impl DirtyLog for BitmapLog {
    fn start(&mut self) -> io::Result<()> {
        self.slots.start()?;
        // A log may be on already, and with manual protection all pages of a new one are marked.
        for slot in self.slots.slots.clone() {
            self.take(&slot, |_| {})?;
        }
        Ok(())
    }

    fn harvest(&mut self, region: usize, dirty: &DirtyBitmap) -> io::Result<()> {
        for slot in self.slots.slots.clone().iter().filter(|slot| slot.region == region) {
            self.take(slot, |words| dirty.or_words(slot.first_page(), words, slot.pages()))?;
        }
        Ok(())
    }

    fn has_other_readers(&self) -> bool {
        false
    }

    fn stop(&mut self) {
        self.slots.stop();
    }
}

/// The pieces of a bitmap that have marks, as first page and number of pages: what `KVM_CLEAR_DIRTY_LOG` takes.
fn pieces(words: &[u64], pages: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
    (0..pages).step_by(CLEARED_PAGES_MAX as usize).filter_map(move |first| {
        let count = CLEARED_PAGES_MAX.min(pages - first);
        let words = &words[(first / 64) as usize..][..words_for(count)];
        // Clean words at both ends need no call.
        let begin = words.iter().position(|word| *word != 0)? as u64 * 64;
        let end = words.iter().rposition(|word| *word != 0)? as u64 * 64 + 64;
        Some((first + begin, end.min(count) - begin))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_pieces_have_every_mark_and_the_form_that_kvm_takes(
            pages in 1..3 * CLEARED_PAGES_MAX,
            marks in prop::collection::vec(any::<prop::sample::Index>(), 0..30),
        ) {
            let mut words = vec![0_u64; words_for(pages)];
            let marks: Vec<u64> = marks.iter().map(|mark| mark.index(pages as usize) as u64).collect();
            marks.iter().for_each(|page| words[(page / 64) as usize] |= 1 << (page % 64));
            let pieces: Vec<_> = pieces(&words, pages).collect();
            for (first, count) in &pieces {
                prop_assert!(first % 64 == 0 && *count > 0 && *count <= CLEARED_PAGES_MAX);
                prop_assert!(count % 64 == 0 || first + count == pages);
                prop_assert!(first + count <= pages);
            }
            prop_assert!(pieces.windows(2).all(|two| two[0].0 + two[0].1 <= two[1].0));
            for page in marks {
                prop_assert!(pieces.iter().any(|(first, count)| (*first..first + count).contains(&page)), "{}", page);
            }
        }
    }
}
