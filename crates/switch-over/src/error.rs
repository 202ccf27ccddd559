//! The errors of a switch-over, by step.

use std::fmt;
use std::io;

use limosa_host::User;

use crate::body::Refusal;
use crate::frame::Malformed;
use crate::item::TooLarge;

/// A step of a switch-over. Each side reports it once it is done with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Step {
    /// Both know each other. The old server has a channel to a process that the kernel lets attach to it.
    Hello,
    /// The new server has checked the offer.
    Offer,
    /// The new server has everything that can be transferred while devices run.
    Prepare,
    /// Old server: from here on nothing changes that the VMM or the guest can see.
    Freeze,
    /// Old server: the rest is collected, and the new one may take over from now on. New server: it has the rest.
    Rest,
    /// Old server: all has been sent. New server: all is loaded.
    Load,
    /// The new server serves.
    Running,
}

impl Step {
    /// All steps in order.
    pub const ALL: [Step; 7] =
        [Step::Hello, Step::Offer, Step::Prepare, Step::Freeze, Step::Rest, Step::Load, Step::Running];

    /// The step's name.
    pub fn name(self) -> &'static str {
        match self {
            Step::Hello => "hello",
            Step::Offer => "offer",
            Step::Prepare => "prepare",
            Step::Freeze => "freeze",
            Step::Rest => "rest",
            Step::Load => "load",
            Step::Running => "running",
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A switch-over that did not take place: the old server serves, if its process lives.
#[derive(Debug, thiserror::Error)]
#[error("the switch-over failed at step {step}: {cause}")]
pub struct Error {
    /// The step that was not done.
    pub step: Step,
    /// Why.
    pub cause: Cause,
}

/// Why a switch-over failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Cause {
    /// The socket, the memfd or the process of the other side.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The other server closed the channel, or its process ended.
    #[error("the other server closed the channel or ended")]
    Ended,
    /// The step's limit has passed.
    #[error("the other server took longer than the step's limit")]
    Late,
    /// The old server has not sent HELLO within the limit.
    #[error(
        "the old server does not answer: it is in another switch-over or hangs, or this is no --takeover socket"
    )]
    Unanswered,
    /// What listens there closed the connection without a word.
    #[error(
        "it ended the connection without a word: it is no server's --takeover socket, or its server runs as another user or \
         was replaced just now"
    )]
    NoDoor,
    /// The other server has refused.
    #[error("the other server refused: {0}")]
    RefusedByOther(Refusal),
    /// This server has refused.
    #[error("{0}")]
    Refused(Refusal),
    /// The other server's frames are not as `docs/switch-over.md` has them.
    #[error("{0}")]
    Malformed(#[from] Malformed),
    /// There is too much data to hand over.
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
    /// The process at the other end runs as a user that is not trusted with this.
    #[error("the other server was started by {0}; expected the user of this one, or root")]
    Untrusted(User),
    /// The listening process is not the process at the other end of the channel.
    #[error("the channel is not that of the process that listens; start the new server again")]
    OtherProcess,
    /// The commit word is not the old server's: it serves.
    #[error("the old server took back: it serves")]
    Withdrawn,
    /// The caller's stop ended the wait for a new server.
    #[error("stopped")]
    Stopped,
}
