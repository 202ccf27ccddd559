//! Tests of `catch` in a simulation: it catches a panic of the program, and never a simulated crash.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use limosa_clockwork::simulation::{self, Process, What, is_crash};
use limosa_clockwork::{Monitor, Panic, Simulation, catch, scope, sleep};

/// Panics without a call of the panic hook.
fn quiet_panic<T>(text: &'static str) -> T {
    resume_unwind(Box::new(text))
}

#[test]
fn a_caught_panic_does_not_fail_the_simulation() {
    let play = |seed| {
        let run = Simulation::new(seed).trace(true).run(|| {
            let done = Monitor::new(0);
            scope(|scope| {
                let workers: Vec<_> = (0..3)
                    .map(|number| {
                        let done = &done;
                        let work = move || {
                            let caught: Result<(), Panic> = catch(|| {
                                let mut done = done.lock();
                                *done += 1;
                                quiet_panic("with the lock held")
                            });
                            // The task takes part in the simulation as before.
                            sleep(Duration::from_millis(number));
                            caught.unwrap_err().message
                        };
                        scope.spawn(format!("worker {number}"), work)
                    })
                    .collect();
                for worker in workers {
                    assert_eq!(worker.join().unwrap(), "with the lock held");
                }
            });
            done.into_inner()
        });
        let run = run.unwrap();
        assert_eq!(run.value, 3);
        (run.trace, run.digest)
    };
    for seed in 0..50 {
        assert_eq!(play(seed), play(seed));
    }
}

#[test]
fn a_panic_that_is_not_caught_still_fails_the_simulation() {
    let run = Simulation::new(1).run(|| {
        assert_eq!(catch(|| quiet_panic::<()>("caught")).unwrap_err().message, "caught");
        quiet_panic::<()>("not caught");
    });
    assert_eq!(run.unwrap_err().what, What::Panic("not caught".into()));
}

#[test]
fn catch_does_not_catch_a_crash() {
    for seed in 0..100 {
        let returned = AtomicU32::new(0);
        let run = Simulation::new(seed).run(|| {
            let process = Process::new("crashes");
            scope(|scope| {
                let thread = process.spawn(scope, "main", || {
                    for _ in 0..10 {
                        if catch(|| sleep(Duration::from_secs(1))).is_err() {
                            returned.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
                assert!(process.reaches(1 + simulation::random(8)));
                process.crash();
                assert!(is_crash(thread.join().unwrap_err().as_ref()));
            });
        });
        run.unwrap();
        assert_eq!(returned.into_inner(), 0, "seed {seed}");
    }
}

#[test]
fn catch_does_not_catch_the_crash_of_another_process() {
    let run = Simulation::new(1).run(|| {
        let process = Process::new("crashes");
        scope(|scope| {
            let thread = process.spawn(scope, "main", || sleep(Duration::from_secs(60)));
            sleep(Duration::from_secs(1));
            process.crash();
            let outer = catch_unwind(AssertUnwindSafe(|| {
                catch(|| thread.join().unwrap_or_else(|payload| resume_unwind(payload)))
            }));
            is_crash(outer.unwrap_err().as_ref())
        })
    });
    assert!(run.unwrap().value);
}

#[test]
fn a_panic_of_a_crashing_process_ends_the_thread_as_the_crash_does() {
    let run = Simulation::new(1).run(|| {
        let (process, returned) = (Process::new("crashes"), AtomicU32::new(0));
        scope(|scope| {
            let thread = process.spawn(scope, "main", || {
                let caught = catch(|| {
                    // Crashes its own process, and panics before it makes a call that would end it.
                    process.crash();
                    quiet_panic::<()>("after the crash");
                });
                drop(caught);
                returned.fetch_add(1, Ordering::Relaxed);
            });
            assert!(is_crash(thread.join().unwrap_err().as_ref()));
        });
        returned.into_inner()
    });
    assert_eq!(run.unwrap().value, 0);
}

#[test]
fn catch_does_not_hide_a_failure_of_the_simulation() {
    let run = Simulation::new(1).steps_max(1_000).run(|| {
        loop {
            let _ = catch(|| sleep(Duration::from_secs(1)));
        }
    });
    let run: Result<simulation::Run<()>, _> = run;
    assert_eq!(run.unwrap_err().what, What::Steps);
}
