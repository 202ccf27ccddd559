//! Sessions: the data that flows while a device saves or loads (`vfio.h: the data fd of
//! VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, VFIO_MIG_GET_PRECOPY_INFO`).
//!
//! The closures that carry data run with the machine's lock held, because the memory they see is
//! the model's own and is lent, not copied. They may wait for a peer; whoever passes them bounds
//! that wait (the transports' sockets have a time limit), and other calls on the same device wait
//! as long. A closure must not call the machine.

use limosa_protocol::feature::PrecopyInfo;
use limosa_protocol::{Errno, MigrationFlags, State};

use super::{Inner, Machine, caught};
use crate::{Migration, Save};

/// Names a data session. Every session of a device has another id.
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
    /// Some of its data was lost: it carries no more, and a load cannot be finished.
    pub(super) damaged: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Saving,
    Loading,
}

/// Received at once for a model that lends no memory; bounds the spare buffer.
const SPARE_BYTES: usize = 256 << 10;

impl Machine {
    /// The open session.
    pub fn session(&self) -> Option<SessionId> {
        self.lock().session.as_ref().map(|open| open.id)
    }

    /// Lends the next bytes of a saving session, at most `bytes_max`, to `take`. They count as
    /// read, whatever `take` returns.
    ///
    /// `take` never sees empty data, nor the end before STOP_COPY, nor "nothing for now" in it.
    /// ENODEV when the session has ended, EBADF in RESUMING, EINVAL for a `bytes_max` of 0, EIO
    /// when the model breaks its contract, else the model's errno.
    pub fn data_read<R>(
        &self,
        session: SessionId,
        bytes_max: usize,
        take: impl FnOnce(Save<'_>) -> R,
    ) -> Result<R, Errno> {
        let mut inner = self.lock();
        let inner = &mut *inner;
        inner.usable(session, Direction::Saving)?;
        if bytes_max == 0 {
            return Err(Errno::EINVAL);
        }
        let stopped = inner.state == State::StopCopy;
        let migration = inner.migration()?;
        let wrong = match caught(|| migration.save(bytes_max, stopped)) {
            None => return Err(inner.model_panicked()),
            Some(Err(errno)) => return Err(errno),
            Some(Ok(Save::Data([]))) => "lent no bytes",
            Some(Ok(Save::Data(data))) if data.len() > bytes_max => "lent more bytes than were asked for",
            Some(Ok(Save::NothingForNow)) if stopped => "had nothing for now in STOP_COPY",
            Some(Ok(Save::End)) if !stopped => "ended its data before STOP_COPY",
            Some(Ok(save)) => return Ok(take(save)),
        };
        Err(inner.damage(wrong))
    }

    /// Takes the next bytes of a RESUMING session.
    ///
    /// ENODEV when the session has ended, EBADF in the saving states; else the model's errno, after
    /// which the session is damaged: it answers EIO, and only a reset leads out of RESUMING.
    pub fn data_write(&self, session: SessionId, chunk: &[u8]) -> Result<(), Errno> {
        let mut inner = self.lock();
        inner.usable(session, Direction::Loading)?;
        if chunk.is_empty() {
            return Ok(());
        }
        inner.load(|migration| migration.load(chunk))
    }

    /// Receives the next `bytes` bytes of a RESUMING session straight into the model's staging
    /// memory, or by way of `spare` when it lends none.
    ///
    /// Whatever becomes of them, `fill` is called with slices that add up to exactly `bytes`, so
    /// that a caller who receives from a socket stays in step with its peer: bytes that the
    /// session refuses are received into `spare` and dropped. Only when `fill` itself fails is it
    /// not called again; then its error is returned, and the session is damaged if it had been
    /// taking the bytes. `spare` grows to at most 256 KiB, and may be kept between calls.
    ///
    /// The inner result is that of [`Machine::data_write`].
    pub fn data_fill<E>(
        &self,
        session: SessionId,
        bytes: usize,
        spare: &mut Vec<u8>,
        mut fill: impl FnMut(&mut [u8]) -> Result<(), E>,
    ) -> Result<Result<(), Errno>, E> {
        let mut left = bytes;
        let refused = {
            let mut inner = self.lock();
            match inner.usable(session, Direction::Loading) {
                Ok(()) => inner.fill(&mut left, spare, &mut fill)?,
                Err(errno) => Err(errno),
            }
        };
        // Nothing of the model's is involved any more: the lock is free while these are drained.
        while left > 0 {
            let piece = spare_piece(spare, left);
            fill(piece)?;
            left -= piece.len();
        }
        Ok(refused)
    }

    /// Estimates of what is left in pre-copy.
    ///
    /// ENODEV when the session has ended, ENOTTY for a device without PRE_COPY, EINVAL outside
    /// PRE_COPY and PRE_COPY_P2P. The flags are 0 unless the client opted in to them
    /// (MIG_PRECOPY_INFO_V2).
    pub fn precopy_info(&self, session: SessionId) -> Result<PrecopyInfo, Errno> {
        self.with(|inner| {
            inner.current(session)?;
            if !self.flags.is_some_and(|flags| flags.contains(MigrationFlags::PRE_COPY)) {
                return Err(Errno::ENOTTY);
            }
            if !inner.state.is_pre_copy() {
                return Err(Errno::EINVAL);
            }
            let reinit = inner.precopy_reinit;
            let info = inner.migration()?.precopy_info(reinit);
            let flags = if reinit { info.flags } else { 0 };
            Ok(PrecopyInfo { argsz: size_of::<PrecopyInfo>() as u32, flags, ..info })
        })
    }
}

impl Inner {
    /// ENODEV unless this session is open.
    fn current(&self, session: SessionId) -> Result<&Open, Errno> {
        self.session.as_ref().filter(|open| open.id == session).ok_or(Errno::ENODEV)
    }

