//! What goes wrong while the guest stands still: how long it stands, and that nothing else is held up by it.

use std::io::IoSlice;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::common::closures::Harvest;
use crate::common::hooked::{Call, Hooked, ends_in_time, move_over_a_link};
use crate::common::peer::Peer;
use crate::common::{Door, VecPages, Zeroes, move_over_links, options};
use limosa_migrate::link::{Bandwidth, LimitedLink, Link, LinkError, SocketLink, Wait};
use limosa_migrate::{
    Cancel, CommitNote, Destination, DirtyLog, Error, FingerprintKey, FingerprintLog, Fingerprinted,
    GuestPages, Ledger, Memory, MemoryRegion, MigrationId, MovedDevice, Obstacle, Options, Outcome, Received,
    Source, Vmm, WhenStalled,
};
use limosa_protocol::{MigrationFlags, State};
use limosa_stream::{DeviceFacts, Kind, MemoryFacts, Offer};
use limosa_testing::forward_link;

const FLAGS: MigrationFlags = MigrationFlags::SETS[3];
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Takes the time from the stop of the vCPUs to their resumption.
#[derive(Default)]
struct Clock {
    stopped: Mutex<Option<Instant>>,
    stood_still: Mutex<Option<Duration>>,
    is_stopped: Arc<AtomicBool>,
    /// Refuses the commit.
    refuses: bool,
    committing: AtomicBool,
    /// Called when the vCPUs go on.
    resumed: Option<Box<dyn Fn() + Send + Sync>>,
}

impl Clock {
    fn stood_still(&self) -> Duration {
        self.stood_still.lock().unwrap().expect("it was resumed")
    }
}

impl Vmm for Clock {
    fn stop(&self) -> Result<(), String> {
        *self.stopped.lock().unwrap() = Some(Instant::now());
        self.is_stopped.store(true, Ordering::SeqCst);
        Ok(())
    }
    fn committing(&self, _: &CommitNote) -> Result<(), String> {
        self.committing.store(true, Ordering::SeqCst);
        if self.refuses { Err("a full disk".into()) } else { Ok(()) }
    }
    fn resume(&self) {
        *self.stood_still.lock().unwrap() = self.stopped.lock().unwrap().map(|at| at.elapsed());
        if let Some(resumed) = &self.resumed {
            resumed();
        }
    }
}

/// A log in which nothing is ever dirty.
fn quiet() -> impl DirtyLog {
    Harvest(|_: &_| Ok(()))
}

fn region(pages: &dyn GuestPages, size: u64) -> MemoryRegion<'_> {
    MemoryRegion { id: 0, iova: 0, size, pages }
}

fn links(options: Options, links: u32) -> Options {
    options.with_links(NonZeroU32::new(links).unwrap())
}

/// A link on which writes come to nothing from a moment on.
struct Dark {
    inner: SocketLink,
    from: Arc<AtomicBool>,
    /// Writes fail rather than being swallowed.
    fails: bool,
}

impl Link for Dark {
    fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        match (self.from.load(Ordering::SeqCst), self.fails) {
            (false, _) => self.inner.write(slices, wait),
            (true, true) => Err(LinkError::Closed),
            (true, false) => Ok(slices.iter().map(|slice| slice.len()).sum()),
        }
    }
    forward_link!(|this| this.inner; read, finish, peer);
}

#[test]
fn a_further_link_that_goes_dark_at_the_stop_held_the_guest_for_as_long_as_loading_may_take() {
    ends_in_time("a dark link", || {
        let load_max = Duration::from_secs(50);
        let options =
            links(options(), 2).with_silence_max(Duration::from_millis(800)).with_load_max(load_max);
        let (source, destination) = (Hooked::new("source", FLAGS, &[7; 9]), Hooked::new("there", FLAGS, &[]));
        let (here, there, ledger) =
            ([MovedDevice::new(&source)], [MovedDevice::new(&destination)], Ledger::new());
        let pages = [VecPages::new(9 * MIB as usize), VecPages::new(9 * MIB as usize)];
        pages[0].0.lock().unwrap().fill(7);
        let (clock, mut log) = (Clock::default(), quiet());
        let regions = [region(&pages[1], 9 * MIB)];
        let (outcome, received) = move_over_links(
            Source::new(&here, &options)
                .with_memory(Memory::logged(vec![region(&pages[0], 9 * MIB)], &mut log))
                .with_vmm(&clock),
            Destination::new(&there, &ledger, &options).with_memory(&regions),
            |number, inner| match number {
                0 => Box::new(inner),
                _ => Box::new(Dark { inner, from: clock.is_stopped.clone(), fails: false }),
            },
        );
        assert!(matches!(outcome, Outcome::Undone { .. }), "{outcome:?}");
        assert!(matches!(received, Received::Discarded { .. }), "{received:?}");
        assert_eq!(source.state(), State::Running);
        assert!(clock.stood_still() < load_max / 4, "it stood still for {:?}", clock.stood_still());
    });
}

