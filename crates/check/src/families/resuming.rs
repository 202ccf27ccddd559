//! RESUMING, with good and bad data (`vfio.h: VFIO_DEVICE_STATE_RESUMING`).

use limosa_client::{DeviceExt, Error};
use limosa_protocol::State;

use crate::bytes::same_bytes;
use crate::check::{Check, Family, Needs, Stop, Verdict, ensure, fail, skip};
use crate::trial::Trial;

pub(super) fn checks() -> Vec<Check> {
    let needs = Needs::MIGRATION | Needs::SAMPLE;
    let check = |id: &'static str, clauses: &[&'static str], body: fn(&mut Trial) -> Verdict| {
        Check::new(Family::Resuming, id, needs, clauses, body).destructive()
    };
    let mut checks = vec![
        check("resuming.loaded-device-saves", &["resuming.round-trip"], |t| {
            let sample = t.sample()?;
            t.load(&sample, 64 << 10)?;
            let again = t.save()?;
            ensure(!again.is_empty(), || "a device that was loaded saves nothing".into())?;
            if t.facts.comparable {
                same_bytes(&again, &sample, || {
                    "a device that was loaded saves another state than it was given".into()
                })?;
            }
            t.go(State::Running).map(drop)
        }),
        check("resuming.loaded-twice", &["resuming.round-trip", "fsm.repeat"], |t| {
            let sample = t.sample()?;
            t.load(&sample, 64 << 10)?;
            t.load(&sample, 64 << 10)?;
            t.go(State::Running).map(drop)
        }),
        check("resuming.left-without-data", &["resuming.incomplete", "resuming.survive"], |t| {
            incomplete(t, |_| Vec::new())
        }),
        check("resuming.first-byte-alone", &["resuming.incomplete", "resuming.survive"], |t| {
            incomplete(t, |data| data[..1].to_vec())
        }),
        check("resuming.half", &["resuming.incomplete", "resuming.survive"], |t| {
            incomplete(t, |data| data[..data.len() / 2].to_vec())
        }),
        check("resuming.last-byte-missing", &["resuming.incomplete", "resuming.survive"], |t| {
            incomplete(t, |data| data[..data.len() - 1].to_vec())
        }),
        check("resuming.zeros", &["resuming.validate"], |t| bad(t, |data| vec![0; data.len().max(64)])),
        check("resuming.foreign", &["resuming.validate"], |t| bad(t, |data| noise(data.len().max(4096)))),
        check("resuming.first-byte-cut-off", &["resuming.validate"], |t| bad(t, |data| data[1..].to_vec())),
        check("resuming.too-long", &["resuming.validate"], |t| {
            bad(t, |data| [data, &noise(64 << 10)].concat())
        }),
        check("resuming.replayed", &["resuming.validate"], |t| bad(t, |data| [data, data].concat())),
        check("resuming.altered-first-byte", &["resuming.survive", "resuming.validate"], |t| {
            altered(t, |_| 0)
        }),
        check("resuming.altered-middle", &["resuming.survive", "resuming.validate"], |t| {
            altered(t, |bytes| bytes / 2)
        }),
        check("resuming.altered-last-byte", &["resuming.survive", "resuming.validate"], |t| {
            altered(t, |bytes| bytes - 1)
        }),
        check("resuming.endless", &["resuming.survive", "resuming.abort"], endless),
        check("resuming.reset-unwritten", &["resuming.abort"], |t| {
            let _stream = t.session(State::Resuming)?;
            t.reset()
        }),
        check("resuming.reset-half-written", &["resuming.abort"], |t| {
            let sample = t.sample()?;
            let mut stream = t.session(State::Resuming)?;
            t.write(&mut stream, &sample[..sample.len() / 2], 64 << 10)?;
            t.reset()
        }),
        check("resuming.load-after-abort", &["resuming.abort", "resuming.round-trip"], |t| {
            let sample = t.sample()?;
            let mut stream = t.session(State::Resuming)?;
            t.write(&mut stream, &sample[..sample.len() / 2], 64 << 10)?;
            t.reset()?;
            t.load(&sample, 64 << 10)?;
            t.go(State::Running).map(drop)
        }),
        check("resuming.load-after-refusal", &["resuming.abort", "resuming.survive"], |t| {
            let sample = t.sample()?;
            let mut stream = t.session(State::Resuming)?;
            let _ = stream.write(&noise(4096));
            let _ = t.device()?.set_state(State::Stop);
            t.reset()?;
            t.load(&sample, 64 << 10)?;
            t.go(State::Running).map(drop)
        }),
        check("resuming.refusal-leaves-a-state-of-the-path", &["state.failed-arc"], |t| {
            let sample = t.sample()?;
            let mut stream = t.session(State::Resuming)?;
            t.write(&mut stream, &sample[..sample.len() / 2], 64 << 10)?;
            match t.device()?.set_state(State::Running) {
                Ok(_) => return skip("the device takes half of its state"),
                Err(Error::Refused { .. }) => {}
                Err(error) => return Err(error.into()),
            }
            let path = [State::Resuming, State::Stop, State::RunningP2p, State::Error];
            let state = t.state()?;
            ensure(path.contains(&state), || {
                format!("after a refused SET RUNNING in RESUMING the device is in {state}")
            })
        }),
    ];
    for piece in [1usize, 13, 4096, 64 << 10, 1 << 20] {
        let clauses = &["resuming.pieces", "resuming.round-trip"];
        let id = format!("resuming.pieces-of-{piece}");
        let body = move |t: &mut Trial| in_pieces(t, piece);
        checks.push(Check::new(Family::Resuming, id, needs, clauses, body).destructive());
    }
    checks
}

