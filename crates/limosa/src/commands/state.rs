//! `limosa state`: read and drive the migration state.

use anyhow::Context;
use limosa_client::{Device, DeviceExt};
use limosa_protocol::{MigrationFlags, State, fsm};
use serde::Serialize;

use crate::args::StateAction;
use crate::exit::{self, Code};
use crate::found;
use crate::loaded::LoadedBy;
use crate::moves::Moves;
use crate::open::Opened;
use crate::output::Output;

#[derive(Debug, Serialize)]
struct Answer {
    device: String,
    state: &'static str,
    /// The states passed, the first and the last one included; absent for a read.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    path: Vec<&'static str>,
    /// Of a read: the last move that was loaded into it.
    #[serde(skip_serializing_if = "Option::is_none")]
    loaded_by: Option<LoadedBy>,
}

pub fn run(
    device: &Opened,
    action: &StateAction,
    force: bool,
    moves: &Moves,
    out: &Output,
) -> anyhow::Result<()> {
    let mut path = Vec::new();
    let runs =
        |state: State| !matches!(state, State::Stop | State::StopCopy | State::Resuming | State::Error);
    let may_run = match action {
        StateAction::Set { state } => runs(*state),
        StateAction::Reset => true,
        _ => false,
    };
    let may_load = matches!(action, StateAction::Set { state: State::Resuming });
    let doubt = (may_run || may_load).then(|| found::doubt(device.given(), moves)).flatten();
    if (may_run || may_load)
        && let Some(why) = device.why_it_stays(moves)
    {
        let code = if doubt.is_some() { Code::InDoubt } else { Code::Refused };
        return Err(exit::error(code, why));
    }
    if let Some(doubt) = doubt.filter(|_| may_run) {
        if !force {
            return Err(exit::error(
                Code::InDoubt,
                format!("{doubt}; --force lets it run here all the same"),
            ));
        }
        tracing::warn!("{doubt}");
    }
    match action {
        StateAction::Get | StateAction::Next { .. } => {}
        StateAction::Set { state } => {
            path = set(device, *state)?;
            if device.is_beside_vmm() && *state != State::Running {
                tracing::warn!(
                    "{}: a VMM uses it, so it runs again when this command ends; --hold keeps it in {state}",
                    device.given()
                );
            }
        }
        StateAction::Reset => {
            device.reset().context("the device cannot be reset; restart its server or driver")?
        }
    }
    let state = match device.migration_flags()? {
        flags if flags.is_empty() => return no_migration(&**device, action, out),
        _ => device.state()?.name(),
    };
    let loaded_by = matches!(action, StateAction::Get).then(|| moves.loaded_by(device)).flatten();
    // Programs compare what is on standard output with the name of a state.
    if let Some(loaded) = loaded_by.as_ref().filter(|_| !out.json) {
        out.say_aside(&format!("loaded by {loaded}"));
    }
    let answer = Answer { device: device.name().into(), state, path, loaded_by };
    let printed = out.result(&answer, |to| match answer.path.as_slice() {
        [] | [_] => writeln!(to, "{}", answer.state),
        path => writeln!(to, "{}", path.join(" > ")),
    });
    match action {
        StateAction::Set { .. } | StateAction::Reset => after(state, printed),
        StateAction::Get | StateAction::Next { .. } => printed,
    }
}

/// The line that is printed for a state that the device has entered.
fn after(state: &str, printed: anyhow::Result<()>) -> anyhow::Result<()> {
    printed.map_err(|error| exit::but(format_args!("the device is in {state}"), &[exit::message(&error)]))
}

/// A device without migration supports only a reset here.
fn no_migration(device: &dyn Device, action: &StateAction, out: &Output) -> anyhow::Result<()> {
    match action {
        StateAction::Reset => {
            let (device, state) = (device.name().into(), State::Running.name());
            let answer = Answer { device, state, path: Vec::new(), loaded_by: None };
            after(answer.state, out.result(&answer, |to| writeln!(to, "reset")))
        }
        _ => Err(cannot(device)),
    }
}

fn cannot(device: &dyn Device) -> anyhow::Error {
    let why = "it has no migration states: its driver or server does not support migration";
    exit::error(Code::Refused, format!("{}: {why}", device.name()))
}

fn set(device: &Opened, to: State) -> anyhow::Result<Vec<&'static str>> {
    let flags: MigrationFlags = device.migration_flags()?;
    if flags.is_empty() {
        return Err(cannot(&**device));
    }
    let from = device.state()?;
    if device.closes_with_us() && from == State::Resuming && to != from {
        // The session was closed with the device. mtty takes the kernel down when it looks for its data.
        let why = "the process that had it open left it in the middle of loading a state, and the rest cannot come any more";
        let what = format!("{}: {why}; run `limosa state {} reset`", device.name(), device.given());
        return Err(exit::error(Code::Refused, what));
    }
    let path = fsm::path(flags, from, to).map_err(|refusal| {
        let given = device.given();
        let hint = match from {
            State::Error => format!("; run `limosa state {given} reset`"),
            _ => String::new(),
        };
        exit::error(Code::Refused, format!("{}: {from} -> {to}: {refusal}{hint}", device.name()))
    })?;
    let resets = device.reset_count()?;
    // The session that this may open ends with the stream, or stays for the next client to end.
    let stream = device.set_state(to).with_context(|| {
        let name = device.name();
        let now = match device.state() {
            Ok(state) if state == from && from == State::Resuming => format!(
                "it stays as it was: what was loaded is not whole, and `limosa state {} reset` empties it",
                device.given()
            ),
            Ok(state) if state == from => "it stays as it was".into(),
            Ok(state) => format!("it is now in {state}"),
            Err(_) => "it does not tell its state now".into(),
        };
        format!("{name}: {from} -> {to} failed, and {now}")
    })?;
    let saves = |state| matches!(state, State::PreCopy | State::PreCopyP2p | State::StopCopy);
    let reopened = stream.is_some() && saves(from) && saves(to);
    drop(stream);
    let found = device.state()?;
    // Most arcs are legal from more than one state: that the device took the last one proves little.
    if found != to || reopened || device.reset_count()? != resets {
        let what = format!(
            "{}: {from} -> {to}: the device was reset, or driven by another client, meanwhile; it is now in {found}",
            device.name()
        );
        return Err(exit::error(Code::Failed, what));
    }
    Ok(path.states().iter().map(|state| state.name()).collect())
}
