//! The kernel's own view of the state (`Documentation/ABI/testing/debugfs-vfio: migration/state`).

use limosa_protocol::State;

use super::session::needs_of;
use crate::check::{Check, Family, Needs, Stop, Verdict, ensure, skip};
use crate::trial::Trial;

pub(super) fn checks() -> Vec<Check> {
    let seen = |state: State| {
        let id = format!("kernel.shows-{}", state.name().to_lowercase());
        Check::new(Family::Kernel, id, needs_of(state) | Needs::VIEW, &["debugfs.state"], move |t| {
            let _stream = t.go(state)?;
            shows(t, state)
        })
    };
    State::ALL.into_iter().filter(|state| *state != State::Error).map(seen).collect()
}

fn shows(t: &Trial, state: State) -> Verdict {
    let Some(view) = &t.target.view else { return skip("the kernel shows no view of its state") };
    let text = view().map_err(|error| Stop::Skip(format!("the kernel's view cannot be read: {error}")))?;
    let text = text.trim();
    ensure(text == state.name(), || format!("the device is in {state}, and the kernel shows `{text}`"))
}