/// Loads the sample in pieces of one size, of which there are at most a thousand; the rest comes at once.
fn in_pieces(t: &mut Trial, piece: usize) -> Verdict {
    const PIECES_MAX: usize = 1024;
    let sample = t.sample()?;
    let (small, rest) = sample.split_at(sample.len().min(piece.saturating_mul(PIECES_MAX)));
    let mut stream = t.session(State::Resuming)?;
    t.write(&mut stream, small, piece)?;
    t.write(&mut stream, rest, 64 << 10)?;
    t.go(State::Stop)?;
    t.go(State::Running).map(drop)
}

/// Bytes that are not the state of any device.
fn noise(bytes: usize) -> Vec<u8> {
    let mut word = 0x9e37_79b9_7f4a_7c15u64;
    let next = || {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        word as u8
    };
    std::iter::repeat_with(next).take(bytes).collect()
}

/// The outcome of a load.
enum Loaded {
    /// A write was refused.
    AtWrite,
    /// The arc to STOP was refused.
    AtArc,
    Taken,
}

/// Loads data that may be refused, and brings the device back by a reset.
fn attempt(t: &Trial, data: &[u8]) -> Result<Loaded, Stop> {
    let mut stream = t.session(State::Resuming)?;
    let mut loaded = Loaded::Taken;
    for chunk in data.chunks(64 << 10) {
        t.in_time("writing the state")?;
        match stream.write(chunk) {
            Ok(()) => {}
            Err(Error::Refused { .. }) => {
                loaded = Loaded::AtWrite;
                break;
            }
            Err(error) => return Err(error.into()),
        }
    }
    match (t.device()?.set_state(State::Stop), &loaded) {
        (Ok(_), Loaded::AtWrite) => {
            return fail("a write was refused, and RESUMING was left for STOP all the same");
        }
        (Ok(_), _) => {}
        (Err(Error::Refused { .. }), Loaded::AtWrite) => {}
        (Err(Error::Refused { .. }), _) => loaded = Loaded::AtArc,
        (Err(error), _) => return Err(error.into()),
    }
    t.reset()?;
    Ok(loaded)
}

fn incomplete(t: &mut Trial, cut: fn(&[u8]) -> Vec<u8>) -> Verdict {
    let sample = t.sample()?;
    let data = cut(&sample);
    match attempt(t, &data)? {
        Loaded::Taken => fail(format!("RESUMING was left with {} of {} bytes", data.len(), sample.len())),
        Loaded::AtWrite if data.is_empty() => fail("nothing was written, and it was refused"),
        Loaded::AtWrite => fail("the beginning of a state was refused as it was written"),
        Loaded::AtArc => Ok(()),
    }
}

fn bad(t: &mut Trial, change: fn(&[u8]) -> Vec<u8>) -> Verdict {
    let data = change(&t.sample()?);
    match attempt(t, &data)? {
        Loaded::Taken => {
            fail(format!("{} bytes that are no state of the device were taken for one", data.len()))
        }
        Loaded::AtWrite | Loaded::AtArc => Ok(()),
    }
}

/// A device need not detect a flipped bit, but has to survive it.
fn altered(t: &mut Trial, at: fn(usize) -> usize) -> Verdict {
    let sample = t.sample()?;
    let mut data = sample.to_vec();
    data[at(sample.len())] ^= 0xff;
    attempt(t, &data)?;
    t.load(&sample, 64 << 10)?;
    t.go(State::Running).map(drop)
}

/// Far more data than the device has.
fn endless(t: &mut Trial) -> Verdict {
    let sample = t.sample()?;
    let most = (sample.len() as u64).saturating_mul(4).clamp(1 << 20, t.limits.sample_bytes_max);
    let mut stream = t.session(State::Resuming)?;
    let mut written = 0;
    let chunk = noise(64 << 10);
    let began = [&sample[..], &chunk].concat();
    let mut answer = stream.write(&began);
    while answer.is_ok() && written < most {
        t.in_time("writing without end")?;
        answer = stream.write(&chunk);
        written += chunk.len() as u64;
    }
    match answer {
        Ok(()) | Err(Error::Refused { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    t.reset()?;
    t.load(&sample, 64 << 10)?;
    t.go(State::Running).map(drop)
}
