//! The data stream of a faulty device.

use super::*;

/// A data stream with the device's fault.
pub struct FaultyStream {
    pub(super) shared: Arc<Faulty>,
    /// `None` for one of no session.
    pub(super) stream: Option<Box<dyn DataStream>>,
    pub(super) loads: bool,
    pub(super) began_in: State,
    /// Which session, by the count of those opened.
    pub(super) generation: u64,
    pub(super) read: u64,
    /// How often the end was told.
    pub(super) ended: u64,
}

impl FaultyStream {
    pub(super) fn nothing(shared: &Arc<Faulty>) -> FaultyStream {
        let began_in = State::Running;
        FaultyStream {
            shared: Arc::clone(shared),
            stream: None,
            loads: false,
            began_in,
            generation: 0,
            read: 0,
            ended: 0,
        }
    }

    pub(super) fn is_stale(&self) -> bool {
        self.shared.now() != State::Resuming && self.loads
            || !self.loads && !self.shared.now().is_saving()
            || self.generation != self.shared.count.load(Ordering::SeqCst)
    }
}

impl DataStream for FaultyStream {
    fn read(&mut self, data: &mut [u8]) -> Result<Chunk> {
        let shared = Arc::clone(&self.shared);
        let Some(stream) = self.stream.as_mut() else { return shared.refuse(Errno::ENODEV) };
        let now = shared.now();
        let stopped = now == State::StopCopy;
        if now == State::Error {
            return match shared.fault {
                Fault::ErrorKeepsSession => Ok(Chunk::End),
                _ => shared.refuse(Errno::ENODEV),
            };
        }
        match shared.fault {
            Fault::InfoTakesData if stopped && self.read == 99 => return Ok(Chunk::End),
            Fault::EndlessData if stopped => {
                data.fill(7);
                return Ok(Chunk::Data(data.len()));
            }
            Fault::NothingInStopCopy if stopped => return Ok(Chunk::NothingForNow),
            Fault::NoDataAtAll if stopped => return Ok(Chunk::End),
            Fault::NoDataAfterPrecopy if stopped && self.began_in == State::PreCopy => return Ok(Chunk::End),
            Fault::NoDataIn(state) if stopped && self.began_in == state => return Ok(Chunk::End),
            Fault::ResetLosesData if stopped && shared.memory.load(Ordering::SeqCst) == 7 => {
                return Ok(Chunk::End);
            }
            Fault::SecondSessionEmpty if stopped && self.generation.is_multiple_of(2) => {
                return Ok(Chunk::End);
            }
            Fault::EndsInPrecopy if now.is_pre_copy() => return Ok(Chunk::End),
            Fault::EndsInPrecopyLate if now.is_pre_copy() => {
                let chunk = stream.read(data)?;
                return Ok(if chunk == Chunk::NothingForNow { Chunk::End } else { chunk });
            }
            Fault::PrecopyDiesInStopCopy if stopped && self.began_in.is_pre_copy() => {
                return shared.refuse(Errno::ENODEV);
            }
            Fault::PrecopyDataIsLost if stopped && self.began_in.is_pre_copy() && self.read == 0 => {
                self.read += 1;
                let mut lost = vec![0; 5000];
                stream.read(&mut lost)?;
            }
            Fault::PrecopyAgainInStopCopy if stopped && self.began_in.is_pre_copy() && self.ended == 0 => {
                self.ended = 1;
                data[0] = 1;
                return Ok(Chunk::Data(1));
            }
            Fault::ReadsWhileLoading if self.loads && now == State::Resuming => return Ok(Chunk::End),
            // The state is looked at last: a reset may come between that and the read.
            Fault::StaleReads => {
                return match stream.read(data) {
                    Err(Error::Refused { errno: Errno::ENODEV, .. })
                        if stream_is_stale(&shared, self.loads) =>
                    {
                        Ok(Chunk::End)
                    }
                    other => other,
                };
            }
            Fault::SessionOutlivesReset
                if now == State::Running && shared.memory.load(Ordering::SeqCst) == 1 =>
            {
                return Ok(Chunk::End);
            }
            Fault::StaleErrno => {
                return match stream.read(data) {
                    Err(Error::Refused { errno: Errno::ENODEV, .. }) => shared.refuse(Errno::EIO),
                    other => other,
                };
            }
            Fault::ReadsFromOneThread if is_second_thread() => {
                return if stopped { Ok(Chunk::End) } else { Ok(Chunk::NothingForNow) };
            }
            Fault::RefusedSetEndsSession if shared.memory.load(Ordering::SeqCst) == 1 => {
                return shared.refuse(Errno::ENODEV);
            }
            Fault::SmallReadsLose if data.len() < 16 => {
                let mut more = vec![0; data.len() + 1];
                let chunk = stream.read(&mut more)?;
                return Ok(match chunk {
                    Chunk::Data(bytes) => {
                        let kept = bytes.min(data.len());
                        data[..kept].copy_from_slice(&more[..kept]);
                        Chunk::Data(kept)
                    }
                    other => other,
                });
            }
            Fault::ReadsLose(piece) if data.len() == piece && self.read == 0 => {
                self.read = 1;
                let mut lost = vec![0; 100];
                stream.read(&mut lost)?;
            }
            Fault::GoesOnFromBefore if stopped && self.read == 0 => {
                self.read = 1;
                let skip = shared.memory.load(Ordering::SeqCst);
                if skip > 0 {
                    stream.read(&mut vec![0; skip as usize])?;
                }
            }
            _ => {}
        }
        let chunk = stream.read(data)?;
        match chunk {
            Chunk::Data(bytes) if shared.is(Fault::GoesOnFromBefore) && stopped && data.len() == 16 => {
                shared.memory.store(bytes as u64, Ordering::SeqCst);
            }
            Chunk::End => {
                if shared.is(Fault::MustBeRead) {
                    shared.memory.store(1, Ordering::SeqCst);
                }
                self.ended += 1;
                if shared.is(Fault::GoesOnFromBefore) {
                    shared.memory.store(0, Ordering::SeqCst);
                }
                if shared.is(Fault::EndIsNotTheEnd) && self.ended.is_multiple_of(2) {
                    data[0] = 1;
                    return Ok(Chunk::Data(1));
                }
                if shared.is(Fault::StateGrows) && stopped && self.ended == 1 {
                    // A byte more in every second session.
                    if self.generation.is_multiple_of(2) {
                        data[0] = 1;
                        return Ok(Chunk::Data(1));
                    }
                }
                if shared.is(Fault::StopsAtTheEnd) {
                    shared.inner.set_state(State::Stop)?;
                }
            }
            _ => {}
        }
        Ok(chunk)
    }

