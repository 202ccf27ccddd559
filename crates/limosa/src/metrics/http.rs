//! The part of HTTP/1.1 that a scrape needs (RFC 9112): one request on a connection, whose head is bounded, and one answer.
//!
//! One thread serves all connections and waits for none of them. A client that sends nothing, or reads nothing, keeps its place
//! until its time is over, or until another client needs the place.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::listener::Socket;

/// Connections at once.
const CLIENTS_MAX: usize = 16;
/// The longest head of a request, in bytes.
const HEAD_BYTES_MAX: usize = 8 << 10;
/// Limit on the bytes that are read from a client after its answer, so that no reset loses the answer (RFC 9112, 9.6).
const REST_BYTES_MAX: usize = 64 << 10;
/// How long a client has to send its request and to read the answer.
const CLIENT_LIMIT: Duration = Duration::from_secs(10);
/// How long a listener without room for a connection is not polled.
const PAUSE: Duration = Duration::from_millis(100);

/// OpenMetrics text.
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A non-blocking connection.
pub(super) trait Stream: Read + Write + AsFd + Send {
    /// Nothing more is written.
    fn finish(&self);
}

impl Stream for TcpStream {
    fn finish(&self) {
        let _ = self.shutdown(Shutdown::Write);
    }
}

impl Stream for UnixStream {
    fn finish(&self) {
        let _ = self.shutdown(Shutdown::Write);
    }
}

/// The stage of a connection.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// The head of the request so far.
    Asks(Vec<u8>),
    /// The answer, and how much of it was written.
    Takes(Vec<u8>, usize),
    /// It has its answer, and this many bytes are still read and dropped.
    Leaves(usize),
    Gone,
}

struct Client {
    stream: Box<dyn Stream>,
    until: Instant,
    step: Step,
}

/// Answers requests until told to end.
pub(super) fn serve(listener: &Socket, end: &OwnedFd, text: &dyn Fn() -> String) {
    let mut clients: Vec<Client> = Vec::new();
    let mut pause: Option<Instant> = None;
    loop {
        let now = Instant::now();
        pause = pause.filter(|until| *until > now);
        clients.retain(|client| client.until > now);
        let until = clients.iter().map(|client| client.until).chain(pause).min();
        let limit = until.and_then(|until| Timespec::try_from(until - now).ok());
        let wanted = |client: &Client| match client.step {
            Step::Takes(..) => PollFlags::OUT,
            _ => PollFlags::IN,
        };
        let mut fds: Vec<_> = clients
            .iter()
            .map(|client| PollFd::from_borrowed_fd(client.stream.as_fd(), wanted(client)))
            .collect();
        fds.push(PollFd::new(end, PollFlags::IN));
        if pause.is_none() {
            fds.push(PollFd::new(listener, PollFlags::IN));
        }
        // A signal, and then another look.
        let _ = poll(&mut fds, limit.as_ref());
        let ready: Vec<_> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let (of_clients, others) = ready.split_at(clients.len());
        if others.first() == Some(&true) {
            return;
        }
        for (client, _) in clients.iter_mut().zip(of_clients).filter(|(_, ready)| **ready) {
            client.go_on(text);
        }
        clients.retain(|client| client.step != Step::Gone);
        if others.get(1) == Some(&true) {
            match listener.accept() {
                Ok(stream) => {
                    make_room(&mut clients);
                    let until = Instant::now() + CLIENT_LIMIT;
                    clients.push(Client { stream, until, step: Step::Asks(Vec::new()) });
                }
                Err(error) if is_passing(&error) => {}
                Err(error) => {
                    tracing::warn!(%error, "no room for a client of --metrics");
                    pause = Some(Instant::now() + PAUSE);
                }
            }
        }
    }
}

/// Takes the place of a client that has sent no request, else of the oldest client.
fn make_room(clients: &mut Vec<Client>) {
    if clients.len() >= CLIENTS_MAX {
        let idle = clients.iter().position(|client| !matches!(client.step, Step::Takes(..)));
        clients.remove(idle.unwrap_or(0));
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::ConnectionAborted)
}

impl Client {
    /// Reads or writes as much as is possible at once.
    fn go_on(&mut self, text: &dyn Fn() -> String) {
        let step = std::mem::replace(&mut self.step, Step::Gone);
        self.step = match step {
            Step::Asks(head) => self.read_head(head, text),
            Step::Takes(answer, written) => self.write(answer, written),
            Step::Leaves(rest) => {
                let mut dropped = [0; 4096];
                match self.stream.read(&mut dropped) {
                    Ok(0) => Step::Gone,
                    Ok(bytes) if bytes < rest => Step::Leaves(rest - bytes),
                    Err(error) if is_passing(&error) => Step::Leaves(rest),
                    Ok(_) | Err(_) => Step::Gone,
                }
            }
            Step::Gone => Step::Gone,
        };
    }

