//! Memory that is mapped: over links without checksums pages are sent from where they lie and received where they belong.

use std::fs::File;
use std::io::IoSlice;
use std::num::NonZeroU32;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::common::closures::Harvest;
use crate::common::{Ends, Fault, FaultyLink, Pages, Way, move_over_links, options, world};
use limosa_guest_memory::{PinnedBytes, SendPart};
use limosa_migrate::link::{Link, LinkError, SocketLink, Wait};
use limosa_migrate::{Error, FilePages, GuestPages, MemoryChecksums, Options, Outcome, Received};
use limosa_protocol::MigrationFlags;
use limosa_protocol::bitmap::DirtyBitmap;
use limosa_stream::{Damage, HEADER_BYTES, Header, Kind};
use limosa_testing::{forward_link, memfd};

const PAGE: u64 = 4096;
const MEMORY_BYTES: u64 = 6 << 20;

fn with(checksums: MemoryChecksums) -> Options {
    options().with_memory_checksums(checksums)
}

fn mapped(file: &File) -> FilePages {
    FilePages::mapped(file.try_clone().unwrap(), 0, MEMORY_BYTES).unwrap()
}

/// The pages that were touched: 3 MiB, and every third page of the last MiB.
fn touched() -> impl Iterator<Item = u64> {
    (0..768).chain((1280..1536).step_by(3))
}

/// Whether a touched page holds zeroes: some behind the first 2 MiB do.
fn holds_zeroes(page: u64) -> bool {
    page >= 512 && page % 16 == 5
}

/// A device, and mapped memory on both sides.
fn ends(options: Options) -> (Ends, [File; 2]) {
    let (source, destination) = world("dev", MigrationFlags::SETS[0], 1000);
    let mut ends = Ends::new(vec![source], vec![destination]);
    ends.options = options;
    let files = [memfd(MEMORY_BYTES), memfd(MEMORY_BYTES)];
    let [here, there] = [0, 1].map(|at| mapped(&files[at]));
    for page in touched() {
        let fill = if holds_zeroes(page) { 0 } else { (page % 255) as u8 + 1 };
        here.write(page * PAGE, &[fill; PAGE as usize]).unwrap();
    }
    ends.memory = Some((Arc::new(here) as Pages, Arc::new(there) as Pages, MEMORY_BYTES));
    (ends, files)
}

/// Counts the frames of memory that are sent without a checksum, and says whether it is authenticated.
struct Watched {
    link: SocketLink,
    is_authenticated: bool,
    unchecked: Arc<AtomicU64>,
}

impl Watched {
    fn new(link: SocketLink, is_authenticated: bool) -> Watched {
        Watched { link, is_authenticated, unchecked: Arc::default() }
    }

    fn look(&self, part: &[u8]) {
        let header = <&[u8; HEADER_BYTES]>::try_from(part).ok().and_then(|bytes| Header::decode(bytes).ok());
        self.unchecked.fetch_add(header.is_some_and(|header| header.unchecked).into(), Ordering::SeqCst);
    }
}

impl Link for Watched {
    fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        slices.iter().for_each(|slice| self.look(slice));
        self.link.write(slices, wait)
    }
    forward_link!(|this| this.link; read, finish, peer);
    fn read_to_memory(
        &self,
        memory: &PinnedBytes,
        from: usize,
        behind: &mut [u8],
        wait: Wait<'_>,
    ) -> Result<usize, LinkError> {
        self.link.read_to_memory(memory, from, behind, wait)
    }
    fn sends_memory(&self) -> bool {
        true
    }
    fn write_parts(&self, parts: &[SendPart<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        for part in parts {
            if let SendPart::Bytes(bytes) = part {
                self.look(bytes);
            }
        }
        self.link.write_parts(parts, wait)
    }
    fn is_authenticated(&self) -> bool {
        self.is_authenticated
    }
}

#[test]
fn mapped_memory_moves_with_and_without_checksums_over_one_link_and_several() {
    for checksums in [MemoryChecksums::Always, MemoryChecksums::Never] {
        for links in [1, 3] {
            let (ends, files) = ends(with(checksums).with_links(NonZeroU32::new(links).unwrap()));
            let (outcome, received) = ends.with_source(|source| {
                ends.with_destination(|destination| {
                    move_over_links(source, destination, |_, near| Box::new(near))
                })
            });
            assert!(ends.check(outcome, received, &format!("{checksums:?}, {links} links")));
            let blocks = files[1].metadata().unwrap().blocks();
            let made = touched().filter(|page| !holds_zeroes(*page)).count();
            assert_eq!(blocks, made as u64 * 8, "in units of 512 bytes: no page that is zero was made");
        }
    }
}

#[test]
fn memory_has_no_checksum_only_where_both_sides_do_without() {
    use MemoryChecksums::{Always, Never, UnlessAuthenticated};
    for (source, destination, authenticated, expected) in [
        (UnlessAuthenticated, UnlessAuthenticated, (true, true), true),
        (UnlessAuthenticated, UnlessAuthenticated, (true, false), false),
        (UnlessAuthenticated, UnlessAuthenticated, (false, true), false),
        (UnlessAuthenticated, UnlessAuthenticated, (false, false), false),
        (Never, UnlessAuthenticated, (false, false), false),
        (UnlessAuthenticated, Never, (false, false), false),
        (Never, UnlessAuthenticated, (false, true), true),
        (Never, Never, (false, false), true),
        (Always, Never, (true, true), false),
        (Never, Always, (true, true), false),
    ] {
        let what = format!("{source:?}, {destination:?}, {authenticated:?}");
        let (mut ends, _files) = ends(with(destination));
        ends.source_options = Some(with(source));
        let (near, far) = SocketLink::pair().unwrap();
        let near = Watched::new(near, authenticated.0);
        let unchecked = Arc::clone(&near.unchecked);
        let (outcome, received) = ends.run(near, Watched::new(far, authenticated.1));
        assert!(ends.check(outcome, received, &what));
        assert_eq!(unchecked.load(Ordering::SeqCst) > 0, expected, "{what}");
    }
}

