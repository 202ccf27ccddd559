//! Why a saved state is refused: a message for people, and an errno for the wire.

use limosa_protocol::Errno;

/// Why a saved state is refused. The device is as it was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The stream does not begin as a saved state does.
    #[error("this is not a saved device state")]
    NotAState,
    /// The format has another version.
    #[error("the state has format version {found}, this device reads version {supported}")]
    OtherFormat {
        /// The version found.
        found: u32,
        /// The version that can be read.
        supported: u32,
    },
    /// The state of another device.
    #[error("the state belongs to a {found:?}, this device is a {expected:?}")]
    OtherDevice {
        /// The kind of device of the state.
        found: String,
        /// The expected kind of device.
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
        /// The missing or incomplete part of the state.
        place: String,
        /// Bytes of the state that arrived.
        bytes: u64,
    },
    /// Bytes after the end.
    #[error("there is more after the end of the state")]
    AfterEnd,
    /// A section is out of sequence.
    #[error("section {name:?} has number {found}, expected {expected}")]
    OutOfSequence {
        /// The section.
        name: String,
        /// Its number.
        found: u32,
        /// The expected number.
        expected: u32,
    },
    /// A section with an invalid head or payload.
    #[error("section {name:?} is malformed: {text}")]
    Malformed {
        /// The section.
        name: String,
        /// What is wrong.
        text: String,
    },
    /// An unknown section that is not optional.
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
    /// A section from a device that is too old to be read.
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
    /// A section that may occur only once is repeated.
    #[error("section {name:?} comes twice")]
    Repeated {
        /// The section.
        name: String,
    },
    /// A required section is missing.
    #[error("section {name:?} is missing")]
    Missing {
        /// The section.
        name: String,
    },
    /// More bytes than the device allows.
    #[error("{place} has {bytes} bytes, more than {bytes_max}")]
    TooLarge {
        /// The section, or the whole state.
        place: String,
        /// Its size in bytes.
        bytes: u64,
        /// The limit in bytes.
        bytes_max: u64,
    },
    /// The state is intact, but describes a device with other properties.
    #[error("section {name:?} does not fit this device: {text}")]
    Unfit {
        /// The section.
        name: String,
        /// What does not fit.
        text: String,
    },
}

impl Refusal {
    /// A payload that is not a message, or that is inconsistent.
    pub fn malformed(name: impl Into<String>, text: impl Into<String>) -> Refusal {
        Refusal::Malformed { name: name.into(), text: text.into() }
    }

    /// A payload of a device with other properties: another size of memory, a feature that is off here.
    pub fn unfit(name: impl Into<String>, text: impl Into<String>) -> Refusal {
        Refusal::Unfit { name: name.into(), text: text.into() }
    }

    /// EBADMSG for a damaged state, EINVAL for an intact one that is not for this device.
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

    /// [`Refusal::errno`] for the wire; the message goes to the log (`tracing`, as an error).
    pub fn log(&self) -> Errno {
        tracing::error!("saved state refused: {self}");
        self.errno()
    }
}
