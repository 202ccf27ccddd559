//! [`fuzz`]: random sequences of requests, legal and illegal, compared with a model of the standard. A difference is
//! shrunk to a short [`Script`], which [`replay`] plays again; a known difference is reported once.

mod generate;
mod judge;
mod model;
mod request;
mod shrink;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Instant;

use limosa_client::Result;
use serde::Serialize;

pub use request::Script;

use crate::check::Needs;
use crate::recorder::{Record, Recorded};
use crate::run::{Done, GRACE, Limits, back, within};
use crate::survey::{self, Facts};
use crate::target::Target;
use judge::Differs;
use model::Driver;

/// How many sequences are played, from which seed and on how many threads.
#[derive(Clone, Debug)]
pub struct FuzzOptions {
    /// How many sequences, each of up to 48 requests.
    pub sequences: u64,
    /// The seed, which determines the sequences.
    pub seed: u64,
    /// Threads: the first drives the device, the others only query it. 1 to 16.
    pub threads: usize,
    /// Signatures of known differences, which are not reported again.
    pub known: BTreeSet<String>,
    /// The limits. A sequence has the time limit of a check.
    pub limits: Limits,
    /// Set by the caller to end before the next sequence.
    pub cancel: Option<Arc<AtomicBool>>,
}

impl Default for FuzzOptions {
    fn default() -> FuzzOptions {
        FuzzOptions {
            sequences: 100,
            seed: 0,
            threads: 1,
            known: BTreeSet::new(),
            limits: Limits::default(),
            cancel: None,
        }
    }
}

/// A difference between a device and the model.
#[derive(Clone, Debug, Serialize)]
pub struct Difference {
    /// A key of one line that is the same for equal differences.
    pub signature: String,
    /// The sequence in which it was found.
    pub sequence: u64,
    /// The shortest script that was found to show it, one request a line.
    pub script: Vec<String>,
    /// The requests with their answers.
    pub requests: Vec<String>,
}

/// What [`fuzz`] found.
#[derive(Clone, Debug, Serialize)]
pub struct FuzzReport {
    /// The device.
    pub device: String,
    /// The seed.
    pub seed: u64,
    /// Threads.
    pub threads: usize,
    /// Sequences that were played.
    pub sequences: u64,
    /// Requests that were played, without those of shrinking.
    pub requests: u64,
    /// The differences that were not known, each once.
    pub differences: Vec<Difference>,
    /// Number of sequences with a difference that was known or already reported.
    pub known: u64,
    /// Why it ended early, if it did.
    pub ended_early: Option<String>,
    /// How long it took.
    #[serde(rename = "duration_ns", serialize_with = "crate::report::seconds_as_ns")]
    pub seconds: f64,
}

/// Plays random sequences. An error only if the device cannot be opened or examined.
pub fn fuzz(target: &Target, options: &FuzzOptions) -> Result<FuzzReport> {
    let begun = Instant::now();
    let mut player = Player::new(target, &options.limits)?;
    let threads = options.threads.clamp(1, request::THREADS_MAX);
    let mut report = FuzzReport {
        device: target.name.clone(),
        seed: options.seed,
        threads,
        sequences: 0,
        requests: 0,
        differences: Vec::new(),
        known: 0,
        ended_early: None,
        seconds: 0.0,
    };
    for sequence in 0..options.sequences {
        if options.cancel.as_ref().is_some_and(|cancel| cancel.load(Ordering::Relaxed)) {
            report.ended_early = Some("it was called off".into());
            break;
        }
        if begun.elapsed() > options.limits.suite {
            report.ended_early = Some("its time was up".into());
            break;
        }
        let script = generate::script(&mut generate::Random::new(options.seed, sequence), threads);
        let found = match player.play(&script) {
            Ok(found) => found,
            Err(error) => {
                report.ended_early = Some(format!("sequence {sequence}: {error}"));
                break;
            }
        };
        report.sequences += 1;
        report.requests += script.len() as u64;
        let Some(differs) = found else { continue };
        let told = report.differences.iter().any(|told| told.signature == differs.signature);
        if told || options.known.contains(&differs.signature) {
            report.known += 1;
            continue;
        }
        let script = shrink::shrink(&mut player, &script, &differs.signature);
        // Record the answers to the shrunk script.
        let _ = player.play(&script);
        report.differences.push(Difference {
            signature: differs.signature,
            sequence,
            script: script.to_string().lines().map(ToOwned::to_owned).collect(),
            requests: player.said.clone(),
        });
    }
    report.seconds = begun.elapsed().as_secs_f64();
    Ok(report)
}

/// Plays one script; the difference that it shows, if it does.
pub fn replay(target: &Target, script: &Script, limits: &Limits) -> Result<Option<Difference>> {
    let mut player = Player::new(target, limits)?;
    let found = player.play(script)?;
    Ok(found.map(|differs| Difference {
        signature: differs.signature,
        sequence: 0,
        script: script.to_string().lines().map(ToOwned::to_owned).collect(),
        requests: player.said.clone(),
    }))
}

