//! The folder in which moves are remembered: the ledger of a destination, and notes of what a source has left standing
//! still. It has to be its owner's alone (`limosa_migrate::PrivateFolder`). There is no doing without it: what cannot be
//! noted is not stopped and not committed.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use limosa_migrate::link::Fingerprint;
use limosa_migrate::{CommitNote, Ledger, PrivateFolder, Secret};
use limosa_protocol::State;
use limosa_stream::MigrationId;
use rustix::fs::{FlockOperation, flock};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::exit::{self, Code};
use crate::open::{self, Identity};
use crate::output::plain;
use crate::process::{Stopped, boot_id};

/// What to do about a folder that cannot be used.
pub const HINT: &str = "name a folder of your own with --moves";
/// The ends of notes' names, after the id.
pub const DOUBT: &str = ".doubt";
pub const STOP: &str = ".stopped";

/// The folder, which may not be there.
#[derive(Clone, Debug)]
pub struct Moves(PathBuf);

/// The note of a move whose source committed, or of a save that was published, and whose source does not know how that
/// ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Doubt {
    pub id: String,
    /// What proves that an answer is the destination's: for nobody else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<Secret>,
    /// The certificate of the destination, which alone may answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<Fingerprint>,
    #[serde(flatten)]
    pub halted: Halted,
    /// The address at which the destination listened; of a save, the snapshot's place; of a move on this machine, the
    /// devices that it went to.
    pub to: String,
    /// Whether this is a save.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub saved: bool,
    /// Whether the destination was in the same process, and cannot be asked.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub here: bool,
    /// Whether it went over TLS, and its destination is to be asked so.
    #[serde(default)]
    pub tls: bool,
    /// The id of the note of its stop, which this one replaces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop: Option<String>,
}

impl Doubt {
    /// What was noted of the move with this id before its commit. Of one that is not noted here only the id is known.
    pub fn commit(id: MigrationId, noted: Option<&Doubt>) -> CommitNote {
        let mut commit = CommitNote::from(id);
        if let Some(noted) = noted {
            (commit.secret, commit.peer) = (noted.secret.clone(), noted.peer);
        }
        commit
    }
}

/// The note of a guest that is being stopped for a move, which has not come to its commit.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Stop {
    /// Not the move's, which is not known yet.
    pub id: String,
    #[serde(flatten)]
    pub halted: Halted,
}

/// What stands still for a move.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Halted {
    /// The source's devices, by names that hold in every folder.
    pub devices: Vec<String>,
    /// What is known of each of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub known: Vec<Known>,
    /// When this was noted, in seconds since 1970.
    pub since: u64,
    /// The boot in which it was noted: no later one has anything of it left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<String>,
    /// The processes that are stopped with the guest, and go on if the move is undone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stopped: Vec<Stopped>,
    /// The command that stops the guest, whose end only its user knows how to undo.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_stop: Option<String>,
}

/// What is known of a device, whatever it is called.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<Identity>,
    /// The state in which it was found before the move.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    found: Option<String>,
}

impl Known {
    pub fn new(identity: Option<Identity>, found: Option<State>) -> Known {
        Known { identity, found: found.map(|state| state.name().into()) }
    }

    /// The state in which it was found; RUNNING if that was not noted.
    pub fn found(&self) -> State {
        self.found.as_ref().and_then(|name| name.parse().ok()).unwrap_or(State::Running)
    }
}

impl Halted {
    /// Of a move that is not noted, and of which a user knows one device.
    pub fn of_one(device: &str) -> std::io::Result<Halted> {
        let devices = vec![open::lasting_name(device)?];
        Ok(Halted { devices, known: Vec::new(), since: 0, boot: None, stopped: Vec::new(), on_stop: None })
    }

    /// What was stopped, for messages.
    pub fn names(&self) -> String {
        match self.devices.as_slice() {
            [] => "the guest's memory".into(),
            devices => plain(&devices.join(", ")),
        }
    }

    /// Whether a user means one of these devices.
    pub fn is_of(&self, name: &str) -> bool {
        let lasting = open::lasting_name(name).ok();
        let identity = open::identity(name);
        self.devices.iter().enumerate().any(|(at, device)| {
            let known = self.known(at).identity;
            device == name || Some(device) == lasting.as_ref() || known.is_some() && known == identity
        })
    }

    /// What is known of the device at this place.
    pub fn known(&self, at: usize) -> Known {
        self.known.get(at).cloned().unwrap_or_default()
    }

    /// Whether the machine was started again since, so that nothing of this is left.
    pub fn is_of_another_boot(&self) -> bool {
        let now = boot_id().ok();
        self.boot.is_some() && now.is_some() && self.boot != now
    }
}

/// A note of either kind.
#[derive(Clone, Debug)]
pub enum Note {
    Doubt(Doubt),
    Stop(Stop),
}

impl Note {
    pub fn id(&self) -> &str {
        match self {
            Note::Doubt(doubt) => &doubt.id,
            Note::Stop(stop) => &stop.id,
        }
    }

    pub fn halted(&self) -> &Halted {
        match self {
            Note::Doubt(doubt) => &doubt.halted,
            Note::Stop(stop) => &stop.halted,
        }
    }

