//! A machine that tests drive through its agent: the one they run on, or the one at the other end of the
//! cables.

use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use limosa_testing::{Ended, LIMIT, Stream, Transcript};

use crate::{Kind, agent, frame};

/// Where `lab/run` has the agent of the other machine listen: on the first cable.
const THERE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 9, 0, 2), 7);

/// A machine that runs programs for a test.
#[derive(Debug)]
pub struct Machine {
    agent: SocketAddrV4,
    /// Its address on the second cable, over which devices move and which tests cut.
    pub address: Ipv4Addr,
}

impl Machine {
    /// The machine that the test runs on.
    ///
    /// # Panics
    ///
    /// When its loopback interface is down.
    pub fn here() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("the loopback interface is up");
        let port = listener.local_addr().expect("a listener has an address").port();
        thread::spawn(move || agent::serve(&listener));
        let agent = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
        Self { agent, address: Ipv4Addr::new(10, 9, 1, 1) }
    }

    /// The machine at the other end of the cables.
    pub fn there() -> Self {
        Self { agent: THERE, address: Ipv4Addr::new(10, 9, 1, 2) }
    }

    /// Starts a program.
    ///
    /// # Panics
    ///
    /// When the agent cannot be reached or cannot start it.
    #[track_caller]
    pub fn start<S: AsRef<str>>(&self, arguments: &[S]) -> Running {
        let arguments: Vec<&str> = arguments.iter().map(AsRef::as_ref).collect();
        let mut payload = arguments.join("\0");
        payload.push('\0');
        self.ask(frame::RUN, payload.as_bytes(), arguments.join(" "))
    }

    #[track_caller]
    fn ask(&self, kind: u8, payload: &[u8], name: String) -> Running {
        let link = TcpStream::connect_timeout(&self.agent.into(), LIMIT);
        let link = link.unwrap_or_else(|error| panic!("{name}: the agent at {}: {error}", self.agent));
        let sent = link.set_nodelay(true).and_then(|()| frame::send(&link, kind, payload));
        sent.unwrap_or_else(|error| panic!("{name}: the agent at {}: {error}", self.agent));
        let (transcript, end) = (Transcript::new(&name, 1), End::default());
        let running = Running { link, transcript: transcript.clone(), end: Arc::clone(&end) };
        let from = running.link.try_clone().expect("a descriptor is free");
        thread::spawn(move || listen(&from, &transcript, &end));
        running
    }

    /// Runs a program to its end.
    #[track_caller]
    pub fn run<S: AsRef<str>>(&self, arguments: &[S]) -> Ended {
        self.start(arguments).end()
    }

    /// Runs a line of shell that must succeed; gives what it printed, without white space at the end.
    #[track_caller]
    pub fn shell(&self, line: &str) -> String {
        self.run(&["/bin/sh", "-c", line]).ok().trim_end().to_owned()
    }

    /// Writes a file there.
    ///
    /// # Panics
    ///
    /// When it cannot be written; with the file and why.
    #[track_caller]
    pub fn write(&self, file: &str, text: &str) {
        self.ask(frame::WRITE, format!("{file}\0{text}").as_bytes(), format!("writing {file}")).end().ok();
    }

    /// Reads a file there, without white space at its end.
    ///
    /// # Panics
    ///
    /// When it cannot be read; with the file and why.
    #[track_caller]
    pub fn read(&self, file: &str) -> String {
        let text = self.ask(frame::READ, file.as_bytes(), format!("reading {file}")).end().ok();
        text.trim_end().to_owned()
    }

    /// Cuts the second cable on this machine's side until what is given is dropped: without its address
    /// nothing leaves it and nothing that comes is taken, and nobody is told. (Setting the device down
    /// would do the same, but a device of User-Mode Linux that was given as a descriptor comes up once only.)
    #[track_caller]
    pub fn cut(&self) -> Cut<'_> {
        self.cable("del");
        Cut { machine: self }
    }

    fn cable(&self, what: &str) {
        self.shell(&format!("busybox ip address {what} {}/24 dev vec1", self.address));
    }

    /// Makes a mediated device there. It goes when it is dropped.
    ///
    /// # Panics
    ///
    /// When the kernel there refuses.
    #[track_caller]
    pub fn mdev(&self, kind: &Kind) -> Placed<'_> {
        let uuid = crate::mdev::random_uuid();
        let Kind { parent, name } = kind;
        let types = format!("{}/{parent}/mdev_supported_types", crate::kind::PARENTS);
        self.write(&format!("{types}/{name}/create"), &uuid);
        Placed { machine: self, uuid }
    }
}

/// A mediated device of a machine.
#[derive(Debug)]
pub struct Placed<'a> {
    machine: &'a Machine,
    uuid: String,
}