#[test]
fn a_guest_waited_for_the_last_words_of_a_peer_that_is_silent() {
    ends_in_time("a failing write", || {
        let options = options().with_silence_max(Duration::from_secs(30));
        let (source, destination) = (Hooked::new("source", FLAGS, &[7; 9]), Hooked::new("there", FLAGS, &[]));
        let (here, there, ledger) =
            ([MovedDevice::new(&source)], [MovedDevice::new(&destination)], Ledger::new());
        let clock = Clock::default();
        let (near, far) = SocketLink::pair().unwrap();
        let near = Dark { inner: near, from: clock.is_stopped.clone(), fails: true };
        std::thread::scope(|scope| {
            let destination = Destination::new(&there, &ledger, &options);
            scope.spawn(move || drop(destination.receive(&far)));
            let outcome = Source::new(&here, &options).with_vmm(&clock).send(&near);
            assert!(matches!(outcome, Outcome::Undone { .. }), "{outcome:?}");
            drop(near);
        });
        assert!(clock.stood_still() < Duration::from_secs(1), "it stood still for {:?}", clock.stood_still());
    });
}

#[test]
fn a_destination_that_loads_for_ever_held_the_guest_for_ever() {
    for call in [Call::Write, Call::Set(State::Stop)] {
        ends_in_time("a destination that loads", move || {
            let standstill_max = Duration::from_millis(400);
            let options = options().with_load_max(Duration::MAX).with_standstill_max(standstill_max);
            let door = Arc::new(Door::default());
            let opens = door.clone();
            let clock = Clock { resumed: Some(Box::new(move || opens.open())), ..Clock::default() };
            let stopped = clock.is_stopped.clone();
            let destination = Hooked::new("there", FLAGS, &[]).on(move |_, made| {
                if made == call && stopped.load(Ordering::SeqCst) {
                    door.pass();
                }
            });
            let source = Hooked::new("source", FLAGS, &[7; 2000]);
            let (here, there, ledger) =
                ([MovedDevice::new(&source)], [MovedDevice::new(&destination)], Ledger::new());
            let (outcome, received) = move_over_a_link(
                Source::new(&here, &options).with_vmm(&clock),
                Destination::new(&there, &ledger, &options),
            );
            let Outcome::Undone { why, .. } = outcome else { panic!("{outcome:?}") };
            let Error::StoodStill { limit, left } = &why else { panic!("{why}") };
            assert_eq!(*limit, standstill_max);
            if call == Call::Write {
                let left = left.as_ref().unwrap_or_else(|| panic!("{why}"));
                assert!(left.of == "source" && (1..=2000).contains(&left.bytes), "{left:?}");
                assert!(why.to_string().contains(&format!("{left} are left to send or to load")), "{why}");
            }
            assert!(matches!(received, Received::Discarded { .. }), "{received:?}");
            assert_eq!(source.state(), State::Running);
        });
    }
}

/// Memory whose reads are counted from a moment on.
struct Counting<'a> {
    from: &'a AtomicBool,
    reads: &'a AtomicU64,
}

