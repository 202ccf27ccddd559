//! What a process says, line by line, without a wait for time.

use std::io::{BufRead, BufReader, Read};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::LIMIT;

/// The lines that a stream has given so far. Clones are of the same stream.
#[derive(Clone, Default)]
pub struct Lines(Arc<Shared>);

#[derive(Default)]
struct Shared {
    said: Mutex<Said>,
    news: Condvar,
}

#[derive(Default)]
struct Said {
    lines: Vec<String>,
    has_ended: bool,
}

impl Lines {
    /// Reads a stream to its end, on a thread of its own.
    pub fn of(stream: impl Read + Send + 'static) -> Lines {
        let lines = Lines::default();
        let writer = lines.clone();
        std::thread::spawn(move || {
            let mut stream = BufReader::new(stream);
            let mut line = Vec::new();
            while matches!(stream.read_until(b'\n', &mut line), Ok(1..)) {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                line.clear();
                writer.said().lines.push(text);
                writer.0.news.notify_all();
            }
            writer.said().has_ended = true;
            writer.0.news.notify_all();
        });
        lines
    }

    /// Waits for the first line that contains `part`; `None` when the stream ends without one.
    ///
    /// # Panics
    ///
    /// When neither comes within [`LIMIT`].
    pub fn wait_for(&self, part: &str) -> Option<String> {
        self.wait(part, |said| said.lines.iter().find(|line| line.contains(part)).cloned())
    }

    /// Waits for line number `index`, counted from 0; `None` when the stream ends before it.
    ///
    /// # Panics
    ///
    /// When neither comes within [`LIMIT`].
    pub fn at(&self, index: usize) -> Option<String> {
        self.wait("the next line", |said| said.lines.get(index).cloned())
    }

    /// All that was said until now.
    pub fn all(&self) -> Vec<String> {
        self.said().lines.clone()
    }

    fn wait<T>(&self, what: &str, found: impl Fn(&Said) -> Option<T>) -> Option<T> {
        let until = Instant::now() + LIMIT;
        let mut said = self.said();
        loop {
            let now = found(&said);
            if now.is_some() || said.has_ended {
                return now;
            }
            let left = until.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "no {what:?} within {LIMIT:?}; it said: {:#?}", said.lines);
            said = self.0.news.wait_timeout(said, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn said(&self) -> MutexGuard<'_, Said> {
        self.0.said.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
