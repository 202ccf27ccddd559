//! Calls, refusals, time and bytes, by request and by arc.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;

use super::lines::duration_text;
use crate::event::{Event, Outcome, Request};
use crate::recorder::Sink;

/// Limit on the lines of a table. Requests with further names are counted together.
const KEYS_MAX: usize = 512;
/// The most devices whose last arc is remembered.
const DEVICES_MAX: usize = 4096;
const FURTHER: &str = "further ones";

/// Counts.
pub struct Statistics(StatisticsHandle);

/// What was counted.
#[derive(Clone, Default)]
pub struct StatisticsHandle(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    requests: BTreeMap<String, Tally>,
    arcs: BTreeMap<String, Tally>,
    /// The last arc of each device, to which the data of its session is attributed.
    last: BTreeMap<String, String>,
}

/// A line of a table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// How often it was requested.
    pub calls: u64,
    /// How many of them were refused, or got no answer.
    pub failed: u64,
    /// How long the answers took, in nanoseconds.
    pub time_ns: u64,
    /// Bytes of data. Of an arc, those of the session that it opened or kept.
    pub bytes: u64,
}

/// Both tables, the largest time first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Table {
    /// By request, such as `FEATURE GET MIG_DATA_SIZE`.
    pub requests: Vec<(String, Tally)>,
    /// By arc, such as `STOP > STOP_COPY`.
    pub arcs: Vec<(String, Tally)>,
}

impl Statistics {
    /// Begins to count, and returns the handle to the counts.
    pub fn new() -> (Statistics, StatisticsHandle) {
        let handle = StatisticsHandle::default();
        (Statistics(handle.clone()), handle)
    }
}

impl Sink for Statistics {
    fn name(&self) -> String {
        "statistics".into()
    }

    fn event(&mut self, event: &Event) -> io::Result<()> {
        let mut state = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.count(event);
        Ok(())
    }
}

impl StatisticsHandle {
    /// The figures so far.
    pub fn table(&self) -> Table {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Table { requests: sorted(&state.requests), arcs: sorted(&state.arcs) }
    }
}

fn sorted(table: &BTreeMap<String, Tally>) -> Vec<(String, Tally)> {
    let mut all: Vec<_> = table.iter().map(|(key, tally)| (key.clone(), tally.clone())).collect();
    all.sort_by_key(|(_, tally)| std::cmp::Reverse(tally.time_ns));
    all
}

fn tally(table: &mut BTreeMap<String, Tally>, key: String) -> &mut Tally {
    let key = if table.len() < KEYS_MAX || table.contains_key(&key) { key } else { FURTHER.to_owned() };
    table.entry(key).or_default()
}

impl State {
    fn count(&mut self, event: &Event) {
        if event.request == Request::Note {
            return;
        }
        let has_failed = !matches!(event.outcome, Outcome::Done(_) | Outcome::Posted);
        let time_ns = event.duration_ns.unwrap_or(0);
        let add = |tally: &mut Tally| {
            tally.calls += 1;
            tally.failed += u64::from(has_failed);
            tally.time_ns = tally.time_ns.saturating_add(time_ns);
            tally.bytes = tally.bytes.saturating_add(event.bytes);
        };
        add(tally(&mut self.requests, event.request.key()));
        if let Request::Feature { transition: Some(transition), .. } = event.request {
            let arc = transition.shown();
            add(tally(&mut self.arcs, arc.clone()));
            if !has_failed {
                if self.last.len() >= DEVICES_MAX {
                    self.last.clear();
                }
                self.last.insert(event.name.clone(), arc);
            }
        }
        if let Some(device) = &event.session_of
            && let Some(arc) = self.last.get(device)
        {
            let tally = tally(&mut self.arcs, arc.clone());
            tally.bytes = tally.bytes.saturating_add(event.bytes);
        }
    }
}

impl Table {
    /// The tables as text, for people.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for (title, lines) in [("request", &self.requests), ("arc", &self.arcs)] {
            if lines.is_empty() {
                continue;
            }
            text += &format!("{:>9} {:>8} {:>9} {:>14}  {title}\n", "calls", "failed", "time", "bytes");
            for (key, Tally { calls, failed, time_ns, bytes }) in lines {
                text +=
                    &format!("{calls:>9} {failed:>8} {:>9} {bytes:>14}  {key}\n", duration_text(*time_ns));
            }
        }
        text
    }
}
