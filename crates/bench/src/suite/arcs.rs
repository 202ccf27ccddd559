//! The arcs of the state machine, each by itself (`vfio.h: enum vfio_device_mig_state`), and the requests of a VMM: stop,
//! start, reset.

use limosa_client::DeviceExt;
use limosa_protocol::{MigrationFlags, State, fsm};

use super::{Context, Step};
use crate::document::Measure;
use crate::samples::timed;

const STATES: [State; 7] = [
    State::Running,
    State::RunningP2p,
    State::Stop,
    State::StopCopy,
    State::PreCopy,
    State::PreCopyP2p,
    State::Resuming,
];

pub(super) fn steps(context: &Context) -> Vec<Step> {
    let may_load = context.saved.is_some();
    let mut steps: Vec<Step> = arcs(context.flags)
        .into_iter()
        .filter(|(from, to)| may_load || ![*from, *to].contains(&State::Resuming))
        .map(|(from, to)| {
            Step::new(format!("arc {from}>{to}"), move |context, id| one(context, id, from, to))
        })
        .collect();
    steps.push(Step::new("stop: RUNNING to STOP", |context, id| {
        one(context, id, State::Running, State::Stop)
    }));
    steps.push(Step::new("start: STOP to RUNNING", |context, id| {
        one(context, id, State::Stop, State::Running)
    }));
    if may_load {
        steps.push(Step::new("reset", |context, id| {
            context.sampler.run(id, None, || Ok(timed(0, || context.device.reset())?.1))
        }));
    }
    steps
}

/// Every arc of every path that a device with these flags supports.
fn arcs(flags: MigrationFlags) -> Vec<(State, State)> {
    let pairs = STATES.into_iter().flat_map(|from| STATES.into_iter().map(move |to| (from, to)));
    let mut arcs: Vec<(State, State)> = pairs
        .filter_map(|(from, to)| fsm::path(flags, from, to).ok())
        .flat_map(|path| path.arcs().map(|arc| (arc.from, arc.to)).collect::<Vec<_>>())
        .collect();
    arcs.sort_unstable_by_key(|(from, to)| (*from as u32, *to as u32));
    arcs.dedup();
    arcs
}

/// The way from one state to another in one request.
fn one(context: &Context, id: &str, from: State, to: State) -> anyhow::Result<Measure> {
    context.sampler.run(id, None, || {
        let session = match from {
            // Leaving it requires a complete state.
            State::Resuming => Some(loaded(context)?),
            _ => context.lead(from)?,
        };
        let (opened, took) = timed(0, || context.device.set_state(to))?;
        drop((session, opened));
        Ok(took)
    })
}

/// A session with all of the state written.
fn loaded(context: &Context) -> limosa_client::Result<Box<dyn limosa_client::DataStream>> {
    let mut stream = context.open(State::Resuming)?;
    let saved = context.saved.as_deref().map_or(&[][..], Vec::as_slice);
    saved.chunks(super::CHUNK_BYTES).try_for_each(|chunk| stream.write(chunk))?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_with_all_states_has_the_arcs_of_the_standard() {
        let all = MigrationFlags::STOP_COPY | MigrationFlags::P2P | MigrationFlags::PRE_COPY;
        let mut expected: Vec<_> = fsm::ARCS.iter().map(|arc| (arc.from, arc.to)).collect();
        expected.sort_unstable_by_key(|(from, to)| (*from as u32, *to as u32));
        assert_eq!(arcs(all), expected);
        let least = arcs(MigrationFlags::STOP_COPY);
        assert!(least.contains(&(State::Running, State::Stop)) && least.len() == 6, "{least:?}");
        assert!(arcs(MigrationFlags::empty()).iter().all(|(from, to)| from != to));
    }
}
