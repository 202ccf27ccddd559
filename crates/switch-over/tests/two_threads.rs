//! Both servers in one process, over real sockets: what goes over, and what each side does when the other refuses, is late,
//! or says something wrong.

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use limosa_switch_over::{
    Cause, Error, FDS_MAX, GiveLimits, GiveOptions, Given, ITEM_BYTES_MAX, ITEM_FDS_MAX, Item, OldServer,
    ROUNDS_MAX, Refusal, Step, TakeOptions, TakeOver, Taken, give_to_child, take,
};
use support::{TestGiver, TestTaker};

/// A socket's place.
fn place() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("take-over");
    (folder, path)
}

const NEW: TakeOptions = TakeOptions { name: "new 2", limits: LIMITS, observer: None };
const LIMITS: limosa_switch_over::TakeLimits = limosa_switch_over::TakeLimits {
    hello: Duration::from_secs(20),
    offer: Duration::from_secs(20),
    prepare: Duration::from_secs(20),
    rest: Duration::from_secs(20),
};

/// The old server's options, for machines that are slow too.
fn old() -> GiveOptions<'static> {
    let limits = GiveLimits { freeze: Duration::from_secs(20), ..GiveLimits::default() };
    GiveOptions { name: "old 1", limits, observer: None }
}

/// One switch-over by a path.
fn by_path(giver: &TestGiver, taker: TestTaker) -> (Result<Given, Error>, Result<Taken<()>, Error>) {
    by_path_with(giver, taker, &old())
}

fn by_path_with(
    giver: &TestGiver,
    taker: TestTaker,
    options: &GiveOptions,
) -> (Result<Given, Error>, Result<Taken<()>, Error>) {
    let (_folder, path) = place();
    let take_over = TakeOver::listen(&path).unwrap();
    thread::scope(|scope| {
        let new = scope.spawn(|| take(OldServer::Path(&path), taker, &NEW));
        (take_over.serve_one(giver, options, None), new.join().unwrap())
    })
}

/// One switch-over to a child.
fn by_child(giver: &TestGiver, taker: TestTaker) -> (Result<Given, Error>, Result<Taken<()>, Error>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        let new = scope.spawn(|| take(OldServer::Parent(theirs), taker, &NEW));
        (give_to_child(ours, giver, &old(), None), new.join().unwrap())
    })
}

#[test]
fn everything_goes_over_in_three_parts() {
    for way in [by_path, by_child] {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let writer = Mutex::new(Some(OwnedFd::from(writer)));
        let large: Vec<u8> = (0..3_000_000_u32).map(|n| n as u8).collect();
        let giver = TestGiver {
            offer: Box::new(|| {
                Ok(vec![Item::new(1, 0, b"uart".to_vec()), Item::new(1, 1, b"nvme".to_vec())])
            }),
            prepare: Box::new({
                let large = large.clone();
                move || Ok(vec![Item::new(2, 1, large.clone())])
            }),
            rest: Box::new(move || {
                let writer = writer.lock().unwrap().take().unwrap();
                Ok(vec![Item::new(3, 0, b"state".to_vec()).with_fds([writer])])
            }),
            ..TestGiver::default()
        };
        let (sender, seen) = mpsc::channel();
        let took = |name: &'static str| {
            let sender = sender.clone();
            move |items: Vec<Item>| {
                items.into_iter().for_each(|item| sender.send((name, item)).unwrap());
                Ok(())
            }
        };
        let taker = TestTaker {
            check: Box::new(took("check")),
            prepare: Box::new(took("prepare")),
            load: Box::new(took("load")),
            before_commit: Box::new(|| {}),
        };
        drop(sender);
        let (given, taken) = way(&giver, taker);
        let (given, taken) = (given.unwrap().report, taken.unwrap().report);
        assert_eq!(giver.calls.take(), ["offer", "prepare", "freeze", "rest", "given"]);
        assert_eq!((given.totals, given.totals.items, given.totals.fds), (taken.totals, 4, 1));
        assert_eq!((given.other.as_str(), taken.other.as_str()), ("new 2", "old 1"));
        assert!(given.step(Step::Freeze).is_some() && taken.step(Step::Load).is_some());

        let seen: Vec<_> = seen.iter().collect();
        let what: Vec<_> = seen.iter().map(|(part, item)| (*part, item.kind, item.device)).collect();
        assert_eq!(what, [("check", 1, 0), ("check", 1, 1), ("prepare", 2, 1), ("load", 3, 0)]);
        assert!(seen[2].1.bytes == large);
        let mut pipe = File::from(seen[3].1.fds[0].as_fd().try_clone_to_owned().unwrap());
        pipe.write_all(b"through the pulled fd").unwrap();
        drop((pipe, seen));
        let mut text = String::new();
        // The giver has no end of the pipe any more.
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through the pulled fd");
    }
}

