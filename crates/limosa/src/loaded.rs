//! Notes of the moves that were loaded into devices of this machine, so that a person who looks at the destination of a move in
//! doubt sees whether that move is in the device. How the move ended is in the ledger's record, not in the note.

use std::fmt;
use std::fs::File;
use std::time::{SystemTime, UNIX_EPOCH};

use limosa_client::DeviceExt;
use limosa_migrate::{Decision, PrivateFolder, Recorded, recorded};
use rustix::fs::FlockOperation;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::endpoint::Endpoint;
use crate::moves::{DOUBT, Doubt, Halted, Moves, is_in_use};
use crate::noting::devices_of;
use crate::open::{self, Identity, Opened};
use crate::output::plain;

/// The end of a note's name, after the move's id.
const LOADED: &str = ".loaded";
/// The number of notes that are kept.
const KEPT: usize = 64;

/// The note of a move that is loaded into devices.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    id: String,
    #[serde(flatten)]
    load: Load,
    /// How it ended, where no ledger on the disk has that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ended: Option<Outcome>,
}

/// The devices that a move is loaded into.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Load {
    #[serde(flatten)]
    halted: Halted,
    /// When it was written, in ns since 1970: two loads may come in one second.
    written_ns: u64,
    /// The reset count of each device before it was loaded, where the device has one.
    resets: Vec<Option<u64>>,
    /// The source: a peer, devices of this machine, or a snapshot.
    from: String,
}

impl Load {
    /// Of these devices, before they are loaded.
    pub fn of(endpoint: &Endpoint, from: &str) -> anyhow::Result<Load> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let (written_ns, halted) = (now.as_nanos() as u64, devices_of(endpoint)?.now());
        let resets = endpoint.devices().iter().map(|device| device.reset_count().ok().flatten()).collect();
        Ok(Load { halted, written_ns, resets, from: from.into() })
    }

    /// Which of the devices this is.
    fn index(&self, identity: &Identity) -> Option<usize> {
        let is_it = |at: &usize| self.halted.known(*at).identity.as_ref() == Some(identity);
        (0..self.halted.devices.len()).find(is_it)
    }
}

/// The outcome of a move that was loaded into a device, as far as it is known here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Its data is being loaded.
    Loading,
    /// Everything is loaded, and the source has not committed.
    Holding,
    /// The source has committed, and the devices are being started.
    Starting,
    /// The source has committed, and the process that started the devices died before it knew that they run.
    Unfinished,
    /// The process of both sides died at the commit.
    InDoubt,
    /// It is committed: the guest is here.
    Committed,
    /// It will never run here.
    NotCommitted,
    /// A snapshot was loaded, which needs no commit.
    Loaded,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Outcome::Loading => "under way",
            Outcome::Holding => "loaded and not committed yet",
            Outcome::Starting => "committed and being started",
            Outcome::Unfinished => "committed, and its receiver died before it knew that all devices run",
            Outcome::InDoubt => "in doubt, since the `limosa migrate` that loaded it died at the commit",
            Outcome::Committed => "committed",
            Outcome::NotCommitted => "not committed, and never will be: what it loaded was discarded",
            Outcome::Loaded => "loaded from a snapshot",
        })
    }
}

/// The last move that was loaded into a device.
#[derive(Clone, Debug, Serialize)]
pub struct LoadedBy {
    pub id: String,
    /// When, in seconds since 1970.
    pub since: u64,
    pub from: String,
    pub outcome: Outcome,
    /// Whether the device was reset since, so that nothing of this move is in it.
    pub reset: bool,
}

impl fmt::Display for LoadedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LoadedBy { id, since, from, outcome, .. } = self;
        write!(f, "move {id} from {}, {}: {outcome}", plain(from), ago(*since))?;
        // A device that discards what it loaded is reset for that.
        if self.reset && *outcome != Outcome::NotCommitted {
            write!(f, "; it was reset since")?;
        }
        Ok(())
    }
}

fn ago(since: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    format!("{} min ago", now.saturating_sub(since) / 60)
}

/// A note whose move is under way in this process.
pub struct Loading {
    folder: PrivateFolder,
    name: String,
    /// Locked as long as this process works on the move.
    _locked: File,
}

impl Loading {
    /// The move was refused before any device was touched.
    pub fn touched_nothing(self) {
        if let Err(error) = self.folder.remove(&self.name) {
            tracing::warn!("the note of a move that was refused is left: {error}");
        }
    }
}

impl Moves {
    /// Notes a move that is about to be loaded into these devices. It is a help for later, and nothing depends on it.
    pub fn loading(&self, id: &str, endpoint: &Endpoint, from: &str) -> Option<Loading> {
        self.note_load(id, endpoint, from, None)
            .inspect_err(|error| tracing::info!("that move {id} is loaded is not noted: {error:#}"))
            .ok()
    }