#[test]
fn a_page_that_was_damaged_on_the_way_fails_the_move() {
    // Within the first two frames of memory, of 1 MiB each: behind the OFFER, and a device that gives nothing before the stop.
    for at in [9_000, 12_345, 900_000, 1_500_000] {
        let (ends, _files) = ends(with(MemoryChecksums::UnlessAuthenticated));
        let (near, far) = SocketLink::pair().unwrap();
        let (outcome, received) = ends.run(FaultyLink::new(near, Way::Out, at, Fault::Flip(3)), far);
        let what = format!("byte {at}");
        match &received {
            Received::Discarded { why: Error::Stream { damage: Damage::Checksum { .. }, .. }, .. } => {}
            received => panic!("{what}: {received:?}"),
        }
        assert!(!ends.check(outcome, received, &what));
    }
}

#[test]
fn pages_that_change_while_they_are_sent_from_where_they_lie_are_sent_again() {
    let (mut ends, files) = ends(with(MemoryChecksums::Never));
    ends.options.convergence.downtime_goal = Duration::ZERO;
    let guest = Arc::new(mapped(&files[0]));
    let (round, is_over) = (Arc::new(AtomicU64::new(0)), Arc::new(Mutex::new(false)));
    let (harvests, writes, ended) = (Arc::clone(&round), Arc::clone(&guest), Arc::clone(&is_over));
    *ends.log.lock().unwrap() = Some(Box::new(Harvest(move |dirty: &DirtyBitmap| {
        let round = harvests.fetch_add(1, Ordering::SeqCst);
        if round == 3 {
            // It has written for the last time, before this harvest.
            *ended.lock().unwrap() = true;
        }
        if round < 10 {
            writes.write(0, &vec![round as u8 + 1; 1 << 20])?;
            dirty.set_range(0, 256);
        }
        Ok(())
    })));
    let (outcome, received) = std::thread::scope(|scope| {
        let (is_over, guest) = (&is_over, &guest);
        scope.spawn(move || {
            // Between two harvests, while pages are sent.
            for page in (0..256_u64).cycle() {
                let is_over = is_over.lock().unwrap();
                if *is_over {
                    break;
                }
                guest.write(page * PAGE, &page.to_le_bytes()).unwrap();
            }
        });
        let done = ends.run_plain();
        *is_over.lock().unwrap() = true;
        done
    });
    assert!(round.load(Ordering::SeqCst) > 3, "enough rounds");
    assert!(ends.check(outcome, received, "a guest that writes"));
}

#[test]
fn memory_that_was_cut_short_is_an_error_of_the_side_that_has_it() {
    for (side, checksums) in
        [(1, MemoryChecksums::Always), (1, MemoryChecksums::Never), (0, MemoryChecksums::Never)]
    {
        let (mut ends, files) = ends(with(checksums));
        files[side].set_len(PAGE * 100).unwrap();
        let (outcome, received) = ends.run_plain();
        let what = format!("side {side}, {checksums:?}: {outcome:?}\n{received:?}");
        match side {
            0 => assert!(matches!(outcome, Outcome::Undone { why: Error::Memory { .. }, .. }), "{what}"),
            _ => assert!(matches!(received, Received::Discarded { why: Error::Memory { .. }, .. }), "{what}"),
        }
        assert!(what.contains("truncated"), "{what}");
        ends.memory = None;
        assert!(!ends.check(outcome, received, &what));
    }
}

#[test]
fn a_frame_without_a_checksum_on_which_nobody_has_agreed_is_refused() {
    /// Sends the first frame of memory as if both sides had agreed.
    struct Alters(SocketLink);
    impl Link for Alters {
        fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
            let altered = slices.iter().map(|slice| {
                let header = Header::decode(<&[u8; HEADER_BYTES]>::try_from(&**slice).ok()?).ok();
                let header = header.filter(|header| header.kind == Kind::MEMORY_DATA)?;
                let (position, bytes) = (header.position, header.length as usize);
                Some(
                    Header::unchecked(header.kind, header.section, position, header.sequence, bytes).encode(),
                )
            });
            let altered: Vec<_> = altered.collect();
            let slices: Vec<_> = std::iter::zip(&altered, slices)
                .map(|(altered, slice)| IoSlice::new(altered.as_ref().map_or(slice, |header| header)))
                .collect();
            self.0.write(&slices, wait)
        }
        forward_link!(|this| this.0; read, finish, peer);
    }
    let (ends, _files) = ends(options());
    let (near, far) = SocketLink::pair().unwrap();
    let (outcome, received) = ends.run(Alters(near), far);
    assert!(format!("{received:?}").contains("which was not agreed on"), "{received:?}");
    assert!(!ends.check(outcome, received, "not agreed"));
}
