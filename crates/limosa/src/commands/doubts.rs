//! `limosa resolve` without a device: the moves in doubt, and the guests that were left stopped.

use std::io::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::moves::{Moves, Note, Refused};
use crate::output::{Output, plain};
use crate::process::Stopped;

#[derive(Serialize)]
struct List {
    in_doubt: Vec<Listed>,
    /// Of moves that had not come to their commit.
    stopped: Vec<Listed>,
    /// Notes that are not trusted.
    refused: Vec<Refused>,
}

/// A note, as it is listed.
#[derive(Serialize)]
struct Listed {
    id: String,
    devices: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    to: Option<String>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    saved: bool,
    since: u64,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    tls: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    stopped: Vec<Stopped>,
    #[serde(skip_serializing_if = "Option::is_none")]
    on_stop: Option<String>,
    /// Whether a process of the command works on it still.
    in_use: bool,
    /// Whether the machine was started again since.
    before_restart: bool,
    #[serde(skip)]
    name: String,
}

impl Listed {
    fn new(note: Note, moves: &Moves) -> Listed {
        let (id, in_use) = (note.id().to_owned(), moves.is_in_use(&note));
        let name = note.halted().names();
        let (halted, doubt) = match note {
            Note::Doubt(doubt) => (doubt.halted.clone(), Some(doubt)),
            Note::Stop(stop) => (stop.halted, None),
        };
        let before_restart = halted.is_of_another_boot();
        Listed {
            id,
            to: doubt.as_ref().map(|doubt| doubt.to.clone()),
            saved: doubt.as_ref().is_some_and(|doubt| doubt.saved),
            tls: doubt.as_ref().is_some_and(|doubt| doubt.tls),
            devices: halted.devices,
            since: halted.since,
            stopped: halted.stopped,
            on_stop: halted.on_stop,
            in_use,
            before_restart,
            name,
        }
    }

    fn print(&self, to: &mut dyn Write, now: u64) -> io::Result<()> {
        write!(to, "{}  {}", self.id, self.name)?;
        match &self.to {
            Some(place) => write!(to, " -> {}", plain(place))?,
            None => write!(to, " stopped, and not moved")?,
        }
        write!(to, ", {} min ago", now.saturating_sub(self.since) / 60)?;
        let pids: Vec<_> = self.stopped.iter().map(|stopped| stopped.pid.to_string()).collect();
        if !pids.is_empty() {
            write!(to, "; with process {} stopped", pids.join(", "))?;
        }
        if let Some(command) = &self.on_stop {
            write!(to, "; with the guest stopped by `{}`", plain(command))?;
        }
        if self.before_restart {
            write!(to, "; this machine was restarted since, and nothing of it is left here")?;
        } else if self.in_use {
            write!(to, "; its command has not ended yet")?;
        }
        writeln!(to)
    }
}

/// Prints all notes.
pub fn list(moves: &Moves, out: &Output) -> anyhow::Result<()> {
    let notes = moves.notes()?;
    let list = List {
        in_doubt: notes.doubts.into_iter().map(|doubt| Listed::new(Note::Doubt(doubt), moves)).collect(),
        stopped: notes.stops.into_iter().map(|stop| Listed::new(Note::Stop(stop), moves)).collect(),
        refused: notes.refused,
    };
    out.result(&list, |to| {
        if list.in_doubt.is_empty() && list.stopped.is_empty() {
            return writeln!(to, "no move is in doubt");
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
        list.in_doubt.iter().chain(&list.stopped).try_for_each(|note| note.print(to, now))
    })
}