    pub fn doubt(&self) -> Option<&Doubt> {
        match self {
            Note::Doubt(doubt) => Some(doubt),
            Note::Stop(_) => None,
        }
    }

    fn file(&self) -> String {
        match self {
            Note::Doubt(doubt) => format!("{}{DOUBT}", doubt.id),
            Note::Stop(stop) => format!("{}{STOP}", stop.id),
        }
    }
}

/// The notes in the folder, of each kind the oldest first.
#[derive(Default)]
pub struct Notes {
    pub doubts: Vec<Doubt>,
    pub stops: Vec<Stop>,
    /// Notes that cannot be read, or are not believed.
    pub refused: Vec<Refused>,
}

/// A note that is not believed.
#[derive(Debug, Serialize)]
pub struct Refused {
    pub file: String,
    pub why: String,
}

impl Notes {
    /// All that are believed, the oldest first.
    pub fn into_all(self) -> Vec<Note> {
        let doubts = self.doubts.into_iter().map(Note::Doubt);
        let mut all: Vec<Note> = doubts.chain(self.stops.into_iter().map(Note::Stop)).collect();
        all.sort_by_key(|note| note.halted().since);
        all
    }
}

/// A note that this process has for itself.
pub struct Taken {
    folder: PrivateFolder,
    note: Note,
    _locked: File,
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

    /// The folder, which is made if it is not there.
    pub fn open(&self) -> anyhow::Result<PrivateFolder> {
        PrivateFolder::create(&self.0).map_err(|error| failed(Code::Unreachable, &error))
    }

    /// What a destination remembers of its moves.
    pub fn ledger(&self) -> anyhow::Result<Ledger> {
        Ledger::open(&self.0).map_err(|error| failed(Code::Unreachable, &error))
    }

    /// What a destination has remembered of its moves, to answer from it.
    pub fn record(&self) -> anyhow::Result<Ledger> {
        let refused =
            |error| failed(Code::Refused, &error).context("there is no record of moves to answer from");
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
        notes.doubts.sort_by_key(|doubt| doubt.halted.since);
        notes.stops.sort_by_key(|stop| stop.halted.since);
        Ok(notes)
    }

    /// Takes a note that was found, unless another process works on its move.
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
        // Who had it before has removed it, or has it replaced.
        match folder.file(&name) {
            Ok(Some(_)) => Ok(Taken { folder, note, _locked: file }),
            _ => Err(gone()),
        }
    }

    /// Whether a process of the command works on the move of this note.
    pub fn is_in_use(&self, note: &Note) -> bool {
        let opened = PrivateFolder::open(&self.0).ok().flatten();
        let file = opened.and_then(|folder| folder.file(note.file()).ok().flatten());
        file.is_some_and(|file| is_in_use(&file, FlockOperation::NonBlockingLockShared))
    }

    /// Removes notes with this id, whether they are believed or not. Returns whether there was one.
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

impl Taken {
    pub fn note(&self) -> &Note {
        &self.note
    }

    /// Forgets a move that is settled.
    pub fn forget(self) -> anyhow::Result<()> {
        let failed = |error| failed(Code::Failed, &error);
        // The note of the stop first: without the other one, it would be taken for that of a move that never committed.
        if let Some(stop) = self.note.doubt().and_then(|doubt| doubt.stop.as_ref()) {
            self.folder.remove(format!("{stop}{STOP}")).map_err(failed)?;
        }
        self.folder.remove(self.note.file()).map_err(failed)?;
        Ok(())
    }
}

/// Locks a note for this process, unless another one works on its move.
fn is_ours(file: &File) -> bool {
    let until = Instant::now() + LOOKS_MAX;
    while is_in_use(file, FlockOperation::NonBlockingLockExclusive) {
        // Whoever works on the move has the note alone. One that only looks shares it, and for a moment.
        if is_in_use(file, FlockOperation::NonBlockingLockShared) || Instant::now() >= until {
            return false;
        }
        // Two that want it alone would keep it from each other.
        let _ = flock(file, FlockOperation::Unlock);
        std::thread::yield_now();
    }
    true
}

/// How long others may look at a note one after the other.
const LOOKS_MAX: Duration = Duration::from_secs(5);

fn is_in_use(file: &File, how: FlockOperation) -> bool {
    flock(file, how) == Err(rustix::io::Errno::WOULDBLOCK)
}

/// Reads all notes of a kind.
fn read_all<T: DeserializeOwned>(
    folder: &PrivateFolder,
    end: &str,
    notes: &mut Vec<T>,
    refused: &mut Vec<Refused>,
) -> std::io::Result<()> {
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
fn failed(code: Code, error: &std::io::Error) -> anyhow::Error {
    exit::error(code, format!("{error}; {HINT}"))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn a_look_at_a_note_is_not_taken_for_work_on_its_move() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("note");
        let opened = || File::options().write(true).create(true).truncate(false).open(&path).unwrap();
        let (looks, done) = (opened(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    is_in_use(&looks, FlockOperation::NonBlockingLockShared);
                    flock(&looks, FlockOperation::Unlock).unwrap();
                }
            });
            for _ in 0..1000 {
                assert!(is_ours(&opened()));
            }
            done.store(true, Ordering::Relaxed);
        });
        let works = opened();
        assert!(is_ours(&works));
        assert!(!is_ours(&opened()), "somebody works on it");
    }
}
