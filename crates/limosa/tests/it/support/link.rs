//! A link between a sender and a receiver that counts what passes, and is held or cut where a test
//! wants it.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use super::{Folder, LIMIT};

/// What happens on the first connection. Those that come after it pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    Pass,
    /// After this number of bytes from the sender, nothing passes until the test says so.
    Hold(u64),
    /// After this number of bytes from the sender, the link is gone.
    Cut(u64),
    /// After this number of bytes from the receiver, the link is gone.
    CutBack(u64),
}

#[derive(Default)]
struct Gate {
    /// Whether the link is held, and whether it may go on.
    held: Mutex<(bool, bool)>,
    news: Condvar,
}

/// A UNIX socket that passes everything on to another one.
pub struct Proxy {
    /// For `--to`.
    pub address: String,
    gate: Arc<Gate>,
    counts: Arc<[AtomicU64; 2]>,
}

impl Proxy {
    /// Listens in the folder, and connects to what listens at `to`.
    pub fn new(folder: &Folder, to: &str, plan: Plan) -> Proxy {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = folder.path(&format!("proxy-{number}"));
        let listener = UnixListener::bind(&path).unwrap();
        let to = PathBuf::from(to.strip_prefix("unix:").unwrap());
        let gate = Arc::new(Gate::default());
        let counts = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let shared = (Arc::clone(&gate), Arc::clone(&counts));
        std::thread::spawn(move || {
            let mut plan = plan;
            for near in listener.incoming() {
                let Ok(near) = near else { return };
                // Nobody there: nobody is here either.
                let Ok(far) = UnixStream::connect(&to) else { return };
                for back in [false, true] {
                    let (from, into) = if back { (&far, &near) } else { (&near, &far) };
                    let (from, into) = (from.try_clone().unwrap(), into.try_clone().unwrap());
                    let shared = shared.clone();
                    std::thread::spawn(move || {
                        pass(from, into, back, plan, &shared.0, &shared.1[usize::from(back)])
                    });
                }
                plan = Plan::Pass;
            }
        });
        Proxy { address: format!("unix:{}", path.display()), gate, counts }
    }

    /// Waits until the link is held.
    pub fn held(&self) {
        let held = self.gate.held.lock().unwrap();
        let (_held, timeout) = self.gate.news.wait_timeout_while(held, LIMIT, |held| !held.0).unwrap();
        assert!(!timeout.timed_out(), "the link never came to where it is held");
    }

    /// Lets everything pass from now on.
    pub fn release(&self) {
        self.gate.held.lock().unwrap().1 = true;
        self.gate.news.notify_all();
    }

    /// Bytes that passed from the sender, and from the receiver.
    pub fn counts(&self) -> (u64, u64) {
        (self.counts[0].load(Ordering::Relaxed), self.counts[1].load(Ordering::Relaxed))
    }
}

static NEXT: AtomicU64 = AtomicU64::new(0);

fn pass(mut from: UnixStream, mut into: UnixStream, back: bool, plan: Plan, gate: &Gate, count: &AtomicU64) {
    let mut limit = match (plan, back) {
        (Plan::Hold(at) | Plan::Cut(at), false) | (Plan::CutBack(at), true) => at,
        _ => u64::MAX,
    };
    let mut piece = [0; 64 << 10];
    loop {
        if limit == 0 {
            let Plan::Hold(_) = plan else { break };
            let mut held = gate.held.lock().unwrap();
            held.0 = true;
            gate.news.notify_all();
            drop(gate.news.wait_while(held, |held| !held.1).unwrap());
            limit = u64::MAX;
        }
        let room = piece.len().min(usize::try_from(limit).unwrap_or(usize::MAX));
        match from.read(&mut piece[..room]) {
            Ok(0) | Err(_) => {
                // The other way may still have something to say.
                let _ = into.shutdown(Shutdown::Write);
                return;
            }
            Ok(bytes) => {
                if into.write_all(&piece[..bytes]).is_err() {
                    break;
                }
                count.fetch_add(bytes as u64, Ordering::Relaxed);
                limit -= bytes as u64;
            }
        }
    }
    for end in [from, into] {
        let _ = end.shutdown(Shutdown::Both);
    }
}
