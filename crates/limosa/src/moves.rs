//! The folder of moves, which outlasts the process: the outcomes of moves that were received, and notes of moves and saves
//! that are in doubt. Only its owner can read it.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use limosa_migrate::{CommitNote, Ledger};
use serde::{Deserialize, Deserializer, Serialize};

use crate::exit::{self, Code};
use crate::guest::Stopped;

/// The folder.
#[derive(Clone, Debug)]
pub struct Moves {
    folder: PathBuf,
    /// Whether the user named it, so that doing without it would be wrong.
    given: bool,
}

/// The note of a move whose source committed, or of a save that was published, and whose source does not know how that
/// ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Doubt {
    /// The id, and what tells the destination's answer from a stranger's: a secret, which is for nobody else.
    #[serde(flatten)]
    pub commit: CommitNote,
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

impl Moves {
    /// In the folder that the user named, or else where programs keep their state.
    pub fn new(given: Option<&Path>) -> Moves {
        if let Some(folder) = given {
            return Moves { folder: folder.into(), given: true };
        }
        let of =
            |variable: &str| std::env::var_os(variable).filter(|path| !path.is_empty()).map(PathBuf::from);
        let state = of("XDG_STATE_HOME").or_else(|| of("HOME").map(|home| home.join(".local/state")));
        let state = state.unwrap_or_else(|| "/var/lib".into());
        Moves { folder: state.join("limosa/moves"), given: false }
    }

    /// The memory of a destination.
    pub fn ledger(&self) -> anyhow::Result<Ledger> {
        match Ledger::open(&self.folder) {
            Ok(ledger) => Ok(ledger),
            Err(error) if self.given => Err(self.failed(error)),
            Err(error) => {
                tracing::info!(
                    "{}: {error}; what became of moves is forgotten with this process",
                    self.folder.display()
                );
                Ok(Ledger::new())
            }
        }
    }

    /// The moves in doubt, the oldest first.
    pub fn doubts(&self) -> anyhow::Result<Vec<Doubt>> {
        let entries = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(|error| self.failed(error))?,
        };
        let mut doubts = Vec::new();
        for entry in entries {
            let path = entry.map_err(|error| self.failed(error))?.path();
            if path.extension().is_none_or(|extension| extension != "doubt") {
                continue;
            }
            let read = fs::read(&path).map_err(anyhow::Error::from);
            match read.and_then(|bytes| Ok(serde_json::from_slice::<Doubt>(&bytes)?)) {
                Ok(doubt) => doubts.push(doubt),
                Err(error) => tracing::warn!("{}: {error}; it is passed over", path.display()),
            }
        }
        doubts.sort_by_key(|doubt| doubt.since);
        Ok(doubts)
    }

    /// Forgets a move that is in doubt no more.
    pub fn forget(&self, id: &str) {
        match fs::remove_file(self.path(id)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!("{}: {error}", self.path(id).display());
            }
            _ => {}
        }
    }

    fn note(&self, doubt: &Doubt) -> anyhow::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.folder)?;
        let hidden = self.folder.join(format!(".{}.partial", doubt.commit.id));
        // Of a process that died; it may have another mode.
        let _ = fs::remove_file(&hidden);
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&hidden)?;
        file.write_all(&serde_json::to_vec(doubt)?)?;
        Ok(fs::rename(&hidden, self.path(&doubt.commit.id.to_string()))?)
    }

    fn path(&self, id: &str) -> PathBuf {
        self.folder.join(format!("{id}.doubt"))
    }

    fn failed(&self, error: io::Error) -> anyhow::Error {
        let hint = "name a folder that you may write to with --moves";
        exit::error(Code::Unreachable, format!("{}: {error}; {hint}", self.folder.display()))
    }
}

/// The parts of a send or a save. A move is noted before it is committed, so that it can be resolved after this process
/// has ended.
pub struct Sending<'a> {
    pub moves: &'a Moves,
    pub devices: Vec<String>,
    pub to: String,
    pub saved: bool,
    pub tls: bool,
}

impl Sending<'_> {
    /// Notes a move that is about to be committed, with those that stand still for it.
    pub fn note(
        &self,
        commit: CommitNote,
        stopped: Vec<Stopped>,
        on_stop: Option<String>,
    ) -> Result<(), String> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let (devices, to) = (self.devices.clone(), self.to.clone());
        let (saved, tls) = (self.saved, self.tls);
        let doubt = Doubt { commit, devices, to, saved, since, tls, stopped, on_stop };
        match self.moves.note(&doubt) {
            Err(error) if self.moves.given => Err(format!("{}: {error}", self.moves.folder.display())),
            Err(error) => {
                tracing::info!("{}: {error}; the move is not noted", self.moves.folder.display());
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }
}
