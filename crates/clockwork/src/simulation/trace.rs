//! What happened in a simulation, in order: as text when it is kept, and as one number in any case.

use std::fmt::{self, Write};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::Location;
use std::time::Duration;

/// Something that a task did.
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
    Joins(String),
    ScopeEnds,
    Note(String),
}

/// The events so far.
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
            let place = Place(at);
            // Writing to a string does not fail.
            let _ = match event {
                Event::Starts => writeln!(text, "{now:>14.6?}  {task:<28} starts"),
                Event::Ends => writeln!(text, "{now:>14.6?}  {task:<28} ends"),
                Event::Crashes => writeln!(text, "{now:>14.6?}  {task:<28} crashes"),
                Event::Locks => writeln!(text, "{now:>14.6?}  {task:<28} locks        {place}"),
                Event::Waits(None) => writeln!(text, "{now:>14.6?}  {task:<28} waits        {place}"),
                Event::Waits(Some(until)) => {
                    writeln!(text, "{now:>14.6?}  {task:<28} waits        {place} until {until:?}")
                }
                Event::Sleeps(until) => {
                    writeln!(text, "{now:>14.6?}  {task:<28} sleeps       {place} until {until:?}")
                }
                Event::Notifies => writeln!(text, "{now:>14.6?}  {task:<28} notifies     {place}"),
                Event::WakesAll => writeln!(text, "{now:>14.6?}  {task:<28} wakes all    {place}"),
                Event::Joins(other) => writeln!(text, "{now:>14.6?}  {task:<28} joins {other}  {place}"),
                Event::ScopeEnds => writeln!(text, "{now:>14.6?}  {task:<28} waits for its threads  {place}"),
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

/// A place in the source, by the end of its path.
pub(crate) struct Place(pub(crate) &'static Location<'static>);

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.0.file();
        let path = path.rsplit_once("/src/").map_or(path, |(_, inner)| inner);
        write!(f, "{path}:{}", self.0.line())
    }
}
