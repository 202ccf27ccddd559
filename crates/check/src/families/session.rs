//! Sessions and their data streams (`vfio.h`: the data fd of `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`).

use limosa_client::{Chunk, DeviceExt};
use limosa_protocol::{Errno, FeatureIndex, FeatureOp, State};

use crate::bytes::same_bytes;
use crate::check::{Check, Family, Needs, Stop, Verdict, ensure, fail};
use crate::trial::{Stream, Trial, refused, refused_somehow};

pub(super) fn checks() -> Vec<Check> {
    let check = |id: &'static str, needs, clauses: &[&'static str], body: fn(&mut Trial) -> Verdict| {
        Check::new(Family::Session, id, Needs::MIGRATION | needs, clauses, body)
    };
    let none = Needs::empty();
    let precopy = Needs::PRE_COPY;
    let mut checks = vec![
        check("session.ends-in-stop-copy", none, &["stream.end"], |t| {
            let mut stream = t.session(State::StopCopy)?;
            let data = t.read_to_end(&mut stream, 64 << 10)?;
            ensure(!data.is_empty(), || "STOP_COPY gave no data at all".into())
        }),
        check("session.end-is-repeated", none, &["stream.end"], |t| {
            let mut stream = t.session(State::StopCopy)?;
            t.read_to_end(&mut stream, 64 << 10)?;
            for _ in 0..3 {
                let again = stream.read(&mut [0; 16])?;
                ensure(again == Chunk::End, || format!("after the end a read brought {again:?}"))?;
            }
            t.is(State::StopCopy)
        }),
        check("session.end-keeps-the-session", none, &["stream.end", "stream.independent"], |t| {
            let mut stream = t.session(State::StopCopy)?;
            t.read_to_end(&mut stream, 64 << 10)?;
            t.is(State::StopCopy)?;
            t.go(State::Stop).map(drop)
        }),
        check("session.stopped-device-is-quiet", none, &["fsm.stop-quiet"], |t| {
            t.go(State::Stop)?;
            let (first, second) = (t.save()?.len(), t.save()?.len());
            ensure(first == second, || {
                format!("two saves of a device in STOP have {first} and {second} bytes")
            })
        }),
        check("session.left-unread", none, &["stream.unread"], |t| {
            drop(t.session(State::StopCopy)?);
            t.walk(&[State::Stop, State::Running]).map(drop)
        }),
        check("session.left-half-read", none, &["stream.unread"], |t| {
            t.go(State::Stop)?;
            let whole = t.save()?.len();
            let mut stream = t.session(State::StopCopy)?;
            stream.read(&mut [0; 16])?;
            t.go(State::Stop)?;
            let again = t.save()?.len();
            ensure(again == whole, || {
                format!("after a session that was left early the next gave {again} bytes, expected {whole}")
            })
        }),
        check("session.dropped-stream", none, &["stream.dropped"], |t| {
            drop(t.session(State::StopCopy)?);
            t.is(State::StopCopy)?;
            t.go(State::Running).map(drop)
        }),
        check("session.second-session", none, &["stream.unread", "stream.end"], |t| {
            t.go(State::Stop)?;
            t.save()?;
            t.save().map(drop)
        }),
        check("session.write-while-saving", none, &["stream.direction"], |t| {
            let mut stream = t.session(State::StopCopy)?;
            refused(stream.write(&[0; 16]), "a write to a saving session", &[Errno::EBADF])?;
            t.read_to_end(&mut stream, 64 << 10).map(drop)
        }),
        check("session.read-while-loading", none, &["stream.direction"], |t| {
            let mut stream = t.session(State::Resuming)?;
            refused(stream.read(&mut [0; 16]).map(drop), "a read of a loading session", &[Errno::EBADF])
        }),
        check("session.write-in-precopy", precopy, &["stream.direction"], |t| {
            let mut stream = t.session(State::PreCopy)?;
            refused(stream.write(&[0; 16]), "a write to a saving session", &[Errno::EBADF])
        }),
        check("session.stale-beside-a-new-one", none, &["stream.stale"], |t| {
            let mut old = t.session(State::StopCopy)?;
            t.go(State::Stop)?;
            let mut new = t.session(State::StopCopy)?;
            stale(&mut old, "a new session is open")?;
            let data = t.read_to_end(&mut new, 64 << 10)?;
            ensure(!data.is_empty(), || "beside a stale stream the new session gave no data".into())
        }),
        check("session.stale-write", none, &["stream.stale"], |t| {
            let Some(sample) = t.facts.sample.clone() else {
                return Err(Stop::Skip("there is no state to load".into()));
            };
            let mut stream = t.session(State::Resuming)?;
            t.write(&mut stream, &sample, 64 << 10)?;
            t.go(State::Stop)?;
            refused(stream.write(&[0; 16]), "a write to a session that has ended", &[Errno::ENODEV])
        }),
        check("session.refused-arc-keeps-it", precopy, &["stream.independent", "fsm.refused"], |t| {
            let mut stream = t.session(State::StopCopy)?;
            refused(t.device()?.set_state(State::PreCopy), "STOP_COPY to PRE_COPY", &[Errno::EINVAL])?;
            let data = t.read_to_end(&mut stream, 64 << 10)?;
            ensure(!data.is_empty(), || "after a refused SET the session gave no data".into())
        }),
        check("session.unknown-state-keeps-it", none, &["stream.independent"], |t| {
            let mut stream = t.session(State::StopCopy)?;
            refused_somehow(t.device()?.set_state(State::Error), "SET ERROR")?;
            let data = t.read_to_end(&mut stream, 64 << 10)?;
            ensure(!data.is_empty(), || "after a refused SET the session gave no data".into())
        }),
        check("session.probes-keep-it", none, &["stream.independent", "feature.probe"], |t| {
            let mut stream = t.session(State::StopCopy)?;
            for index in 0..16 {
                t.device()?.probe(FeatureIndex(index), FeatureOp::GET)?;
            }
            let data = t.read_to_end(&mut stream, 64 << 10)?;
            ensure(!data.is_empty(), || "after probes the session gave no data".into())
        }),
        check("session.precopy-goes-on-in-stop-copy", precopy, &["stream.one-session"], |t| {
            let mut stream = t.session(State::PreCopy)?;
            t.read_precopy(&mut stream, 1 << 20)?;
            ensure(t.go(State::StopCopy)?.is_none(), || {
                "PRE_COPY to STOP_COPY opened a second session".into()
            })?;
            t.read_to_end(&mut stream, 64 << 10).map(drop)
        }),
        check("session.precopy-goes-on-in-p2p", precopy | Needs::P2P, &["stream.one-session"], |t| {
            let mut stream = t.session(State::PreCopy)?;
            for state in [State::PreCopyP2p, State::PreCopy, State::PreCopyP2p, State::StopCopy] {
                ensure(t.go(state)?.is_none(), || format!("SET {state} opened a second session"))?;
            }
            t.read_to_end(&mut stream, 64 << 10).map(drop)
        }),
    ];
    for (from, to) in [
        (State::StopCopy, State::Stop),
        (State::StopCopy, State::Running),
        (State::PreCopy, State::Running),
        (State::PreCopy, State::Stop),
        (State::PreCopyP2p, State::RunningP2p),
        (State::StopCopy, State::Resuming),
    ] {
        let id = format!("session.stale-{}-to-{}", id_of(from), id_of(to));
        checks.push(Check::new(Family::Session, id, needs_of(from), &["stream.stale"], move |t| {
            let mut stream = t.session(from)?;
            t.go(to)?;
            stale(&mut stream, &format!("the device went to {to}"))
        }));
    }
    for piece in [1usize, 7, 4096, 1 << 20] {
        let id = format!("session.read-{piece}");
        checks.push(Check::new(
            Family::Session,
            id,
            Needs::MIGRATION | Needs::SAMPLE,
            &["stream.pieces"],
            move |t| pieces(t, piece),
        ));
    }
    checks
}