impl Placed<'_> {
    /// The UUID by which it is found in `/sys/bus/mdev/devices`.
    pub fn uuid(&self) -> &str {
        &self.uuid
    }

    /// Writes an attribute of its driver.
    ///
    /// # Panics
    ///
    /// When the driver refuses.
    #[track_caller]
    pub fn set(&self, attribute: &str, value: impl ToString) {
        self.machine.write(&self.file(attribute), &value.to_string());
    }

    /// Reads an attribute of its driver, without white space at the end.
    ///
    /// # Panics
    ///
    /// When there is no such attribute.
    #[track_caller]
    pub fn get(&self, attribute: &str) -> String {
        self.machine.read(&self.file(attribute))
    }

    fn file(&self, attribute: &str) -> String {
        format!("/sys/bus/mdev/devices/{}/{attribute}", self.uuid)
    }
}

impl Drop for Placed<'_> {
    fn drop(&mut self) {
        // While a test fails the machine may be in any condition, and its reason is the better one.
        if !thread::panicking() {
            self.machine.write(&self.file("remove"), "1");
        }
    }
}

/// A cable that is cut; joined again when this is dropped.
#[derive(Debug)]
pub struct Cut<'a> {
    machine: &'a Machine,
}

impl Drop for Cut<'_> {
    fn drop(&mut self) {
        self.machine.cable("add");
    }
}

/// How a program of a machine ended: its exit code, or why it could not be run.
type End = Arc<Mutex<Option<Result<i32, String>>>>;

/// Takes all that the agent sends, to the end.
fn listen(link: &TcpStream, transcript: &Transcript, end: &End) {
    let ended = loop {
        match frame::receive(link) {
            Ok((frame::OUT, text)) => transcript.push(Stream::Out, &text),
            Ok((frame::ERR, text)) => transcript.push(Stream::Err, &text),
            Ok((frame::END, payload)) => break frame::number(&payload).map_err(|error| error.to_string()),
            Ok((frame::FAILED, text)) => break Err(String::from_utf8_lossy(&text).into_owned()),
            Ok((kind, _)) => break Err(format!("the agent sent a frame of kind {kind}")),
            Err(error) => break Err(format!("the agent is gone: {error}")),
        }
    };
    *end.lock().unwrap_or_else(PoisonError::into_inner) = Some(ended);
    transcript.close();
}

/// A program that a machine runs, and by [`Deref`] what it says. Killed when it is dropped.
pub struct Running {
    link: TcpStream,
    transcript: Transcript,
    end: End,
}

impl Running {
    /// Gives it and all that it started a signal.
    #[track_caller]
    pub fn signal(&self, signal: rustix::process::Signal) {
        let sent = frame::send(&self.link, frame::SIGNAL, &signal.as_raw().to_le_bytes());
        sent.unwrap_or_else(|error| panic!("{}: {error}", self.name()));
    }

    /// Waits for its end.
    ///
    /// # Panics
    ///
    /// When it could not be run.
    #[track_caller]
    pub fn end(mut self) -> Ended {
        self.wait()
    }

    /// As [`Running::end`], for one that is still needed.
    #[track_caller]
    pub fn wait(&mut self) -> Ended {
        self.transcript.end();
        let end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        match end.as_ref().expect("the end comes before that of what it says") {
            Ok(code) => Ended { code: *code, out: self.transcript.out(), err: self.transcript.err() },
            Err(error) => panic!("{}: {error}", self.name()),
        }
    }

    /// As with `kill -9`; returns when it is gone.
    #[track_caller]
    pub fn kill(self) -> Ended {
        self.signal(rustix::process::Signal::KILL);
        self.end()
    }
}

impl Deref for Running {
    type Target = Transcript;

    fn deref(&self) -> &Transcript {
        &self.transcript
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // The agent kills what nobody listens to any more.
        let _ = self.link.shutdown(std::net::Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_heard_signalled_and_ended_by_the_agent_of_this_machine() {
        let here = Machine::here();
        assert_eq!(here.shell("echo out; echo err >&2"), "out");
        let ended = here.run(&["/bin/sh", "-c", "echo out; echo no >&2; exit 3"]);
        assert_eq!((ended.code, &*ended.out, &*ended.err), (3, "out\n", "no\n"));
        let running = here.start(&["/bin/sh", "-c", "echo begun; while :; do :; done"]);
        assert_eq!(running.line("begun"), "begun");
        assert_eq!(running.kill().code, -9);
        let missing = std::panic::catch_unwind(|| here.run(&["/nowhere/at/all"])).unwrap_err();
        let told = missing.downcast_ref::<String>().expect("a message");
        assert!(told.contains("/nowhere/at/all") && told.contains("No such file"), "{told}");
    }
}
