//! [`measure`]: every measure of a device, one after the other, each within its share and its limit. After each the
//! device is returned to RUNNING; a failed measure is skipped, with the reason.

mod accesses;
mod arcs;
mod moves;
mod reports;
mod run;
mod streams;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use limosa_client::{DataStream, Device, DeviceExt, Error, Result};
use limosa_protocol::{MigrationFlags, State, fsm};

use crate::document::{Document, Measure, VERSION};
use crate::samples::Sampler;
use run::{Known, Suite};

/// Bytes of one read or write where the size is not what is measured.
const CHUNK_BYTES: usize = 1 << 20;

/// The longest share of a measure while a guest waits for its device.
const IN_USE_MAX: Duration = Duration::from_secs(1);

/// Opens a device.
pub type Open = Arc<dyn Fn() -> Result<Box<dyn Device>> + Send + Sync>;

/// The device to measure.
#[derive(Clone)]
pub struct Target {
    /// The name that the user gave.
    pub name: String,
    /// Opens it, as often as that is needed.
    pub open: Open,
    /// A second device of the same kind, for whole moves. It loses its state.
    pub peer: Option<Open>,
    /// The fd of a kernel device, for bare calls to compare accesses with; it is closed after these. `None` for a
    /// vfio-user device, which is compared with a bare socket.
    pub fd: Option<Arc<Mutex<Option<OwnedFd>>>>,
    /// Whether a guest uses it: then it is stopped, and nothing is reset, loaded, mapped or moved.
    pub in_use: bool,
}

/// Bounds of a run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The share of each measure.
    pub each: Duration,
    /// The time beyond its share after which a measure is given up.
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

/// A run that came to an end.
#[derive(Debug)]
pub struct Run {
    /// The measured values.
    pub document: Document,
    /// Why whole moves were not measured although there is a [`Target::peer`]. `None` too if the run ended before them, which the
    /// document says.
    pub not_moved: Option<anyhow::Error>,
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
    /// Whether the device is behind a socket, which gives the floor.
    pub fn has_floor(&self) -> bool {
        self.target.fd.is_none()
    }

    /// Drives the device to a state, from its current one; returns the data stream if a session opened.
    pub fn lead(&self, to: State) -> Result<Option<Box<dyn DataStream>>> {
        let at = self.device.state()?;
        if at == State::Resuming {
            // The load may be incomplete, and then no arc leaves RESUMING.
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

/// Measures everything that the device supports. Fails only if the device cannot be opened or does not answer at all.
pub fn measure(target: &Target, options: &Options, tell: &mut dyn FnMut(Event<'_>)) -> anyhow::Result<Run> {
    let each = if target.in_use { options.each.min(IN_USE_MAX) } else { options.each };
    let mut suite = Suite::new(target, options, each);
    let context = suite.begin()?;
    let steps = steps(&context, &mut suite);
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
    let document = Document {
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
    };
    Ok(Run { document, not_moved: suite.not_moved })
}

/// Every step for this device. Measures that it does not allow are skipped with the reason.
fn steps(context: &Context, suite: &mut Suite) -> Vec<Step> {
    let mut steps = accesses::steps(context);
    if context.flags.contains(MigrationFlags::STOP_COPY) {
        steps.extend(arcs::steps(context));
        steps.extend(streams::steps(context));
    } else {
        suite.skip("arcs, streams", "the device has no migration");
    }
    match (&context.target.peer, suite.not_kept.take()) {
        (None, _) => {}
        (Some(_), Some(why)) => suite.skip_moves(why.context("the state of the device cannot be given back")),
        // A device without migration is refused by the engine, in its words.
        (Some(peer), None) => steps.push(moves::step(Arc::clone(peer))),
    }
    let mut skip = |id: &str, why: &str| suite.skip(id, why);
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
