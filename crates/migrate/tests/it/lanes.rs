//! Moves over several links, and of devices that differ in how fast they are: everything arrives, in order, and a
//! link that fails ends the move without harm.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{LazyLock, Mutex};
use std::time::Duration;

use crate::common::closures::Harvest;
use crate::common::{Ends, Fault, FaultyLink, Pages, VecPages, Way, options, world};
use limosa_migrate::link::{Bandwidth, LimitedLink, Link, LinkError, SocketLink, Wait};
use limosa_migrate::{Compression, GuestPages, Options, Outcome, Received};
use limosa_protocol::MigrationFlags;
use limosa_protocol::bitmap::DirtyBitmap;

const MEMORY_BYTES: usize = 9 << 20;

fn links(links: u32) -> Options {
    options().with_links(NonZeroU32::new(links).unwrap())
}

/// Devices of different sizes, and memory with zeroes in it.
fn ends(devices: usize, most: u32) -> Ends {
    let worlds = (0..devices).map(|at| {
        let flags = MigrationFlags::SETS[at % MigrationFlags::SETS.len()];
        world(&format!("dev{at}"), flags, 70_000 * at + 11)
    });
    let (source, destination) = worlds.unzip();
    let mut ends = Ends::new(source, destination);
    ends.options = links(most);
    // Made once: it takes longer than a move.
    static CONTENT: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let byte = |at: usize| if at % 50_000 < 40_000 { (at / 7 % 251) as u8 } else { 0 };
        (0..MEMORY_BYTES).map(byte).collect()
    });
    let (here, there) = (VecPages(Mutex::new(CONTENT.clone())), VecPages::new(MEMORY_BYTES));
    ends.memory = Some((Arc::new(here) as Pages, Arc::new(there) as Pages, MEMORY_BYTES as u64));
    ends
}

/// Where both sides get their further links: the source's are made by `make`, the destination's come out of it.
struct Exchange<F> {
    waiting: Mutex<Vec<Box<dyn Link>>>,
    connected: AtomicUsize,
    make: F,
}

impl<F: Fn(usize) -> (Box<dyn Link>, Vec<Box<dyn Link>>) + Sync> Exchange<F> {
    fn new(make: F) -> Exchange<F> {
        Exchange { waiting: Mutex::default(), connected: AtomicUsize::new(0), make }
    }

    fn connect(&self) -> Result<Box<dyn Link>, LinkError> {
        let (near, far) = (self.make)(self.connected.fetch_add(1, Ordering::SeqCst) + 1);
        self.waiting.lock().unwrap().extend(far);
        Ok(near)
    }

    fn accept(&self, wait: Wait<'_>) -> Result<Box<dyn Link>, LinkError> {
        loop {
            if let Some(link) = self.waiting.lock().unwrap().pop() {
                return Ok(link);
            }
            wait.left()?;
            std::thread::yield_now();
        }
    }
}

fn pair() -> (Box<dyn Link>, Vec<Box<dyn Link>>) {
    let (near, far) = SocketLink::pair().unwrap();
    (Box::new(near), vec![Box::new(far)])
}

fn run(
    ends: &Ends,
    make: impl Fn(usize) -> (Box<dyn Link>, Vec<Box<dyn Link>>) + Sync,
) -> (Outcome, Received, usize) {
    let (near, far) = SocketLink::pair().unwrap();
    run_over(ends, near, far, make)
}

/// With this first link.
fn run_over(
    ends: &Ends,
    near: impl Link,
    far: SocketLink,
    make: impl Fn(usize) -> (Box<dyn Link>, Vec<Box<dyn Link>>) + Sync,
) -> (Outcome, Received, usize) {
    let exchange = Exchange::new(make);
    let (outcome, received) = std::thread::scope(|scope| {
        let exchange = &exchange;
        let receiving = scope.spawn(move || {
            let accept = |wait: Wait<'_>| exchange.accept(wait);
            ends.with_destination(|destination| destination.receive_over(&far, &accept))
        });
        let connect = |_: Wait<'_>| exchange.connect();
        let outcome = ends.with_source(|source| source.send_over(&near, &connect));
        drop(near);
        (outcome, receiving.join().unwrap())
    });
    let connected = exchange.connected.load(Ordering::SeqCst);
    (outcome, received, connected)
}

