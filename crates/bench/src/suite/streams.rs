//! Data streams by phase and by the size of a chunk: pre-copy and stop-copy out, resuming in. One operation is one chunk, so that
//! a device with much state does not exceed its share.

use anyhow::{Context as _, bail};
use limosa_client::{Chunk, DataStream, DeviceExt};
use limosa_protocol::{MigrationFlags, State};

use super::accesses::floor;
use super::{Context, Step};
use crate::cases::HEADER;
use crate::document::{Measure, by_chunk};
use crate::samples::timed;
use crate::streams::{CHUNKS, MIG_DATA};

pub(super) fn steps(context: &Context) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut reads = |what: &str, state: State| {
        steps.extend(CHUNKS.map(|bytes| {
            Step::new(by_chunk(what, bytes), move |context, id| out(context, id, state, bytes))
        }));
    };
    if context.flags.contains(MigrationFlags::PRE_COPY) {
        reads("pre-copy read", State::PreCopy);
    }
    reads("stop-copy read", State::StopCopy);
    if context.saved.as_ref().is_some_and(|saved| !saved.is_empty()) {
        steps.extend(CHUNKS.map(|bytes| {
            Step::new(by_chunk("resuming write", bytes), move |context, id| into(context, id, bytes))
        }));
    }
    steps
}

fn out(context: &Context, id: &str, state: State, bytes: usize) -> anyhow::Result<Measure> {
    let mut floor = floor(context, HEADER + MIG_DATA, HEADER + MIG_DATA + bytes)?;
    let (mut stream, mut chunk): (Option<Box<dyn DataStream>>, _) = (None, vec![0; bytes]);
    context.sampler.run(id, floor.as_mut(), || {
        // One session after the other, until there is a chunk.
        for _ in 0..2 {
            let session = match stream.take() {
                Some(session) => session,
                None => context.open(state)?,
            };
            let session = stream.insert(session);
            let (read, mut took) = timed(0, || session.read(&mut chunk))?;
            if let Chunk::Data(read) = read {
                took.bytes = read as u64;
                return Ok(took);
            }
            stream = None;
            context.device.set_state(if state == State::StopCopy { State::Stop } else { State::Running })?;
        }
        bail!("a session of {state} gives no data")
    })
}

fn into(context: &Context, id: &str, bytes: usize) -> anyhow::Result<Measure> {
    let saved = context.saved.clone().context("no state was kept")?;
    let bytes = bytes.min(saved.len());
    let mut floor = floor(context, HEADER + MIG_DATA + bytes, HEADER)?;
    let (mut stream, mut at): (Option<Box<dyn DataStream>>, _) = (None, 0);
    context.sampler.run(id, floor.as_mut(), || {
        if at == saved.len() {
            stream = None;
            // The device validates the load here.
            context.device.set_state(State::Stop)?;
            at = 0;
        }
        let session = match stream.take() {
            Some(session) => session,
            None => context.open(State::Resuming)?,
        };
        let session = stream.insert(session);
        let chunk = &saved[at..(at + bytes).min(saved.len())];
        at += chunk.len();
        Ok(timed(chunk.len() as u64, || session.write(chunk))?.1)
    })
}
