//! [`Check`]: one named test of a device, and [`Outcome`], its result.

use std::borrow::Cow;
use std::fmt;

use limosa_client::Error;
use serde::{Deserialize, Serialize};

use crate::trial::Trial;

/// A group of checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// Regions, interrupts and device information.
    Device,
    /// The FEATURE multiplexer.
    Feature,
    /// Every pair of states.
    States,
    /// Sessions and their data streams.
    Session,
    /// Pre-copy and its info.
    Precopy,
    /// Estimates of the data's size, compared with the actual size.
    Size,
    /// RESUMING, with good and bad data.
    Resuming,
    /// Resets.
    Reset,
    /// ERROR, and the way out.
    Error,
    /// DMA logging.
    Logging,
    /// Several threads at once.
    Concurrency,
    /// A second device of the same kind.
    Peer,
    /// The kernel's own view of the state.
    Kernel,
    /// The messages of a vfio-user server.
    VfioUser,
}

impl Family {
    /// Every family, in the order in which they run.
    pub const ALL: [Family; 14] = [
        Family::Device,
        Family::Feature,
        Family::States,
        Family::Session,
        Family::Precopy,
        Family::Size,
        Family::Resuming,
        Family::Reset,
        Family::Error,
        Family::Logging,
        Family::Concurrency,
        Family::Peer,
        Family::Kernel,
        Family::VfioUser,
    ];

    /// Its name, with which the ids of its checks begin.
    pub const fn name(self) -> &'static str {
        match self {
            Family::Device => "device",
            Family::Feature => "feature",
            Family::States => "states",
            Family::Session => "session",
            Family::Precopy => "precopy",
            Family::Size => "size",
            Family::Resuming => "resuming",
            Family::Reset => "reset",
            Family::Error => "error",
            Family::Logging => "logging",
            Family::Concurrency => "concurrency",
            Family::Peer => "peer",
            Family::Kernel => "kernel",
            Family::VfioUser => "vfio-user",
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for Family {
    type Err = String;

    fn from_str(text: &str) -> Result<Family, String> {
        Family::ALL.into_iter().find(|family| family.name() == text).ok_or_else(|| {
            let names: Vec<_> = Family::ALL.iter().map(|family| family.name()).collect();
            format!("no family of checks: expected one of {}", names.join(", "))
        })
    }
}

bitflags::bitflags! {
    /// The requirements of a check; without them it is skipped.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Needs: u32 {
        /// The feature MIGRATION.
        const MIGRATION = 1 << 0;
        /// The flag P2P.
        const P2P = 1 << 1;
        /// The flag PRE_COPY.
        const PRE_COPY = 1 << 2;
        /// DMA logging.
        const LOGGING = 1 << 3;
        /// MIG_DATA_SIZE.
        const DATA_SIZE = 1 << 4;
        /// Pre-copy info on the data stream.
        const PRECOPY_INFO = 1 << 5;
        /// MIG_PRECOPY_INFOv2.
        const PRECOPY_INFO_V2 = 1 << 6;
        /// VFIO_DEVICE_RESET.
        const RESET = 1 << 7;
        /// A state of the device's own, saved when the suite began.
        const SAMPLE = 1 << 8;
        /// A second device.
        const PEER = 1 << 9;
        /// A way to break the device.
        const BREAK = 1 << 11;
        /// The kernel's view of the state.
        const VIEW = 1 << 12;
        /// A device without migration.
        const NO_MIGRATION = 1 << 13;
        /// A device without DMA logging.
        const NO_LOGGING = 1 << 14;
        /// A transport with the kernel's rules for the ranges of DMA_LOGGING_START.
        const KERNEL_RANGES = 1 << 15;
        /// A raw connection to the device's server. While such a check runs, the suite has no client connected.
        const WIRE = 1 << 16;
    }
}

/// The result of a check's body: `?` on a call to the device turns its refusal into a failure.
pub(crate) type Verdict = Result<(), Stop>;

/// Why a check's body ended early.
#[derive(Debug)]
pub(crate) enum Stop {
    /// The device violates the clause.
    Fail(String),
    /// The check cannot be made on this device.
    Skip(String),
}

impl Stop {
    /// The same of a step of the check, which a failure names.
    pub(crate) fn of(self, step: impl FnOnce() -> String) -> Stop {
        match self {
            Stop::Fail(why) => Stop::Fail(format!("{}: {why}", step())),
            skip @ Stop::Skip(_) => skip,
        }
    }
}

impl From<Error> for Stop {
    fn from(error: Error) -> Stop {
        match error {
            // Nothing was sent: this transport cannot express it.
            Error::Usage { what, .. } => Stop::Skip(format!("the client does not send this: {what}")),
            error => Stop::Fail(error.to_string()),
        }
    }
}

/// A failure with this text.
pub(crate) fn fail<T>(what: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::Fail(what.into()))
}

/// A check that cannot be made.
pub(crate) fn skip<T>(why: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::Skip(why.into()))
}

/// A failure unless it holds.
pub(crate) fn ensure(holds: bool, what: impl FnOnce() -> String) -> Verdict {
    if holds { Ok(()) } else { fail(what()) }
}

/// The outcome of a check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", content = "detail", rename_all = "kebab-case")]
pub enum Outcome {
    /// The device complies with the clauses, as far as this check can tell.
    Pass,
    /// It failed: the expected and the actual result.
    Fail(String),
    /// The check does not apply, or could not be made.
    Skip(String),
    /// The check may destroy the device's state, and was not enabled.
    Unsafe,
}

impl Outcome {
    /// One word for it.
    pub const fn word(&self) -> &'static str {
        match self {
            Outcome::Pass => "pass",
            Outcome::Fail(_) => "FAIL",
            Outcome::Skip(_) => "skip",
            Outcome::Unsafe => "unsafe",
        }
    }

    /// Further details.
    pub fn detail(&self) -> &str {
        match self {
            Outcome::Fail(text) | Outcome::Skip(text) => text,
            Outcome::Pass => "",
            Outcome::Unsafe => "it needs --destructive",
        }
    }
}

pub(crate) type Body = Box<dyn Fn(&mut Trial) -> Verdict + Send + Sync>;

/// One named test of a device.
pub struct Check {
    /// Its id: the family, a dot, the rest.
    pub id: Cow<'static, str>,
    /// Its family.
    pub family: Family,
    /// The ids of its clauses.
    pub clauses: Vec<&'static str>,
    /// Its requirements.
    pub needs: Needs,
    /// Whether it may destroy the device's state: by data of another device, resets, DMA.
    pub destructive: bool,
    pub(crate) body: Body,
}

impl fmt::Debug for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Check").field("id", &self.id).field("clauses", &self.clauses).finish_non_exhaustive()
    }
}

impl Check {
    /// A check that preserves the device's state.
    pub(crate) fn new(
        family: Family,
        id: impl Into<Cow<'static, str>>,
        needs: Needs,
        clauses: &[&'static str],
        body: impl Fn(&mut Trial) -> Verdict + Send + Sync + 'static,
    ) -> Check {
        let id = id.into();
        debug_assert!(id.starts_with(family.name()), "{id}");
        Check { id, family, clauses: clauses.to_vec(), needs, destructive: false, body: Box::new(body) }
    }

    /// The same for a check that may destroy the device's state.
    pub(crate) fn destructive(mut self) -> Check {
        self.destructive = true;
        self
    }
}
