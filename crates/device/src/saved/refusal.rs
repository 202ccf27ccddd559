//! Why a saved state is refused, in words for a person and in an errno for the wire.

use limosa_protocol::Errno;

/// Why a saved state is refused. The device is as it was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The stream does not begin as a saved state does.
    #[error("this is no saved device state")]
    NotAState,
    /// The format itself is of another version.
    #[error("the state has format version {found}, this device reads version {supported}")]
    OtherFormat {
        /// The version found.
        found: u32,
        /// The version that can be read.
        supported: u32,
    },
    /// The state of another device.
    #[error("the state is that of a {found:?}, this device is a {expected:?}")]
    OtherDevice {
        /// Whose state it is.
        found: String,
        /// Whose state was expected.
        expected: String,
    },
    /// A checksum is wrong.
    #[error("the state was altered: wrong checksum in {place}")]
    Altered {
        /// The part of the state that ends with the checksum.
        place: String,
    },
    /// The stream ends too early.
    #[error("the state is truncated: it ends after {bytes} bytes in {place}")]
    Truncated {
        /// The part of the state that is not there, or not all of it.
        place: String,
        /// Bytes that did come.
        bytes: u64,
    },
    /// Bytes after the end.
    #[error("there is more after the end of the state")]
    AfterEnd,
    /// A section comes out of its turn.
    #[error("section {name:?} has number {found} where {expected} belongs")]
    OutOfSequence {
        /// The section.
        name: String,
        /// Its number.
        found: u32,
        /// The number that was to come.
        expected: u32,
    },
    /// A section whose head says what no version of the format does.
    #[error("section {name:?} is malformed: {text}")]
    Malformed {
        /// The section.
        name: String,
        /// What is wrong.
        text: String,
    },
    /// A section that this device does not know and that its writer did not call optional.
    #[error("section {name:?} (version {version}) is not known to this device, and cannot be left out")]
    UnknownSection {
        /// The section.
        name: String,
        /// Its version.
        version: u32,
    },
    /// A section from a newer device.
    #[error("section {name:?} has version {found}, newer than version {supported} that this device reads")]
    NewerSection {
        /// The section.
        name: String,
        /// Its version.
        found: u32,
        /// The newest version that can be read.
        supported: u32,
    },
    /// A section from a device so old that nobody reads it any more.
    #[error(
        "section {name:?} has version {found}, older than version {supported} that this device still reads"
    )]
    OlderSection {
        /// The section.
        name: String,
        /// Its version.
        found: u32,
        /// The oldest version that can be read.
        supported: u32,
    },
    /// A section that may come once came twice.
    #[error("section {name:?} comes twice")]
    Repeated {
        /// The section.
        name: String,
    },
    /// A section that must come did not.
    #[error("section {name:?} is missing")]
    Missing {
        /// The section.
        name: String,
    },
    /// More bytes than the device allows.
    #[error("{place} has {bytes} bytes, more than {bytes_max}")]
    TooLarge {
        /// The section, or the whole.
        place: String,
        /// Its bytes.
        bytes: u64,
        /// The most that are allowed.
        bytes_max: u64,
    },
    /// Everything arrived as it was sent, and says what this device cannot be.
    #[error("section {name:?} does not fit this device: {text}")]
    Unfit {
        /// The section.
        name: String,
        /// What does not fit.
        text: String,
    },
}

impl Refusal {
    /// A payload that is no message, or that contradicts itself.
    pub fn malformed(name: impl Into<String>, text: impl Into<String>) -> Refusal {
        Refusal::Malformed { name: name.into(), text: text.into() }
    }

    /// A payload that a device of other properties wrote: another size of memory, a feature that is off here.
    pub fn unfit(name: impl Into<String>, text: impl Into<String>) -> Refusal {
        Refusal::Unfit { name: name.into(), text: text.into() }
    }

    /// EBADMSG for a state that is damaged, EINVAL for one that is whole and not for this device.
    pub fn errno(&self) -> Errno {
        match self {
            Refusal::NotAState
            | Refusal::Altered { .. }
            | Refusal::Truncated { .. }
            | Refusal::AfterEnd
            | Refusal::OutOfSequence { .. }
            | Refusal::Malformed { .. } => Errno::EBADMSG,
            Refusal::OtherFormat { .. }
            | Refusal::OtherDevice { .. }
            | Refusal::UnknownSection { .. }
            | Refusal::NewerSection { .. }
            | Refusal::OlderSection { .. }
            | Refusal::Repeated { .. }
            | Refusal::Missing { .. }
            | Refusal::TooLarge { .. }
            | Refusal::Unfit { .. } => Errno::EINVAL,
        }
    }

    /// [`Refusal::errno`], for a wire that has no room for words: these go to the log (`tracing`, as an error).
    pub fn log(&self) -> Errno {
        tracing::error!("saved state refused: {self}");
        self.errno()
    }
}
