//! Frames over a link: [`FrameWriter`] numbers and sends them, [`FrameReader`] receives and checks them; both keep the time
//! limits. A [`Connection`] is the two together, for as long as one thread does both.

mod frame_reader;
mod frame_writer;

use std::sync::Arc;
use std::time::Duration;

pub(crate) use frame_reader::FrameReader;
pub(crate) use frame_writer::FrameWriter;
use limosa_clockwork::{Monitor, now};

use crate::link::{self, Link, LinkError, TlsError, Wait};
use crate::{Cancel, Error, Result, cancel};
use limosa_stream::{Damage, Header, Kind, MigrationId, PREFACE_BYTES, Preface, PrefaceFlags};

/// How often, at least, each side says that it is alive.
const PROGRESS_EVERY: Duration = Duration::from_millis(250);
/// How long a side that called off waits for the other to have read why.
pub(crate) const LINGER: Duration = Duration::from_secs(2);

/// How often a side says that it is alive, so that the other does not take it for silent.
pub(crate) fn pulse(silence_max: Duration) -> Duration {
    PROGRESS_EVERY.min(silence_max / 4)
}

const COMPRESSING: &str = "making room to compress in";

/// What is wrong with a link, as an error that says where.
fn link_failed(link: &dyn Link, error: LinkError, doing: &'static str, limit: Duration) -> Error {
    let peer = link.peer().into();
    match error {
        LinkError::Cancelled => Error::Cancelled,
        LinkError::TimedOut => Error::TimedOut { peer, doing, limit },
        error => Error::Link { peer, doing, error },
    }
}

/// Both directions of a link, in one hand.
pub(crate) struct Connection<'a> {
    link: &'a dyn Link,
    cancel: Option<&'a Cancel>,
    silence_max: Duration,
    /// Shared with the threads of the work.
    pub(crate) writer: Arc<FrameWriter<'a>>,
    pub(crate) reader: FrameReader<'a>,
}