impl GuestPages for Counting<'_> {
    fn read(&self, _: u64, into: &mut [u8]) -> std::io::Result<()> {
        into.fill(3);
        self.reads.fetch_add(u64::from(self.from.load(Ordering::SeqCst)), Ordering::SeqCst);
        Ok(())
    }
    fn write(&self, _: u64, _: &[u8]) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn an_undo_with_a_fingerprint_log_read_all_memory_again() {
    let size = 4 * MIB;
    let clock = Clock { refuses: true, ..Clock::default() };
    let reads = AtomicU64::new(0);
    let counting = Counting { from: &clock.committing, reads: &reads };
    let pages = Fingerprinted::new(counting, size, &FingerprintKey::random().unwrap()).unwrap();
    let mut log = FingerprintLog { regions: vec![&pages] };
    let options = options();
    let (ledger, nothing) = (Ledger::new(), VecPages::new(size as usize));
    let regions = [region(&nothing, size)];
    let (outcome, _) = move_over_a_link(
        Source::new(&[], &options)
            .with_memory(Memory::logged(vec![region(&pages, size)], &mut log))
            .with_vmm(&clock),
        Destination::new(&[], &ledger, &options).with_memory(&regions),
    );
    let Outcome::Undone { why: Error::Vmm { .. }, report } = outcome else { panic!("{outcome:?}") };
    assert!(report.notes.is_empty(), "{:?}", report.notes);
    assert_eq!(reads.load(Ordering::SeqCst), 0, "reads after the commit was refused");
}

#[test]
fn a_log_that_is_lost_at_the_stop_broke_the_downtime_limit_in_silence() {
    for when_stalled in [WhenStalled::Abort, WhenStalled::SwitchOver] {
        // At the rate that is assumed it takes a minute: nothing was read from which it could be learned.
        let (size, goal) = (64 * GIB, Duration::from_secs(10));
        let (here, there, clock) = (Zeroes::default(), Zeroes::default(), Clock::default());
        let is_lost = clock.is_stopped.clone();
        let mut log = Harvest(move |_: &_| match is_lost.load(Ordering::SeqCst) {
            true => Err(std::io::ErrorKind::BrokenPipe.into()),
            false => Ok(()),
        });
        let wanted = options().convergence.with_downtime_goal(goal).with_when_stalled(when_stalled);
        let options = options().with_convergence(wanted).with_standstill_max(Duration::from_secs(3600));
        let (regions, ledger) = ([region(&there, size)], Ledger::new());
        let (outcome, _) = move_over_a_link(
            Source::new(&[], &options)
                .with_memory(Memory::logged(vec![region(&here, size)], &mut log))
                .with_vmm(&clock),
            Destination::new(&[], &ledger, &options).with_memory(&regions),
        );
        let (report, expected) = match (outcome, when_stalled) {
            (Outcome::Undone { why: Error::NotConverging { obstacle, predicted, .. }, report }, _) => {
                assert_eq!(obstacle, Obstacle::LogLost);
                assert!(predicted > goal, "{predicted:?}");
                (report, WhenStalled::Abort)
            }
            (Outcome::Moved(report), _) => (report, WhenStalled::SwitchOver),
            (outcome, _) => panic!("{outcome:?}"),
        };
        assert_eq!(when_stalled, expected);
        let noted = |note: &String| note.contains("the log of dirty pages was lost at the stop");
        assert!(report.notes.iter().any(noted), "{:?}", report.notes);
    }
}

#[test]
fn a_log_that_failed_in_every_round_was_noted_only_at_the_stop() {
    let (here, there) = (Zeroes::default(), Zeroes::default());
    let mut log = Harvest(|_: &_| Err(std::io::ErrorKind::BrokenPipe.into()));
    let (options, ledger, size) = (options(), Ledger::new(), 1 << 20);
    let regions = [region(&there, size)];
    let (outcome, _) = move_over_a_link(
        Source::new(&[], &options).with_memory(Memory::logged(vec![region(&here, size)], &mut log)),
        Destination::new(&[], &ledger, &options).with_memory(&regions),
    );
    let Outcome::Moved(report) = outcome else { panic!("{outcome:?}") };
    let noted = |part: &str| report.notes.iter().filter(|note| note.contains(part)).count();
    assert_eq!((noted("lost in a round"), noted("lost at the stop")), (1, 1), "{:?}", report.notes);
}

