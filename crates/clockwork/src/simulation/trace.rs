//! The events of a simulation in their order: always as a digest, and as text on request.

use std::fmt::{self, Write};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::Location;
use std::time::Duration;

/// An action of a task, or of the simulator on a task.
#[derive(Clone, Debug, Hash)]
pub(crate) enum Event {
    Starts,
    Ends,
    Crashes,
    Locks,
    Waits(Option<Duration>),
    Sleeps(Duration),
    Notifies,
    WakesAll,
    WakesPolls,
    /// The simulator ends a wait without a notification.
    SpuriousWakeUp,
    Joins(String),
    ScopeEnds,
    Note(String),
}

/// The events so far. `text` is `None` unless the simulation keeps it.
#[derive(Debug)]
pub(crate) struct Trace {
    text: Option<String>,
    hasher: DefaultHasher,
}

impl Trace {
    pub(crate) fn new(kept: bool) -> Trace {
        Trace { text: kept.then(String::new), hasher: DefaultHasher::new() }
    }

    pub(crate) fn is_kept(&self) -> bool {
        self.text.is_some()
    }

    pub(crate) fn add(&mut self, now: Duration, task: &str, event: &Event, at: &'static Location<'static>) {
        (now, task, event, at.line(), at.column()).hash(&mut self.hasher);
        if let Some(text) = &mut self.text {
            let site = CallSite(at);
            // Formatting into a `String` does not fail.
            let _ = match event {
                Event::Starts => writeln!(text, "{now:>14.6?}  {task:<28} starts"),
                Event::Ends => writeln!(text, "{now:>14.6?}  {task:<28} ends"),
                Event::Crashes => writeln!(text, "{now:>14.6?}  {task:<28} crashes"),
                Event::Locks => writeln!(text, "{now:>14.6?}  {task:<28} locks        {site}"),
                Event::Waits(None) => writeln!(text, "{now:>14.6?}  {task:<28} waits        {site}"),
                Event::Waits(Some(until)) => {
                    writeln!(text, "{now:>14.6?}  {task:<28} waits        {site} until {until:?}")
                }
                Event::Sleeps(until) => {
                    writeln!(text, "{now:>14.6?}  {task:<28} sleeps       {site} until {until:?}")
                }
                Event::Notifies => writeln!(text, "{now:>14.6?}  {task:<28} notifies     {site}"),
                Event::WakesAll => writeln!(text, "{now:>14.6?}  {task:<28} wakes all    {site}"),
                Event::WakesPolls => writeln!(text, "{now:>14.6?}  {task:<28} wakes polls  {site}"),
                Event::SpuriousWakeUp => {
                    writeln!(text, "{now:>14.6?}  {task:<28} is woken spuriously  {site}")
                }
                Event::Joins(other) => writeln!(text, "{now:>14.6?}  {task:<28} joins {other}  {site}"),
                Event::ScopeEnds => writeln!(text, "{now:>14.6?}  {task:<28} waits for its threads  {site}"),
                Event::Note(note) => writeln!(text, "{now:>14.6?}  {task:<28} {note}"),
            };
        }
    }

    pub(crate) fn digest(&self) -> u64 {
        self.hasher.finish()
    }

    pub(crate) fn take_text(&mut self) -> String {
        self.text.take().unwrap_or_default()
    }
}

/// Displays a source location without the directories up to `src`.
pub(crate) struct CallSite(pub(crate) &'static Location<'static>);

impl fmt::Display for CallSite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.0.file();
        let path = path.rsplit_once("/src/").map_or(path, |(_, inner)| inner);
        write!(f, "{path}:{}", self.0.line())
    }
}
