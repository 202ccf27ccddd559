//! Tests of the simulator: a seed determines a run, time is virtual, and defects are found.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use limosa_clockwork::simulation::{self, Failure, Process, Run, What, is_crash};
use limosa_clockwork::{Monitor, Simulation, in_simulation, now, scope, sleep, wake_all};

/// Several producers and consumers of a bounded queue. Returns the items in the order of their arrival.
fn queue() -> Vec<u32> {
    let queue = Monitor::new(Vec::new());
    let taken = Monitor::new(Vec::new());
    scope(|scope| {
        for producer in 0..3 {
            let queue = &queue;
            scope.spawn(format!("producer {producer}"), move || {
                for item in 0..5 {
                    let mut items = queue.lock();
                    while items.len() >= 2 {
                        (items, _) = queue.wait(items, None);
                    }
                    items.push(producer * 100 + item);
                    queue.notify_all();
                    drop(items);
                    sleep(Duration::from_micros(simulation::random(50)));
                }
            });
        }
        for _ in 0..2 {
            let (queue, taken) = (&queue, &taken);
            scope.spawn("consumer", move || {
                loop {
                    let mut items = queue.lock();
                    while items.is_empty() {
                        let timed_out;
                        (items, timed_out) = queue.wait(items, Some(now() + Duration::from_secs(1)));
                        if timed_out {
                            return;
                        }
                    }
                    taken.lock().extend(items.pop());
                    queue.notify_all();
                }
            });
        }
    });
    taken.into_inner()
}

fn traced(seed: u64) -> Run<Vec<u32>> {
    Simulation::new(seed).trace(true).run(queue).unwrap()
}

#[test]
fn the_same_seed_gives_the_same_interleaving_and_other_seeds_give_others() {
    let mut orders = BTreeSet::new();
    for seed in 0..40 {
        let (one, two) = (traced(seed), traced(seed));
        assert_eq!(one.trace, two.trace);
        assert_eq!(
            (one.value.clone(), one.steps, one.time, one.digest),
            (two.value, two.steps, two.time, two.digest)
        );
        let mut sorted = one.value.clone();
        sorted.sort_unstable();
        assert_eq!(sorted.len(), 15);
        orders.insert(one.value);
    }
    assert!(orders.len() > 30, "{} orders of 40 seeds", orders.len());
}

#[test]
fn the_load_of_the_machine_does_not_change_a_run() {
    let alone = traced(5).trace;
    let busy = AtomicBool::new(true);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while busy.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        let beside: Vec<_> = (0..4).map(|_| scope.spawn(|| traced(5).trace)).collect();
        let beside: Vec<_> = beside.into_iter().map(|thread| thread.join().unwrap()).collect();
        busy.store(false, Ordering::Relaxed);
        assert!(beside.iter().all(|trace| *trace == alone));
    });
}

#[test]
fn the_digest_does_not_depend_on_whether_the_trace_is_kept() {
    let run = Simulation::new(5).run(queue).unwrap();
    assert_eq!((run.digest, run.trace), (traced(5).digest, String::new()));
}

#[test]
fn a_sleep_of_a_day_takes_no_real_time() {
    let began = Instant::now();
    let day = Duration::from_secs(86_400);
    let run = Simulation::new(1).run(|| {
        assert!(in_simulation());
        let began = now();
        sleep(day);
        now() - began
    });
    let run = run.unwrap();
    assert!(run.value >= day && run.time >= day && run.value < day + Duration::from_secs(1));
    assert!(began.elapsed() < day && !in_simulation());
}

#[test]
fn a_deadlock_of_two_threads_is_found_and_both_are_named() {
    let failed = (0..500).find_map(|seed| {
        let (one, two) = (Monitor::new(()), Monitor::new(()));
        Simulation::new(seed)
            .run(|| {
                scope(|scope| {
                    let (one, two) = (&one, &two);
                    for (name, first, second) in [("there", one, two), ("back", two, one)] {
                        scope.spawn(name, move || {
                            let _first = first.lock();
                            let _second = second.lock();
                        });
                    }
                });
            })
            .err()
    });
    let failure = failed.unwrap();
    assert_eq!(failure.what, What::Deadlock);
    let text = failure.to_string();
    assert!(text.contains("world/there: waits to lock a monitor, "), "{text}");
    assert!(text.contains("world/back: waits to lock a monitor, "), "{text}");
    assert!(text.contains("world/main: waits for the threads of its scope"), "{text}");
    assert!(text.contains("tests/simulation.rs:"), "{text}");
}

#[test]
fn a_notification_before_the_wait_is_a_deadlock_in_some_seeds() {
    // The waiter does not check a condition, so a notification that comes before the wait is lost.
    let lost = |seed| {
        let flag = Monitor::new(());
        Simulation::new(seed)
            .run(|| {
                scope(|scope| {
                    scope.spawn("sender", || flag.notify_all());
                    drop(flag.wait(flag.lock(), None));
                });
            })
            .is_err()
    };
    let count = (0..100).filter(|seed| lost(*seed)).count();
    assert!(count > 10 && count < 100, "{count} of 100");
}

