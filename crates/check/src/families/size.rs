//! Estimates of the data's size compared with the actual size (`vfio.h: VFIO_DEVICE_FEATURE_MIG_DATA_SIZE`).

use limosa_client::DeviceExt;
use limosa_protocol::State;

use super::session::needs_of;
use crate::check::{Check, Family, Needs, Verdict, ensure, fail};
use crate::trial::Trial;

/// An estimate may be wrong by this factor, and by this number of bytes in addition.
const TIMES: u64 = 4;
const BESIDE: u64 = 64 << 10;

pub(super) fn checks() -> Vec<Check> {
    let states = [
        State::Running,
        State::RunningP2p,
        State::Stop,
        State::StopCopy,
        State::PreCopy,
        State::PreCopyP2p,
        State::Resuming,
    ];
    let mut checks: Vec<_> = states
        .into_iter()
        .map(|state| {
            let id = format!("size.in-{}", state.name().to_lowercase());
            Check::new(Family::Size, id, needs_of(state) | Needs::DATA_SIZE, &["size.any-state"], move |t| {
                let _stream = t.go(state)?;
                match t.device()?.mig_data_size()? {
                    Some(_) => t.is(state),
                    None => fail(format!("MIG_DATA_SIZE is not there in {state}")),
                }
            })
        })
        .collect();
    let needs = Needs::MIGRATION | Needs::DATA_SIZE;
    checks.push(Check::new(Family::Size, "size.running-is-about-right", needs, &["size.estimate"], |t| {
        about(t, State::Running)
    }));
    checks.push(Check::new(Family::Size, "size.stopped-is-about-right", needs, &["size.estimate"], |t| {
        about(t, State::Stop)
    }));
    checks
}

/// The estimate for a state compared with the data of STOP_COPY.
fn about(t: &mut Trial, state: State) -> Verdict {
    t.go(state)?;
    let Some(estimate) = t.device()?.mig_data_size()? else {
        return fail(format!("MIG_DATA_SIZE is not there in {state}"));
    };
    let mut stream = t.session(State::StopCopy)?;
    let real = t.read_to_end(&mut stream, 64 << 10)?.len() as u64;
    let most = |bytes: u64| bytes.saturating_mul(TIMES).saturating_add(BESIDE);
    ensure(estimate > 0 || real == 0, || format!("in {state} the estimate was 0, and {real} bytes came"))?;
    ensure(real <= most(estimate) && estimate <= most(real), || {
        format!("in {state} the estimate was {estimate} bytes, and {real} came")
    })
}
