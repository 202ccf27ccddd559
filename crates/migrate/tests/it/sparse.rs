//! Memory that was never touched is neither read nor made by a move.

use std::fs::File;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use limosa_migrate::link::{Link, LinkError, SocketLink, Wait};
use limosa_migrate::{
    Destination, FilePages, GuestPages, Ledger, Memory, MemoryRegion, Options, Outcome, Received, Source,
    move_local,
};
use limosa_stream::{Answer, Decoded, Decoder, Kind, Offer};
use limosa_testing::{forward_link, memfd};

use crate::common::peer::Peer;

const BYTES: u64 = 64 << 30;

#[test]
fn a_guest_of_64_gib_that_touched_three_pages_moves_as_three_pages() {
    let files = [memfd(BYTES), memfd(BYTES)];
    let pages = |file: &File| FilePages::mapped(file.try_clone().unwrap(), 0, BYTES).unwrap();
    let [here, there] = [pages(&files[0]), pages(&files[1])];
    let touched = [0, (40 << 30) + 4096, BYTES - 4096];
    touched.iter().for_each(|at| here.write(*at, &[7; 4096]).unwrap());
    // What is there and not in the source has to go.
    there.write(1 << 30, &[9; 4096]).unwrap();
    let region = |pages| MemoryRegion { id: 0, iova: 0, size: BYTES, pages };
    let (options, ledger) = (Options::default(), Ledger::new());
    let (outcome, received) = move_local(
        Source::new(&[], &options).with_memory(Memory::stopped(vec![region(&here)])),
        Destination::new(&[], &ledger, &options).with_memory(&[region(&there)]),
    );
    let Outcome::Moved(report) = outcome else { panic!("{outcome:?}") };
    assert!(matches!(received, Received::Runs(_)), "{received:?}");
    assert_eq!((report.bytes.memory_bytes, report.bytes.zero_bytes), (3 * 4096, BYTES - 3 * 4096));
    let mut page = [1; 4096];
    for at in touched {
        there.read(at, &mut page).unwrap();
        assert_eq!(page, [7; 4096]);
    }
    there.read(1 << 30, &mut page).unwrap();
    assert_eq!(page, [0; 4096]);
    let blocks = files.map(|file| file.metadata().unwrap().blocks());
    assert_eq!(blocks, [3 * 8, 4 * 8], "in units of 512 bytes");
}

/// A link that keeps count of the frames that are written to it.
struct Counted {
    link: SocketLink,
    frames: Mutex<(Decoder, Vec<Kind>)>,
}

impl Counted {
    fn new(link: SocketLink) -> Counted {
        Counted { link, frames: Mutex::new((Decoder::new(), Vec::new())) }
    }

    fn count(&self, kind: Kind) -> usize {
        self.frames.lock().unwrap().1.iter().filter(|found| **found == kind).count()
    }
}

impl Link for Counted {
    fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        let written = self.link.write(slices, wait)?;
        let mut bytes = slices.iter().map(|slice| &**slice).collect::<Vec<_>>().concat();
        bytes.truncate(written);
        let (decoder, kinds) = &mut *self.frames.lock().unwrap();
        decoder.push(&bytes);
        while let Some(decoded) = decoder.next().unwrap() {
            if let Decoded::Frame { header, .. } = decoded {
                kinds.push(header.kind);
            }
        }
        Ok(written)
    }
    forward_link!(|this| this.link; read, finish, peer);
}

const PAGES: u64 = 4096;
const PAGE: u64 = 4096;

/// Memory of which every second page was touched, and every eighth of these holds zeroes.
fn alternating() -> (File, FilePages) {
    let file = memfd(PAGES * PAGE);
    let pages = FilePages::mapped(file.try_clone().unwrap(), 0, PAGES * PAGE).unwrap();
    for page in (0..PAGES).step_by(2) {
        pages.write(page * PAGE, &[if page % 16 == 0 { 0 } else { page as u8 | 1 }; PAGE as usize]).unwrap();
    }
    (file, pages)
}

fn region(pages: &FilePages) -> MemoryRegion<'_> {
    MemoryRegion { id: 0, iova: 0, size: PAGES * PAGE, pages }
}

