//! What the command remembers of moves beyond its own end: what became of those that it received, and which of those
//! that it sent are in doubt.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use limosa_migrate::Ledger;
use limosa_stream::MigrationId;
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

/// A move whose source committed and does not know how that ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Doubt {
    pub id: String,
    /// The source's devices, as they were named.
    #[serde(alias = "device", deserialize_with = "one_or_more")]
    pub devices: Vec<String>,
    /// Where the destination listened.
    pub to: String,
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
        fs::create_dir_all(&self.folder)?;
        let hidden = self.folder.join(format!(".{}.partial", doubt.id));
        let mut file = fs::File::create(&hidden)?;
        file.write_all(&serde_json::to_vec(doubt)?)?;
        Ok(fs::rename(&hidden, self.path(&doubt.id))?)
    }

    fn path(&self, id: &str) -> PathBuf {
        self.folder.join(format!("{id}.doubt"))
    }

    fn failed(&self, error: io::Error) -> anyhow::Error {
        let hint = "name a folder that you may write to with --moves";
        exit::error(Code::Unreachable, format!("{}: {error}; {hint}", self.folder.display()))
    }
}

/// What the command sends: it is noted before the move is committed, so that it can be resolved when this process is no
/// more.
pub struct Sending<'a> {
    pub moves: &'a Moves,
    pub devices: Vec<String>,
    pub to: String,
    pub tls: bool,
}

impl Sending<'_> {
    /// Notes a move that is about to be committed, with those that stand still for it.
    pub fn note(
        &self,
        id: MigrationId,
        stopped: Vec<Stopped>,
        on_stop: Option<String>,
    ) -> Result<(), String> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let (devices, to) = (self.devices.clone(), self.to.clone());
        let doubt = Doubt { id: id.to_string(), devices, to, since, tls: self.tls, stopped, on_stop };
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

impl Doubt {
    pub fn id(&self) -> anyhow::Result<MigrationId> {
        self.id.parse().with_context(|| format!("`{}`", self.id))
    }
}
