//! What is left after many switch-overs in one process, those that failed included: no fd and no mapping.
//! One test, as it counts those of the process.

mod support;

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use limosa_switch_over::{GiveOptions, Item, OldServer, Refusal, TakeOptions, TakeOver, give_to_child, take};
use support::{TestGiver, TestTaker};

fn open_fds() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

fn words() -> usize {
    fs::read_to_string("/proc/self/maps").unwrap().matches("limosa: commit word").count()
}

/// Waits for the threads that close fds of peers.
fn until_closed(before: usize) {
    let limit = Instant::now() + Duration::from_secs(20);
    while open_fds() != before {
        assert!(Instant::now() < limit, "{before} fds before, {} now", open_fds());
        thread::yield_now();
    }
}

fn items() -> Vec<Item> {
    let fds = || (0..20).map(|_| OwnedFd::from(fs::File::open("/dev/null").unwrap()));
    vec![Item::new(1, 0, vec![1; 100_000]).with_fds(fds()), Item::new(2, 0, vec![2; 100]).with_fds(fds())]
}

fn giver() -> TestGiver {
    let part = || Ok(items());
    TestGiver { offer: Box::new(part), prepare: Box::new(part), rest: Box::new(part), ..TestGiver::default() }
}

/// Takes, or refuses at one of the parts.
fn taker(refuses: usize) -> TestTaker {
    let part =
        |number: usize| move |_: Vec<Item>| if number == refuses { Err(Refusal::new("no")) } else { Ok(()) };
    TestTaker {
        check: Box::new(part(1)),
        prepare: Box::new(part(2)),
        load: Box::new(part(3)),
        before_commit: Box::new(|| {}),
    }
}

#[test]
fn two_hundred_switch_overs_leave_no_fd() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("take-over");
    let mut before = None;
    for round in 0..200 {
        let refuses = round % 4;
        let (giver, taker) = (giver(), taker(refuses));
        let (given, taken) = thread::scope(|scope| match round % 8 < 4 {
            true => {
                let take_over = TakeOver::listen(&path).unwrap();
                let path = &path;
                let new = scope.spawn(move || take(OldServer::Path(path), taker, &TakeOptions::default()));
                (take_over.serve_one(&giver, &GiveOptions::default(), None), new.join().unwrap())
            }
            false => {
                let (ours, theirs) = UnixStream::pair().unwrap();
                let new =
                    scope.spawn(move || take(OldServer::Parent(theirs), taker, &TakeOptions::default()));
                (give_to_child(ours, &giver, &GiveOptions::default(), None), new.join().unwrap())
            }
        });
        assert_eq!((given.is_ok(), taken.is_ok()), (refuses == 0, refuses == 0), "{given:?} {taken:?}");
        drop((given, taken));
        // The first ones bring in what stays, such as the standard library's.
        match before {
            None if round == 8 => {
                thread::yield_now();
                before = Some(settled());
            }
            _ => {}
        }
    }
    until_closed(before.unwrap());
    assert_eq!(words(), 0);
}

/// The number of fds once it does not change any more.
fn settled() -> usize {
    let mut least = open_fds();
    let limit = Instant::now() + Duration::from_millis(500);
    while Instant::now() < limit {
        least = least.min(open_fds());
        thread::yield_now();
    }
    least
}