/// What a failed switch-over leaves: the giver's calls, and whether it serves.
fn still_serves(giver: &TestGiver, calls: &[&str]) {
    assert_eq!(giver.calls.take(), calls);
    assert!(giver.serves.load(SeqCst));
}

/// A change of one side.
type Alter<T> = fn(&mut T);

fn no(why: &str) -> Result<(), Refusal> {
    Err(Refusal::of_device(7, why))
}

#[test]
fn a_refusal_of_the_new_server_leaves_the_old_one_serving() {
    let frozen = ["offer", "prepare", "freeze", "rest", "thaw"];
    let cases: [(Alter<TestTaker>, Step, &[&str]); 3] = [
        (|taker| taker.check = Box::new(|_| no("newer state")), Step::Offer, &frozen[..1]),
        (
            |taker| taker.prepare = Box::new(|_| no("newer state")),
            Step::Prepare,
            &["offer", "prepare", "thaw"],
        ),
        (|taker| taker.load = Box::new(|_| no("newer state")), Step::Running, &frozen),
    ];
    for (alter, old_step, calls) in cases {
        for way in [by_path, by_child] {
            let giver = TestGiver::default();
            let mut taker = TestTaker::default();
            alter(&mut taker);
            let (given, taken) = way(&giver, taker);
            still_serves(&giver, calls);
            let given = given.unwrap_err();
            assert_eq!(given.step, old_step, "{given}");
            assert!(given.to_string().contains("refused: device 7: newer state"), "{given}");
            assert!(matches!(taken.unwrap_err().cause, Cause::Refused(_)));
        }
    }
}

#[test]
fn a_refusal_of_the_old_server_is_told_to_the_new_one() {
    fn none<T>() -> Result<T, Refusal> {
        Err(Refusal::new("a migration is under way"))
    }
    let all = ["offer", "prepare", "freeze", "rest", "thaw"];
    let cases: [(Alter<TestGiver>, &[&str]); 4] = [
        (|giver| giver.offer = Box::new(none), &all[..1]),
        (|giver| giver.prepare = Box::new(none), &["offer", "prepare", "thaw"]),
        (|giver| giver.freeze = Box::new(|_| none()), &["offer", "prepare", "freeze", "thaw"]),
        (|giver| giver.rest = Box::new(none), &all),
    ];
    for (alter, calls) in cases {
        let mut giver = TestGiver::default();
        alter(&mut giver);
        let (given, taken) = by_path(&giver, TestTaker::default());
        still_serves(&giver, calls);
        assert!(matches!(given.unwrap_err().cause, Cause::Refused(_)));
        let taken = taken.unwrap_err();
        assert!(matches!(&taken.cause, Cause::RefusedByOther(_)), "{taken}");
        assert!(taken.to_string().contains("a migration is under way"), "{taken}");
    }
}

/// A giver that has something more in each of so many rounds.
fn giver_of_rounds(rounds: usize) -> TestGiver {
    let left = AtomicUsize::new(rounds);
    TestGiver {
        more: Box::new(move || {
            let is_left = left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1));
            Ok(is_left.ok().map(|left| vec![Item::new(2, 0, left.to_le_bytes().to_vec())]))
        }),
        ..TestGiver::default()
    }
}

#[test]
fn what_changes_while_devices_run_goes_over_in_rounds_up_to_the_bound() {
    for (more, expected) in [(0, 1), (3, 4), (1000, ROUNDS_MAX)] {
        for way in [by_path, by_child] {
            let giver = giver_of_rounds(more);
            let (sender, rounds) = mpsc::channel();
            let prepare = move |items: Vec<Item>| {
                sender.send(items.len()).unwrap();
                Ok(())
            };
            let (given, taken) =
                way(&giver, TestTaker { prepare: Box::new(prepare), ..TestTaker::default() });
            assert_eq!(given.unwrap().report.totals, taken.unwrap().report.totals);
            let rounds: Vec<usize> = rounds.try_iter().collect();
            assert_eq!((rounds.len(), rounds[0]), (expected, 0), "{more} more");
            assert!(rounds[1..].iter().all(|items| *items == 1));
        }
    }
}

