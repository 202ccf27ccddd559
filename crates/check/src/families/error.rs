//! ERROR, and the way out (`vfio.h: VFIO_DEVICE_STATE_ERROR`), for a device that the caller can break.

use limosa_client::DeviceExt;
use limosa_protocol::{Errno, State};

use super::session::stale;
use crate::check::{Check, Family, Needs, Verdict, ensure, skip};
use crate::trial::{Trial, refused, refused_somehow};

/// Brings the device into ERROR by the caller's action.
pub(super) fn break_device(t: &Trial) -> Verdict {
    let Some(action) = &t.target.breaks else {
        return skip("no way to bring the device into ERROR was named");
    };
    t.record.note("break", "ok");
    if let Err(why) = action() {
        return skip(format!("the device could not be broken: {why}"));
    }
    match t.state()? {
        State::Error => Ok(()),
        state => skip(format!("it was to be broken, and is in {state}")),
    }
}

pub(super) fn checks() -> Vec<Check> {
    let check = |id: &'static str, clauses: &[&'static str], body: fn(&mut Trial) -> Verdict| {
        Check::new(Family::Error, id, Needs::MIGRATION | Needs::BREAK, clauses, body).destructive()
    };
    vec![
        check("error.is-told", &["state.get", "fsm.from-error"], |t| {
            break_device(t)?;
            (0..3).try_for_each(|_| t.is(State::Error))
        }),
        check("error.no-arc-leads-out", &["fsm.from-error"], |t| {
            break_device(t)?;
            for state in State::ALL.into_iter().filter(|state| *state != State::Error) {
                refused(t.device()?.set_state(state), &format!("SET {state} in ERROR"), &[Errno::EINVAL])?;
                t.is(State::Error)?;
            }
            Ok(())
        }),
        check("error.reset-leads-out", &["fsm.from-error", "reset.running"], |t| {
            break_device(t)?;
            t.reset()
        }),
        check("error.ends-the-session", &["fsm.error-session"], |t| {
            let mut stream = t.session(State::StopCopy)?;
            break_device(t)?;
            stale(&mut stream, "the device broke")
        }),
        check("error.then-reset-then-save", &["reset.usable", "fsm.from-error"], |t| {
            break_device(t)?;
            t.reset()?;
            t.go(State::Stop)?;
            let data = t.save()?;
            ensure(!data.is_empty(), || "after ERROR and a reset STOP_COPY gave no data".into())
        }),
        check("error.in-resuming", &["fsm.from-error", "resuming.abort"], |t| {
            let mut stream = t.session(State::Resuming)?;
            break_device(t)?;
            refused_somehow(stream.write(&[0; 16]), "a write to the session of a device in ERROR")?;
            t.reset()
        }),
    ]
}