#[test]
fn an_endless_loop_reaches_the_limit() {
    let spins = Simulation::new(3).steps_max(1_000).run(|| {
        loop {
            wake_all();
        }
    });
    let spins: Result<Run<()>, Failure> = spins;
    assert_eq!(spins.unwrap_err().what, What::Steps);
    let reads_clock: Result<Run<()>, Failure> = Simulation::new(3).steps_max(1_000).run(|| {
        loop {
            let _ = now();
        }
    });
    assert_eq!(reads_clock.unwrap_err().what, What::Steps);
    let sleeps: Result<Run<()>, _> = Simulation::new(3).time_max(Duration::from_secs(60)).run(|| {
        loop {
            sleep(Duration::from_secs(1));
        }
    });
    assert_eq!(sleeps.unwrap_err().what, What::Time);
}

#[test]
fn a_panic_is_a_failure_with_its_seed() {
    let failure = Simulation::new(11)
        .run(|| {
            scope(|scope| {
                let thread = scope.spawn("panics", || std::panic::resume_unwind(Box::new("over")));
                let _: Result<(), _> = thread.join();
            });
        })
        .unwrap_err();
    assert_eq!(failure.what, What::Panic("over".into()));
    assert!(failure.to_string().starts_with("seed 11: a task panicked: over"), "{failure}");
}

#[test]
fn the_watching_function_sees_every_step_and_can_fail_the_run() {
    let value = Arc::new(AtomicU64::new(0));
    let seen = Arc::new(Mutex::new(Vec::new()));
    let watch = {
        let (value, seen) = (value.clone(), seen.clone());
        move || {
            let value = value.load(Ordering::Relaxed);
            seen.lock().unwrap().push(value);
            if value < 5 { Ok(()) } else { Err(format!("the value is {value}")) }
        }
    };
    let failure = Simulation::new(2)
        .watch(watch)
        .run(|| {
            for _ in 0..10 {
                value.fetch_add(1, Ordering::Relaxed);
                sleep(Duration::from_millis(1));
            }
        })
        .unwrap_err();
    assert_eq!(failure.what, What::Watch("the value is 5".into()));
    assert_eq!(*seen.lock().unwrap(), [1, 2, 3, 4, 5]);
}

#[test]
fn a_crash_ends_all_threads_of_a_process_and_the_process_can_be_restarted() {
    for seed in 0..60 {
        let run = Simulation::new(seed).run(|| {
            let work = Monitor::new(0u32);
            let dropped = AtomicU64::new(0);
            struct Counts<'a>(&'a AtomicU64);
            impl Drop for Counts<'_> {
                fn drop(&mut self) {
                    assert!(simulation::crashing());
                    self.0.fetch_add(1, Ordering::Relaxed);
                }
            }
            let server = Process::new("server");
            scope(|outer| {
                let serve = || {
                    let _counts = Counts(&dropped);
                    scope(|inner| {
                        for worker in 0..2 {
                            inner.spawn(format!("worker {worker}"), || {
                                let _counts = Counts(&dropped);
                                loop {
                                    *work.lock() += 1;
                                    sleep(Duration::from_millis(1));
                                }
                            });
                        }
                        // The lock is held across a wait. The crash unlocks it.
                        let guard = Monitor::new(());
                        let guard = (guard.lock(), &guard);
                        sleep(Duration::from_secs(u64::MAX));
                        drop(guard);
                    });
                };
                let first = server.spawn(outer, "before the crash", serve);
                assert!(server.reaches(1 + simulation::random(30)));
                server.crash();
                assert!(is_crash(first.join().unwrap_err().as_ref()));
                let done = *work.lock();
                sleep(Duration::from_secs(1));
                assert_eq!(*work.lock(), done);
                let second = server.spawn(outer, "after the crash", || *work.lock() + 1);
                assert_eq!(second.join().unwrap(), done + 1);
            });
            dropped.into_inner()
        });
        assert!(run.unwrap().value <= 3, "seed {seed}");
    }
}

#[test]
fn a_process_that_ends_early_does_not_reach_a_later_point() {
    let run = Simulation::new(4).run(|| {
        let process = Process::new("short");
        scope(|scope| {
            process.spawn(scope, "main", || sleep(Duration::from_secs(1)));
            (process.reaches(1), process.reaches(1_000))
        })
    });
    assert_eq!(run.unwrap().value, (true, false));
}

#[test]
fn wake_all_ends_all_waits() {
    let run = Simulation::new(9).run(|| {
        let (monitor, is_set) = (Monitor::new(()), AtomicBool::new(false));
        scope(|scope| {
            scope.spawn("sets a flag without a monitor", || {
                sleep(Duration::from_secs(5));
                is_set.store(true, Ordering::Relaxed);
                wake_all();
            });
            let mut guard = monitor.lock();
            while !is_set.load(Ordering::Relaxed) {
                (guard, _) = monitor.wait(guard, None);
            }
        });
    });
    assert!(run.unwrap().time >= Duration::from_secs(5));
}

#[test]
fn a_note_is_formatted_only_when_the_trace_is_kept() {
    let noted = |kept| {
        Simulation::new(1).trace(kept).run(|| {
            let mut is_called = false;
            simulation::note(|| {
                is_called = true;
                "a note".into()
            });
            is_called
        })
    };
    let kept = noted(true).unwrap();
    assert!(kept.value && kept.trace.contains("world/main"), "{}", kept.trace);
    assert!(kept.trace.contains("a note"), "{}", kept.trace);
    assert!(!noted(false).unwrap().value);
}
