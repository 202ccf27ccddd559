//! The request that publishes a snapshot, where it or its answer is lost on the way: what the saver says is what is true.

mod support;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use limosa_client::DeviceExt;
use limosa_migrate::{AfterLoad, AfterSave, Outcome, Received};
use limosa_protocol::State;
use limosa_store::Object;
use support::{BUCKET, End, Server, object};

/// What becomes of the request that completes an upload.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Plan {
    /// The first is lost.
    RequestIsLost,
    /// The first is carried out, and its answer is lost.
    AnswerIsLost,
    /// The same, and after it nothing comes through any more.
    NetworkIsLost,
    /// All are lost, and the first is carried out later, just before the upload is given up.
    ComesLate,
}

/// Between a saver and the server.
struct Gate {
    plan: Plan,
    server: std::net::SocketAddr,
    completions: AtomicUsize,
    closed: AtomicBool,
    late: Mutex<Option<Vec<u8>>>,
}

/// A gate before the server, and the object behind it.
fn gate(server: &Server, plan: Plan) -> (Arc<Gate>, Object) {
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
    (gate, Object::new(&format!("s3://{BUCKET}/lost"), variables).unwrap())
}

impl Gate {
    /// One connection, request by request.
    fn pass(&self, mut near: TcpStream) {
        let mut far = TcpStream::connect(self.server).unwrap();
        while let Some(request) = message(&mut near, false) {
            let first = String::from_utf8_lossy(&request[..request.len().min(400)]).into_owned();
            let is_completion = first.starts_with("POST ") && first.contains("uploadId=");
            let is_first = is_completion && self.completions.fetch_add(1, Ordering::SeqCst) == 0;
            match self.plan {
                Plan::RequestIsLost if is_first => break,
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

/// The snapshot is whole, and the guest goes on where it is loaded.
#[track_caller]
fn is_there(server: &Server, source: &End) {
    assert_eq!((server.objects(), server.unfinished()), (vec!["lost".to_owned()], 0));
    let end = End::new(0);
    let received = end.load(&object(server, "lost"), AfterLoad::Run);
    assert!(matches!(received, Received::Runs(_)), "{received:?}");
    assert!(end.contents() == source.contents());
}

fn save(plan: Plan) -> (Server, End, Outcome, usize) {
    let (server, source) = (Server::start(), End::new(7));
    let (gate, object) = gate(&server, plan);
    let outcome = source.save(&object, AfterSave::Stop, None);
    (server, source, outcome, gate.completions.load(Ordering::SeqCst))
}

#[test]
fn a_snapshot_whose_completion_is_lost_on_the_way_is_published_by_the_next_one() {
    let (server, source, outcome, completions) = save(Plan::RequestIsLost);
    assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
    assert!(completions > 1);
    is_there(&server, &source);
}

#[test]
fn a_snapshot_that_was_published_though_the_answer_was_lost_is_said_to_be_there() {
    let (server, source, outcome, completions) = save(Plan::AnswerIsLost);
    assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
    assert!(completions > 0);
    assert_eq!(source.device.state().unwrap(), State::Stop);
    is_there(&server, &source);
}

#[test]
fn a_completion_that_is_carried_out_late_is_not_taken_for_one_that_failed() {
    let (server, source, outcome, _) = save(Plan::ComesLate);
    assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
    assert_eq!(source.device.state().unwrap(), State::Stop);
    is_there(&server, &source);
}

#[test]
fn a_saver_that_cannot_learn_whether_it_published_says_so() {
    let (server, source, outcome, _) = save(Plan::NetworkIsLost);
    let Outcome::Undone { why, .. } = outcome else { panic!("{outcome:?}") };
    let why = why.to_string();
    assert!(why.contains("it is not known whether it was published: look with `limosa verify`"), "{why}");
    assert_eq!(source.device.state().unwrap(), State::Running, "the guest goes on");
    // It is there: who looks finds it.
    let (there, limit) = (object(&server, "lost"), source.options.silence_max);
    limosa_migrate::verify(&there, limit, None).unwrap();
}
