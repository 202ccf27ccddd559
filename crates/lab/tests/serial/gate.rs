//! A link between two processes that is held where a frame begins, and then cut.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::fresh;

/// Bytes of a frame's header, and of the preface before the first.
pub const HEADER: u64 = 32;
const PREFACE: u64 = 40;

/// Longer than anything here takes; what takes longer hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// Connections after the first.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Later {
    /// Nobody listens any more once the first is made.
    Refused,
    /// They pass.
    Pass,
}

/// A UNIX socket that passes a connection on.
pub struct Gate {
    /// For `--to`.
    pub address: String,
    held: Receiver<()>,
    cut: Sender<()>,
    passing: JoinHandle<[Vec<u8>; 2]>,
}

impl Gate {
    /// For a connection to `to`, held where after so many bytes from the sender, or from the receiver, one more comes.
    pub fn new(to: &str, from_receiver: bool, at: u64, later: Later) -> Gate {
        let (path, to) = (fresh("gate"), to.strip_prefix("unix:").unwrap().to_owned());
        let listener = UnixListener::bind(&path).unwrap();
        let address = format!("unix:{path}");
        let (say_held, held) = channel();
        let (cut, is_cut) = channel();
        let passing = std::thread::spawn(move || {
            let (near, _) = listener.accept().unwrap();
            let far = UnixStream::connect(&to).unwrap();
            match later {
                Later::Refused => std::fs::remove_file(&path).unwrap(),
                Later::Pass => drop(std::thread::spawn(move || pass_all(&listener, &to))),
            }
            pass(&near, &far, from_receiver, at, &say_held, &is_cut)
        });
        Gate { address, held, cut, passing }
    }

    /// Waits until it is held.
    #[track_caller]
    pub fn held(&self) {
        self.held.recv_timeout(LIMIT).expect("the link comes to where it is held");
    }

    /// Cuts it.
    pub fn cut(self) {
        // It may have ended by itself.
        let _ = self.cut.send(());
        drop(self.passing.join().unwrap());
    }

    /// What passed, from the sender and from the receiver, when both have closed it.
    pub fn passed(self) -> [Vec<u8>; 2] {
        self.passing.join().unwrap()
    }
}

/// Until the test ends.
fn pass_all(listener: &UnixListener, to: &str) {
    for near in listener.incoming() {
        let (Ok(near), Ok(far)) = (near, UnixStream::connect(to)) else { return };
        let (held, (_cut, is_cut)) = (channel().0, channel());
        pass(&near, &far, false, u64::MAX, &held, &is_cut);
    }
}

fn pass(
    near: &UnixStream,
    far: &UnixStream,
    from_receiver: bool,
    at: u64,
    held: &Sender<()>,
    is_cut: &Receiver<()>,
) -> [Vec<u8>; 2] {
    let passed = [(); 2].map(|()| Arc::new(Mutex::new(Vec::new())));
    std::thread::scope(|scope| {
        let ways = [(near, far, !from_receiver, &passed[0]), (far, near, from_receiver, &passed[1])];
        for (mut from, mut into, is_held, passed) in ways {
            scope.spawn(move || {
                let mut left = if is_held { at } else { u64::MAX };
                let mut piece = [0; 4096];
                loop {
                    let room = piece.len().min(usize::try_from(left.max(1)).unwrap_or(usize::MAX));
                    let bytes = from.read(&mut piece[..room]).unwrap_or(0);
                    if bytes > 0 && left == 0 {
                        // The frame that is not to pass is on its way.
                        let _ = held.send(());
                        return;
                    }
                    if bytes == 0 || into.write_all(&piece[..bytes]).is_err() {
                        let _ = into.shutdown(Shutdown::Write);
                        return;
                    }
                    passed.lock().unwrap().extend_from_slice(&piece[..bytes]);
                    left -= bytes as u64;
                }
            });
        }
        // A gate that is held nowhere ends with its connection.
        if at < u64::MAX {
            let _ = is_cut.recv();
            for end in [near, far] {
                let _ = end.shutdown(Shutdown::Both);
            }
        }
    });
    passed.map(|passed| std::mem::take(&mut *passed.lock().unwrap()))
}

/// Where frames begin, the preface as the first.
pub fn frames(sent: &[u8]) -> Vec<u64> {
    let (mut begins, mut at) = (vec![0], PREFACE);
    while at < sent.len() as u64 {
        begins.push(at);
        let length = &sent[at as usize + 8..][..4];
        at += HEADER + u64::from(u32::from_le_bytes(length.try_into().unwrap()));
    }
    assert_eq!(at, sent.len() as u64, "the last frame is whole");
    begins
}
