//! The differences that keep two machines from being the two ends of one move.

/// Why two sides do not match.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
#[non_exhaustive]
pub struct Mismatch {
    /// The mismatch.
    pub kind: MismatchKind,
    /// Names the device or memory region, with what was found and what was expected.
    pub message: String,
}

/// A difference between two sides that prevents a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MismatchKind {
    /// A device has no migration.
    NoMigration,
    /// A device is not in a state in which it can be moved.
    State,
    /// The sides have different numbers of devices.
    DeviceCount,
    /// A device is of another kind.
    DeviceKind,
    /// A device has another PCI identification.
    Pci,
    /// A device has other regions.
    Regions,
    /// A device has other interrupts.
    Irqs,
    /// The memory is not the same.
    Memory,
    /// The machine exceeds a limit of the stream's format.
    Format,
    /// The other side's reason, in its words.
    Told,
}

impl Mismatch {
    pub(crate) fn new(kind: MismatchKind, message: impl Into<String>) -> Mismatch {
        Mismatch { kind, message: message.into() }
    }
}

pub(super) fn joined(reasons: &[Mismatch]) -> String {
    let messages: Vec<_> = reasons.iter().map(|reason| reason.message.as_str()).collect();
    messages.join("; ")
}

/// The difference between two machines.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Difference {
    /// Their devices differ.
    #[error("its devices are [{}], those that were moved are [{}]", .found.join(", "), .expected.join(", "))]
    Devices {
        /// The names of the devices that were moved.
        expected: Vec<String>,
        /// The names of the devices of this source.
        found: Vec<String>,
    },
    /// Their memory differs.
    #[error("its memory regions have {found:?} bytes, those that were moved have {expected:?}")]
    Memory {
        /// The sizes of the regions that were moved, in bytes.
        expected: Vec<u64>,
        /// The sizes of the regions of this source, in bytes.
        found: Vec<u64>,
    },
}
