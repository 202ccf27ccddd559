//! [`Suite`]: the device opened, asked within limits, and brought back to RUNNING after each measure.

use std::sync::Arc;
use std::time::{Duration, Instant};

use limosa_check::{Done, back, within};
use limosa_client::{Chunk, DeviceExt, Error, Result};
use limosa_protocol::{FeatureIndex, FeatureOp, MigrationFlags, State};

use super::{CHUNK_BYTES, Context, Options, Step, Target, moves};
use crate::document::{Measure, Skipped};
use crate::samples::Sampler;

/// Limit on the state that is kept to be loaded again, in bytes.
const STATE_BYTES_MAX: usize = 1 << 30;

/// The run ends after this many measures in a row without an answer.
const SILENT_MAX: u32 = 3;

/// Facts of the device that hold for all connections.
pub(super) struct Known {
    pub flags: MigrationFlags,
    pub has_logging: bool,
    pub saved: Option<Arc<Vec<u8>>>,
}

/// A run under way.
pub(super) struct Suite {
    target: Target,
    limit: Duration,
    sampler: Sampler,
    /// With the device, if it is open and no thread that hangs has it.
    pub context: Option<Context>,
    silent: u32,
    pub ended: Option<String>,
    pub skipped: Vec<Skipped>,
    /// Why the device's state could not be kept.
    pub not_kept: Option<anyhow::Error>,
    /// Why there is no measure of moves.
    pub not_moved: Option<anyhow::Error>,
}

/// The device's state, whole.
fn save(context: &Context, until: Instant) -> anyhow::Result<Vec<u8>> {
    let mut stream = context.open(State::StopCopy)?;
    let (mut chunk, mut saved) = (vec![0; CHUNK_BYTES], Vec::new());
    loop {
        match stream.read(&mut chunk)? {
            Chunk::Data(bytes) if saved.len() + bytes > STATE_BYTES_MAX => {
                anyhow::bail!("it is more than 1 GiB")
            }
            Chunk::Data(bytes) => saved.extend_from_slice(&chunk[..bytes]),
            Chunk::NothingForNow | Chunk::End => break,
        }
        anyhow::ensure!(Instant::now() < until, "{} bytes in, its time was up", saved.len());
    }
    drop(stream);
    context.device.set_state(State::Running)?;
    Ok(saved)
}

/// Loads a state into a device, and leaves it in STOP.
fn load(context: &Context, saved: &[u8], chunk_bytes: usize) -> Result<()> {
    let mut stream = context.open(State::Resuming)?;
    saved.chunks(chunk_bytes).try_for_each(|chunk| stream.write(chunk))?;
    context.device.set_state(State::Stop).map(drop)
}

impl Suite {
    /// A run that has not begun.
    pub fn new(target: &Target, options: &Options, each: Duration) -> Suite {
        Suite {
            target: target.clone(),
            limit: options.limit,
            sampler: Sampler { each, cancel: Arc::clone(&options.cancel) },
            context: None,
            silent: 0,
            ended: None,
            skipped: Vec::new(),
            not_kept: None,
            not_moved: None,
        }
    }

