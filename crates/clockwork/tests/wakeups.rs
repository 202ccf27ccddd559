//! Tests of what ends a wait: a forgotten notification must be noticed, and spurious wake-ups must happen.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use limosa_clockwork::simulation::{self, Run};
use limosa_clockwork::{Monitor, Simulation, now, scope, sleep, wake_all, wake_polls};

const SEEDS: u64 = 200;
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// A thread sets a flag and forgets to notify; another one waits for the flag. Beside them, `ticking` threads call
/// `tick` every `period`. Returns whether the waiter sees the flag before its wait times out.
fn forgotten_notification(ticking: u32, period: Duration, tick: fn()) -> bool {
    let (flag, done) = (Monitor::new(false), Monitor::new(false));
    let until = now() + SILENCE_MAX;
    scope(|scope| {
        scope.spawn("sender", || {
            sleep(Duration::from_millis(10));
            *flag.lock() = true;
        });
        for _ in 0..ticking {
            scope.spawn("keep-alive", || {
                while !*done.lock() && now() < until {
                    sleep(period);
                    tick();
                }
            });
        }
        let mut is_set = flag.lock();
        let mut timed_out = false;
        while !*is_set && !timed_out {
            (is_set, timed_out) = flag.wait(is_set, Some(until));
        }
        drop(is_set);
        *done.lock() = true;
        !timed_out
    })
}

/// In how many seeds the forgotten notification goes unnoticed.
fn unnoticed(ticking: u32, period: Duration, tick: fn()) -> usize {
    let is_unnoticed = |&seed: &u64| {
        Simulation::new(seed).run(|| forgotten_notification(ticking, period, tick)).unwrap().value
    };
    (0..SEEDS).filter(is_unnoticed).count()
}

#[test]
fn a_forgotten_notification_is_noticed_in_at_least_half_of_the_seeds() {
    let period = Duration::from_millis(250);
    let quiet = unnoticed(0, period, || {});
    let ticking = unnoticed(3, period, || {});
    assert!(quiet <= 20 && ticking <= 20, "unnoticed in {quiet} without ticks, in {ticking} with ticks");
}

#[test]
fn more_ticks_elsewhere_do_not_hide_a_forgotten_notification() {
    let unnoticed = unnoticed(1, Duration::from_millis(50), || {});
    assert!(unnoticed <= 20, "unnoticed in {unnoticed} of {SEEDS}");
}

#[test]
fn wake_polls_does_not_hide_a_forgotten_notification() {
    let unnoticed = unnoticed(1, Duration::from_millis(250), wake_polls);
    assert!(unnoticed <= 20, "unnoticed in {unnoticed} of {SEEDS}");
}

#[test]
fn wake_all_hides_a_forgotten_notification() {
    assert!(unnoticed(1, Duration::from_millis(250), wake_all) as u64 == SEEDS);
}

#[test]
fn a_forgotten_notification_without_a_timeout_is_a_deadlock() {
    for one_in in [None, Some(1), Some(16)] {
        let deadlocks = (0..100).filter(|&seed| {
            let run = Simulation::new(seed).spurious_one_in(one_in).run(|| {
                let flag = Monitor::new(false);
                let mut is_set = flag.lock();
                while !*is_set {
                    (is_set, _) = flag.wait(is_set, None);
                }
            });
            run.is_err()
        });
        assert_eq!(deadlocks.count(), 100, "{one_in:?}");
    }
}

/// Counts the waits that end without a notification, of 1500 waits.
fn spurious_wakeups(simulation: Simulation) -> Run<u32> {
    let run = simulation.run(|| {
        let monitor = Monitor::new(());
        let done = AtomicBool::new(false);
        scope(|scope| {
            scope.spawn("ticks", || {
                while !done.load(Ordering::Relaxed) {
                    sleep(Duration::from_micros(50));
                }
            });
            let mut count = 0;
            let mut guard = monitor.lock();
            for _ in 0..1_500 {
                let timed_out;
                (guard, timed_out) = monitor.wait(guard, Some(now() + Duration::from_micros(500)));
                count += u32::from(!timed_out);
            }
            done.store(true, Ordering::Relaxed);
            count
        })
    });
    run.unwrap()
}

