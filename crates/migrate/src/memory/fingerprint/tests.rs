//! Properties of fingerprints.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};
use std::thread;

use super::compare::SHARE_BYTES;
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
    let pages = Fingerprinted::new(Untouched::default(), BYTES, &FingerprintKey::random().unwrap()).unwrap();
    assert_eq!(pages.data(0..BYTES).unwrap(), Some(TOUCHED));
    pages.read(TOUCHED.start, &mut [0; PAGE_BYTES as usize]).unwrap();
    assert_eq!(pages.data(TOUCHED.end..BYTES).unwrap(), None);
    assert_eq!(pages.prints.chunks(), 1, "fingerprints of the page that was touched, and of those around it");
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
    /// Whether a thread has come to the defect.
    reached: Mutex<bool>,
    news: Condvar,
}

impl GuestPages for Defective {
    fn read(&self, _: u64, into: &mut [u8]) -> io::Result<()> {
        into.fill(0);
        self.read.fetch_add(into.len() as u64, Ordering::Relaxed);
        if (thread::current().id() == self.reader) == self.panics_elsewhere {
            // However late the system starts a thread, it gets a piece; and from then on this one is slow.
            let reached = self.reached.lock().unwrap();
            drop(self.news.wait_while(reached, |reached| !*reached).unwrap());
            thread::sleep(std::time::Duration::from_millis(1));
            return Ok(());
        }
        *self.reached.lock().unwrap() = true;
        self.news.notify_all();
        if self.fails {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        // Without the hook, which may take seconds to print a backtrace.
        std::panic::resume_unwind(Box::new("a defect in GuestPages".to_owned()))
    }

    fn write(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_panic_in_the_pages_of_a_caller_is_passed_on_from_every_thread() {
    const BYTES: u64 = 256 << 20;
    for (panics_elsewhere, fails) in [(false, false), (true, false), (false, true), (true, true)] {
        let (reader, read) = (thread::current().id(), AtomicU64::new(0));
        let (reached, news) = (Mutex::new(false), Condvar::new());
        let pages = Defective { reader, panics_elsewhere, fails, read, reached, news };
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
