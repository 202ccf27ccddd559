//! [`FingerprintLog`]: a dirty log for memory whose writers are not logged, such as another process, a KVM guest whose
//! log has another reader, or a device without DMA logging. Each page that is read in order to be sent leaves a
//! fingerprint. A harvest reads all of the memory and compares.
//!
//! # Why no page is lost
//!
//! The fingerprint is that of the bytes that were sent, not of the page a moment earlier or later. So the source knows
//! what the destination has, and a page with other content, once its writers have stopped, has another fingerprint.
//!
//! A fingerprint is two sums of NH, the hash of UMAC (Black, Halevi, Krawczyk, Krovetz, Rogaway: *UMAC: Fast and Secure
//! Message Authentication*, CRYPTO 1999), under two independent random keys that are new for each move. For any two
//! different pages the probability that one sum is equal is at most 2^-32 (theorem 1 there), and that both are equal is
//! at most 2^-64, whatever the pages contain. A guest does not know the keys, so it cannot write pages that are mistaken
//! for equal.
//!
//! # What it costs
//!
//! 16 bytes for each page, which is 4 MiB for each GiB of memory, and a bit for a page of zeroes. Each harvest, including the
//! one after the stop, takes the time to read all of the memory, which is a fraction of the time to send it. Holes
//! ([`GuestPages::data`]) are not read.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use limosa_protocol::bitmap::DirtyBitmap;

use crate::memory::prints::{Print, Prints};
use crate::memory::{DirtyLog, GuestPages, PAGE_BYTES, whole_pages};

/// Bytes that are read and compared at once; they fit in a processor's cache.
const PIECE_BYTES: u64 = 256 << 10;
/// Bytes that a thread takes at once. A hole is found by a system call for so many.
const SHARE_BYTES: u64 = 64 * PIECE_BYTES;
/// The most threads that compare at once.
const THREADS_MAX: usize = 8;

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
    fn print(&self, page: &[u8]) -> Print {
        let sums = self.of(page);
        (sums != self.zero).then_some(sums)
    }

    fn of(&self, page: &[u8]) -> [u64; 2] {
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

/// Pages of a region, with a fingerprint of what was last read of each. The engine reads pages only in order to send
/// them.
pub struct Fingerprinted<P> {
    pages: P,
    bytes: u64,
    key: FingerprintKey,
    prints: Prints,
}

impl<P: GuestPages> Fingerprinted<P> {
    /// Wraps the pages of a region of `bytes` bytes. Fails when that is not a multiple of [`PAGE_BYTES`], and when there
    /// is no memory for the fingerprints.
    pub fn new(pages: P, bytes: u64, key: &FingerprintKey) -> io::Result<Fingerprinted<P>> {
        if !bytes.is_multiple_of(PAGE_BYTES) {
            let what = format!("{bytes} bytes of memory, expected whole pages of {PAGE_BYTES} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let prints = Prints::new(bytes / PAGE_BYTES)?;
        Ok(Fingerprinted { pages, bytes, key: key.clone(), prints })
    }

    /// Marks every page whose content differs from what was read of it last.
    fn compare(&self, dirty: &DirtyBitmap) -> io::Result<()> {
        let threads = thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
        let shares = usize::try_from(self.bytes.div_ceil(SHARE_BYTES)).unwrap_or(usize::MAX);
        self.compare_on(threads.min(shares), thread::Builder::new, dirty)
    }

    /// Compares on this many threads, the calling one included, or on as many as the system starts. A panic in one of
    /// them is passed on to the caller.
    fn compare_on(
        &self,
        threads: usize,
        thread: impl Fn() -> thread::Builder,
        dirty: &DirtyBitmap,
    ) -> io::Result<()> {
        let next = AtomicU64::new(0);
        thread::scope(|scope| {
            let work = || {
                // Ends the other threads early when this one fails or panics.
                let mut end = EndAll { next: &next, armed: true };
                let compared = self.compare_shares(&next, dirty);
                end.armed = compared.is_err();
                compared
            };
            let others: Vec<_> = (1..threads)
                .map_while(|_| thread().name("limosa: compare".into()).spawn_scoped(scope, work).ok())
                .collect();
            let own = work();
            // All threads are joined before the first failure is passed on.
            let joined: Vec<_> = others.into_iter().map(|other| other.join()).collect();
            joined
                .into_iter()
                .map(|other| other.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .fold(own, io::Result::and)
        })
    }

    /// Compares shares that no other thread has taken, until all are taken.
    fn compare_shares(&self, next: &AtomicU64, dirty: &DirtyBitmap) -> io::Result<()> {
        let mut buffer = vec![0; PIECE_BYTES.min(self.bytes) as usize];
        loop {
            let at = next.fetch_add(SHARE_BYTES, Ordering::Relaxed);
            if at >= self.bytes {
                return Ok(());
            }
            self.compare_share(at..at.saturating_add(SHARE_BYTES).min(self.bytes), &mut buffer, dirty)?;
        }
    }

    fn compare_share(&self, share: Range<u64>, buffer: &mut [u8], dirty: &DirtyBitmap) -> io::Result<()> {
        let mut at = share.start;
        while at < share.end {
            let rest = at..share.end;
            let data = whole_pages(self.pages.data(rest.clone())?, &rest).unwrap_or(share.end..share.end);
            self.prints.mark_others(at / PAGE_BYTES..data.start / PAGE_BYTES, dirty);
            at = data.start;
            while at < data.end {
                let bytes = &mut buffer[..PIECE_BYTES.min(data.end - at) as usize];
                self.pages.read(at, bytes)?;
                for (page, bytes) in (at / PAGE_BYTES..).zip(bytes.chunks_exact(PAGE_BYTES as usize)) {
                    if !self.prints.is(page, self.key.print(bytes)) {
                        dirty.set(page);
                    }
                }
                at += bytes.len() as u64;
            }
        }
        Ok(())
    }
}

/// Leaves nothing for the other threads when it is dropped armed.
struct EndAll<'a> {
    next: &'a AtomicU64,
    armed: bool,
}

impl Drop for EndAll<'_> {
    fn drop(&mut self) {
        if self.armed {
            // Beyond all shares, and far from where the counter wraps.
            self.next.store(u64::MAX / 2, Ordering::Relaxed);
        }
    }
}

impl<P> std::fmt::Debug for Fingerprinted<P> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fingerprinted").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl<P: GuestPages> GuestPages for Fingerprinted<P> {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        if !offset.is_multiple_of(PAGE_BYTES) || !into.len().is_multiple_of(PAGE_BYTES as usize) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "expected a read of whole pages"));
        }
        self.pages.read(offset, into)?;
        for (page, bytes) in (offset / PAGE_BYTES..).zip(into.chunks_exact(PAGE_BYTES as usize)) {
            self.prints.set(page, self.key.print(bytes))?;
        }
        Ok(())
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.pages.write(offset, from)
    }

    fn data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        let data = self.pages.data(range.clone())?;
        // The pages before the data are sent as zeroes.
        let first = whole_pages(data.clone(), &range).map_or(range.end, |data| data.start);
        self.prints.set_zero(range.start.div_ceil(PAGE_BYTES)..first / PAGE_BYTES);
        Ok(data)
    }

    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.pages.zero(offset, bytes)
    }
}