/// A source that offers 128 GiB and says in one frame that all of them are zero. Then it looks at what comes back.
fn all_is_zero(
    there: &Zeroes,
    options: &Options,
    cancel: Option<&Cancel>,
    look: impl Fn(Kind) + Send,
) -> Received {
    let ledger = Ledger::new();
    let size = 128 * GIB;
    let regions = [region(there, size)];
    let options = options.clone().with_unauthenticated_peers(true);
    let (near, far) = SocketLink::pair().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut peer = Peer::new(near);
            peer.preface(MigrationId([3; 16]));
            let memory = vec![MemoryFacts { id: 0, address: 0, bytes: size, page_bytes: 4096 }];
            let offer = Offer { devices: Vec::<DeviceFacts>::new(), memory, ..Offer::default() };
            peer.frame(Kind::OFFER, 0, 0, &offer.encode().unwrap());
            peer.frame(Kind::MEMORY_ZERO, 0, 0, &size.to_le_bytes());
            while let Some(header) = peer.next() {
                look(header.kind);
            }
        });
        let received =
            Destination::new(&[], &ledger, &options).with_memory(&regions).with_cancel(cancel).receive(&far);
        drop(far);
        received
    })
}

#[test]
fn a_frame_of_zeroes_of_128_gib_let_no_cancel_through() {
    ends_in_time("128 GiB of zeroes", || {
        let cancel = Cancel::new().unwrap();
        let there = {
            let cancel = cancel.clone();
            let zeroed = Box::new(move |number| {
                if number == 2 {
                    cancel.cancel();
                }
            });
            Zeroes { zeroed: Some(zeroed), ..Zeroes::default() }
        };
        let received = all_is_zero(&there, &options(), Some(&cancel), |_| {});
        let Received::Discarded { why: Error::Cancelled, .. } = received else { panic!("{received:?}") };
        assert_eq!(there.pieces.into_inner(), 3, "pieces up to the cancel");
        assert!(there.largest.into_inner() <= 64 * MIB);
    });
}

#[test]
fn a_frame_of_zeroes_of_128_gib_kept_the_destination_silent() {
    ends_in_time("128 GiB of zeroes", || {
        let (cancel, door) = (Cancel::new().unwrap(), Arc::new(Door::default()));
        let there = {
            let (cancel, door) = (cancel.clone(), door.clone());
            let zeroed = Box::new(move |number| {
                // The first piece takes until the peer has heard of it.
                if number == 0 {
                    door.pass();
                    cancel.cancel();
                }
            });
            Zeroes { zeroed: Some(zeroed), ..Zeroes::default() }
        };
        let (heard, options) = (AtomicU32::new(0), options().with_silence_max(Duration::from_millis(400)));
        let look = |kind: Kind| {
            let count = heard.fetch_add(u32::from(kind == Kind::PROGRESS), Ordering::SeqCst);
            if kind == Kind::PROGRESS && count == 2 {
                door.open();
            }
        };
        let received = all_is_zero(&there, &options, Some(&cancel), look);
        let Received::Discarded { why: Error::Cancelled, .. } = received else { panic!("{received:?}") };
        assert!(heard.into_inner() >= 3, "keep-alives while memory is made zero");
    });
}

#[test]
fn a_slow_link_that_is_healthy_was_taken_for_a_dead_one() {
    ends_in_time("a slow link", || {
        // A frame of a MiB takes longer than the limit for silence where eight links share the bandwidth.
        let (rate, silence_max) = (5_000_000, Duration::from_secs(1));
        let (source, destination) = (Hooked::new("source", FLAGS, &[7; 9]), Hooked::new("there", FLAGS, &[]));
        let (here, there, ledger) =
            ([MovedDevice::new(&source)], [MovedDevice::new(&destination)], Ledger::new());
        // Nobody waits for a destination that is busy elsewhere.
        let options =
            links(options(), 8).with_silence_max(silence_max).with_load_max(Duration::from_secs(60));
        let size = 8 * MIB;
        let pages = [VecPages::new(size as usize), VecPages::new(size as usize)];
        pages[0].0.lock().unwrap().fill(7);
        let mut log = quiet();
        let regions = [region(&pages[1], size)];
        let bandwidth = Bandwidth::new(rate);
        let (outcome, received) = move_over_links(
            Source::new(&here, &options).with_memory(Memory::logged(vec![region(&pages[0], size)], &mut log)),
            Destination::new(&there, &ledger, &options).with_memory(&regions),
            |_, inner| Box::new(LimitedLink::new(inner, Some(bandwidth.clone()))),
        );
        assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
        assert!(matches!(received, Received::Runs(_)), "{received:?}");
        assert!(pages[0].0.lock().unwrap()[..] == pages[1].0.lock().unwrap()[..]);
    });
}
