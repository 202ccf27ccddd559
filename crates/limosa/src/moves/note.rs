//! The notes of a source: of a move in doubt ([`Doubt`]), and of a guest that is being stopped ([`Stop`]).

use std::time::{SystemTime, UNIX_EPOCH};

use limosa_migrate::link::Fingerprint;
use limosa_migrate::{CommitNote, Secret};
use limosa_protocol::State;
use limosa_stream::MigrationId;
use serde::{Deserialize, Serialize};

use crate::loaded::Load;
use crate::open::{self, Identity};
use crate::output::plain;
use crate::process::{Stopped, boot_id};

/// The ends of notes' names, after the id.
pub const DOUBT: &str = ".doubt";
pub const STOP: &str = ".stopped";

/// The note of a move whose source committed, or of a save that was published, and whose source does not know how that
/// ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Doubt {
    pub id: String,
    /// Proves that an answer comes from the destination; kept secret.
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
    /// Whether the destination was in the same process, so that it cannot be asked.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub here: bool,
    /// Whether it went over TLS, so that its destination has to be asked over TLS.
    #[serde(default)]
    pub tls: bool,
    /// The id of the note of its stop, which this one replaces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop: Option<String>,
    /// The devices that it is loaded into, if they are on this machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load: Option<Box<Load>>,
}

impl Doubt {
    /// The note of the move with this id before its commit. If there is none here, only the id is known.
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
    /// Its own: that of the move is not known yet.
    pub id: String,
    #[serde(flatten)]
    pub halted: Halted,
}

/// The devices and processes that stand still for a move.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Halted {
    /// The source's devices, by names that hold in every folder.
    pub devices: Vec<String>,
    /// The identity and state of each of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub known: Vec<Known>,
    /// When this was noted, in seconds since 1970.
    pub since: u64,
    /// The same in nanoseconds. Older versions do not note it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since_ns: Option<u64>,
    /// The boot in which it was noted: after a reboot, nothing of it is left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<String>,
    /// The processes that are stopped with the guest, and resumed if the move is undone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stopped: Vec<Stopped>,
    /// The command that stops the guest; only the user knows how to undo it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_stop: Option<String>,
}

/// A device's identity, independent of its name, and the state in which it was found.
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
    /// For a move without a note, of which a user names one device.
    pub fn of_one(device: &str) -> std::io::Result<Halted> {
        let devices = vec![open::lasting_name(device)?];
        Ok(Halted::of(devices, Vec::new(), None))
    }

    /// Of these devices, not noted yet.
    pub fn of(devices: Vec<String>, known: Vec<Known>, boot: Option<String>) -> Halted {
        let (stopped, on_stop) = (Vec::new(), None);
        Halted { devices, known, since: 0, since_ns: None, boot, stopped, on_stop }
    }

    /// The same, noted now.
    pub fn now(self) -> Halted {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let (since, since_ns) = (now.as_secs(), u64::try_from(now.as_nanos()).ok());
        Halted { since, since_ns, ..self }
    }

    /// The key by which notes are sorted, the oldest first.
    pub fn age(&self) -> impl Ord + use<> {
        (self.since, self.since_ns)
    }

    /// Whether this was noted before the other. `false` for notes of one second if an older version wrote one of them.
    pub fn is_before(&self, other: &Halted) -> bool {
        match (self.since_ns, other.since_ns) {
            (Some(this), Some(that)) => this < that,
            _ => self.since < other.since,
        }
    }

    /// The names of the stopped devices, for messages.
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

    /// The identity and state of the device at this index.
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

    pub(super) fn file(&self) -> String {
        match self {
            Note::Doubt(doubt) => format!("{}{DOUBT}", doubt.id),
            Note::Stop(stop) => format!("{}{STOP}", stop.id),
        }
    }
}
