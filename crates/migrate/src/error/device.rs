//! What went wrong with a device: it broke the standard (`vfio.h: enum vfio_device_mig_state`), or another client did
//! to it.

use limosa_protocol::State;

/// Behaviour of a device that the standard does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Misbehaviour {
    /// It opened a session without a data stream.
    #[error("it entered {0} without opening a data stream")]
    NoDataStream(State),
    /// A read returned no data, or more than the buffer can hold.
    #[error("a read of up to {room} bytes returned {bytes} bytes")]
    WrongLength {
        /// The size of the buffer in bytes.
        room: usize,
        /// The length that the device returned, in bytes.
        bytes: usize,
    },
    /// Its data never ends, or is more than it may have ([`Options::state_max`](crate::Options::state_max)).
    #[error(
        "its data exceeds {0} bytes, the limit; if it really has that much state, raise the limit (--state-max)"
    )]
    Endless(u64),
    /// It said "nothing for now" in STOP_COPY, where a device has data or is at the end.
    #[error("in STOP_COPY it said \"nothing for now\" instead of data or the end")]
    NothingInStopCopy,
}

/// How the engine noticed that a device was reset or driven by another client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Changed {
    /// It is not in the state that the engine had set.
    #[error("it is in {found}, and the engine had set it to {expected}")]
    State {
        /// The state that the engine had set.
        expected: State,
        /// The state in which it is.
        found: State,
    },
    /// A second saving session opened while the first was open.
    #[error("entering {0} opened a second session while the first was open")]
    SecondSession(State),
    /// It counts more resets than before.
    #[error("it has been reset {0} times since its session opened")]
    Reset(u64),
}