impl<'a> Connection<'a> {
    /// Over this link. `silence_max` is how long the other side may say nothing.
    pub(crate) fn new(
        link: &'a dyn Link,
        cancel: Option<&'a Cancel>,
        silence_max: Duration,
    ) -> Connection<'a> {
        let (writer, reader) = (FrameWriter::new(link, silence_max), FrameReader::new(link, silence_max));
        Connection { link, cancel, silence_max, writer: Arc::new(writer), reader }
    }

    pub(crate) fn has_peer(&self) -> bool {
        self.link.has_peer()
    }

    /// From now on a cancel has no effect: the move is being undone, or past its commit.
    pub(crate) fn ignore_cancel(&mut self) {
        self.cancel = None;
    }

    /// [`Error::Cancelled`] when somebody called the move off.
    pub(crate) fn check_cancel(&self) -> Result<()> {
        cancel::check(self.cancel)
    }

    pub(crate) fn send_preface(&mut self, id: MigrationId, flags: PrefaceFlags) -> Result<()> {
        self.writer.send_preface(id, flags, self.cancel)
    }

    pub(crate) fn receive_preface(&mut self) -> Result<Preface> {
        let bytes = self.read_preface()?;
        Preface::decode(&bytes).map_err(|damage| self.damaged(damage))
    }

    /// The bytes where a preface is due, and no byte more.
    pub(crate) fn read_preface(&self) -> Result<[u8; PREFACE_BYTES]> {
        let doing = "waiting for the preface";
        let mut bytes = [0; PREFACE_BYTES];
        let wait = Wait::within(self.silence_max, self.cancel);
        let mut filled = 0;
        while filled < bytes.len() {
            filled += match self.link.read(&mut bytes[filled..], wait) {
                Err(LinkError::Closed) if !self.has_peer() => {
                    return Err(self.damaged(Damage::Truncated { what: "its preface" }));
                }
                read => read.map_err(|error| self.reader.failed(error, doing))?,
            };
            // Three bytes tell, and an alert is no longer than seven.
            if link::is_tls(&bytes[..filled]) {
                return Err(self.reader.failed(TlsError::TlsPeer.into(), doing));
            }
        }
        Ok(bytes)
    }

    /// Sends a frame.
    pub(crate) fn send(&mut self, kind: Kind, section: u32, position: u64, payload: &[u8]) -> Result<()> {
        match self.writer.send(kind, section, position, payload, self.cancel) {
            Err(error @ Error::Link { .. }) if self.has_peer() => Err(self.last_words().unwrap_or(error)),
            sent => sent,
        }
    }

    /// The next frame that is not PROGRESS; ABORT is [`Error::Aborted`]. The other side may be silent
    /// for [`Connection::new`]'s limit, and with PROGRESS keep this side waiting for `within`.
    pub(crate) fn receive(&mut self, doing: &'static str, within: Duration) -> Result<(Header, &[u8])> {
        let overall = Wait::within(within, self.cancel);
        loop {
            self.check_cancel()?;
            let mut wait = (Wait::within(self.silence_max, self.cancel), self.silence_max);
            if overall.deadline < wait.0.deadline {
                wait = (overall, within);
            }
            let Some(header) = self.reader.next(doing, wait.0)? else {
                return Err(self.reader.timed_out(doing, wait.1));
            };
            if header.kind != Kind::PROGRESS {
                return Ok((header, self.reader.payload(&header)));
            }
            // There may always be more of these at hand, so that nothing is ever waited for.
            if matches!(overall.left(), Err(LinkError::TimedOut)) {
                return Err(self.reader.timed_out(doing, within));
            }
        }
    }

    /// The frame of this kind, or else an error.
    pub(crate) fn expect(&mut self, kind: Kind, doing: &'static str, within: Duration) -> Result<&[u8]> {
        let (header, _) = self.receive(doing, within)?;
        if header.kind != kind {
            let why = format!("{kind} is due");
            return Err(self.damaged(Damage::Misplaced { kind: header.kind, why }));
        }
        Ok(self.reader.payload(&header))
    }

    /// Does what takes long, and meanwhile lets another thread tell the other side that this one is alive.
    pub(crate) fn attend<T>(&self, busy: impl FnOnce() -> T) -> T {
        if !self.has_peer() {
            return busy();
        }
        let done = Monitor::new(false);
        limosa_clockwork::scope(|scope| {
            scope.spawn("limosa: alive", || {
                let mut is_done = done.lock();
                while !*is_done {
                    let timed_out;
                    (is_done, timed_out) = done.wait(is_done, Some(now() + pulse(self.silence_max)));
                    if timed_out && !*is_done {
                        drop(is_done);
                        // A link that has failed shows when it is used next.
                        let _ = self.writer.pulse(self.cancel);
                        is_done = done.lock();
                    }
                }
            });
            let _told = OnDrop(|| {
                *done.lock() = true;
                done.notify_all();
            });
            busy()
        })
    }

    /// Tells the other side that the move is off and why, and gives it the time to read that.
    pub(crate) fn abort(&mut self, error: &Error) {
        self.ignore_cancel();
        if !self.has_peer() || error.peer_needs_no_word() {
            // Whoever waits for this side to have read its last words need not wait longer.
            self.link.finish();
            return;
        }
        let limit = self.silence_max.min(LINGER);
        let said = self.writer.abort(error, limit);
        if said {
            self.link.part(Wait::within(limit, None));
        }
    }

    /// What is wrong with what came, as an error that names the sender.
    pub(crate) fn damaged(&self, damage: Damage) -> Error {
        self.reader.damaged(damage)
    }

    /// What is wrong with this link, or with a further one.
    pub(crate) fn link_failed(&self, error: LinkError, doing: &'static str) -> Error {
        link_failed(self.link, error, doing, self.silence_max)
    }

    /// After a failed send: the ABORT that explains it, when there is one.
    fn last_words(&mut self) -> Option<Error> {
        let wait = Wait::within(LINGER, self.cancel);
        loop {
            match self.reader.next("sending", wait) {
                Err(error @ Error::Aborted { .. }) => return Some(error),
                Err(_) | Ok(None) => return None,
                Ok(_) if wait.left().is_err() => return None,
                Ok(_) => {}
            }
        }
    }
}

/// Does something at the end, also of a panic.
pub(crate) struct OnDrop<F: FnMut()>(pub(crate) F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}
