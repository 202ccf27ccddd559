//! [`Trial`]: the input of a check's body: the device, the facts about it, and the limit of every wait.

use std::sync::Arc;
use std::time::Instant;

use limosa_client::{Chunk, DataStream, Device, DeviceExt, Error, Result};
use limosa_protocol::{Errno, MigrationFlags, State};

use crate::check::{Stop, Verdict, ensure, fail, skip};
use crate::recorder::{Record, Recorded};
use crate::run::Limits;
use crate::survey::Facts;
use crate::target::{Open, Target};

pub(crate) type Stream = Box<dyn DataStream>;

/// The input of a check's body.
pub(crate) struct Trial {
    pub device: Option<Arc<Recorded>>,
    pub facts: Arc<Facts>,
    pub target: Arc<Target>,
    pub record: Arc<Record>,
    pub limits: Limits,
    pub until: Instant,
}

impl Trial {
    /// The device.
    pub fn device(&self) -> Result<&Recorded, Stop> {
        self.device.as_deref().ok_or_else(|| Stop::Skip("the device is not open".into()))
    }

    /// A further device, recorded with this prefix.
    pub fn open(&self, open: &Open, prefix: &'static str) -> Result<Recorded, Stop> {
        Ok(Recorded { device: open()?, record: Arc::clone(&self.record), prefix })
    }

    pub fn flags(&self) -> MigrationFlags {
        self.facts.flags
    }

    /// Whether the limit of this check has passed.
    pub fn in_time(&self, doing: &str) -> Verdict {
        ensure(Instant::now() < self.until, || format!("{doing} did not end within {:?}", self.limits.check))
    }

    pub fn state(&self) -> Result<State, Stop> {
        Ok(self.device()?.state()?)
    }

    /// Checks that GET returns this state.
    pub fn is(&self, state: State) -> Verdict {
        let found = self.state()?;
        ensure(found == state, || format!("GET MIG_DEVICE_STATE says {found}, expected {state}"))
    }

    /// Drives the device to a state, and checks that it is there.
    pub fn go(&self, to: State) -> Result<Option<Stream>, Stop> {
        let stream = self.device()?.set_state(to)?;
        self.is(to)?;
        Ok(stream)
    }

    /// The same, over several states; the last stream that was handed out.
    pub fn walk(&self, states: &[State]) -> Result<Option<Stream>, Stop> {
        let mut last = None;
        for state in states {
            last = self.go(*state)?.or(last);
        }
        Ok(last)
    }

    /// From RUNNING into a session: the session's stream.
    pub fn session(&self, in_state: State) -> Result<Stream, Stop> {
        match self.go(in_state)? {
            Some(stream) => Ok(stream),
            None => fail(format!("SET {in_state} opened a session and handed out no data stream")),
        }
    }

    /// The sample that the survey took.
    pub fn sample(&self) -> Result<Arc<Vec<u8>>, Stop> {
        match &self.facts.sample {
            Some(sample) => Ok(Arc::clone(sample)),
            None => skip("there is no state of its own to load"),
        }
    }

    /// Reads a session in STOP_COPY to its end.
    pub fn read_to_end(&self, stream: &mut Stream, piece: usize) -> Result<Vec<u8>, Stop> {
        read_to_end(stream, piece, self.limits.state_bytes_max, self.until)
    }

    /// Reads what there is in a pre-copy state, until nothing is there for now or `bytes_max` bytes came.
    /// Also returns whether nothing is left.
    pub fn read_precopy(&self, stream: &mut Stream, bytes_max: u64) -> Result<(Vec<u8>, bool), Stop> {
        let mut all = Vec::new();
        let mut buffer = vec![0; 64 << 10];
        while (all.len() as u64) < bytes_max {
            self.in_time("reading in pre-copy")?;
            match stream.read(&mut buffer)? {
                Chunk::Data(bytes) => all.extend_from_slice(&buffer[..bytes]),
                Chunk::NothingForNow => return Ok((all, true)),
                Chunk::End => return fail("the data stream ended in a pre-copy state, expected ENOMSG"),
            }
        }
        Ok((all, false))
    }

    /// Writes data in pieces.
    pub fn write(&self, stream: &mut Stream, data: &[u8], piece: usize) -> Verdict {
        let mut from = 0;
        for chunk in data.chunks(piece.max(1)) {
            self.in_time("writing the state")?;
            let to = from + chunk.len();
            let what = || format!("writing bytes {from:#x} to {to:#x} of the {:#x} of a state", data.len());
            stream.write(chunk).map_err(|error| Stop::from(error).of(what))?;
            from = to;
        }
        Ok(())
    }

    /// Loads a state: STOP over RESUMING to STOP.
    pub fn load(&self, data: &[u8], piece: usize) -> Verdict {
        let mut stream = self.session(State::Resuming)?;
        self.write(&mut stream, data, piece)?;
        self.go(State::Stop)?;
        Ok(())
    }

    /// Saves the state in STOP_COPY, and stops.
    pub fn save(&self) -> Result<Vec<u8>, Stop> {
        let mut stream = self.session(State::StopCopy)?;
        let data = self.read_to_end(&mut stream, 64 << 10)?;
        self.go(State::Stop)?;
        Ok(data)
    }

    /// Resets, and checks that the device runs.
    pub fn reset(&self) -> Verdict {
        self.device()?.reset()?;
        self.is(State::Running)
    }
}

/// Reads a session in STOP_COPY to its end, within bounds.
pub(crate) fn read_to_end(
    stream: &mut Stream,
    piece: usize,
    bytes_max: u64,
    until: Instant,
) -> Result<Vec<u8>, Stop> {
    let mut all = Vec::new();
    let mut buffer = vec![0; piece];
    loop {
        if Instant::now() >= until {
            return fail(format!("the data did not end in time: {} bytes so far", all.len()));
        }
        if all.len() as u64 > bytes_max {
            return fail(format!("the data has no end: more than {bytes_max} bytes"));
        }
        let what = || format!("reading the state from byte {:#x} on", all.len());
        match stream.read(&mut buffer).map_err(|error| Stop::from(error).of(what))? {
            Chunk::Data(0) => return fail("a read brought data of no bytes"),
            Chunk::Data(bytes) if bytes > buffer.len() => {
                return fail(format!("a read of {piece} bytes brought {bytes}"));
            }
            Chunk::Data(bytes) => all.extend_from_slice(&buffer[..bytes]),
            Chunk::NothingForNow => return fail("nothing for now (ENOMSG) in STOP_COPY"),
            Chunk::End => return Ok(all),
        }
    }
}

/// Checks that the request is refused with one of these.
pub(crate) fn refused<T>(answer: Result<T>, what: &str, with: &[Errno]) -> Verdict {
    let expected = || with.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ");
    match answer {
        Ok(_) => fail(format!("{what} succeeded, expected {}", expected())),
        Err(Error::Refused { errno, .. }) if with.is_empty() || with.contains(&errno) => Ok(()),
        Err(Error::Refused { errno, .. }) => {
            fail(format!("{what} was refused with {errno}, expected {}", expected()))
        }
        Err(error) => Err(error.into()),
    }
}

/// Checks that the request is refused; the errno is the device's choice.
pub(crate) fn refused_somehow<T>(answer: Result<T>, what: &str) -> Verdict {
    match answer {
        Ok(_) => fail(format!("{what} succeeded, expected a refusal")),
        Err(Error::Refused { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
