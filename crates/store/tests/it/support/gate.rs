//! A proxy before a server that loses the request which completes an upload, or its answer.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::server::Server;

/// What happens to the request that completes an upload.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// The first is lost.
    RequestIsLost,
    /// The first is carried out, and its answer is lost.
    AnswerIsLost,
    /// The same, and after it nothing gets through any more.
    NetworkIsLost,
    /// Its first request is lost, and after it nothing gets through any more.
    NetworkIsLostBefore,
    /// Another client has aborted the upload.
    IsAborted,
    /// All are lost, and the first is carried out later, just before the upload is given up.
    ComesLate,
}

/// Between a saver and the server.
pub struct Gate {
    plan: Plan,
    server: SocketAddr,
    pub completions: AtomicUsize,
    /// Nothing gets through.
    pub closed: AtomicBool,
    late: Mutex<Option<Vec<u8>>>,
}

impl Gate {
    /// A gate before the server, and the variables that lead through it.
    pub fn new(server: &Server, plan: Plan) -> (Arc<Gate>, Vec<(String, String)>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (completions, closed, late) = (AtomicUsize::new(0), AtomicBool::new(false), Mutex::default());
        let gate = Arc::new(Gate { plan, server: server.address, completions, closed, late });
        let shared = Arc::clone(&gate);
        std::thread::spawn(move || {
            for near in listener.incoming() {
                let (near, gate) = (near.unwrap(), Arc::clone(&shared));
                if !gate.closed.load(Ordering::SeqCst) {
                    std::thread::spawn(move || gate.pass(near));
                }
            }
        });
        let variables = server.variables().into_iter().map(|(name, value)| match name.as_str() {
            "AWS_ENDPOINT_URL" => (name, format!("http://{address}")),
            _ => (name, value),
        });
        (gate, variables.collect())
    }

    /// One connection, request by request.
    fn pass(&self, mut near: TcpStream) {
        let mut far = TcpStream::connect(self.server).unwrap();
        while let Some(request) = message(&mut near, false) {
            let first = String::from_utf8_lossy(&request[..request.len().min(400)]).into_owned();
            let is_completion = first.starts_with("POST ") && first.contains("uploadId=");
            let is_first = is_completion && self.completions.fetch_add(1, Ordering::SeqCst) == 0;
            match self.plan {
                Plan::RequestIsLost if is_first => break,
                Plan::NetworkIsLostBefore if is_completion => {
                    self.closed.store(true, Ordering::SeqCst);
                    break;
                }
                Plan::IsAborted if is_completion || first.starts_with("DELETE ") => {
                    // Whether the client gets it shows in what it does next.
                    let _ = near.write_all(NO_SUCH_UPLOAD);
                    continue;
                }
                Plan::ComesLate if is_completion => {
                    self.late.lock().unwrap().get_or_insert(request);
                    break;
                }
                _ => {}
            }
            if first.starts_with("DELETE ")
                && let Some(late) = self.late.lock().unwrap().take()
            {
                let mut far = TcpStream::connect(self.server).unwrap();
                far.write_all(&late).unwrap();
                message(&mut far, false).unwrap();
            }
            far.write_all(&request).unwrap();
            let Some(answer) = message(&mut far, first.starts_with("HEAD ")) else { break };
            if is_first && matches!(self.plan, Plan::AnswerIsLost | Plan::NetworkIsLost) {
                self.closed.store(self.plan == Plan::NetworkIsLost, Ordering::SeqCst);
            }
            let is_lost = is_first && self.plan == Plan::AnswerIsLost;
            if is_lost || self.closed.load(Ordering::SeqCst) || near.write_all(&answer).is_err() {
                break;
            }
        }
        let _ = near.shutdown(Shutdown::Both);
    }
}

/// What S3 answers to the completion or the abort of an upload that was aborted before.
const NO_SUCH_UPLOAD: &[u8] =
    b"HTTP/1.1 404 Not Found\r\ncontent-type: application/xml\r\ncontent-length: 47\r\n\r\n\
                                <Error><Code>NoSuchUpload</Code></Error>       ";

/// A whole message of HTTP, with its body unless it answers a HEAD.
fn message(from: &mut TcpStream, answers_head: bool) -> Option<Vec<u8>> {
    let (mut all, mut byte) = (Vec::new(), [0]);
    while !all.ends_with(b"\r\n\r\n") {
        from.read_exact(&mut byte).ok()?;
        all.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&all).to_ascii_lowercase();
    let field = |name: &str| head.lines().find_map(|line| line.strip_prefix(name).map(str::trim));
    if answers_head || head.starts_with("http/1.1 204") {
        return Some(all);
    }
    if field("transfer-encoding:") == Some("chunked") {
        while !all.ends_with(b"\r\n0\r\n\r\n") {
            from.read_exact(&mut byte).ok()?;
            all.push(byte[0]);
        }
    } else {
        let length = field("content-length:").map_or(0, |length| length.parse().unwrap());
        let begin = all.len();
        all.resize(begin + length, 0);
        from.read_exact(&mut all[begin..]).ok()?;
    }
    Some(all)
}