#[test]
fn a_refusal_in_a_later_round_leaves_the_old_server_serving() {
    let giver = giver_of_rounds(5);
    let mut rounds = 0;
    let prepare = move |_| {
        rounds += 1;
        if rounds < 3 { Ok(()) } else { no("a page is missing") }
    };
    let (given, taken) = by_path(&giver, TestTaker { prepare: Box::new(prepare), ..TestTaker::default() });
    still_serves(&giver, &["offer", "prepare", "more", "more", "thaw"]);
    assert_eq!(given.unwrap_err().step, Step::Prepare);
    assert!(matches!(taken.unwrap_err().cause, Cause::Refused(_)));
    let giver = TestGiver { more: Box::new(|| Err(Refusal::new("it is moved"))), ..TestGiver::default() };
    let (given, taken) = by_path(&giver, TestTaker::default());
    still_serves(&giver, &["offer", "prepare", "thaw"]);
    assert_eq!(given.unwrap_err().step, Step::Prepare);
    assert!(matches!(taken.unwrap_err().cause, Cause::RefusedByOther(_)));
}

#[test]
fn a_new_server_that_takes_too_long_to_load_finds_that_the_old_one_took_back() {
    let thawed = Arc::new(AtomicBool::new(false));
    let (sender, receiver) = mpsc::channel::<()>();
    struct Thaws(TestGiver, Mutex<Option<mpsc::Sender<()>>>, Arc<AtomicBool>);
    impl limosa_switch_over::Giver for Thaws {
        fn offer(&self) -> Result<Vec<Item>, Refusal> {
            self.0.offer()
        }
        fn prepare(&self) -> Result<Vec<Item>, Refusal> {
            self.0.prepare()
        }
        fn freeze(&self, until: Instant) -> Result<(), Refusal> {
            self.0.freeze(until)
        }
        fn rest(&self) -> Result<Vec<Item>, Refusal> {
            self.0.rest()
        }
        fn thaw(&self) {
            self.0.thaw();
            self.2.store(true, SeqCst);
            *self.1.lock().unwrap() = None;
        }
        fn given(&self) {
            self.0.given();
        }
    }
    let giver = Thaws(TestGiver::default(), Mutex::new(Some(sender)), Arc::clone(&thawed));
    let (_folder, path) = place();
    let take_over = TakeOver::listen(&path).unwrap();
    // It is loaded, and about to commit, as the old one serves again.
    let before_commit = Box::new(move || assert!(receiver.recv().is_err(), "the sender is dropped"));
    let taker = TestTaker { before_commit, ..TestTaker::default() };
    let limits = GiveLimits { freeze: Duration::from_millis(50), ..GiveLimits::default() };
    let began = Instant::now();
    let (given, taken) = thread::scope(|scope| {
        let new = scope.spawn(|| take(OldServer::Path(&path), taker, &NEW));
        (take_over.serve_one(&giver, &GiveOptions { limits, ..old() }, None), new.join().unwrap())
    });
    assert!(began.elapsed() < Duration::from_secs(15), "the limit is that of the freeze");
    let given = given.unwrap_err();
    assert!(matches!(given.cause, Cause::Late), "{given}");
    let taken = taken.unwrap_err();
    assert!(matches!((taken.step, &taken.cause), (Step::Running, Cause::Withdrawn)), "{taken}");
    still_serves(&giver.0, &["offer", "prepare", "freeze", "rest", "thaw"]);
}

#[test]
fn a_freeze_that_ends_after_its_limit_is_undone() {
    let freeze = |until: Instant| {
        // A device that needs longer than it was given.
        while Instant::now() <= until {
            thread::yield_now();
        }
        Ok(())
    };
    let giver = TestGiver { freeze: Box::new(freeze), ..TestGiver::default() };
    let limits = GiveLimits { freeze: Duration::from_millis(20), ..GiveLimits::default() };
    let (given, taken) = by_path_with(&giver, TestTaker::default(), &GiveOptions { limits, ..old() });
    let given = given.unwrap_err();
    assert!(matches!((given.step, &given.cause), (Step::Freeze, Cause::Late)), "{given}");
    assert!(matches!(taken.unwrap_err().cause, Cause::RefusedByOther(_)));
    still_serves(&giver, &["offer", "prepare", "freeze", "thaw"]);
}

