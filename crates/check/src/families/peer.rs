//! Round trips with a second device of the same kind.

use limosa_client::{Device, DeviceExt, Error};
use limosa_protocol::State;

use crate::bytes::same_bytes;
use crate::check::{Check, Family, Needs, Stop, Verdict, ensure, fail, skip};
use crate::recorder::Recorded;
use crate::trial::{Stream, Trial, read_to_end};

pub(super) fn checks() -> Vec<Check> {
    let needs = Needs::MIGRATION | Needs::PEER | Needs::SAMPLE;
    let check = |id: &'static str, needs: Needs, body: fn(&mut Trial) -> Verdict| {
        Check::new(Family::Peer, id, needs, &["resuming.round-trip"], body).destructive()
    };
    vec![
        check("peer.there", needs, |t| {
            let peer = open(t)?;
            t.go(State::Stop)?;
            let data = t.save()?;
            load(t, &peer, &data)?;
            leave(&peer)
        }),
        check("peer.there-and-back", needs, |t| {
            let peer = open(t)?;
            t.go(State::Stop)?;
            let data = t.save()?;
            load(t, &peer, &data)?;
            let back = save(t, &peer)?;
            leave(&peer)?;
            if t.facts.comparable {
                same_bytes(&back, &data, || {
                    "the second device saves another state than it was given".into()
                })?;
            }
            t.load(&back, 64 << 10)?;
            t.go(State::Running).map(drop)
        }),
        check("peer.there-by-precopy", needs | Needs::PRE_COPY, |t| {
            let peer = open(t)?;
            let mut stream = t.session(State::PreCopy)?;
            let (mut data, _) = t.read_precopy(&mut stream, t.limits.sample_bytes_max)?;
            t.go(State::StopCopy)?;
            data.extend(t.read_to_end(&mut stream, 64 << 10)?);
            t.go(State::Stop)?;
            load(t, &peer, &data)?;
            leave(&peer)
        }),
    ]
}

fn open(t: &Trial) -> Result<Recorded, Stop> {
    let Some(open) = &t.target.peer else { return skip("no second device was named") };
    let peer = t.open(open, "peer ")?;
    match peer.state() {
        Ok(State::Running) => {}
        Ok(_) => peer.reset()?,
        Err(Error::Refused { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(peer)
}

fn session(device: &Recorded, state: State) -> Result<Stream, Stop> {
    match device.set_state(state)? {
        Some(stream) => Ok(stream),
        None => fail(format!("the second device opened no session in {state}")),
    }
}

fn load(t: &Trial, peer: &Recorded, data: &[u8]) -> Verdict {
    let mut stream = session(peer, State::Resuming)?;
    t.write(&mut stream, data, 64 << 10)?;
    peer.set_state(State::Stop)?;
    Ok(())
}

fn save(t: &Trial, peer: &Recorded) -> Result<Vec<u8>, Stop> {
    let mut stream = session(peer, State::StopCopy)?;
    let data = read_to_end(&mut stream, 64 << 10, t.limits.state_bytes_max, t.until)?;
    peer.set_state(State::Stop)?;
    Ok(data)
}

fn leave(peer: &Recorded) -> Verdict {
    peer.set_state(State::Running)?;
    let state = peer.state()?;
    ensure(state == State::Running, || format!("the second device is in {state}, expected RUNNING"))
}