fn id_of(state: State) -> String {
    state.name().to_lowercase()
}

/// The flags that a state requires.
pub(super) fn needs_of(state: State) -> Needs {
    match state {
        State::RunningP2p => Needs::MIGRATION | Needs::P2P,
        State::PreCopy => Needs::MIGRATION | Needs::PRE_COPY,
        State::PreCopyP2p => Needs::MIGRATION | Needs::PRE_COPY | Needs::P2P,
        _ => Needs::MIGRATION,
    }
}

/// Checks that a stream whose session has ended answers ENODEV.
pub(super) fn stale(stream: &mut Stream, why: &str) -> Verdict {
    let what = format!("a read of the old data stream after {why}");
    refused(stream.read(&mut [0; 16]).map(drop), &what, &[Errno::ENODEV])
}

/// Reads the stopped device's state in pieces of one size, or the beginning of it when there would be too many.
fn pieces(t: &mut Trial, piece: usize) -> Verdict {
    const PIECES_MAX: usize = 1024;
    t.go(State::Stop)?;
    let whole = t.save()?;
    let mut stream = t.session(State::StopCopy)?;
    let mut data = Vec::new();
    let mut buffer = vec![0; piece];
    for _ in 0..PIECES_MAX {
        t.in_time("reading in pieces")?;
        match stream.read(&mut buffer)? {
            Chunk::Data(bytes) if bytes > piece => {
                return fail(format!("a read of {piece} bytes brought {bytes}"));
            }
            Chunk::Data(bytes) => data.extend_from_slice(&buffer[..bytes]),
            Chunk::NothingForNow => return fail("nothing for now (ENOMSG) in STOP_COPY"),
            Chunk::End => break,
        }
    }
    data.extend(t.read_to_end(&mut stream, 64 << 10)?);
    ensure(data.len() == whole.len(), || {
        format!("in pieces of {piece} bytes the state has {} bytes, expected {}", data.len(), whole.len())
    })?;
    if t.facts.comparable {
        same_bytes(&data, &whole, || {
            format!("read in pieces of {piece} bytes the state has other contents than at once")
        })?;
    }
    Ok(())
}