#[test]
fn a_giver_that_panics_serves_again() {
    let rest = || panic!("the giver's own defect");
    let giver = TestGiver { rest: Box::new(rest), ..TestGiver::default() };
    let (_folder, path) = place();
    let take_over = TakeOver::listen(&path).unwrap();
    let taken = thread::scope(|scope| {
        let old = scope.spawn(|| take_over.serve_one(&giver, &old(), None));
        let taken = take(OldServer::Path(&path), TestTaker::default(), &NEW);
        assert!(old.join().is_err());
        taken
    });
    assert!(matches!(taken.unwrap_err().cause, Cause::Ended));
    still_serves(&giver, &["offer", "prepare", "freeze", "rest", "thaw"]);
}

#[test]
fn more_than_the_bounds_is_refused_before_anything_of_it_is_sent() {
    let cases: [fn() -> Vec<Item>; 3] = [
        || vec![Item::new(1, 2, vec![0; ITEM_BYTES_MAX + 1])],
        || vec![Item::new(1, 2, Vec::new()).with_fds(nulls(ITEM_FDS_MAX + 1))],
        || (0..=limosa_switch_over::ITEMS_MAX).map(|_| Item::new(1, 2, Vec::new())).collect(),
    ];
    for items in cases {
        let giver = TestGiver { rest: Box::new(move || Ok(items())), ..TestGiver::default() };
        let (given, taken) = by_path(&giver, TestTaker::default());
        let given = given.unwrap_err();
        assert!(matches!((given.step, &given.cause), (Step::Rest, Cause::TooLarge(_))), "{given}");
        let taken = taken.unwrap_err();
        assert!(taken.to_string().contains("kind 1 for device 2"), "{taken}");
        still_serves(&giver, &["offer", "prepare", "freeze", "rest", "thaw"]);
    }
    const { assert!(FDS_MAX >= 65_536) };
}

fn nulls(count: usize) -> Vec<OwnedFd> {
    let null = File::open("/dev/null").unwrap();
    (0..count).map(|_| null.try_clone().unwrap().into()).collect()
}

#[test]
fn the_largest_items_and_many_batches_go_over() {
    for way in [by_path, by_child] {
        let items = || {
            let mut items = vec![Item::new(1, 0, vec![5; ITEM_BYTES_MAX])];
            items
                .extend((0..5).map(|n| Item::new(2, n, vec![n as u8; 65_537]).with_fds(nulls(ITEM_FDS_MAX))));
            items.extend((0..2000).map(|n| Item::new(3, n, vec![n as u8; 65 + n as usize % 200])));
            items.push(Item::new(4, 0, vec![6; 65_536]).with_fds(nulls(1)));
            Ok(items)
        };
        let giver = TestGiver { prepare: Box::new(items), ..TestGiver::default() };
        let came = Arc::new(Mutex::new(Vec::new()));
        let prepare = {
            let came = Arc::clone(&came);
            move |items| {
                *came.lock().unwrap() = items;
                Ok(())
            }
        };
        let (given, taken) = way(&giver, TestTaker { prepare: Box::new(prepare), ..TestTaker::default() });
        given.unwrap();
        taken.unwrap();
        let expected = items().unwrap();
        let came = std::mem::take(&mut *came.lock().unwrap());
        assert_eq!(came.len(), expected.len());
        for (came, expected) in came.iter().zip(&expected) {
            assert_eq!(
                (came.kind, came.device, came.fds.len()),
                (expected.kind, expected.device, expected.fds.len())
            );
            assert!(came.bytes == expected.bytes);
        }
    }
}

#[test]
fn a_stop_ends_the_wait_for_a_new_server() {
    let (_folder, path) = place();
    let take_over = TakeOver::listen(&path).unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(writer);
    let stopped = take_over.serve_one(&TestGiver::default(), &old(), Some(reader.as_fd())).unwrap_err();
    assert!(matches!(stopped.cause, Cause::Stopped), "{stopped}");
}

#[test]
fn a_place_without_a_server_is_named() {
    let (_folder, path) = place();
    let refused = take(OldServer::Path(&path), TestTaker::default(), &NEW).unwrap_err();
    assert!(refused.to_string().contains("--takeover"), "{refused}");
    assert!(refused.to_string().contains("take-over: "), "{refused}");
}
