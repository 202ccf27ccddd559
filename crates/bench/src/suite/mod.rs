//! [`measure`]: every measure of a device, one after the other, each within its share and its limit. After each the device is
//! brought back to RUNNING; a measure that fails is left out, and says why.

mod accesses;
mod arcs;
mod moves;
mod reports;
mod streams;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use limosa_check::{Done, back, within};
use limosa_client::{Chunk, DataStream, Device, DeviceExt, Error, Result};
use limosa_protocol::{FeatureIndex, FeatureOp, MigrationFlags, State, fsm};

use crate::document::{Document, Measure, Skipped, VERSION};
use crate::samples::Sampler;

/// The most state that is kept to be loaded again, in bytes.
const STATE_BYTES_MAX: usize = 1 << 30;

/// Bytes of one read or write where the size is not what is measured.
const CHUNK_BYTES: usize = 1 << 20;

/// The run ends after this many measures in a row without an answer.
const SILENT_MAX: u32 = 3;

/// The longest share of a measure while a guest waits for its device.
const IN_USE_MAX: Duration = Duration::from_secs(1);

/// Opens a device.
pub type Open = Arc<dyn Fn() -> Result<Box<dyn Device>> + Send + Sync>;

/// The device to measure.
#[derive(Clone)]
pub struct Target {
    /// How the user named it.
    pub name: String,
    /// Opens it, as often as that is needed.
    pub open: Open,
    /// A second device of the same kind, for whole moves. It loses its state.
    pub peer: Option<Open>,
    /// A device of the kernel's has an fd, on which bare calls are made beside accesses; it is closed after these. `None` for a
    /// device behind a socket, which is measured beside a bare socket.
    pub fd: Option<Arc<Mutex<Option<OwnedFd>>>>,
    /// Whether a guest uses it: then it is stopped, and nothing is reset, loaded, mapped or moved.
    pub in_use: bool,
}

/// Bounds of a run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The share of each measure.
    pub each: Duration,
    /// How much longer a measure may take before it is given up, with all that it waits for.
    pub limit: Duration,
    /// Set by the caller to end the run.
    pub cancel: Arc<AtomicBool>,
}

/// Progress of a run.
#[derive(Debug)]
pub enum Event<'a> {
    /// A measure begins, the first of them being 0.
    Begins {
        /// The measure.
        id: &'a str,
        /// Which one.
        at: usize,
        /// Of how many.
        of: usize,
    },
    /// It is done.
    Measured(&'a Measure),
}

/// The device and its facts, as measures see them.
#[derive(Clone)]
pub(crate) struct Context {
    pub device: Arc<dyn Device>,
    pub flags: MigrationFlags,
    pub has_logging: bool,
    /// Its state, if that could be kept.
    pub saved: Option<Arc<Vec<u8>>>,
    pub sampler: Sampler,
    pub target: Target,
}

impl Context {
    /// Whether a socket lies between, beside which it is measured.
    pub fn has_floor(&self) -> bool {
        self.target.fd.is_none()
    }

    /// Leads the device to a state, from wherever it is; the data stream if a session opened.
    pub fn lead(&self, to: State) -> Result<Option<Box<dyn DataStream>>> {
        let at = self.device.state()?;
        if at == State::Resuming {
            // The load may be incomplete, and then no arc leads out.
            self.device.reset()?;
        } else if fsm::path(self.flags, at, to).is_err() {
            self.device.set_state(State::Running)?;
        }
        self.device.set_state(to)
    }

    /// The same for a state with a session that is not open yet.
    pub fn open(&self, to: State) -> Result<Box<dyn DataStream>> {
        if self.device.state()? == to && to != State::Resuming {
            self.device.set_state(State::Running)?;
        }
        self.lead(to)?.ok_or_else(|| Error::Misbehaved {
            device: self.device.name().into(),
            what: format!("{to} opened no session"),
        })
    }
}

type Body = Box<dyn FnOnce(&Context) -> anyhow::Result<Vec<Measure>> + Send>;

/// One measure, or several that are taken together.
pub(crate) struct Step {
    id: String,
    /// How much longer than others it may take.
    more: Duration,
    body: Body,
}

impl Step {
    pub fn new(
        id: impl Into<String>,
        body: impl FnOnce(&Context, &str) -> anyhow::Result<Measure> + Send + 'static,
    ) -> Step {
        let id = id.into();
        let named = id.clone();
        Step { id, more: Duration::ZERO, body: Box::new(move |context| Ok(vec![body(context, &named)?])) }
    }
}