#[test]
fn half_of_the_seeds_have_no_spurious_wakeups_and_the_others_have_different_rates() {
    let counts: Vec<_> = (0..60).map(|seed| spurious_wakeups(Simulation::new(seed)).value).collect();
    let without = counts.iter().filter(|&&count| count == 0).count();
    assert!((20..=48).contains(&without), "{without} of 60 seeds have none");
    let rates: BTreeSet<_> = counts.iter().filter_map(|count| count.checked_ilog2()).collect();
    assert!(rates.len() >= 4, "{counts:?}");
}

#[test]
fn a_fixed_rate_of_spurious_wakeups_holds_for_every_seed() {
    for seed in 0..10 {
        assert_eq!(spurious_wakeups(Simulation::new(seed).spurious_one_in(None)).value, 0);
        let often = spurious_wakeups(Simulation::new(seed).spurious_one_in(Some(4))).value;
        assert!((100..=600).contains(&often), "seed {seed}: {often}");
    }
}

#[test]
fn a_seed_with_spurious_wakeups_plays_the_same_twice() {
    for seed in 0..5 {
        let play = || spurious_wakeups(Simulation::new(seed).spurious_one_in(Some(16)).trace(true));
        let (one, two) = (play(), play());
        assert!(one.value > 0 && one.trace.contains("is woken spuriously"));
        assert!(one.trace == two.trace);
        assert_eq!((one.value, one.digest), (two.value, two.digest));
    }
}

#[test]
fn a_wait_without_a_check_of_its_condition_is_noticed_in_some_seeds() {
    // `if` in place of `while` round the wait.
    let is_noticed = |&seed: &u64| {
        let run = Simulation::new(seed).run(|| {
            let flag = Monitor::new(0);
            scope(|scope| {
                scope.spawn("sender", || {
                    for _ in 0..20 {
                        sleep(Duration::from_millis(10));
                        *flag.lock() += 1;
                        flag.notify_all();
                    }
                });
                (1..=20).all(|number| {
                    let mut value = flag.lock();
                    if *value < number {
                        (value, _) = flag.wait(value, None);
                    }
                    *value >= number
                })
            })
        });
        !run.is_ok_and(|run| run.value)
    };
    let noticed = (0..1_000).filter(is_noticed).count();
    assert!(noticed >= 40, "noticed in {noticed} of 1000");
}

#[test]
fn wake_polls_ends_a_wait_that_stands_for_a_poll_and_no_other() {
    for seed in 0..100 {
        let run = Simulation::new(seed).spurious_one_in(None).run(|| {
            let monitor = Monitor::new(());
            let until = now() + Duration::from_secs(10);
            scope(|scope| {
                let poll = scope.spawn("polls", || monitor.wait_as_poll(monitor.lock(), None).1);
                let wait = scope.spawn("waits", || monitor.wait(monitor.lock(), Some(until)).1);
                sleep(Duration::from_secs(1));
                wake_polls();
                let polled = (poll.join().unwrap(), simulation::elapsed() < Duration::from_secs(2));
                (polled, wait.join().unwrap())
            })
        });
        assert_eq!(run.unwrap().value, ((false, true), true), "seed {seed}");
    }
}

#[test]
fn a_notification_and_a_timeout_end_a_poll_as_they_end_a_wait() {
    let poll = || {
        let monitor = Monitor::new(false);
        let past: Instant = now();
        assert!(monitor.wait_as_poll(monitor.lock(), Some(past)).1);
        scope(|scope| {
            scope.spawn("sender", || {
                *monitor.lock() = true;
                monitor.notify_all();
            });
            let mut is_set = monitor.lock();
            while !*is_set {
                (is_set, _) = monitor.wait_as_poll(is_set, None);
            }
        });
        wake_polls();
    };
    poll();
    for seed in 0..50 {
        Simulation::new(seed).run(poll).unwrap();
    }
}
