//! Sessions: the data of a device that saves or loads
//! (`vfio.h: the data fd of VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, VFIO_MIG_GET_PRECOPY_INFO`).
//!
//! The closures that transfer data access the model's memory, and no arc is taken before they return. So they must not
//! block: if a socket is not ready for all of the data, another call transfers the rest. A closure must not call the
//! machine.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{MutexGuard, PoisonError};

use limosa_protocol::feature::PrecopyInfo;
use limosa_protocol::{Errno, MigrationFlags, State};

use super::{Inner, Machine};
use crate::{Migration, Save};

/// Names a data session. Every session of a device has a different id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// Hands out ids.
#[derive(Default)]
pub(super) struct SessionIds(u64);

impl SessionIds {
    pub(super) fn open(&mut self) -> Open {
        self.0 += 1;
        Open { id: SessionId(self.0), damaged: false }
    }
}

/// The session that is open.
pub(super) struct Open {
    pub(super) id: SessionId,
    /// Some of its data was lost: it transfers no more data, and a load cannot be finished.
    pub(super) damaged: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Saving,
    Loading,
}

/// Bytes received at once for a model without staging memory; bounds the spare buffer.
const SPARE_BYTES: usize = 256 << 10;

impl Machine {
    /// The open session.
    pub fn session(&self) -> Option<SessionId> {
        self.lock().session.as_ref().map(|open| open.id)
    }