#[test]
fn every_second_page_cost_a_frame_of_its_own() {
    let (_, here) = alternating();
    let there_file = memfd(PAGES * PAGE);
    let there = FilePages::mapped(there_file.try_clone().unwrap(), 0, PAGES * PAGE).unwrap();
    // Where the source has zeroes: a touched page, one that was not touched, and one that the next is behind.
    let stale = [16, 17, 1001];
    stale.iter().for_each(|page| there.write(page * PAGE, &[9; PAGE as usize]).unwrap());
    let (near, far) = SocketLink::pair().unwrap();
    let near = Counted::new(near);
    let (options, ledger) = (Options::default(), Ledger::new());
    std::thread::scope(|scope| {
        let receiving = scope
            .spawn(|| Destination::new(&[], &ledger, &options).with_memory(&[region(&there)]).receive(&far));
        let source = Source::new(&[], &options).with_memory(Memory::stopped(vec![region(&here)]));
        let outcome = source.send(&near);
        near.finish();
        let Outcome::Moved(report) = outcome else { panic!("{outcome:?}") };
        let received = receiving.join().unwrap();
        assert!(matches!(received, Received::Runs(_)), "{received:?}");
        let data_bytes = (PAGES / 2 - PAGES / 16) * PAGE;
        assert_eq!(report.bytes.memory_bytes, data_bytes);
        assert_eq!(report.bytes.zero_bytes, PAGES * PAGE - data_bytes);
    });
    let (mut sent, mut found) = (vec![0; (PAGES * PAGE) as usize], vec![1; (PAGES * PAGE) as usize]);
    here.read(0, &mut sent).unwrap();
    there.read(0, &mut found).unwrap();
    assert!(sent == found);
    let made = PAGES / 2 - PAGES / 16 + stale.len() as u64;
    assert_eq!(there_file.metadata().unwrap().blocks(), made * 8, "in units of 512 bytes");
    let frames =
        near.count(Kind::MEMORY_RUNS) + near.count(Kind::MEMORY_DATA) + near.count(Kind::MEMORY_ZERO);
    assert!(frames <= 24, "{frames} frames for {} pages", PAGES / 2);
}

#[test]
fn an_older_destination_is_sent_no_frame_that_it_does_not_know() {
    let (_, here) = alternating();
    let (near, far) = SocketLink::pair().unwrap();
    let near = Counted::new(near);
    let options = Options::default().with_unauthenticated_peers(true);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut peer = Peer::new(far);
            let id = peer.read_id();
            let (kind, offer) = peer.read();
            assert_eq!(kind, Kind::OFFER);
            let answer = Answer { accepted: true, window: Some(1 << 20), ..Answer::default() };
            assert!(Offer::decode(&offer).is_ok() && !answer.runs);
            peer.preface(id);
            peer.frame(Kind::ANSWER, 0, 0, &answer.encode().unwrap());
            // It answers no further.
            loop {
                let header = peer.next().expect("the source has not ended");
                match header.kind {
                    Kind::MEMORY_RUNS => panic!("a frame of a newer version"),
                    Kind::FLUSH => peer.frame(Kind::FLUSHED, header.section, header.position, &[]),
                    Kind::SUM => break,
                    _ => {}
                }
            }
        });
        let source = Source::new(&[], &options).with_memory(Memory::stopped(vec![region(&here)]));
        let outcome = source.send(&near);
        assert!(matches!(outcome, Outcome::Undone { .. }), "{outcome:?}");
    });
    assert_eq!(near.count(Kind::MEMORY_DATA) as u64, PAGES / 2 - PAGES / 16);
}

/// Counts the searches for data.
struct Searched {
    pages: FilePages,
    searches: AtomicUsize,
}

impl GuestPages for Searched {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.pages.read(offset, into)
    }
    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.pages.write(offset, from)
    }
    fn data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        self.searches.fetch_add(1, Ordering::SeqCst);
        self.pages.data(range)
    }
}

#[test]
fn a_hole_was_searched_anew_for_each_of_its_mebibytes() {
    const BYTES: u64 = 8 << 30;
    // Nothing of it but two pages.
    let [here, there] =
        [0, 1].map(|_| Searched { pages: FilePages::new(memfd(BYTES), 0), searches: AtomicUsize::new(0) });
    for at in [5 << 30, (5 << 30) + 100 * PAGE] {
        here.write(at, &[7; PAGE as usize]).unwrap();
    }
    let region = |pages| MemoryRegion { id: 0, iova: 0, size: BYTES, pages };
    let (options, ledger) = (Options::default(), Ledger::new());
    let (near, far) = SocketLink::pair().unwrap();
    let (here_region, there_region) = ([region(&here)], [region(&there)]);
    std::thread::scope(|scope| {
        let receiving =
            scope.spawn(|| Destination::new(&[], &ledger, &options).with_memory(&there_region).receive(&far));
        let source = Source::new(&[], &options).with_memory(Memory::stopped(here_region.to_vec()));
        let outcome = source.send(&near);
        assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
        assert!(matches!(receiving.join().unwrap(), Received::Runs(_)));
    });
    let searches = here.searches.load(Ordering::SeqCst);
    assert!(searches < 100, "{searches} searches for a hole in each of 8 GiB");
    let mut page = [0; PAGE as usize];
    there.read((5 << 30) + 100 * PAGE, &mut page).unwrap();
    assert_eq!(page, [7; PAGE as usize]);
}
