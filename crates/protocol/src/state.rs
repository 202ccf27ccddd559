//! Migration states and the flags that say which of them a device has
//! (`vfio.h: enum vfio_device_mig_state`, `VFIO_DEVICE_FEATURE_MIGRATION`).

use core::fmt;
use core::str::FromStr;

use crate::Errno;

/// A state of the device migration state machine, numbered as in `enum vfio_device_mig_state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum State {
    /// The device has failed; only a reset leaves this state, to [`State::Running`].
    Error = 0,
    /// The device changes neither its internal nor any external state.
    Stop = 1,
    /// The device runs; the state in which every device starts.
    Running = 2,
    /// Stopped, and the remaining internal state can be read out.
    StopCopy = 3,
    /// Stopped, and loading a new internal state.
    Resuming = 4,
    /// Running, except that it starts no peer-to-peer DMA.
    RunningP2p = 5,
    /// Running, and tracking changes of its internal state while that is read out.
    PreCopy = 6,
    /// [`State::PreCopy`], except that it starts no peer-to-peer DMA.
    PreCopyP2p = 7,
}

impl State {
    /// How many states there are (`VFIO_DEVICE_STATE_NR`).
    pub const COUNT: usize = 8;

    /// Every state, by number.
    pub const ALL: [State; State::COUNT] = [
        State::Error,
        State::Stop,
        State::Running,
        State::StopCopy,
        State::Resuming,
        State::RunningP2p,
        State::PreCopy,
        State::PreCopyP2p,
    ];

    /// The state with this number, or `None` for a number that the standard does not assign.
    pub const fn from_raw(number: u32) -> Option<State> {
        if (number as usize) < State::COUNT { Some(State::ALL[number as usize]) } else { None }
    }

    /// The number, as on the wire.
    pub const fn raw(self) -> u32 {
        self as u32
    }

    /// The standard's name without its prefix, such as `STOP_COPY`.
    pub const fn name(self) -> &'static str {
        match self {
            State::Error => "ERROR",
            State::Stop => "STOP",
            State::Running => "RUNNING",
            State::StopCopy => "STOP_COPY",
            State::Resuming => "RESUMING",
            State::RunningP2p => "RUNNING_P2P",
            State::PreCopy => "PRE_COPY",
            State::PreCopyP2p => "PRE_COPY_P2P",
        }
    }

    /// Whether the state belongs to the saving group, whose states share one data session.
    pub const fn is_saving(self) -> bool {
        matches!(self, State::StopCopy | State::PreCopy | State::PreCopyP2p)
    }

    /// Whether a data session is open in this state.
    pub const fn has_session(self) -> bool {
        self.is_saving() || matches!(self, State::Resuming)
    }

    /// Whether the state is a pre-copy state: the device runs while its state is read out.
    pub const fn is_pre_copy(self) -> bool {
        matches!(self, State::PreCopy | State::PreCopyP2p)
    }

    /// Whether the device may change its internal state or memory in this state (true for the P2P states, which only
    /// suppress peer-to-peer DMA).
    pub const fn is_running(self) -> bool {
        matches!(self, State::Running | State::RunningP2p | State::PreCopy | State::PreCopyP2p)
    }

    /// The flags that a device must have for this state to exist on it.
    pub const fn requires(self) -> MigrationFlags {
        let bits = match self {
            State::Error | State::Stop | State::Running => 0,
            State::StopCopy | State::Resuming => MigrationFlags::STOP_COPY.bits(),
            State::RunningP2p => MigrationFlags::P2P.bits(),
            State::PreCopy => MigrationFlags::PRE_COPY.bits(),
            State::PreCopyP2p => MigrationFlags::P2P.union(MigrationFlags::PRE_COPY).bits(),
        };
        MigrationFlags::from_bits_retain(bits)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Not the name of a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "not a migration state: expected one of STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P, ERROR"
)]
pub struct NotAState;

impl FromStr for State {
    type Err = NotAState;

    /// Accepts the standard's name in either case, `-` for `_` too.
    fn from_str(text: &str) -> Result<State, NotAState> {
        State::ALL.into_iter().find(|state| same_name(state.name(), text)).ok_or(NotAState)
    }
}

impl TryFrom<u32> for State {
    type Error = Errno;

    /// [`Errno::EINVAL`] for a number above `VFIO_DEVICE_STATE_PRE_COPY_P2P`.
    fn try_from(number: u32) -> Result<State, Errno> {
        State::from_raw(number).ok_or(Errno::EINVAL)
    }
}

bitflags::bitflags! {
    /// The abilities of a device's migration (`struct vfio_device_feature_migration`, field *flags*).
    ///
    /// Bits that this crate does not know are kept.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct MigrationFlags: u64 {
        /// STOP_COPY and RESUMING: mandatory for migration.
        const STOP_COPY = 1 << 0;
        /// RUNNING_P2P.
        const P2P = 1 << 1;
        /// PRE_COPY.
        const PRE_COPY = 1 << 2;
        const _ = !0;
    }
}

impl MigrationFlags {
    /// The four sets that a device may have, fewest first.
    pub const SETS: [MigrationFlags; 4] = [
        MigrationFlags::STOP_COPY,
        MigrationFlags::STOP_COPY.union(MigrationFlags::P2P),
        MigrationFlags::STOP_COPY.union(MigrationFlags::PRE_COPY),
        MigrationFlags::STOP_COPY.union(MigrationFlags::P2P).union(MigrationFlags::PRE_COPY),
    ];

    /// Whether a device with these flags has the state.
    pub const fn has(self, state: State) -> bool {
        self.contains(state.requires())
    }
}

impl fmt::Display for MigrationFlags {
    /// `STOP_COPY+P2P+PRE_COPY`, unknown bits as a hexadecimal number, `none` for no bit.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut plus = "";
        for (name, _) in self.iter_names() {
            write!(f, "{plus}{name}")?;
            plus = "+";
        }
        let unknown = self.bits() & !MigrationFlags::SETS[3].bits();
        match (unknown, self.bits()) {
            (_, 0) => f.write_str("none"),
            (0, _) => Ok(()),
            _ => write!(f, "{plus}{unknown:#x}"),
        }
    }
}

/// Not a set of migration flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "not migration flags: expected STOP_COPY, P2P and PRE_COPY joined by +, a hexadecimal number, or none"
)]
pub struct NotMigrationFlags;

impl FromStr for MigrationFlags {
    type Err = NotMigrationFlags;

    /// Accepts what is printed, in either case, `-` for `_` too.
    fn from_str(text: &str) -> Result<MigrationFlags, NotMigrationFlags> {
        if same_name("NONE", text) {
            return Ok(MigrationFlags::empty());
        }
        text.split('+').try_fold(MigrationFlags::empty(), |flags, part| {
            let known = MigrationFlags::SETS[3].iter_names().find(|(name, _)| same_name(name, part));
            let unknown = || u64::from_str_radix(part.strip_prefix("0x")?, 16).ok();
            let one = known.map(|(_, flag)| flag).or_else(|| unknown().map(MigrationFlags::from_bits_retain));
            one.map(|one| flags.union(one)).ok_or(NotMigrationFlags)
        })
    }
}

/// Whether the text is a name of the standard's, in either case, `-` for `_` too.
fn same_name(name: &str, text: &str) -> bool {
    let same = |(want, got): (u8, u8)| want == got.to_ascii_uppercase() || (want == b'_' && got == b'-');
    name.len() == text.len() && name.bytes().zip(text.bytes()).all(same)
}
