//! A link between two processes that is held where a frame begins, and then cut.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use limosa_stream::{Header, Kind};

use super::fresh;

/// Bytes of a frame's header, and of the preface before the first.
pub const HEADER: u64 = 32;
const PREFACE: usize = 40;

/// Longer than anything here takes; what takes longer hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// Where one way of a link is held. Pre-copy is as long as it takes, so frames are known by kind, not by number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nowhere.
    Never,
    /// Before the preface.
    Preface,
    /// Before the first frame of a kind.
    Frame(Kind),
}

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
    /// For a connection to `to`, whose way from the sender or from the receiver is held at a place.
    pub fn new(to: &str, from_receiver: bool, at: Place, later: Later) -> Gate {
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
        pass(&near, &far, false, Place::Never, &held, &is_cut);
    }
}

fn pass(
    near: &UnixStream,
    far: &UnixStream,
    from_receiver: bool,
    at: Place,
    held: &Sender<()>,
    is_cut: &Receiver<()>,
) -> [Vec<u8>; 2] {
    let passed = [(); 2].map(|()| Arc::new(Mutex::new(Vec::new())));
    std::thread::scope(|scope| {
        let ways = [(near, far, !from_receiver, &passed[0]), (far, near, from_receiver, &passed[1])];
        for (mut from, mut into, is_held, passed) in ways {
            scope.spawn(move || {
                let mut is_preface = true;
                // A link that ends in a frame passes no part of it.
                while let Some((place, piece)) = next(&mut from, is_preface) {
                    if is_held && place == at {
                        // The frame that is not to pass has come.
                        let _ = held.send(());
                        return;
                    }
                    if into.write_all(&piece).is_err() {
                        break;
                    }
                    passed.lock().unwrap().extend_from_slice(&piece);
                    is_preface = false;
                }
                let _ = into.shutdown(Shutdown::Write);
            });
        }
        // A gate that is held nowhere ends with its connection.
        if at != Place::Never {
            let _ = is_cut.recv();
            for end in [near, far] {
                let _ = end.shutdown(Shutdown::Both);
            }
        }
    });
    passed.map(|passed| std::mem::take(&mut *passed.lock().unwrap()))
}

/// The preface or the frame that comes next, whole; `None` at the end, and before anything else.
fn next(from: &mut impl Read, is_preface: bool) -> Option<(Place, Vec<u8>)> {
    let mut piece = vec![0; if is_preface { PREFACE } else { HEADER as usize }];
    from.read_exact(&mut piece).ok()?;
    if is_preface {
        return Some((Place::Preface, piece));
    }
    // A sender that has lost its receiver asks once what listens here, in another protocol.
    let header = Header::decode(piece.first_chunk()?).ok()?;
    piece.resize(HEADER as usize + header.length as usize, 0);
    from.read_exact(&mut piece[HEADER as usize..]).ok()?;
    Some((Place::Frame(header.kind), piece))
}

/// The places of what was sent, each kind of frame once.
pub fn places(sent: &[u8]) -> Vec<Place> {
    let mut places = Vec::new();
    for (_, place) in all(sent) {
        if !places.contains(&place) {
            places.push(place);
        }
    }
    places
}

/// Where frames begin, the preface as the first.
pub fn frames(sent: &[u8]) -> Vec<u64> {
    all(sent).into_iter().map(|(begin, _)| begin).collect()
}

fn all(sent: &[u8]) -> Vec<(u64, Place)> {
    let (mut all, mut left, mut at) = (Vec::new(), sent, 0);
    while let Some((place, piece)) = next(&mut left, all.is_empty()) {
        all.push((at as u64, place));
        at += piece.len();
    }
    assert_eq!(at, sent.len(), "the last frame is whole");
    all
}