/// Measures all that the device allows. An error only if it cannot be opened or does not answer at all.
pub fn measure(
    target: &Target,
    options: &Options,
    tell: &mut dyn FnMut(Event<'_>),
) -> anyhow::Result<Document> {
    let each = if target.in_use { options.each.min(IN_USE_MAX) } else { options.each };
    let mut suite = Suite {
        target: target.clone(),
        limit: options.limit,
        sampler: Sampler { each, cancel: Arc::clone(&options.cancel) },
        context: None,
        silent: 0,
        ended: None,
        skipped: Vec::new(),
    };
    let context = suite.begin()?;
    let steps = steps(&context, &mut suite.skipped);
    let (flags, has_logging, saved) = (context.flags, context.has_logging, context.saved.clone());
    suite.context = Some(context);
    let (of, mut measures) = (steps.len(), Vec::new());
    for (at, step) in steps.into_iter().enumerate() {
        if options.cancel.load(Ordering::Relaxed) {
            suite.end(format!("it was called off before {}", step.id));
        }
        if suite.ended.is_some() {
            suite.skip(&format!("{} and all after it", step.id), "the run had ended");
            break;
        }
        tell(Event::Begins { id: &step.id, at, of });
        let known = Known { flags, has_logging, saved: saved.clone() };
        for measure in suite.step(step, &known) {
            tell(Event::Measured(&measure));
            measures.push(measure);
        }
    }
    let left_in = suite.leave(&Known { flags, has_logging, saved });
    Ok(Document {
        bench: VERSION,
        limosa: env!("CARGO_PKG_VERSION").into(),
        device: target.name.clone(),
        kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().into(),
        processors: std::thread::available_parallelism().map_or(1, usize::from),
        seconds: each.as_secs_f64(),
        measures,
        skipped: suite.skipped,
        ended_early: suite.ended,
        left_in,
    })
}

/// Every step for this device. Measures that it does not allow are skipped with the reason.
fn steps(context: &Context, skipped: &mut Vec<Skipped>) -> Vec<Step> {
    let mut steps = accesses::steps(context);
    let mut skip = |id: &str, why: &str| skipped.push(Skipped { id: id.into(), why: why.into() });
    if !context.flags.contains(MigrationFlags::STOP_COPY) {
        skip("arcs, streams, moves", "the device has no migration");
    } else {
        steps.extend(arcs::steps(context));
        steps.extend(streams::steps(context));
        match &context.target.peer {
            None => {}
            Some(_) if context.saved.is_none() => {
                skip("moves", "the state of the device cannot be given back")
            }
            Some(peer) => steps.push(moves::step(Arc::clone(peer))),
        }
    }
    match context.has_logging {
        false => skip("dirty reports", "the device has no DMA logging"),
        true if context.target.in_use => {
            skip("dirty reports", "a guest uses the device, and its VMM the log")
        }
        true => steps.extend(reports::steps(context)),
    }
    if context.target.in_use {
        skip("resets, loads", "a guest uses the device");
    }
    steps
}

/// Facts of the device that hold for all connections.
struct Known {
    flags: MigrationFlags,
    has_logging: bool,
    saved: Option<Arc<Vec<u8>>>,
}

struct Suite {
    target: Target,
    limit: Duration,
    sampler: Sampler,
    /// With the device, if it is open and no thread that hangs has it.
    context: Option<Context>,
    silent: u32,
    ended: Option<String>,
    skipped: Vec<Skipped>,
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

/// Loads a state into a device, which is in STOP then.
pub(crate) fn load(context: &Context, saved: &[u8], chunk_bytes: usize) -> Result<()> {
    let mut stream = context.open(State::Resuming)?;
    saved.chunks(chunk_bytes).try_for_each(|chunk| stream.write(chunk))?;
    context.device.set_state(State::Stop).map(drop)
}

impl Suite {
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

    /// Lets go of a connection that is lost.
    fn lost(&mut self, error: &anyhow::Error) {
        let client = error.chain().find_map(|cause| cause.downcast_ref::<Error>());
        if client.is_some_and(Error::is_connection_lost) {
            self.context = None;
        }
        if matches!(client, Some(Error::Timeout { .. })) {
            self.silent += 1;
        }
    }

    fn end(&mut self, why: String) {
        self.ended.get_or_insert(why);
    }

    fn skip(&mut self, id: &str, why: &str) {
        self.skipped.push(Skipped { id: id.into(), why: why.into() });
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
    fn begin(&mut self) -> anyhow::Result<Context> {
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
                    self.skip("resets, loads", &format!("the device's state cannot be kept: {error:#}"))
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

    fn step(&mut self, step: Step, known: &Known) -> Vec<Measure> {
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
            self.skip(&id, &format!("{error:#}"));
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

    /// Leads the device to RUNNING, opened anew where that is needed.
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
                // No arc leads out of a load that is not complete.
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

    /// Gives the device its state back. Returns the state in which it is left.
    fn leave(&mut self, known: &Known) -> String {
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