#[test]
fn everything_arrives_over_any_number_of_links() {
    for most in [1, 2, 4, 16] {
        for devices in [1, 3] {
            let ends = ends(devices, most);
            let (outcome, received, connected) = run(&ends, |_| pair());
            assert_eq!(connected as u32, most - 1);
            if let Outcome::Moved(report) = &outcome {
                assert_eq!(report.links.len() as u32, most);
                assert!(report.bytes.zero_bytes > 0);
            }
            assert!(ends.check(outcome, received, &format!("{most} links, {devices} devices")));
        }
    }
}

#[test]
fn links_that_share_a_small_bandwidth_are_not_taken_for_silent() {
    let mut ends = ends(1, 8);
    // Frames without zeroes are whole, and take longer than that with all links together.
    let here = VecPages::new(MEMORY_BYTES);
    here.0.lock().unwrap().fill(7);
    ends.memory = Some((Arc::new(here), Arc::new(VecPages::new(MEMORY_BYTES)), MEMORY_BYTES as u64));
    ends.options.silence_max = Duration::from_millis(1500);
    let bandwidth = Bandwidth::new(4 << 20);
    let limited = || {
        let (near, far) = SocketLink::pair().unwrap();
        (LimitedLink::new(near, Some(bandwidth.clone())), far)
    };
    let (near, far) = limited();
    let (outcome, received, connected) = run_over(&ends, near, far, |_| {
        let (near, far) = limited();
        (Box::new(near), vec![Box::new(far)])
    });
    assert_eq!(connected, 7);
    if let Outcome::Undone { why, .. } = &outcome {
        panic!("{why}; at the destination: {received:?}");
    }
    assert!(ends.check(outcome, received, "eight links at 4 MiB/s"));
}

#[test]
fn everything_that_was_compressed_arrives_over_several_links() {
    for compression in Compression::ALL {
        let mut ends = ends(3, 3);
        ends.options.compress = Some(compression);
        let (outcome, received, connected) = run(&ends, |_| pair());
        assert_eq!(connected, 2);
        let Outcome::Moved(report) = &outcome else { panic!("{outcome:?}") };
        let carried: u64 = report.links.iter().map(|link| link.sent_bytes).sum();
        let moved = report.bytes.memory_bytes - report.bytes.zero_bytes;
        assert!(carried < moved, "{}: {carried} bytes for {moved}", compression.name());
        // Compares the memory and the devices' states of both sides.
        assert!(ends.check(outcome, received, &format!("{} over 3 links", compression.name())));
    }
}

#[test]
fn links_that_are_chosen_by_measurement_carry_everything() {
    let mut ends = ends(2, 4);
    ends.options.links_measured = true;
    let (outcome, received, connected) = run(&ends, |_| pair());
    assert_eq!(connected, 3);
    assert!(ends.check(outcome, received, "up to four links"));
}

#[test]
fn the_destination_takes_no_more_links_than_it_wants() {
    let mut ends = ends(2, 2);
    ends.source_options = Some(links(8));
    let (outcome, received, connected) = run(&ends, |_| pair());
    assert_eq!(connected, 1);
    assert!(ends.check(outcome, received, "8 offered, 2 taken"));
    // One that knows of no way to get more takes one.
    let mut ends = self::ends(2, 8);
    ends.source_options = Some(links(8));
    let (near, far) = SocketLink::pair().unwrap();
    let (outcome, received) = std::thread::scope(|scope| {
        let ends = &ends;
        let receiving = scope.spawn(move || ends.with_destination(|destination| destination.receive(&far)));
        let none = |_: Wait<'_>| -> Result<Box<dyn Link>, LinkError> { panic!("nobody asks for more") };
        let outcome = ends.with_source(|source| source.send_over(&near, &none));
        drop(near);
        (outcome, receiving.join().unwrap())
    });
    assert!(ends.check(outcome, received, "8 offered, 1 taken"));
}

#[test]
fn a_link_of_another_client_is_closed_and_the_right_one_waited_for() {
    let ends = ends(2, 3);
    let (outcome, received, _) = run(&ends, |number| {
        let (near, mut far) = pair();
        // Taken last in, first out: the other client comes before the link.
        let (other, theirs) = SocketLink::pair().unwrap();
        let wait = Wait::within(Duration::from_secs(10), None);
        let words: &[u8] =
            if number == 1 { b"GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n......" } else { b"\x16\x03\x01" };
        other.write(&[std::io::IoSlice::new(words)], wait).unwrap();
        other.finish();
        far.push(Box::new(theirs));
        (near, far)
    });
    assert!(ends.check(outcome, received, "another client between"));
}

