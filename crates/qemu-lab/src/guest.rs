//! A booted Linux whose init is `limosa-qemu-guest`: jobs that use the served devices, and what they count.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use limosa_testing::{LIMIT, Transcript};
use serde::{Deserialize, Serialize};

/// What the guest can be made to do, again and again until it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestJob {
    /// Sends lines over the serial port of `limosa serve uart`, by Linux' driver, and compares what comes back.
    Serial,
    /// Lets `limosa serve synthetic` write pages into memory on its own, and checks each.
    Dma,
    /// Lets a [`TestDevice`](crate::TestDevice) copy memory and send the messages of all its vectors.
    Messages,
}

/// What a job has done so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobCounts {
    /// Rounds that were finished, right or wrong.
    pub rounds: u64,
    /// Rounds in which something was not as it had to be.
    pub wrong: u64,
    /// What it was, for the first few of them.
    pub faults: Vec<String>,
}

/// What the guest says of itself.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Counts {
    /// By job, those that were started.
    pub jobs: Vec<(GuestJob, JobCounts)>,
    /// Lines of the kernel's log that are warnings or worse, since the guest was ready.
    pub complaints: Vec<String>,
}

impl Counts {
    /// Those of a job.
    ///
    /// # Panics
    ///
    /// When it was not started.
    pub fn of(&self, job: GuestJob) -> &JobCounts {
        let found = self.jobs.iter().find(|(of, _)| *of == job);
        &found.unwrap_or_else(|| panic!("{job:?} was not started")).1
    }
}

/// What is said to the guest, a JSON document a line; each is answered by one line.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Starts a job; answered by `null` when its device was found.
    Start(GuestJob),
    /// Answered by [`Counts`] as soon as every job has finished this many rounds more than at the last answer.
    Advance(u64),
}

/// The connection to the guest's jobs.
pub struct Guest {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    console: PathBuf,
    /// Of QEMU.
    transcript: Transcript,
}

impl Guest {
    pub(crate) fn new(stream: UnixStream, console: PathBuf, transcript: Transcript) -> Guest {
        stream.set_read_timeout(Some(LIMIT)).expect("a socket of ours");
        let writer = stream.try_clone().expect("an fd");
        let mut guest = Guest { reader: BufReader::new(stream), writer, console, transcript };
        let ready: String = guest.answer().unwrap_or_else(|error| {
            let said = guest.transcript.err();
            panic!("{error}; QEMU said {said}; the guest's console: {}", guest.console())
        });
        assert_eq!(ready, "ready");
        guest
    }

    /// Starts a job.
    ///
    /// # Panics
    ///
    /// When its device is not there.
    pub fn start(&mut self, job: GuestJob) {
        let () = self.request(Request::Start(job)).and_then(|()| self.answer()).expect("the guest answers");
    }

    /// Waits until every job has finished this many rounds more, and says what they count.
    ///
    /// # Panics
    ///
    /// When the guest is gone.
    pub fn advance(&mut self, rounds: u64) -> Counts {
        self.try_advance(rounds).unwrap_or_else(|said| {
            panic!("the guest is gone; QEMU said {said}; the guest's console: {}", self.console())
        })
    }

    /// The same; `Err` with what QEMU said when it ends meanwhile.
    pub fn try_advance(&mut self, rounds: u64) -> Result<Counts, String> {
        self.request(Request::Advance(rounds)).and_then(|()| self.answer()).map_err(|_| {
            self.transcript.end();
            self.transcript.err()
        })
    }

    /// All that the guest's kernel and jobs printed.
    pub fn console(&self) -> String {
        fs::read_to_string(&self.console).unwrap_or_default()
    }

    fn request(&mut self, request: Request) -> io::Result<()> {
        let line = serde_json::to_string(&request).expect("a plain request");
        writeln!(self.writer, "{line}")
    }

    /// `Err` when QEMU is gone.
    fn answer<T: for<'a> Deserialize<'a>>(&mut self) -> io::Result<T> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let answer: Result<Result<T, String>, _> = serde_json::from_str(&line);
        let answer = answer.unwrap_or_else(|error| panic!("{error}: {line}"));
        Ok(answer.unwrap_or_else(|error| panic!("the guest: {error}; its console: {}", self.console())))
    }
}
