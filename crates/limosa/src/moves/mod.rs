//! The folder of moves: the ledger of a destination, and a source's notes of stopped guests and devices. Only its owner may
//! access it (`limosa_migrate::PrivateFolder`). It is required: a guest is not stopped, and a move is not committed, before a
//! note of that was written.

mod note;
mod taken;

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use limosa_migrate::{Ledger, PrivateFolder};
use limosa_stream::MigrationId;
use rustix::fs::FlockOperation;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::exit::{self, Code};
pub use note::{DOUBT, Doubt, Halted, Known, Note, STOP, Stop};
pub use taken::Taken;
pub use taken::is_in_use;
use taken::is_ours;

/// Advice about a folder that cannot be used.
pub fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "make room on its file system, or name another folder with --moves"
        }
        ErrorKind::ReadOnlyFilesystem => "name a folder that can be written to with --moves",
        _ => "name a folder of your own with --moves",
    }
}

/// The folder, which may not exist.
#[derive(Clone, Debug)]
pub struct Moves(PathBuf);

/// The notes in the folder, of each kind the oldest first.
#[derive(Default)]
pub struct Notes {
    pub doubts: Vec<Doubt>,
    pub stops: Vec<Stop>,
    /// Notes that cannot be read, or are not trusted.
    pub refused: Vec<Refused>,
}

/// A note that is not trusted.
#[derive(Debug, Serialize)]
pub struct Refused {
    pub file: String,
    pub why: String,
}

impl Notes {
    /// All trusted notes, the oldest first.
    pub fn into_all(self) -> Vec<Note> {
        let doubts = self.doubts.into_iter().map(Note::Doubt);
        let mut all: Vec<Note> = doubts.chain(self.stops.into_iter().map(Note::Stop)).collect();
        all.sort_by_key(|note| note.halted().age());
        all
    }
}

impl Moves {
    /// The folder that the user named, or else the one where programs keep their state.
    pub fn new(given: Option<&Path>) -> Moves {
        if let Some(folder) = given {
            return Moves(folder.into());
        }
        let of =
            |variable: &str| std::env::var_os(variable).filter(|path| !path.is_empty()).map(PathBuf::from);
        let state = of("XDG_STATE_HOME").or_else(|| of("HOME").map(|home| home.join(".local/state")));
        Moves(state.unwrap_or_else(|| "/var/lib".into()).join("limosa/moves"))
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.0
    }

    /// The folder, which is created if it does not exist.
    pub fn open(&self) -> anyhow::Result<PrivateFolder> {
        PrivateFolder::create(&self.0).map_err(|error| failed(Code::Unreachable, &error))
    }

    /// The ledger of a destination's moves, in which there is room for one.
    pub fn ledger(&self) -> anyhow::Result<Ledger> {
        let opened = Ledger::open(&self.0);
        let ledger = opened.and_then(|ledger| ledger.check_room().map(|()| ledger));
        ledger.map_err(|error| failed(Code::Unreachable, &error))
    }

    /// The ledger of a destination's moves, to answer from it.
    pub fn record(&self) -> anyhow::Result<Ledger> {
        let refused =
            |error| failed(Code::Unreachable, &error).context("there is no record of moves to answer from");
        if PrivateFolder::open(&self.0).map_err(refused)?.is_none() {
            let what = format!(
                "{}: there is no such folder, and so no record of moves to answer from; expected with --moves the folder of the \
                 receiver",
                self.0.display()
            );
            return Err(exit::error(Code::Unreachable, what));
        }
        let ledger = Ledger::open(&self.0).map_err(refused)?;
        if ledger.has_no_record().map_err(refused)? {
            tracing::warn!(
                "{}: no move is recorded here, and what became of one is not known; --moves names the folder of the \
                 receiver",
                self.0.display()
            );
        }
        Ok(ledger)
    }