    fn read_head(&mut self, mut head: Vec<u8>, text: &dyn Fn() -> String) -> Step {
        let mut piece = [0; 1024];
        match self.stream.read(&mut piece) {
            Ok(0) => return Step::Gone,
            Ok(bytes) => head.extend_from_slice(&piece[..bytes]),
            Err(error) if is_passing(&error) => return Step::Asks(head),
            Err(_) => return Step::Gone,
        }
        // A method's name begins with a letter. A client of another protocol would never end its request.
        if !head[0].is_ascii_alphabetic() {
            return self.write(refusal("400 Bad Request", "", "expected a request of HTTP/1.1"), 0);
        }
        let is_whole =
            head.windows(4).any(|end| end == b"\r\n\r\n") || head.windows(2).any(|end| end == b"\n\n");
        match is_whole {
            true => self.write(answer(&head, text), 0),
            false if head.len() > HEAD_BYTES_MAX => {
                self.write(refusal("431 Request Header Fields Too Large", "", "the request is too long"), 0)
            }
            false => Step::Asks(head),
        }
    }

    fn write(&mut self, answer: Vec<u8>, mut written: usize) -> Step {
        while written < answer.len() {
            match self.stream.write(&answer[written..]) {
                Ok(0) => return Step::Gone,
                Ok(bytes) => written += bytes,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Step::Takes(answer, written),
                Err(_) => return Step::Gone,
            }
        }
        self.stream.finish();
        Step::Leaves(REST_BYTES_MAX)
    }
}

/// The answer to a request.
fn answer(head: &[u8], text: &dyn Fn() -> String) -> Vec<u8> {
    let line = head.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = std::str::from_utf8(line).unwrap_or_default().trim_end_matches('\r');
    let words: Vec<_> = line.split(' ').collect();
    let [method, target, version] = words[..] else {
        return refusal("400 Bad Request", "", "expected a request of HTTP/1.1");
    };
    if !version.starts_with("HTTP/1.") || !target.starts_with('/') {
        return refusal("400 Bad Request", "", "expected a request of HTTP/1.1");
    }
    if method != "GET" && method != "HEAD" {
        return refusal("405 Method Not Allowed", "Allow: GET, HEAD\r\n", "expected GET /metrics");
    }
    if target.split('?').next() != Some("/metrics") {
        return refusal("404 Not Found", "", "expected GET /metrics");
    }
    let text = text();
    let mut answer = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        text.len()
    );
    if method == "GET" {
        answer += &text;
    }
    answer.into_bytes()
}

fn refusal(status: &str, more: &str, why: &str) -> Vec<u8> {
    let length = why.len() + 1;
    let head = "Content-Type: text/plain; charset=utf-8\r\nConnection: close";
    format!("HTTP/1.1 {status}\r\n{more}{head}\r\nContent-Length: {length}\r\n\r\n{why}\n").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(request: &str) -> String {
        String::from_utf8(answer(request.as_bytes(), &|| "# EOF\n".into())).unwrap()
    }

    #[test]
    fn metrics_are_all_that_there_is() {
        let got = of("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(got.starts_with("HTTP/1.1 200 ") && got.ends_with("\r\n\r\n# EOF\n"), "{got}");
        assert!(got.contains("Content-Length: 6\r\n") && got.contains("openmetrics-text; version=1.0.0"));
        assert!(of("GET /metrics?x=1 HTTP/1.0\n\n").starts_with("HTTP/1.1 200 "));
        let head = of("HEAD /metrics HTTP/1.1\r\n\r\n");
        assert!(head.contains("Content-Length: 6\r\n") && head.ends_with("\r\n\r\n"), "{head}");
        for (request, status) in [
            ("GET / HTTP/1.1", "404"),
            ("GET /metrics/x HTTP/1.1", "404"),
            ("POST /metrics HTTP/1.1", "405"),
            ("PRI * HTTP/2.0", "400"),
            ("GET /metrics", "400"),
            ("GET  /metrics HTTP/1.1", "400"),
            ("", "400"),
            ("\u{16}\u{3}\u{1}", "400"),
        ] {
            let got = of(&format!("{request}\r\n\r\n"));
            assert!(got.starts_with(&format!("HTTP/1.1 {status} ")), "{request}: {got}");
            assert!(got.contains("Connection: close\r\n"), "{got}");
        }
    }
}