#[test]
fn a_further_link_that_fails_anywhere_ends_the_move_without_harm() {
    // The bytes that the further link carries vary with who is faster; most of these lie within them.
    let with_fault = |fault, at| {
        let mut ends = ends(2, 2);
        let short = Duration::from_millis(400);
        ends.options = links(2).with_silence_max(short).with_load_max(short).with_commit_max(short);
        let (outcome, received, _) = run(&ends, |_| {
            let (near, far) = SocketLink::pair().unwrap();
            (Box::new(FaultyLink::new(near, Way::Out, at, fault)), vec![Box::new(far)])
        });
        ends.check(outcome, received, &format!("{fault:?} at byte {at} of the further link"));
    };
    std::thread::scope(|scope| {
        for fault in [Fault::Cut, Fault::Flip(3), Fault::Drop] {
            // A few at a time: most of them only wait.
            scope.spawn(move || {
                for at in [0, 1, 39, 40, 60, 75, 76, 100, 110, 200_000, 300_033, 1_000_000] {
                    with_fault(fault, at);
                }
            });
        }
    });
}

#[test]
fn a_further_link_that_cannot_be_made_failed_a_move_that_can_go_on_with_fewer() {
    let mut ends = ends(1, 4);
    ends.options.silence_max = Duration::from_secs(3);
    let (near, far) = SocketLink::pair().unwrap();
    let (outcome, received) = std::thread::scope(|scope| {
        let ends = &ends;
        let receiving = scope.spawn(move || {
            let never = |wait: Wait<'_>| -> Result<Box<dyn Link>, LinkError> {
                // No link comes.
                let (near, _far) = SocketLink::pair()?;
                near.read(&mut [0], wait).map(|_| unreachable!())
            };
            ends.with_destination(|destination| destination.receive_over(&far, &never))
        });
        let refused = |_: Wait<'_>| -> Result<Box<dyn Link>, LinkError> {
            Err(LinkError::Io(std::io::ErrorKind::ConnectionRefused.into()))
        };
        let outcome = ends.with_source(|source| source.send_over(&near, &refused));
        drop(near);
        (outcome, receiving.join().unwrap())
    });
    let Outcome::Moved(report) = &outcome else { panic!("{outcome:?}") };
    assert!(report.notes.iter().any(|note| note.contains("1 of 4 are used")), "{:?}", report.notes);
    assert!(ends.check(outcome, received, "no further link"));
}

/// Pages of which one is written only when everything else has been.
struct LastPage {
    inner: VecPages,
}

impl GuestPages for LastPage {
    fn read(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        self.inner.read(offset, into)
    }
    fn write(&self, offset: u64, from: &[u8]) -> std::io::Result<()> {
        if offset == 0 {
            // Whatever order the links are read in.
            (0..1000).for_each(|_| std::thread::yield_now());
        }
        self.inner.write(offset, from)
    }
}

#[test]
fn a_link_that_lags_behind_does_not_bring_back_old_pages() {
    struct Shared(Arc<VecPages>);
    impl GuestPages for Shared {
        fn read(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
            self.0.read(offset, into)
        }
        fn write(&self, offset: u64, from: &[u8]) -> std::io::Result<()> {
            self.0.write(offset, from)
        }
    }
    let mut ends = ends(1, 4);
    ends.options.convergence.downtime_goal = Duration::ZERO;
    let here = Arc::new(VecPages::new(MEMORY_BYTES));
    here.write(0, &[0xff; MEMORY_BYTES]).unwrap();
    let there = LastPage { inner: VecPages::new(MEMORY_BYTES) };
    ends.memory = Some((Arc::new(Shared(here.clone())), Arc::new(there), MEMORY_BYTES as u64));
    // In every round the guest has written to the first page once more.
    let mut round = 0;
    *ends.log.lock().unwrap() = Some(Box::new(Harvest(move |dirty: &DirtyBitmap| {
        if round < 20 {
            round += 1;
            here.write(0, &[round; 4096])?;
            dirty.set_range(0, dirty.pages());
        }
        Ok(())
    })));
    let (outcome, received, _) = run(&ends, |_| pair());
    assert!(ends.check(outcome, received, "rounds over four links"));
}