    /// All notes.
    pub fn notes(&self) -> anyhow::Result<Notes> {
        let mut notes = Notes::default();
        let failed = |error| failed(Code::Unreachable, &error);
        let Some(folder) = PrivateFolder::open(&self.0).map_err(failed)? else { return Ok(notes) };
        read_all(&folder, DOUBT, &mut notes.doubts, &mut notes.refused).map_err(failed)?;
        read_all(&folder, STOP, &mut notes.stops, &mut notes.refused).map_err(failed)?;
        for refused in &notes.refused {
            tracing::error!("a note is passed over: {}", refused.why);
        }
        // A process that died between the two has left both.
        let is_replaced =
            |stop: &Stop| notes.doubts.iter().any(|doubt| doubt.stop.as_ref() == Some(&stop.id));
        notes.stops.retain(|stop| !is_replaced(stop));
        notes.doubts.sort_by_key(|doubt| doubt.halted.age());
        notes.stops.sort_by_key(|stop| stop.halted.age());
        Ok(notes)
    }

    /// Locks a note that was found for this process, unless another process works on its move.
    pub fn take(&self, note: Note) -> anyhow::Result<Taken> {
        let gone = || exit::error(Code::Refused, format!("move {}: it was settled meanwhile", note.id()));
        let folder = self.open()?;
        let name = note.file();
        let file = folder.file(&name).map_err(|error| failed(Code::Unreachable, &error))?.ok_or_else(gone)?;
        if !is_ours(&file) {
            let what = format!(
                "move {}: a process of limosa works on it still, and settles it itself; end that process first",
                note.id()
            );
            return Err(exit::error(Code::Refused, what));
        }
        // The process that held it before has removed or replaced it.
        match folder.file(&name) {
            Ok(Some(_)) => Ok(Taken::new(folder, note, file)),
            _ => Err(gone()),
        }
    }

    /// Whether a process of the command works on the move of this note.
    pub fn is_in_use(&self, note: &Note) -> bool {
        let opened = PrivateFolder::open(&self.0).ok().flatten();
        let file = opened.and_then(|folder| folder.file(note.file()).ok().flatten());
        file.is_some_and(|file| is_in_use(&file, FlockOperation::NonBlockingLockShared))
    }

    /// Removes the notes with this id, whether they are trusted or not. Returns whether there was one.
    pub fn drop_note(&self, id: MigrationId) -> anyhow::Result<bool> {
        let failed = |error| failed(Code::Unreachable, &error);
        let Some(folder) = PrivateFolder::open(&self.0).map_err(failed)? else { return Ok(false) };
        let mut there = false;
        for name in [DOUBT, STOP].map(|end| format!("{id}{end}")) {
            there |= folder.remove(&name).map_err(failed)?;
        }
        Ok(there)
    }
}

/// Reads all notes of a kind.
fn read_all<T: DeserializeOwned>(
    folder: &PrivateFolder,
    end: &str,
    notes: &mut Vec<T>,
    refused: &mut Vec<Refused>,
) -> io::Result<()> {
    for name in folder.names(end)? {
        let read = folder.file(&name).and_then(|file| match file {
            Some(file) => folder.read(&name, &file).map(Some),
            None => Ok(None),
        });
        let noted = match read {
            Ok(None) => continue,
            Ok(Some(bytes)) => serde_json::from_slice(&bytes)
                .map_err(|error| format!("{}: {error}", folder.path().join(&name).display())),
            Err(error) => Err(error.to_string()),
        };
        match noted {
            Ok(note) => notes.push(note),
            Err(why) => refused.push(Refused { file: name.to_string_lossy().into_owned(), why }),
        }
    }
    Ok(())
}

/// An error of the folder, which it names.
pub fn failed(code: Code, error: &io::Error) -> anyhow::Error {
    let code = match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::ReadOnlyFilesystem => Code::Failed,
        _ => code,
    };
    exit::error(code, format!("{error}; {}", hint(error)))
}