/// The log of all regions of a move. From the start of the last harvest to the end of the move the memory must not be
/// written: stop its writers in [`Vmm::stop`](crate::Vmm::stop).
#[derive(Debug)]
pub struct FingerprintLog<'a, P> {
    /// The pages of the regions, in their order in the move.
    pub regions: Vec<&'a Fingerprinted<P>>,
}

impl<P: GuestPages + Send> DirtyLog for FingerprintLog<'_, P> {
    fn start(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn harvest(&mut self, region: usize, dirty: &DirtyBitmap) -> io::Result<()> {
        self.regions.get(region).ok_or(io::ErrorKind::NotFound)?.compare(dirty)
    }

    fn stop(&mut self) {}

    /// The fingerprints belong to this log alone.
    fn has_other_readers(&self) -> bool {
        false
    }

    /// Pages differ no matter what wrote them.
    fn covers_devices(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    struct Bytes(Mutex<Vec<u8>>);

    impl Bytes {
        /// Whether all of the page is zero, which counts as a hole.
        fn is_hole(&self, at: u64) -> bool {
            let page = (at / PAGE_BYTES * PAGE_BYTES) as usize;
            self.0.lock().unwrap()[page..][..PAGE_BYTES as usize].iter().all(|byte| *byte == 0)
        }
    }

    impl GuestPages for Bytes {
        fn data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
            let pages = || range.clone().step_by(PAGE_BYTES as usize);
            let Some(start) = pages().find(|at| !self.is_hole(*at)) else { return Ok(None) };
            let end = pages().find(|at| *at > start && self.is_hole(*at));
            Ok(Some(start..end.unwrap_or(range.end)))
        }

        fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
            into.copy_from_slice(&self.0.lock().unwrap()[offset as usize..][..into.len()]);
            Ok(())
        }

        fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
            self.0.lock().unwrap()[offset as usize..][..from.len()].copy_from_slice(from);
            Ok(())
        }
    }

    fn pages(count: usize) -> Fingerprinted<Bytes> {
        let bytes = count * PAGE_BYTES as usize;
        let key = FingerprintKey::random().unwrap();
        Fingerprinted::new(Bytes(Mutex::new(vec![7; bytes])), bytes as u64, &key).unwrap()
    }

    fn dirty(pages: &Fingerprinted<Bytes>) -> Vec<(u64, u64)> {
        let dirty = DirtyBitmap::new(pages.prints.pages()).unwrap();
        FingerprintLog { regions: vec![pages] }.harvest(0, &dirty).unwrap();
        dirty.runs().collect()
    }

    #[test]
    fn a_bit_that_changes_anywhere_in_a_page_is_seen_and_one_that_changes_back_is_not() {
        let pages = pages(200);
        let mut all = vec![0; 200 * PAGE_BYTES as usize];
        pages.read(0, &mut all).unwrap();
        assert!(dirty(&pages).is_empty());
        for at in [0, 1, 7, 8, 4095, 4096, 300_000, 200 * 4096 - 1] {
            let value = pages.pages.0.lock().unwrap()[at];
            for bit in 0..8 {
                pages.write(at as u64, &[value ^ (1 << bit)]).unwrap();
                assert_eq!(dirty(&pages), [(at as u64 / PAGE_BYTES, 1)], "byte {at}, bit {bit}");
            }
            pages.write(at as u64, &[value]).unwrap();
            assert!(dirty(&pages).is_empty());
        }
    }

    #[test]
    fn a_page_that_changed_after_it_was_sent_is_dirty_also_when_it_changed_back_and_was_sent_in_between() {
        let pages = pages(2);
        let mut page = vec![0; PAGE_BYTES as usize];
        pages.read(0, &mut page).unwrap();
        pages.read(PAGE_BYTES, &mut page).unwrap();
        // The content that was sent last counts.
        pages.write(0, &[1]).unwrap();
        pages.read(0, &mut page).unwrap();
        pages.write(0, &[7]).unwrap();
        assert_eq!(dirty(&pages), [(0, 1)]);
    }

    #[test]
    fn words_that_change_places_or_cancel_out_are_seen() {
        let pages = pages(1);
        let mut page: Vec<u8> = (0..PAGE_BYTES).map(|at| (at / 8) as u8).collect();
        pages.write(0, &page).unwrap();
        let mut read = vec![0; page.len()];
        pages.read(0, &mut read).unwrap();
        page.swap(0, 8);
        pages.write(0, &page).unwrap();
        assert_eq!(dirty(&pages), [(0, 1)]);
        page.swap(0, 8);
        page.rotate_left(8);
        pages.write(0, &page).unwrap();
        assert_eq!(dirty(&pages), [(0, 1)]);
        page.rotate_right(8);
        (page[0], page[8]) = (page[0] + 1, page[8] - 1);
        pages.write(0, &page).unwrap();
        assert_eq!(dirty(&pages), [(0, 1)]);
    }

    #[test]
    fn holes_are_pages_of_zeroes_that_were_sent() {
        let pages = pages(200);
        let page = |page: u64| page * PAGE_BYTES..(page + 1) * PAGE_BYTES;
        for hole in [0, 3, 4, 150, 199] {
            pages.write(page(hole).start, &[0; PAGE_BYTES as usize]).unwrap();
        }
        // In the order in which the engine reads.
        let (mut at, mut read) = (0, Vec::new());
        while let Some(data) = pages.data(at..page(199).end).unwrap() {
            let mut bytes = vec![0; (data.end - data.start) as usize];
            pages.read(data.start, &mut bytes).unwrap();
            at = data.end;
            read.push(data.start / PAGE_BYTES..data.end / PAGE_BYTES);
        }
        assert_eq!(read, [1..3, 5..150, 151..199]);
        assert!(dirty(&pages).is_empty());
        pages.write(page(4).start + 9, &[1]).unwrap();
        pages.write(page(100).start, &[0; PAGE_BYTES as usize]).unwrap();
        pages.write(page(199).end - 1, &[1]).unwrap();
        assert_eq!(dirty(&pages), [(4, 1), (100, 1), (199, 1)]);
    }

    /// Memory of which only one page was ever touched.
    #[derive(Default)]
    struct Untouched {
        asked: AtomicU64,
        read: AtomicU64,
    }

    const TOUCHED: Range<u64> = 5 * PAGE_BYTES..6 * PAGE_BYTES;

    impl GuestPages for Untouched {
        fn data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            Ok((range.start < TOUCHED.end && TOUCHED.start < range.end).then_some(TOUCHED))
        }

        fn read(&self, _: u64, into: &mut [u8]) -> io::Result<()> {
            self.read.fetch_add(into.len() as u64, Ordering::Relaxed);
            into.fill(1);
            Ok(())
        }

        fn write(&self, _: u64, _: &[u8]) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_page_that_was_never_touched_had_a_fingerprint_and_was_compared() {
        const BYTES: u64 = 64 << 30;
        let pages =
            Fingerprinted::new(Untouched::default(), BYTES, &FingerprintKey::random().unwrap()).unwrap();
        assert_eq!(pages.data(0..BYTES).unwrap(), Some(TOUCHED));
        pages.read(TOUCHED.start, &mut [0; PAGE_BYTES as usize]).unwrap();
        assert_eq!(pages.data(TOUCHED.end..BYTES).unwrap(), None);
        assert_eq!(
            pages.prints.chunks(),
            1,
            "fingerprints of the page that was touched, and of those around it"
        );
        pages.pages.asked.store(0, Ordering::Relaxed);
        let dirty = DirtyBitmap::new(BYTES / PAGE_BYTES).unwrap();
        FingerprintLog { regions: vec![&pages] }.harvest(0, &dirty).unwrap();
        assert_eq!(dirty.count(), 0);
        assert_eq!(pages.pages.read.load(Ordering::Relaxed), 2 * PAGE_BYTES, "when it was sent, and now");
        let asked = pages.pages.asked.load(Ordering::Relaxed);
        assert!(asked <= BYTES / SHARE_BYTES + 1, "{asked} searches for data");
    }

    #[test]
    fn threads_that_the_system_refuses_are_done_without() {
        let pages = pages(2000);
        let dirty = DirtyBitmap::new(2000).unwrap();
        // No system has room for such stacks.
        pages.compare_on(8, || thread::Builder::new().stack_size(1 << 62), &dirty).unwrap();
        assert_eq!(dirty.count(), 2000);
    }

    /// Pages that panic, or fail, when a certain thread reads them.
    struct Defective {
        reader: thread::ThreadId,
        panics_elsewhere: bool,
        fails: bool,
        read: AtomicU64,
    }

    impl GuestPages for Defective {
        fn read(&self, _: u64, into: &mut [u8]) -> io::Result<()> {
            into.fill(0);
            self.read.fetch_add(into.len() as u64, Ordering::Relaxed);
            if (thread::current().id() == self.reader) == self.panics_elsewhere {
                // Slow, so that the other threads get pieces.
                thread::sleep(std::time::Duration::from_millis(1));
                return Ok(());
            }
            if self.fails {
                return Err(io::ErrorKind::PermissionDenied.into());
            }
            std::panic::panic_any("a defect in GuestPages".to_owned())
        }

        fn write(&self, _: u64, _: &[u8]) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_panic_in_the_pages_of_a_caller_is_passed_on_from_every_thread() {
        const BYTES: u64 = 256 << 20;
        for (panics_elsewhere, fails) in [(false, false), (true, false), (false, true), (true, true)] {
            let read = AtomicU64::new(0);
            let pages = Defective { reader: thread::current().id(), panics_elsewhere, fails, read };
            let key = FingerprintKey::random().unwrap();
            let pages = Fingerprinted::new(pages, BYTES, &key).unwrap();
            let dirty = DirtyBitmap::new(BYTES / PAGE_BYTES).unwrap();
            let compared = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                pages.compare_on(4, thread::Builder::new, &dirty)
            }));
            match fails {
                true => assert_eq!(compared.unwrap().unwrap_err().kind(), io::ErrorKind::PermissionDenied),
                false => {
                    let panic = compared.unwrap_err();
                    assert_eq!(panic.downcast_ref::<String>().unwrap(), "a defect in GuestPages");
                }
            }
            assert!(pages.pages.read.load(Ordering::Relaxed) < BYTES / 2, "the others end early");
        }
    }

    #[test]
    fn a_part_of_a_page_is_refused_and_not_forgotten() {
        let key = FingerprintKey::random().unwrap();
        let bytes = Bytes(Mutex::new(vec![0; 5000]));
        let error = Fingerprinted::new(bytes, 5000, &key).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn two_moves_have_different_keys_and_pages_that_were_never_read_are_dirty() {
        let (one, other) = (FingerprintKey::random().unwrap(), FingerprintKey::random().unwrap());
        assert_ne!(one.of(&[1; 4096]), other.of(&[1; 4096]));
        assert_eq!(dirty(&pages(3)), [(0, 3)]);
    }
}