    /// Notes a move or a snapshot that was loaded by a process which has no ledger on the disk.
    pub fn loaded(&self, id: &str, endpoint: &Endpoint, from: &str, outcome: Outcome) {
        if let Err(error) = self.note_load(id, endpoint, from, Some(outcome)) {
            tracing::info!("that move {id} was loaded is not noted: {error:#}");
        }
    }

    fn note_load(
        &self,
        id: &str,
        endpoint: &Endpoint,
        from: &str,
        ended: Option<Outcome>,
    ) -> anyhow::Result<Loading> {
        self.write_load(Note { id: id.into(), load: Load::of(endpoint, from)?, ended })
    }

    /// Notes how a move in doubt has ended that was loaded on this machine.
    pub fn settled(&self, doubt: &Doubt, decision: Decision) {
        let Some(load) = doubt.load.as_deref().cloned() else { return };
        let ended = Some(match decision {
            Decision::Committed => Outcome::Committed,
            _ => Outcome::NotCommitted,
        });
        if let Err(error) = self.write_load(Note { id: doubt.id.clone(), load, ended }) {
            tracing::info!("how move {} ended is not noted: {error:#}", doubt.id);
        }
    }

    fn write_load(&self, note: Note) -> anyhow::Result<Loading> {
        let folder = self.open()?;
        prune(&folder)?;
        let name = format!("{}{LOADED}", note.id);
        let locked = folder.write(&name, &serde_json::to_vec(&note)?)?;
        Ok(Loading { folder, name, _locked: locked })
    }

    /// The last move that was loaded into the device, according to the notes in this folder.
    pub fn loaded_by(&self, device: &Opened) -> Option<LoadedBy> {
        let folder = PrivateFolder::open(self.folder()).ok().flatten()?;
        let identity = open::identity(device.given())?;
        let loaded = read(&folder, LOADED).into_iter().map(|(note, file): (Note, _)| (note, file, false));
        let doubts = read(&folder, DOUBT).into_iter().filter_map(|(doubt, file): (Doubt, _)| {
            Some((Note { id: doubt.id, load: *doubt.load?, ended: None }, file, true))
        });
        let of_device = loaded.chain(doubts).filter_map(|(note, file, is_doubt)| {
            note.load.index(&identity).map(|at| (at, note, file, is_doubt))
        });
        let (at, note, file, is_doubt) = of_device.max_by_key(|(_, note, ..)| note.load.written_ns)?;
        let lives = is_in_use(&file, FlockOperation::NonBlockingLockShared);
        let recorded = note.id.parse().ok().and_then(|id| recorded(&folder, id).ok().flatten());
        let outcome = note.ended.unwrap_or(match (recorded, lives) {
            (None, false) if is_doubt => Outcome::InDoubt,
            (Some(Recorded::Committed), _) => Outcome::Committed,
            (Some(Recorded::Starting), true) => Outcome::Starting,
            (Some(Recorded::Starting), false) => Outcome::Unfinished,
            (Some(Recorded::Holding), true) => Outcome::Holding,
            (None, true) => Outcome::Loading,
            // No process is left that could start the devices.
            _ => Outcome::NotCommitted,
        });
        let now = device.reset_count().ok().flatten();
        let Load { halted, resets, from, .. } = note.load;
        let reset = resets.get(at).copied().flatten().zip(now).is_some_and(|(then, now)| then != now);
        Some(LoadedBy { id: note.id, since: halted.since, from, outcome, reset })
    }
}

/// All notes whose names have this end and that can be read.
fn read<T: DeserializeOwned>(folder: &PrivateFolder, end: &str) -> Vec<(T, File)> {
    let mut notes = Vec::new();
    for name in folder.names(end).unwrap_or_default() {
        let Ok(Some(file)) = folder.file(&name) else { continue };
        let bytes = folder.read(&name, &file).ok();
        if let Some(note) = bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()) {
            notes.push((note, file));
        }
    }
    notes
}

/// Removes the oldest notes beyond those that are kept, and those of another boot, whose devices are gone.
fn prune(folder: &PrivateFolder) -> anyhow::Result<()> {
    let mut notes: Vec<(Note, File)> = read(folder, LOADED);
    notes.sort_by_key(|(note, _)| note.load.written_ns);
    let too_many = (notes.len() + 1).saturating_sub(KEPT);
    for (at, (note, file)) in notes.iter().enumerate() {
        let is_old = at < too_many || note.load.halted.is_of_another_boot();
        if is_old && !is_in_use(file, FlockOperation::NonBlockingLockShared) {
            folder.remove(format!("{}{LOADED}", note.id))?;
        }
    }
    Ok(())
}