    /// Runs something on the device in a thread of its own.
    fn within<T: Send + 'static>(
        &mut self,
        doing: &str,
        more: Duration,
        work: impl FnOnce(Context) -> anyhow::Result<T> + Send + 'static,
    ) -> anyhow::Result<T> {
        let Some(context) = self.context.clone() else { anyhow::bail!("the device is not open") };
        let limit = self.sampler.each * 4 + self.limit + more;
        match within(limit, move || work(context)) {
            Done::Value(done) => {
                if let Err(error) = &done {
                    self.lost(error);
                } else {
                    self.silent = 0;
                }
                done
            }
            Done::Panicked(what) => anyhow::bail!("{doing} panicked: {what}"),
            Done::Hangs => {
                // The thread has the device.
                self.context = None;
                self.silent += 1;
                anyhow::bail!("{doing}: no answer within {limit:?}")
            }
        }
    }

    /// Drops a lost connection.
    fn lost(&mut self, error: &anyhow::Error) {
        let client = error.chain().find_map(|cause| cause.downcast_ref::<Error>());
        if client.is_some_and(Error::is_connection_lost) {
            self.context = None;
        }
        if matches!(client, Some(Error::Timeout { .. })) {
            self.silent += 1;
        }
    }

    pub fn end(&mut self, why: String) {
        self.ended.get_or_insert(why);
    }

    pub fn skip(&mut self, id: &str, why: &str) {
        self.skipped.push(Skipped { id: id.into(), why: why.into() });
    }

    pub fn skip_moves(&mut self, why: anyhow::Error) {
        self.skip(moves::ID, &format!("{why:#}"));
        self.not_moved = Some(why);
    }

    fn open(&mut self, known: &Known) -> anyhow::Result<()> {
        let (open, limit) = (Arc::clone(&self.target.open), self.limit);
        let device = match within(limit, move || open()) {
            Done::Value(device) => device?,
            Done::Panicked(what) => anyhow::bail!("opening it panicked: {what}"),
            Done::Hangs => anyhow::bail!("it cannot be opened within {limit:?}"),
        };
        self.context = Some(Context {
            device: Arc::from(device),
            flags: known.flags,
            has_logging: known.has_logging,
            saved: known.saved.clone(),
            sampler: self.sampler.clone(),
            target: self.target.clone(),
        });
        Ok(())
    }

    /// Opens the device, resets it if it is in ERROR, and keeps its state.
    pub fn begin(&mut self) -> anyhow::Result<Context> {
        self.open(&Known { flags: MigrationFlags::empty(), has_logging: false, saved: None })?;
        let in_use = self.target.in_use;
        let (flags, has_logging, was_reset) =
            self.within("a look at the device", Duration::ZERO, move |context| {
                let device = &context.device;
                let flags = device.migration_flags()?;
                let has_logging = device.probe(FeatureIndex::DMA_LOGGING_START, FeatureOp::SET)?;
                let is_broken = !flags.is_empty() && device.state()? == State::Error && !in_use;
                if is_broken {
                    device.reset()?;
                }
                Ok((flags, has_logging, is_broken))
            })?;
        if was_reset {
            self.skip("the state that was found", "the device was in ERROR, and was reset");
        }
        let mut known = Known { flags, has_logging, saved: None };
        if let Some(context) = &mut self.context {
            (context.flags, context.has_logging) = (flags, has_logging);
        }
        if flags.contains(MigrationFlags::STOP_COPY) && !in_use {
            let until = Instant::now() + self.sampler.each * 4 + self.limit;
            match self
                .within("keeping the device's state", Duration::ZERO, move |context| save(&context, until))
            {
                Ok(saved) => known.saved = Some(Arc::new(saved)),
                Err(error) => {
                    self.skip("resets, loads", &format!("the device's state cannot be kept: {error:#}"));
                    self.not_kept = Some(error);
                }
            }
            self.bring_back(&known);
        }
        if let Some(why) = &self.ended {
            anyhow::bail!("{}: {why}", self.target.name);
        }
        let Some(context) = &mut self.context else { anyhow::bail!("{}: it is gone", self.target.name) };
        context.saved = known.saved;
        Ok(context.clone())
    }

    pub fn step(&mut self, step: Step, known: &Known) -> Vec<Measure> {
        let Step { id, more, body } = step;
        if self.context.is_none()
            && let Err(error) = self.open(known)
        {
            self.skip(&id, "the device cannot be opened any more");
            self.end(format!("before {id}: the device cannot be opened any more: {error:#}"));
            return Vec::new();
        }
        let measured = self.within(&id, more, move |context| body(&context));
        let measured = measured.unwrap_or_else(|error| {
            match &*id {
                moves::ID => self.skip_moves(error),
                id => self.skip(id, &format!("{error:#}")),
            }
            Vec::new()
        });
        if self.silent >= SILENT_MAX {
            self.end(format!(
                "the device has not answered {SILENT_MAX} times in a row, in {id} for the last time"
            ));
        }
        self.bring_back(known);
        if let Some(why) = self.ended.as_mut().filter(|why| !why.contains(&id)) {
            *why = format!("after {id}: {why}");
        }
        measured
    }

    /// Brings the device to RUNNING, and opens it again if necessary.
    fn bring_back(&mut self, known: &Known) {
        let (has_migration, has_logging) =
            (!known.flags.is_empty(), known.has_logging && !self.target.in_use);
        for attempt in 0..2 {
            if self.context.is_none()
                && let Err(error) = self.open(known)
            {
                return self.end(format!("the device cannot be opened any more: {error:#}"));
            }
            let done = self.within("bringing the device back", Duration::ZERO, move |context| {
                // No arc leaves RESUMING after an incomplete load.
                if has_migration && context.device.state()? == State::Resuming {
                    context.device.reset()?;
                }
                Ok(back(&*context.device, has_migration, has_logging)?)
            });
            match done {
                Ok(()) => return,
                Err(_) if attempt == 0 && self.silent < SILENT_MAX => self.context = None,
                Err(error) => {
                    return self.end(format!("the device cannot be brought back to RUNNING: {error:#}"));
                }
            }
        }
    }

    /// Restores the device's state. Returns the migration state in which it is left.
    pub fn leave(&mut self, known: &Known) -> String {
        if known.flags.is_empty() {
            return "its only state: it has no migration".into();
        }
        if self.context.is_none()
            && let Err(error) = self.open(known)
        {
            return format!("an unknown state: it cannot be opened any more: {error:#}");
        }
        if let Some(saved) = known.saved.clone().filter(|_| self.silent < SILENT_MAX) {
            let given_back =
                self.within("giving the device its state back", Duration::ZERO, move |context| {
                    context.device.reset()?;
                    load(&context, &saved, CHUNK_BYTES)?;
                    context.device.set_state(State::Running)?;
                    Ok(())
                });
            if let Err(error) = given_back {
                self.bring_back(known);
                let state = self.state();
                return format!("{state}, without the state that it had: {error:#}");
            }
        }
        self.state()
    }

    fn state(&mut self) -> String {
        match self.within("its state", Duration::ZERO, |context| Ok(context.device.state()?)) {
            Ok(state) => state.to_string(),
            Err(error) => format!("an unknown state: {error:#}"),
        }
    }
}
