//! The example of a VMM, as two processes: its guest moves under load with nothing lost, and goes on where it was when
//! the destination dies or the move is called off. When the link dies at the commit it runs where the destination says
//! that it does, and nowhere as long as nobody says.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;
use std::sync::mpsc::{Receiver, channel};

use limosa_stream::{HEADER_BYTES, Header, Kind, PREFACE_BYTES, PROOF_BYTES};
use limosa_testing::{LIMIT, Process, built_example};

/// So few bytes a second that a move does not end by itself while a test runs.
const SLOW: &str = "300000";

/// A process of the example.
struct Vmm(Process);

impl Vmm {
    fn new(arguments: &[&str]) -> Vmm {
        static PROGRAM: LazyLock<PathBuf> = LazyLock::new(|| built_example("limosa-migrate", "toy_vmm"));
        Vmm(Process::start_with_input(Command::new(&*PROGRAM).args(arguments), Stdio::piped()))
    }

    fn say(&mut self, line: &str) {
        self.0.say(line);
    }

    /// The rest of the next line that begins so.
    #[track_caller]
    fn expect(&self, begin: &str) -> String {
        loop {
            let line = self.0.next_line();
            let line = line.unwrap_or_else(|| panic!("no `{begin}` after {}{}", self.0.out(), self.0.err()));
            if let Some(rest) = line.strip_prefix(begin) {
                return rest.trim().to_string();
            }
            assert!(!line.starts_with("the guest has crashed"), "{line}");
        }
    }

    fn count(&mut self) -> u64 {
        self.say("count");
        self.expect("count ").parse().unwrap()
    }

    /// The guest counts on from there.
    fn counts_beyond(&mut self, from: u64) {
        while self.count() <= from + 1000 {}
    }
}

/// A guest that runs, one that waits for it, and where.
fn two() -> (Vmm, Vmm, String, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let address = format!("unix:{}", folder.path().join("move").display());
    let destination = Vmm::new(&["receive", &address]);
    destination.expect("listens at");
    let mut source = Vmm::new(&["run"]);
    source.expect("runs");
    source.counts_beyond(5000);
    (source, destination, address, folder)
}

/// Moves a guest that has counted to `count`, and sees it count on at the destination.
fn moves_on(source: &mut Vmm, destination: &mut Vmm, address: &str, count: u64) {
    source.say(&format!("send {address}"));
    source.expect("moved");
    destination.expect("runs");
    destination.counts_beyond(count);
}

#[test]
fn a_guest_moves_between_two_processes_under_load_with_nothing_lost() {
    let (mut source, mut destination, address, _folder) = two();
    source.say(&format!("send {address}"));
    let left = source.expect("commits");
    let (_, left) = left.split_once(": ").unwrap();
    // Its prepare hook has compared each page with the count.
    assert_eq!(destination.expect("takes over:"), left, "count and checksum of all memory");
    source.expect("moved");
    destination.expect("runs");
    let count = left.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert_eq!(source.count(), count, "it stands still");
    destination.counts_beyond(count);
    assert_eq!((source.0.end().code, destination.0.end().code), (0, 0));
}

#[test]
fn a_destination_that_is_killed_leaves_the_guest_running_and_movable() {
    let (mut source, destination, address, folder) = two();
    source.say(&format!("send {address} {SLOW}"));
    source.expect("phase pre-copy");
    destination.0.kill();
    source.expect("undone:");
    let count = source.count();
    source.counts_beyond(count);

    std::fs::remove_file(folder.path().join("move")).unwrap();
    let mut another = Vmm::new(&["receive", &address]);
    another.expect("listens at");
    moves_on(&mut source, &mut another, &address, count);
}

#[test]
fn a_move_that_is_called_off_leaves_the_guest_running_and_the_destination_waiting() {
    let (mut source, mut destination, address, _folder) = two();
    source.say(&format!("send {address} {SLOW}"));
    source.expect("phase pre-copy");
    source.say("cancel");
    source.expect("undone: cancelled");
    destination.expect("discarded:");
    let count = source.count();
    source.counts_beyond(count);
    moves_on(&mut source, &mut destination, &address, count);
}

/// Where a source connects to, instead of to the destination. When the COMMIT of the first move comes, this is asked
/// whether it arrives there, and then the link is cut, before any answer. Links that come later pass once the sender of
/// `opens` is gone.
fn gate(
    folder: &Path,
    to: &str,
    opens: Receiver<()>,
    arrives: impl FnOnce() -> bool + Send + 'static,
) -> String {
    let (path, to) = (folder.join("gate"), PathBuf::from(to.strip_prefix("unix:").unwrap()));
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        let mut arrives = Some(arrives);
        for near in listener.incoming() {
            if arrives.is_none() {
                // Nothing is ever sent: this is its sender's end.
                let _ = opens.recv();
            }
            // Where nobody listens the source is not heard either.
            let (Ok(near), Ok(far)) = (near, UnixStream::connect(&to)) else { continue };
            let (back_from, back_to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
            std::thread::spawn(move || pass(back_from, back_to));
            let arrives = arrives.take();
            std::thread::spawn(move || match arrives {
                Some(arrives) => pass_until_commit(near, far, arrives),
                None => pass(near, far),
            });
        }
    });
    format!("unix:{}", path.display())
}

