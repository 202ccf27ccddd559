//! Several threads at once: requests on one device are answered one by one, independently of each other.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};

use limosa_client::{Chunk, Device, DeviceExt, Error};
use limosa_protocol::State;

use crate::check::{Check, Family, Needs, Stop, Verdict, ensure, fail};
use crate::trial::{Trial, read_to_end};

pub(super) fn checks() -> Vec<Check> {
    let check = |id: &'static str, needs, clauses: &[&'static str], body: fn(&mut Trial) -> Verdict| {
        Check::new(Family::Concurrency, id, Needs::MIGRATION | needs, clauses, body)
    };
    let (none, precopy) = (Needs::empty(), Needs::PRE_COPY);
    vec![
        check("concurrency.get-while-driven", none, &["state.get", "fsm.repeat"], get_while_driven),
        check("concurrency.info-while-driven", none, &["info.stable", "fsm.repeat"], info_while_driven),
        check("concurrency.two-drivers", none, &["fsm.repeat", "state.get"], two_drivers),
        check(
            "concurrency.read-while-stopped",
            precopy,
            &["stream.one-session", "precopy.then-stop"],
            read_while_stopped,
        ),
        check("concurrency.read-while-cancelled", precopy, &["stream.stale", "precopy.cancel"], |t| {
            interrupted(t, |t| t.go(State::Running).map(drop))
        }),
        check(
            "concurrency.read-while-reset",
            precopy | Needs::RESET,
            &["reset.session", "stream.stale"],
            |t| interrupted(t, Trial::reset),
        )
        .destructive(),
    ]
}

/// Drives the device while another thread queries it.
fn beside(t: &Trial, ask: impl Fn(&Trial) -> Verdict + Sync, drive: impl Fn(&Trial) -> Verdict) -> Verdict {
    let (done, begun) = (AtomicBool::new(false), Barrier::new(2));
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| -> Verdict {
            begun.wait();
            loop {
                ask(t)?;
                if done.load(Ordering::Relaxed) {
                    return Ok(());
                }
            }
        });
        begun.wait();
        let driven = drive(t);
        done.store(true, Ordering::Relaxed);
        let asked = asking.join().unwrap_or_else(|_| fail("the thread that asks panicked"));
        driven.and(asked)
    })
}

fn get_while_driven(t: &mut Trial) -> Verdict {
    let known = |t: &Trial| -> Verdict {
        let state = t.state()?;
        let on_the_way = [State::Running, State::RunningP2p, State::Stop];
        ensure(on_the_way.contains(&state), || format!("between RUNNING and STOP the device is in {state}"))
    };
    beside(t, known, |t| {
        for _ in 0..20 {
            t.device()?.set_state(State::Stop)?;
            t.device()?.set_state(State::Running)?;
        }
        Ok(())
    })
}

fn info_while_driven(t: &mut Trial) -> Verdict {
    let regions = t.device()?.info()?.num_regions;
    let same = |t: &Trial| -> Verdict {
        let now = t.device()?.info()?.num_regions;
        ensure(now == regions, || {
            format!("the device has {now} regions while it is driven, and had {regions}")
        })
    };
    beside(t, same, |t| {
        for _ in 0..20 {
            t.walk(&[State::Stop, State::Running])?;
        }
        Ok(())
    })
}

fn two_drivers(t: &mut Trial) -> Verdict {
    std::thread::scope(|scope| {
        let drive = |state: State| {
            let t = &*t;
            scope.spawn(move || -> Verdict {
                for _ in 0..20 {
                    t.device()?.set_state(state)?;
                }
                Ok(())
            })
        };
        let drivers = [drive(State::Stop), drive(State::Running)];
        drivers
            .into_iter()
            .map(|driver| driver.join().unwrap_or_else(|_| fail("a thread that drives panicked")))
            .collect::<Vec<_>>()
            .into_iter()
            .collect::<Verdict>()
    })?;
    let state = t.state()?;
    ensure([State::Stop, State::Running].contains(&state), || {
        format!("after SETs of STOP and RUNNING by two threads the device is in {state}")
    })?;
    t.go(State::Running).map(drop)
}

/// One thread reads from pre-copy on, the other stops the device.
fn read_while_stopped(t: &mut Trial) -> Verdict {
    let mut stream = t.session(State::PreCopy)?;
    let (until, bytes_max) = (t.until, t.limits.state_bytes_max);
    let stopped = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reading = scope.spawn(|| -> Result<usize, Stop> {
            let mut bytes = 0;
            let mut buffer = vec![0; 4096];
            loop {
                if std::time::Instant::now() >= until || bytes as u64 > bytes_max {
                    return fail(format!("the data had no end: {bytes} bytes"));
                }
                match stream.read(&mut buffer)? {
                    Chunk::Data(more) => bytes += more,
                    Chunk::NothingForNow if stopped.load(Ordering::SeqCst) => break,
                    Chunk::NothingForNow => std::thread::yield_now(),
                    Chunk::End => return Ok(bytes),
                }
            }
            Ok(bytes + read_to_end(&mut stream, 4096, bytes_max, until)?.len())
        });
        let driven = t.go(State::StopCopy).map(drop);
        stopped.store(true, Ordering::SeqCst);
        let read = reading.join().unwrap_or_else(|_| fail("the thread that reads panicked"));
        driven?;
        ensure(read? > 0, || "no data came".into())
    })
}

/// One thread reads, the other ends the session: the reader gets an answer.
fn interrupted(t: &mut Trial, end: impl Fn(&Trial) -> Verdict) -> Verdict {
    let mut stream = t.session(State::PreCopy)?;
    let until = t.until;
    std::thread::scope(|scope| {
        let reading = scope.spawn(move || -> Verdict {
            let mut buffer = [0; 256];
            loop {
                if std::time::Instant::now() >= until {
                    return fail("reads of a session that has ended go on");
                }
                match stream.read(&mut buffer) {
                    Ok(Chunk::Data(_)) => {}
                    Ok(Chunk::NothingForNow) => std::thread::yield_now(),
                    Ok(Chunk::End) => return fail("the data stream ended in PRE_COPY"),
                    Err(Error::Refused { errno, .. }) if errno == limosa_protocol::Errno::ENODEV => {
                        return Ok(());
                    }
                    Err(error) => return Err(error.into()),
                }
            }
        });
        let ended = end(t);
        let read = reading.join().unwrap_or_else(|_| fail("the thread that reads panicked"));
        ended.and(read)
    })
}
