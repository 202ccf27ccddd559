//! The states in which devices are found before a move: which of them prevent a move from or to the device, and the command
//! that leads out of each.

use limosa_client::DeviceExt;
use limosa_protocol::State;

use crate::args::Stopping;
use crate::exit::{self, Code};
use crate::moved::Moved;
use crate::moves::{Moves, Note};
use crate::open::Opened;

/// Refuses devices that cannot be moved in their current state. A device in STOP is moved only if that is intended (`stopped`):
/// an earlier move has left it so, or its guest was paused, and only the user knows which.
pub fn check_source(devices: &[Opened], stopped: bool, moves: &Moves) -> anyhow::Result<()> {
    refuse(devices, moves, |device, state| match state {
        State::Running => None,
        State::Stop if stopped => None,
        State::Stop => Some(in_stop(device.given(), moves)),
        _ => Some(left(device.given(), state, "is it being moved already?", moves)),
    })
}

/// Refuses devices to which nothing can be moved.
pub fn check_destination(devices: &[Opened], moves: &Moves) -> anyhow::Result<()> {
    refuse(devices, moves, |device, state| match state {
        State::Running | State::Stop => None,
        _ => Some(left(device.given(), state, "is it in use?", moves)),
    })
}

/// Refuses to stop the server of a device together with the guest: it would no longer answer, and the move would wait for it.
pub fn check_stop_with<'a>(
    stopping: &Stopping,
    devices: impl Iterator<Item = &'a Opened> + Clone,
) -> anyhow::Result<()> {
    for pid in &stopping.stop_with {
        if let Some(device) = devices.clone().find(|device| device.server() == Some(*pid)) {
            let what = format!(
                "--stop-with {pid}: this process serves {}, and would not answer any more once it is stopped; expected the \
                 process that runs the guest. One that does both is asked to stop the guest by --on-stop",
                device.given()
            );
            return Err(exit::error(Code::Usage, what));
        }
    }
    Ok(())
}

/// A device that was given away with a move is refused in any case: it would refuse the move itself, without the reason.
fn refuse(
    devices: &[Opened],
    moves: &Moves,
    why: impl Fn(&Opened, State) -> Option<String>,
) -> anyhow::Result<()> {
    let of = |device: &Opened| {
        let state = state(device)?;
        device.why_it_stays(moves).or_else(|| why(device, state))
    };
    let reasons: Vec<_> = devices.iter().filter_map(of).collect();
    match reasons.is_empty() {
        true => Ok(()),
        false => Err(exit::error(Code::Refused, reasons.join("; "))),
    }
}

/// `None` for a device that has no state, or does not return it: the move reports why.
fn state(device: &Opened) -> Option<State> {
    let flags = device.migration_flags().ok().filter(|flags| !flags.is_empty());
    flags.and_then(|_| device.state().ok())
}

fn in_stop(name: &str, moves: &Moves) -> String {
    if let Some(what) = noted(name, moves) {
        return format!("{name} is in STOP: {what}");
    }
    let why = match moves.last(name) {
        Some(Moved { id, to, saved: true, .. }) => {
            format!("its last move {id} is done: it was saved to {to}")
        }
        Some(Moved { id, to, .. }) => format!("its last move {id} is done: it went to {to}"),
        None => "an earlier move has left it so, or somebody has paused it".into(),
    };
    format!(
        "{name} is in STOP: {why}. Where its guest runs elsewhere, moving it again would put what it held over that guest. If \
         the guest runs nowhere else, `limosa state {name} set RUNNING` lets it run here, and --stopped moves it as it \
         stands, to stay in STOP there"
    )
}

/// The unfinished work of a command that died, or the work of another command that still runs.
fn left(name: &str, state: State, question: &str, moves: &Moves) -> String {
    if let Some(what) = noted(name, moves) {
        return format!("{name} is in {state}, RUNNING or STOP is expected; {question} {what}");
    }
    let what = match state {
        State::PreCopy | State::PreCopyP2p | State::StopCopy => format!(
            "{question} If what was moving or saving it was killed, `limosa state {name} set RUNNING` brings its guest back \
             (`set STOP` one that stood still before)"
        ),
        State::Resuming => format!(
            "{question} If what was loading it was killed, there is no guest in it, and `limosa state {name} reset` makes it \
             usable"
        ),
        State::Error => {
            format!(
                "it has failed, and what it held is lost; only `limosa state {name} reset` leads out of that"
            )
        }
        _ => format!("{question} If not, `limosa state {name} set RUNNING` lets it run"),
    };
    format!("{name} is in {state}, RUNNING or STOP is expected; {what}")
}

/// A warning for a person who is about to let a device run although its guest may run elsewhere.
pub fn doubt(name: &str, moves: &Moves) -> Option<String> {
    let doubts = moves.notes().ok()?.doubts;
    let doubt = doubts.iter().rfind(|doubt| doubt.halted.is_of(name))?;
    let id = &doubt.id;
    Some(format!(
        "{name}: its move {id} is in doubt, and its guest may run elsewhere: two must never run; `limosa resolve {name}` settles it"
    ))
}

/// The note of a move of this device that is not settled. A device is not refused because of notes that cannot be read.
pub fn noted(name: &str, moves: &Moves) -> Option<String> {
    let note = moves.notes().ok()?.into_all().into_iter().rfind(|note| note.halted().is_of(name))?;
    let id = note.id();
    Some(match (moves.is_in_use(&note), &note) {
        (true, _) => format!("a process of limosa works on its move {id}"),
        (false, Note::Doubt(_)) => {
            format!("its move {id} is in doubt, which `limosa resolve {name}` settles")
        }
        (false, Note::Stop(_)) => {
            format!("what was moving it has left its guest stopped, which `limosa resolve {name}` lets go on")
        }
    })
}
