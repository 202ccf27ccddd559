//! Tests of threads that a simulation refuses to `try_spawn`.

use std::io::ErrorKind;
use std::time::Duration;

use limosa_clockwork::simulation::{self, Process};
use limosa_clockwork::{Monitor, Simulation, scope, sleep};

const EAGAIN: i32 = 11;

/// Starts up to six threads and returns how many started before the first one was refused.
fn start_six(sum: &Monitor<u32>) -> usize {
    scope(|scope| {
        let start = |number: u32| {
            scope.try_spawn(format!("worker {number}"), move || {
                sleep(Duration::from_micros(simulation::random(50)));
                *sum.lock() += 1;
            })
        };
        for number in 0..6 {
            if let Err(error) = start(number) {
                assert_eq!((error.raw_os_error(), error.kind()), (Some(EAGAIN), ErrorKind::WouldBlock));
                return number as usize;
            }
        }
        6
    })
}

#[test]
fn the_limit_refuses_all_threads_after_a_number_and_can_be_lifted() {
    for seed in 0..50 {
        let run = Simulation::new(seed).run(|| {
            let sum = Monitor::new(0);
            let process = Process::current();
            let mut started = vec![start_six(&sum)];
            process.refuse_threads(4);
            started.extend([start_six(&sum), start_six(&sum)]);
            process.refuse_threads(1);
            started.push(start_six(&sum));
            process.allow_threads();
            started.push(start_six(&sum));
            (started, sum.into_inner())
        });
        assert_eq!(run.unwrap().value, (vec![6, 4, 0, 1, 6], 17), "seed {seed}");
    }
}

#[test]
fn a_seed_with_refused_threads_plays_the_same_twice() {
    let play = |seed| {
        let run = Simulation::new(seed).trace(true).run(|| {
            Process::current().refuse_threads(simulation::random(6));
            start_six(&Monitor::new(0))
        });
        let run = run.unwrap();
        assert!(run.trace.contains(&format!("is refused the thread worker {}", run.value)), "{}", run.trace);
        (run.value, run.trace, run.digest)
    };
    for seed in 0..50 {
        assert_eq!(play(seed), play(seed));
    }
}

#[test]
fn only_the_process_with_the_limit_is_refused_threads() {
    let run = Simulation::new(3).run(|| {
        let (limited, other) = (Process::new("limited"), Process::new("other"));
        limited.refuse_threads(0);
        scope(|scope| {
            let [limited, other] = [limited, other].map(|process| {
                process.spawn(scope, "main", move || {
                    (Process::current() == process, start_six(&Monitor::new(0)))
                })
            });
            [limited.join().unwrap(), other.join().unwrap(), (true, start_six(&Monitor::new(0)))]
        })
    });
    assert_eq!(run.unwrap().value, [(true, 0), (true, 6), (true, 6)]);
}

#[test]
fn spawn_is_neither_refused_nor_counted() {
    let run = Simulation::new(3).run(|| {
        let process = Process::current();
        process.refuse_threads(1);
        scope(|scope| {
            let mut started = 0;
            for _ in 0..3 {
                started += scope.spawn("spawn", || 1).join().unwrap();
                started += process.spawn(scope, "Process::spawn", || 1).join().unwrap();
            }
            (started, scope.try_spawn("first", || {}).is_ok(), scope.try_spawn("second", || {}).is_ok())
        })
    });
    assert_eq!(run.unwrap().value, (6, true, false));
}

#[test]
fn a_limit_outlives_a_crash_and_the_restart() {
    let run = Simulation::new(3).run(|| {
        let process = Process::new("restarts");
        process.refuse_threads(0);
        scope(|scope| {
            let before = process.spawn(scope, "before the crash", || sleep(Duration::from_secs(60)));
            sleep(Duration::from_secs(1));
            process.crash();
            before.join().unwrap_err();
            process.spawn(scope, "after the crash", || start_six(&Monitor::new(0))).join().unwrap()
        })
    });
    assert_eq!(run.unwrap().value, 0);
}