    /// ENODEV unless this session is open, EBADF unless it flows that way, EIO when damaged.
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
    fn damage(&mut self, why: &'static str) -> Errno {
        tracing::error!(state = %self.state, "the data session is damaged: the model {why}");
        if let Some(open) = &mut self.session {
            open.damaged = true;
        }
        Errno::EIO
    }

    /// A call that loads: whatever it fails with, the session is damaged.
    fn load(&mut self, call: impl FnOnce(&mut dyn Migration) -> Result<(), Errno>) -> Result<(), Errno> {
        let migration = self.migration()?;
        match caught(|| call(migration)) {
            None => Err(self.model_panicked()),
            Some(Ok(())) => Ok(()),
            Some(Err(errno)) => {
                self.damage("refused its data");
                Err(errno)
            }
        }
    }

    /// Receives and loads until all of `left` is done or the model refuses.
    fn fill<E>(
        &mut self,
        left: &mut usize,
        spare: &mut Vec<u8>,
        fill: &mut impl FnMut(&mut [u8]) -> Result<(), E>,
    ) -> Result<Result<(), Errno>, E> {
        while *left > 0 {
            let migration = match self.migration() {
                Ok(migration) => migration,
                Err(errno) => return Ok(Err(errno)),
            };
            let bytes_max = *left;
            let (filled, bytes) = match caught(|| migration.load_space(bytes_max)) {
                None => return Ok(Err(self.model_panicked())),
                Some(Some(space)) if !space.is_empty() => {
                    let bytes = space.len().min(bytes_max);
                    (fill(&mut space[..bytes]), bytes)
                }
                Some(_) => {
                    let piece = spare_piece(spare, bytes_max);
                    let filled = fill(piece);
                    let loaded = match filled {
                        Ok(()) => self.load(|migration| migration.load(piece)),
                        Err(error) => {
                            self.damage("was cut off from its data");
                            return Err(error);
                        }
                    };
                    *left -= piece.len();
                    match loaded {
                        Ok(()) => continue,
                        Err(errno) => return Ok(Err(errno)),
                    }
                }
            };
            if let Err(error) = filled {
                self.damage("was cut off from its data");
                return Err(error);
            }
            *left -= bytes;
            if let Err(errno) = self.load(|migration| migration.load_filled(bytes)) {
                return Ok(Err(errno));
            }
        }
        Ok(Ok(()))
    }
}

/// A part of the spare buffer for at most that many bytes.
fn spare_piece(spare: &mut Vec<u8>, bytes_max: usize) -> &mut [u8] {
    let bytes = bytes_max.min(SPARE_BYTES);
    if spare.len() < bytes {
        spare.resize(bytes, 0);
    }
    &mut spare[..bytes]
}
