//! What a program says, with waits for lines and for the end.

use std::io::{BufRead, BufReader, Read};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::LIMIT;

/// One of the streams of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

/// What a program has said so far. Clones are of the same program.
///
/// Every wait ends with a panic, and all that was said, after [`LIMIT`].
#[derive(Clone)]
pub struct Transcript(Arc<Shared>);

struct Shared {
    name: String,
    said: Mutex<Said>,
    news: Condvar,
}

struct Said {
    out: String,
    err: String,
    /// Bytes of `out` that [`Transcript::next_line`] has returned.
    taken: usize,
    /// How many streams have not ended.
    open: usize,
}

impl Said {
    fn line(&self, part: &str) -> Option<String> {
        self.out.lines().chain(self.err.lines()).find(|line| line.contains(part)).map(str::to_owned)
    }
}

impl Transcript {
    /// Of a program that messages call `name`, and that has ended when this many streams have been closed.
    pub fn new(name: &str, streams: usize) -> Transcript {
        let said = Said { out: String::new(), err: String::new(), taken: 0, open: streams };
        Transcript(Arc::new(Shared { name: name.to_owned(), said: Mutex::new(said), news: Condvar::new() }))
    }

    /// Reads a stream to its end, on a thread of its own, and closes it.
    pub fn listen(&self, stream: Stream, from: impl Read + Send + 'static) {
        let transcript = self.clone();
        std::thread::spawn(move || {
            let mut from = BufReader::new(from);
            let mut line = Vec::new();
            while matches!(from.read_until(b'\n', &mut line), Ok(1..)) {
                transcript.push(stream, &line);
                line.clear();
            }
            transcript.close();
        });
    }

    /// Adds what the program has said.
    pub fn push(&self, stream: Stream, bytes: &[u8]) {
        let text = String::from_utf8_lossy(bytes);
        let mut said = self.said();
        match stream {
            Stream::Out => said.out.push_str(&text),
            Stream::Err => said.err.push_str(&text),
        }
        drop(said);
        self.0.news.notify_all();
    }

    /// Notes that one of the streams has ended.
    pub fn close(&self) {
        self.said().open -= 1;
        self.0.news.notify_all();
    }

    /// What the program is called.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// All that was said until now on standard output.
    pub fn out(&self) -> String {
        self.said().out.clone()
    }

    /// All that was said until now on standard error.
    pub fn err(&self) -> String {
        self.said().err.clone()
    }

    /// Waits for a line with this part, and returns it.
    #[track_caller]
    pub fn line(&self, part: &str) -> String {
        self.says_one_of(&[part])
            .unwrap_or_else(|| panic!("{} never said `{part}`: {}{}", self.name(), self.out(), self.err()))
    }

    /// Whether the program says this before it ends.
    pub fn says(&self, part: &str) -> bool {
        self.says_one_of(&[part]).is_some()
    }

    /// The first line with one of these parts, if the program says one before it ends.
    pub fn says_one_of(&self, parts: &[&str]) -> Option<String> {
        self.wait(|said| parts.iter().find_map(|part| said.line(part)))
    }

    /// What comes after this in the line with it, such as an address.
    #[track_caller]
    pub fn after(&self, part: &str) -> String {
        let line = self.line(part);
        let (_, rest) = line.split_once(part).expect("the line with it");
        rest.trim().to_owned()
    }

    /// Waits for the next line of standard output, each of which is returned once; `None` after the last one.
    pub fn next_line(&self) -> Option<String> {
        self.wait(|said| {
            let line = said.out[said.taken..].split_inclusive('\n').next()?;
            let is_whole = line.ends_with('\n') || said.open == 0;
            let line = is_whole.then(|| line.to_owned())?;
            said.taken += line.len();
            Some(line.trim_end().to_owned())
        })
    }

    /// Waits until all has been said.
    pub fn end(&self) {
        self.wait(|_| None::<()>);
    }

    /// Waits until `found` returns something; `None` when all has been said before it does.
    fn wait<T>(&self, mut found: impl FnMut(&mut Said) -> Option<T>) -> Option<T> {
        let until = Instant::now() + LIMIT;
        let mut said = self.said();
        loop {
            let now = found(&mut said);
            if now.is_some() || said.open == 0 {
                return now;
            }
            let left = until.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{} hangs: {}{}", self.name(), said.out, said.err);
            said = self.0.news.wait_timeout(said, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn said(&self) -> MutexGuard<'_, Said> {
        self.0.said.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
