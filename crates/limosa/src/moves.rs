//! The folder in which moves are remembered: the ledger of a destination, and notes of moves and saves that are in doubt.
//! It has to be its owner's alone (`limosa_migrate::PrivateFolder`). There is no doing without it: what cannot be noted is
//! not committed.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use limosa_migrate::{Ledger, PrivateFolder};
use limosa_stream::MigrationId;
use serde::{Deserialize, Deserializer, Serialize};

use crate::exit::{self, Code};
use crate::guest::Stopped;

/// What to do about a folder that cannot be used.
const HINT: &str = "name a folder of your own with --moves";
/// The end of a note's name, after the move's id.
const DOUBT: &str = ".doubt";

/// The folder, which may not be there.
#[derive(Clone, Debug)]
pub struct Moves(PathBuf);

/// The note of a move whose source committed, or of a save that was published, and whose source does not know how that
/// ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Doubt {
    pub id: String,
    /// The source's devices, as they were named.
    #[serde(alias = "device", deserialize_with = "one_or_more")]
    pub devices: Vec<String>,
    /// The address at which the destination listened; of a save, the snapshot's place.
    pub to: String,
    /// Whether this is a save.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub saved: bool,
    /// When it was committed, in seconds since 1970.
    pub since: u64,
    /// Whether it went over TLS, and its destination is to be asked so.
    #[serde(default)]
    pub tls: bool,
    /// The processes that were stopped with the guest, and go on if the move is undone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stopped: Vec<Stopped>,
    /// The command that stopped the guest, whose end only its user knows how to undo.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_stop: Option<String>,
}

/// A record of one device has its name alone.
fn one_or_more<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Names {
        One(String),
        More(Vec<String>),
    }
    Ok(match Names::deserialize(from)? {
        Names::One(name) => vec![name],
        Names::More(names) => names,
    })
}

/// The notes in the folder.
pub struct Notes {
    /// The oldest first.
    pub doubts: Vec<Doubt>,
    /// Notes that cannot be read, or are not believed: the name, and why.
    pub refused: Vec<Refused>,
}

/// A note that is not believed.
#[derive(Debug, Serialize)]
pub struct Refused {
    pub file: String,
    pub why: String,
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
        let mut notes = Notes { doubts: Vec::new(), refused: Vec::new() };
        let failed = |error| failed(Code::Unreachable, &error);
        let Some(folder) = PrivateFolder::open(&self.0).map_err(failed)? else { return Ok(notes) };
        for name in folder.names(DOUBT).map_err(failed)? {
            let read = folder.file(&name).and_then(|file| match file {
                Some(file) => folder.read(&name, &file).map(Some),
                None => Ok(None),
            });
            let noted = match read {
                Ok(None) => continue,
                Ok(Some(bytes)) => serde_json::from_slice::<Doubt>(&bytes)
                    .map_err(|error| format!("{}: {error}", folder.path().join(&name).display())),
                Err(error) => Err(error.to_string()),
            };
            match noted {
                Ok(doubt) => notes.doubts.push(doubt),
                Err(why) => notes.refused.push(Refused { file: name.to_string_lossy().into_owned(), why }),
            }
        }
        for refused in &notes.refused {
            tracing::error!("a note is passed over: {}", refused.why);
        }
        notes.doubts.sort_by_key(|doubt| doubt.since);
        Ok(notes)
    }

    /// Forgets a move that is in doubt no more.
    pub fn forget(&self, id: &str) {
        let removed = PrivateFolder::open(&self.0).and_then(|folder| match folder {
            Some(folder) => folder.remove(format!("{id}{DOUBT}")),
            None => Ok(()),
        });
        if let Err(error) = removed {
            tracing::warn!("the note of a move that is settled is left: {error}");
        }
    }
}

/// An error of the folder, which it names.
fn failed(code: Code, error: &std::io::Error) -> anyhow::Error {
    exit::error(code, format!("{error}; {HINT}"))
}

/// The parts of a send or a save. A move is noted before it is committed, so that it can be resolved after this process
/// has ended.
pub struct Sending {
    pub folder: PrivateFolder,
    pub devices: Vec<String>,
    pub to: String,
    pub saved: bool,
    pub tls: bool,
}

impl Sending {
    /// Notes a move that is about to be committed, with those that stand still for it.
    pub fn note(
        &self,
        id: MigrationId,
        stopped: Vec<Stopped>,
        on_stop: Option<String>,
    ) -> Result<File, String> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let (devices, to) = (self.devices.clone(), self.to.clone());
        let (saved, tls) = (self.saved, self.tls);
        let doubt = Doubt { id: id.to_string(), devices, to, saved, since, tls, stopped, on_stop };
        let bytes = serde_json::to_vec(&doubt).map_err(|error| error.to_string())?;
        let written = self.folder.write(format!("{id}{DOUBT}"), &bytes);
        written.map_err(|error| format!("the move cannot be noted: {error}; {HINT}"))
    }
}

impl Doubt {
    pub fn id(&self) -> anyhow::Result<MigrationId> {
        self.id.parse().with_context(|| format!("`{}`", self.id))
    }
}