/// Plays scripts on a device, each from RUNNING.
struct Player {
    target: Target,
    limits: Limits,
    facts: Arc<Facts>,
    device: Option<Arc<Recorded>>,
    /// The requests of the last script with their answers.
    said: Vec<String>,
}

impl Player {
    fn new(target: &Target, limits: &Limits) -> Result<Player> {
        let device = open(target, limits)?;
        let until = Instant::now() + limits.check;
        let (looked_at, of, bounds) = (Arc::clone(&device), target.clone(), limits.clone());
        let facts = match within(limits.check + GRACE, move || {
            let facts = survey::survey(&*looked_at, &of, &bounds, until)?;
            back(&*looked_at, facts.has.contains(Needs::MIGRATION), facts.has.contains(Needs::LOGGING))?;
            Ok(facts)
        }) {
            Done::Value(facts) => facts?,
            Done::Panicked(what) => {
                return Err(limosa_client::Error::Misbehaved { device: target.name.clone(), what });
            }
            Done::Hangs => return Err(silent(target, limits, "a look at it")),
        };
        let (target, limits) = (target.clone(), limits.clone());
        Ok(Player { target, limits, facts: Arc::new(facts), device: Some(device), said: Vec::new() })
    }

    /// Plays a script, and brings the device back to RUNNING. An error when the device cannot be opened again.
    fn play(&mut self, script: &Script) -> Result<Option<Differs>> {
        let device = match &self.device {
            Some(device) => Arc::clone(device),
            None => open(&self.target, &self.limits)?,
        };
        device.record.clear();
        let (record, facts, script) = (Arc::clone(&device.record), Arc::clone(&self.facts), script.clone());
        let (migration, logging) = (facts.has.contains(Needs::MIGRATION), facts.has.contains(Needs::LOGGING));
        let kept = Arc::clone(&device);
        // A hanging thread keeps the device: then it is opened again.
        self.device = None;
        let done = within(self.limits.check + GRACE, move || {
            let found = threads(&device, &facts, &script);
            let said = device.record.text();
            let restored = back(&*device, migration, logging);
            (found, said, restored)
        });
        Ok(match done {
            Done::Value((found, said, restored)) => {
                self.said = said;
                match restored {
                    Ok(()) => {
                        self.device = Some(kept);
                        found
                    }
                    Err(_) => found.or_else(|| Some(Differs { signature: NOT_BROUGHT_BACK.into() })),
                }
            }
            Done::Panicked(what) => {
                self.said = record.text();
                Some(Differs { signature: format!("a panic: {what}") })
            }
            Done::Hangs => {
                self.said = record.text();
                let request = record.pending().unwrap_or_else(|| "a request".into());
                let kind = request.split(' ').next().unwrap_or_default().to_owned();
                Some(Differs { signature: format!("{kind}: no answer") })
            }
        })
    }
}

/// Whether a text has the form of a [`Difference::signature`], so that a file of known ones is not taken for one by mistake.
pub fn is_signature(text: &str) -> bool {
    text.contains(", expected ")
        || text.ends_with(": no answer")
        || text.starts_with("a panic")
        || text == NOT_BROUGHT_BACK
}

/// The signature of a device that is lost.
const NOT_BROUGHT_BACK: &str = "the device cannot be brought back to RUNNING";

/// Plays a script's requests, those of each thread in order. The first thread's difference counts first.
fn threads(device: &Arc<Recorded>, facts: &Arc<Facts>, script: &Script) -> Option<Differs> {
    let count = script.threads();
    let together = Barrier::new(count);
    std::thread::scope(|scope| {
        let play = |thread: usize| {
            let mut driver = Driver::new(Arc::clone(device), Arc::clone(facts), thread == 0);
            let requests = script.of(thread);
            together.wait();
            requests.iter().find_map(|request| driver.play(request).err())
        };
        let others: Vec<_> = (1..count).map(|thread| scope.spawn(move || play(thread))).collect();
        let first = play(0);
        let others: Vec<_> = others
            .into_iter()
            .map(|other| {
                other.join().unwrap_or_else(|_| {
                    Some(Differs { signature: "a panic beside the thread that drives".into() })
                })
            })
            .collect();
        first.or_else(|| others.into_iter().flatten().next())
    })
}

fn silent(target: &Target, limits: &Limits, request: &str) -> limosa_client::Error {
    limosa_client::Error::Timeout {
        device: target.name.clone(),
        request: request.into(),
        limit: limits.check + GRACE,
    }
}

fn open(target: &Target, limits: &Limits) -> Result<Arc<Recorded>> {
    let open = Arc::clone(&target.open);
    let device = match within(limits.check + GRACE, move || open()) {
        Done::Value(device) => device?,
        Done::Panicked(what) => {
            return Err(limosa_client::Error::Misbehaved { device: target.name.clone(), what });
        }
        Done::Hangs => return Err(silent(target, limits, "opening")),
    };
    Ok(Arc::new(Recorded { device, record: Arc::new(Record::default()), prefix: "" }))
}