    /// Passes the next bytes of a saving session, at most `bytes_max`, to `take`. They count as read, whatever
    /// `take` returns.
    ///
    /// `take` must not block. It never gets empty data, nor the end before STOP_COPY, nor "nothing for now" in
    /// STOP_COPY. ENODEV if the session has ended, EBADF in RESUMING, EINVAL for a `bytes_max` of 0, EIO if the model
    /// breaks its contract, otherwise the model's errno.
    pub fn data_read<R>(
        &self,
        session: SessionId,
        bytes_max: usize,
        take: impl FnOnce(Save<'_>) -> R,
    ) -> Result<R, Errno> {
        let _data = self.one_at_a_time();
        let _passing = self.pass();
        let stopped = {
            let inner = self.lock();
            inner.usable(session, Direction::Saving)?;
            inner.state == State::StopCopy
        };
        if bytes_max == 0 {
            return Err(Errno::EINVAL);
        }
        let (mut take, mut bytes) = (Some(take), 0);
        // A panic of the caller's closure is not the model's.
        let mut taken = Err("lent nothing");
        self.migrate(|migration| {
            migration.save(bytes_max, stopped, &mut |save| {
                let wrong = match &save {
                    Save::Data([]) => "lent no bytes",
                    Save::Data(data) if data.len() > bytes_max => "lent more bytes than were asked for",
                    Save::NothingForNow if stopped => "had nothing for now in STOP_COPY",
                    Save::End if !stopped => "ended its data before STOP_COPY",
                    _ => match take.take() {
                        Some(take) => {
                            if let Save::Data(data) = &save {
                                bytes = data.len();
                            }
                            return taken = Ok(catch_unwind(AssertUnwindSafe(|| take(save))));
                        }
                        None => "lent twice at once",
                    },
                };
                taken = Err(wrong);
            })
        })?;
        let taken = taken.map_err(|wrong| self.lock().damage(wrong))?;
        self.counters.saved_bytes.fetch_add(bytes as u64, Relaxed);
        Ok(taken.unwrap_or_else(|panic| resume_unwind(panic)))
    }

    /// Loads the next bytes of a RESUMING session.
    ///
    /// ENODEV if the session has ended, EBADF in the saving states; otherwise the model's errno, after which the
    /// session is damaged: it answers EIO, and only a reset leaves RESUMING.
    pub fn data_write(&self, session: SessionId, chunk: &[u8]) -> Result<(), Errno> {
        let _data = self.one_at_a_time();
        let _passing = self.pass();
        self.lock().usable(session, Direction::Loading)?;
        if chunk.is_empty() {
            return Ok(());
        }
        self.load(|migration| migration.load(chunk))?;
        self.counters.loaded_bytes.fetch_add(chunk.len() as u64, Relaxed);
        Ok(())
    }

    /// Receives the next bytes of a RESUMING session, at most `bytes_max`, directly into the model's staging memory, or
    /// through `spare` if it has none. `fill` is called at most once and returns the number of bytes received, which
    /// may be 0. If it fails, the session is damaged, since the amount of lost data is unknown, and its error is
    /// returned. `spare` grows to at most 256 KiB, and may be kept between calls.
    ///
    /// The inner result is the number of bytes loaded, or the error of [`Machine::data_write`].
    pub fn data_fill<E>(
        &self,
        session: SessionId,
        bytes_max: usize,
        spare: &mut Vec<u8>,
        fill: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Result<Result<usize, Errno>, E> {
        let _data = self.one_at_a_time();
        let _passing = self.pass();
        if let Err(errno) = self.lock().usable(session, Direction::Loading) {
            return Ok(Err(errno));
        }
        let (mut fill, mut filled) = (Some(fill), Ok(0));
        let mut receive = |into: &mut [u8]| {
            let Some(fill) = fill.take() else { return 0 };
            let room = into.len();
            filled = fill(into).map(|bytes| bytes.min(room));
            *filled.as_ref().unwrap_or(&0)
        };
        let lent = self.load(|migration| migration.load_into(bytes_max, &mut receive).transpose());
        let loaded = match lent {
            Ok(None) => {
                let piece = spare_piece(spare, bytes_max);
                let bytes = receive(piece);
                let load = |chunk| self.load(|migration| migration.load(chunk));
                if bytes == 0 { Ok(()) } else { load(&piece[..bytes]) }
            }
            other => other.map(|_| ()),
        };
        match filled {
            Ok(bytes) => Ok(loaded.map(|()| {
                self.counters.loaded_bytes.fetch_add(bytes as u64, Relaxed);
                bytes
            })),
            Err(error) => {
                self.lock().damage("was cut off from its data");
                Err(error)
            }
        }
    }

    /// The session has lost some of its data: it transfers no more, and a load cannot be completed. Does nothing if
    /// the session has ended.
    pub fn data_lost(&self, session: SessionId) {
        let mut inner = self.lock();
        if inner.current(session).is_ok() {
            inner.damage("was cut off from its data");
        }
    }

    /// Estimates of the remaining data in pre-copy.
    ///
    /// ENODEV if the session has ended, ENOTTY for a device without PRE_COPY, EINVAL outside PRE_COPY and PRE_COPY_P2P.
    /// The flags are 0 unless the client opted in to them (MIG_PRECOPY_INFO_V2).
    pub fn precopy_info(&self, session: SessionId) -> Result<PrecopyInfo, Errno> {
        let _passing = self.pass();
        let reinit = {
            let inner = self.lock();
            inner.current(session)?;
            if !self.flags.is_some_and(|flags| flags.contains(MigrationFlags::PRE_COPY)) {
                return Err(Errno::ENOTTY);
            }
            if !inner.state.is_pre_copy() {
                return Err(Errno::EINVAL);
            }
            inner.precopy_reinit
        };
        let info = self.migrate(|migration| Ok(migration.precopy_info(reinit)))?;
        let flags = if reinit { info.flags } else { 0 };
        Ok(PrecopyInfo { argsz: size_of::<PrecopyInfo>() as u32, flags, ..info })
    }

    fn one_at_a_time(&self) -> MutexGuard<'_, ()> {
        self.data.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A call that loads: any failure damages the session.
    fn load<R>(&self, call: impl FnOnce(&dyn Migration) -> Result<R, Errno>) -> Result<R, Errno> {
        let loaded = self.migrate(call);
        if loaded.is_err() {
            self.lock().damage("refused its data");
        }
        loaded
    }
}

impl Inner {
    /// ENODEV unless this session is open.
    fn current(&self, session: SessionId) -> Result<&Open, Errno> {
        self.session.as_ref().filter(|open| open.id == session).ok_or(Errno::ENODEV)
    }

    /// ENODEV unless this session is open, EBADF unless it has that direction, EIO if it is damaged.
    fn usable(&self, session: SessionId, direction: Direction) -> Result<(), Errno> {
        let open = self.current(session)?;
        let flows = if self.state == State::Resuming { Direction::Loading } else { Direction::Saving };
        match (flows == direction, open.damaged) {
            (false, _) => Err(Errno::EBADF),
            (true, true) => Err(Errno::EIO),
            (true, false) => Ok(()),
        }
    }

    /// The session lost some of its data.
    pub(super) fn damage(&mut self, why: &'static str) -> Errno {
        if let Some(open) = &mut self.session {
            tracing::error!(state = %self.state, "the data session is damaged: the model {why}");
            open.damaged = true;
        }
        Errno::EIO
    }
}

/// A part of the spare buffer for at most this many bytes.
fn spare_piece(spare: &mut Vec<u8>, bytes_max: usize) -> &mut [u8] {
    let bytes = bytes_max.min(SPARE_BYTES);
    if spare.len() < bytes {
        spare.resize(bytes, 0);
    }
    &mut spare[..bytes]
}
