//! Every pair of states (`vfio.h: enum vfio_device_mig_state`), direct and combined, by the table of
//! [`limosa_protocol::fsm`].

use limosa_client::DeviceExt;
use limosa_protocol::fsm::{self, Refusal};
use limosa_protocol::{Errno, MigrationFlags, State};

use crate::check::{Check, Family, Needs, Stop, Verdict, ensure, fail, skip};
use crate::trial::{Stream, Trial, refused};

pub(super) fn checks() -> Vec<Check> {
    let check = |id: &'static str, clauses: &[&'static str], body: fn(&mut Trial) -> Verdict| {
        Check::new(Family::States, id, Needs::MIGRATION, clauses, body)
    };
    let mut checks = vec![
        check("states.begins-in-running", &["fsm.initial"], |t| t.is(State::Running)),
        check("states.get-changes-nothing", &["state.get"], |t| {
            t.go(State::Stop)?;
            (0..20).try_for_each(|_| t.is(State::Stop))
        }),
        check("states.stop-and-go", &["fsm.repeat"], |t| {
            for _ in 0..20 {
                t.walk(&[State::Stop, State::Running])?;
            }
            Ok(())
        }),
        check("states.stop-copy-again-and-again", &["fsm.repeat", "stream.unread"], |t| {
            for _ in 0..10 {
                drop(t.session(State::StopCopy)?);
                t.go(State::Stop)?;
            }
            Ok(())
        }),
    ];
    for from in State::ALL {
        for to in State::ALL {
            checks.push(pair(from, to));
        }
    }
    checks.extend(walks());
    checks
}

fn id_of(state: State) -> String {
    state.name().to_lowercase()
}

fn pair(from: State, to: State) -> Check {
    let all = MigrationFlags::SETS[3];
    let mut clauses = match fsm::path(all, from, to) {
        Err(Refusal::FromError) => vec!["fsm.from-error"],
        Err(Refusal::ToError) => vec!["fsm.no-error"],
        Err(_) => vec!["fsm.refused"],
        Ok(_) if from == to => vec!["fsm.same", "state.fd"],
        Ok(path) if path.arcs().count() == 1 => vec!["fsm.arcs", "state.fd"],
        Ok(_) => vec!["fsm.combined", "state.fd"],
    };
    if to.requires().bits() & !MigrationFlags::STOP_COPY.bits() != 0 && to != from {
        clauses.push("fsm.unsupported");
    }
    let id = format!("states.{}-to-{}", id_of(from), id_of(to));
    let needs = if from == State::Error { Needs::MIGRATION | Needs::BREAK } else { Needs::MIGRATION };
    let check = Check::new(Family::States, id, needs, &clauses, move |t| transition(t, from, to));
    if from == State::Error { check.destructive() } else { check }
}

/// Brings the device from RUNNING into the state that a pair begins in; the stream of its session. A device in RESUMING
/// has all of a state, so that it can be left.
fn begin(t: &Trial, from: State) -> Result<Option<Stream>, Stop> {
    if from == State::Error {
        super::error::break_device(t)?;
        return Ok(None);
    }
    if !t.flags().has(from) {
        return skip(format!("the device has no state {from}"));
    }
    if from == State::Running {
        return Ok(None);
    }
    let mut stream = t.go(from)?;
    if from == State::Resuming {
        match (&mut stream, &t.facts.sample) {
            (Some(stream), Some(sample)) => t.write(stream, sample, 64 << 10)?,
            _ => return skip("there is no state to load, without which RESUMING is not left"),
        }
    }
    Ok(stream)
}

fn transition(t: &mut Trial, from: State, to: State) -> Verdict {
    let stream = begin(t, from)?;
    let answer = t.device()?.set_state(to);
    match fsm::path(t.flags(), from, to) {
        // Linux' drivers compare the states before they look for a path.
        Err(_) if from == to && answer.is_ok() => t.is(from)?,
        Err(refusal) => {
            refused(answer, &format!("SET {to} in {from} ({refusal})"), &[Errno::EINVAL])?;
            t.is(from)?;
        }
        Ok(path) => {
            let opened = answer?.is_some();
            ensure(opened == path.opens_session(), || match opened {
                true => format!("{from} to {to} handed out a data stream where no session opens"),
                false => format!("{from} to {to} opens a session, and handed out no data stream"),
            })?;
            t.is(to)?;
        }
    }
    // A refused SET and one to the same state leave the session alone.
    if let (Some(mut stream), true) = (stream, t.state()? == from && from.is_saving()) {
        match stream.read(&mut [0; 64]) {
            Ok(_) => {}
            Err(error) => return fail(format!("after SET {to} the session of {from} is gone: {error}")),
        }
    }
    Ok(())
}

/// The arcs of a migration, one by one.
fn walks() -> Vec<Check> {
    use State::*;
    let p2p = Needs::MIGRATION | Needs::P2P;
    let precopy = Needs::MIGRATION | Needs::PRE_COPY;
    let walks: [(&str, Needs, &[State]); 7] = [
        ("states.walk-stop-copy", Needs::MIGRATION, &[Stop, StopCopy, Stop, Running]),
        ("states.walk-p2p", p2p, &[RunningP2p, Stop, RunningP2p, Running]),
        ("states.walk-p2p-stop-copy", p2p, &[RunningP2p, StopCopy, Stop, RunningP2p, Running]),
        ("states.walk-precopy", precopy, &[PreCopy, StopCopy, Stop, Running]),
        (
            "states.walk-precopy-p2p",
            precopy | Needs::P2P,
            &[PreCopy, PreCopyP2p, StopCopy, Stop, RunningP2p, Running],
        ),
        ("states.walk-precopy-cancelled", precopy, &[PreCopy, Running, PreCopy, Running]),
        (
            "states.walk-precopy-p2p-cancelled",
            precopy | Needs::P2P,
            &[PreCopy, PreCopyP2p, RunningP2p, Running],
        ),
    ];
    let check = |(id, needs, states): (&'static str, Needs, &'static [State])| {
        Check::new(Family::States, id, needs, &["fsm.arcs", "fsm.repeat"], move |t| t.walk(states).map(drop))
    };
    walks.into_iter().map(check).collect()
}