fn pass(mut from: UnixStream, mut to: UnixStream) {
    // It may be cut, by either side or by [`pass_until_commit`].
    let _ = std::io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
}

/// Frame by frame.
fn pass_until_commit(mut from: UnixStream, mut to: UnixStream, arrives: impl FnOnce() -> bool) {
    let mut piece = vec![0; PREFACE_BYTES];
    from.read_exact(&mut piece).unwrap();
    to.write_all(&piece).unwrap();
    loop {
        let mut header = [0; HEADER_BYTES];
        from.read_exact(&mut header).unwrap();
        let decoded = Header::decode(&header).unwrap();
        if decoded.kind == Kind::COMMIT {
            let mut proof = [0; PROOF_BYTES];
            from.read_exact(&mut proof).unwrap();
            let arrives = arrives();
            // The source has sent it, and what goes back ends here.
            from.shutdown(Shutdown::Both).unwrap();
            if arrives {
                to.write_all(&[&header[..], &proof].concat()).unwrap();
            }
            // A process that was killed has done so itself.
            let _ = to.shutdown(Shutdown::Both);
            return;
        }
        piece.resize(decoded.length as usize, 0);
        from.read_exact(&mut piece).unwrap();
        to.write_all(&header).unwrap();
        to.write_all(&piece).unwrap();
    }
}

#[test]
fn a_guest_whose_move_is_in_doubt_stays_stopped_until_the_destination_says_that_it_runs_there() {
    let (mut source, mut destination, address, folder) = two();
    let (closed, opens) = channel();
    let gate = gate(folder.path(), &address, opens, || true);
    source.say(&format!("send {gate}"));
    let left = source.expect("commits");
    source.expect("in doubt:");
    // A question that overtakes the COMMIT decides that the guest goes on at the source.
    destination.expect("runs");
    drop(closed);
    // It asks by itself.
    source.expect("moved");
    let (_, left) = left.split_once(": count ").unwrap();
    let count = left.split_whitespace().next().unwrap().parse().unwrap();
    assert_eq!(source.count(), count, "it stands still");
    destination.counts_beyond(count);
}

#[test]
fn a_guest_whose_move_is_in_doubt_goes_on_when_the_destination_says_that_it_never_ran() {
    let (mut source, mut destination, address, folder) = two();
    let gate = gate(folder.path(), &address, channel().1, || false);
    source.say(&format!("send {gate}"));
    source.expect("in doubt:");
    destination.expect("discarded:");
    destination.expect("answered for");
    source.expect("undone:");
    let count = source.count();
    source.counts_beyond(count);
    moves_on(&mut source, &mut destination, &address, count);
}

#[test]
fn a_guest_whose_move_is_in_doubt_stays_stopped_when_the_destination_is_killed() {
    let (mut source, destination, address, folder) = two();
    let ((reached, commits), (killed, goes_on)) = (channel(), channel());
    let gate = gate(folder.path(), &address, channel().1, move || {
        reached.send(()).unwrap();
        goes_on.recv().unwrap()
    });
    source.say(&format!("send {gate}"));
    commits.recv_timeout(LIMIT).unwrap();
    destination.0.kill();
    killed.send(false).unwrap();
    source.expect("in doubt:");
    let count = source.count();
    // One that remembers nothing of the move says so, and the source guesses nothing.
    std::fs::remove_file(folder.path().join("move")).unwrap();
    let another = Vmm::new(&["receive", &address]);
    another.expect("listens at");
    source.say(&format!("resolve {address}"));
    assert!(another.expect("answered for").ends_with("Unknown"));
    source.expect("in doubt:");
    assert_eq!(source.count(), count, "it stands still");
}

#[test]
fn a_guest_that_is_too_fast_for_the_link_is_slowed_down_until_it_fits_and_then_no_more() {
    let (mut source, mut destination, address, _folder) = two();
    source.say(&format!("send {address} 30000000"));
    source.expect("throttle 1:");
    let left = source.expect("commits");
    assert!(source.expect("throttle 0:").starts_with("the vCPU rests 0ns"));
    source.expect("moved");
    assert_eq!(destination.expect("takes over:"), left.split_once(": ").unwrap().1);
    destination.expect("runs");
    let count = source.count();
    destination.counts_beyond(count);
}