    fn write(&mut self, data: &[u8]) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let stale = stream_is_stale(&shared, self.loads);
        let Some(stream) = self.stream.as_mut() else { return shared.refuse(Errno::ENODEV) };
        if shared.now() == State::Error {
            return if shared.is(Fault::ErrorKeepsSession) { Ok(()) } else { shared.refuse(Errno::ENODEV) };
        }
        match shared.fault {
            Fault::WritesWhileSaving if !self.loads => return Ok(()),
            Fault::StaleWrites if stale => return Ok(()),
            Fault::NoPiecesBelow(least) if data.len() < least => return shared.refuse(Errno::EINVAL),
            Fault::NoPiecesAbove(most) if data.len() > most => return shared.refuse(Errno::E2BIG),
            Fault::ResetForbidsLoads if shared.memory.load(Ordering::SeqCst) == 7 && self.loads && !stale => {
                return shared.refuse(Errno::EIO);
            }
            Fault::TakesAnything => {
                let _ = stream.write(data);
                return Ok(());
            }
            Fault::TakesIncomplete => {
                let done = stream.write(data);
                if done.is_err() {
                    shared.memory.store(1, Ordering::SeqCst);
                }
                return done;
            }
            Fault::RefusesItsOwn if self.loads && data.len() > 64 => return shared.refuse(Errno::EINVAL),
            Fault::RefusesTheFirstByte if self.loads && data.len() < 64 => {
                return shared.refuse(Errno::EINVAL);
            }
            _ => {}
        }
        stream.write(data)
    }

    fn precopy_info(&mut self) -> Result<PrecopyInfo> {
        let shared = Arc::clone(&self.shared);
        let Some(stream) = self.stream.as_mut() else { return shared.refuse(Errno::ENODEV) };
        let now = shared.now();
        let answer = stream.precopy_info();
        match shared.fault {
            Fault::InfoNotIn(state) if now == state => shared.refuse(Errno::EINVAL),
            Fault::InfoEverywhere if answer.is_err() => Ok(PrecopyInfo::default()),
            Fault::InfoGrows => Ok(PrecopyInfo { initial_bytes: (1 << 20) + shared.tick(), ..answer? }),
            Fault::InfoIsStuck => Ok(PrecopyInfo { initial_bytes: 1 << 20, ..answer? }),
            Fault::StaleInfo if !now.has_session() => Ok(PrecopyInfo::default()),
            Fault::InfoHasFlags => Ok(PrecopyInfo { flags: 1, ..answer? }),
            Fault::InfoTakesData => {
                let info = answer?;
                while let Chunk::Data(_) = stream.read(&mut [0; 4096])? {}
                self.read = 99;
                Ok(info)
            }
            _ => answer,
        }
    }

    fn transfer_bytes_max(&self) -> usize {
        self.stream.as_ref().map_or(1, |stream| stream.transfer_bytes_max())
    }
}

fn stream_is_stale(shared: &Faulty, loads: bool) -> bool {
    if loads { shared.now() != State::Resuming } else { !shared.now().is_saving() }
}

impl Drop for FaultyStream {
    fn drop(&mut self) {
        if self.shared.is(Fault::DropStops) && self.shared.now() == State::StopCopy && !self.is_stale() {
            let _ = self.shared.inner.set_state(State::Stop);
        }
    }
}
