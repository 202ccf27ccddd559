//! Links below TLS that are cut, altered, closed or full.

use std::io::IoSlice;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use limosa_migrate::link::{Link, LinkError, SocketLink, Tls, TlsLink, Wait};
use limosa_migrate::{Cancel, Outcome, Received};
use limosa_protocol::State;

use super::{Authority, LIMIT, address, attempt, boxed, ends, resolve, wait};
use crate::common::{Fault, FaultyLink, Way, options};

/// Bytes that each side sends in a whole move, about: signatures differ in length.
fn lengths(source: &Tls, destination: &Tls) -> (u64, u64) {
    let ends = ends();
    let (near, far) = SocketLink::pair().unwrap();
    let near = FaultyLink::new(near, Way::Out, u64::MAX, Fault::Cut);
    let (sent, received) = (Arc::clone(&near.sent), Arc::clone(&near.received));
    let (outcome, there) = attempt(
        &ends,
        || boxed(TlsLink::connect(near, source, &address(), wait())),
        || boxed(TlsLink::accept(far, destination, wait())),
    );
    assert!(ends.check(outcome.unwrap(), there.unwrap(), "no fault"));
    (sent.load(Ordering::SeqCst), received.load(Ordering::SeqCst))
}

/// One move with a fault below TLS; whether it was moved.
fn with_fault(source: &Tls, destination: &Tls, way: Way, at: u64, fault: Fault) -> bool {
    let (mut ends, what) = (ends(), format!("{fault:?} at byte {at}, {way:?}"));
    // A record that has become longer shows by its end that does not come.
    let short = Duration::from_millis(if fault == Fault::Cut { 10_000 } else { 150 });
    ends.options = options().with_silence_max(short).with_load_max(short).with_commit_max(short);
    let wait = || Wait::within(short, None);
    let (near, far) = SocketLink::pair().unwrap();
    let none = |link| FaultyLink::new(link, Way::Out, u64::MAX, Fault::Cut);
    let faulty = |link| FaultyLink::new(link, Way::Out, at, fault);
    let (near, far) = match way {
        Way::Out => (faulty(near), none(far)),
        Way::In => (none(near), faulty(far)),
    };
    let (outcome, received) = attempt(
        &ends,
        || boxed(TlsLink::connect(near, source, &address(), wait())),
        || boxed(TlsLink::accept(far, destination, wait())),
    );
    match (outcome, received) {
        (Ok(Outcome::InDoubt(doubt)), Ok(received)) => {
            assert!(!ends.source[0].state().is_running(), "{what}: in doubt");
            let (outcome, _) = resolve(&ends, doubt, source, Some(destination));
            ends.check(outcome, received, &what)
        }
        (Ok(outcome), Ok(received)) => ends.check(outcome, received, &what),
        (outcome, received) => {
            let moved = matches!(outcome, Ok(Outcome::Moved(_) | Outcome::InDoubt(_)));
            assert!(!moved && !matches!(received, Ok(Received::Runs(_))), "{what}: {outcome:?} {received:?}");
            assert_eq!(ends.source[0].state(), State::Running, "{what}");
            assert!(!ends.destination[0].holds_guest(), "{what}");
            false
        }
    }
}

#[test]
fn a_link_cut_or_altered_at_any_byte_below_tls_leaves_one_side_running() {
    let authority = Authority::new();
    let (source, destination) = (authority.tls("source"), authority.tls("destination"));
    let (out, back) = lengths(&source, &destination);
    let mut moved = 0;
    for (way, bytes) in [(Way::Out, out), (Way::In, back)] {
        // The last records are COMMIT and DONE, or RUNNING.
        let places = (0..bytes).filter(|at| at + 180 > bytes && at % 5 == 0 || at % 67 == 0);
        for at in places {
            for fault in [Fault::Cut, Fault::Flip((at % 8) as u8)] {
                moved += u32::from(with_fault(&source, &destination, way, at, fault));
            }
        }
    }
    assert!(moved > 0, "a cut behind COMMIT");
}

#[test]
fn the_end_is_told_from_nothing_and_what_was_sent_before_it_arrives() {
    let authority = Authority::new();
    let (source, destination) = (authority.tls("source"), authority.tls("destination"));
    for truncated in [false, true] {
        let (near, far) = SocketLink::pair().unwrap();
        let (near, far) = std::thread::scope(|scope| {
            let far = scope.spawn(|| TlsLink::accept(far, &destination, wait()).unwrap());
            (TlsLink::connect(near, &source, &address(), wait()).unwrap(), far.join().unwrap())
        });
        let now = || Wait::within(Duration::from_millis(5), None);
        let mut got = [0; 64];
        assert!(matches!(far.read(&mut got, now()), Err(LinkError::TimedOut)));
        assert_eq!(near.write(&[IoSlice::new(b"a"), IoSlice::new(b"bc")], now()).unwrap(), 3);
        match truncated {
            true => drop(near),
            false => {
                near.finish();
                far.write(&[IoSlice::new(b"still heard")], wait()).unwrap();
                assert_eq!(near.read(&mut got, wait()).unwrap(), 11);
                far.finish();
                assert!(matches!(near.read(&mut got, wait()), Err(LinkError::Closed)));
            }
        }
        assert_eq!(far.read(&mut got, wait()).unwrap(), 3);
        assert!(matches!(far.read(&mut got, wait()), Err(LinkError::Closed)));
        assert!(matches!(far.read(&mut got, wait()), Err(LinkError::Closed)), "and again");
    }
}

#[test]
fn a_peer_that_does_not_read_blocks_no_more_than_a_bounded_buffer() {
    let authority = Authority::new();
    let (source, destination) = (authority.tls("source"), authority.tls("destination"));
    let (near, far) = SocketLink::pair().unwrap();
    let (near, far) = std::thread::scope(|scope| {
        let far = scope.spawn(|| TlsLink::accept(far, &destination, wait()).unwrap());
        (TlsLink::connect(near, &source, &address(), wait()).unwrap(), far.join().unwrap())
    });
    let cancel = Cancel::new().unwrap();
    let bytes: Vec<u8> = (0..1 << 20).map(|at: u32| (at % 251) as u8).collect();
    let mut sent = 0;
    let error = loop {
        let soon = Wait::within(Duration::from_millis(20), Some(&cancel));
        match near.write(&[IoSlice::new(&bytes[sent % 251..][..1 << 16])], soon) {
            Ok(taken) => sent += taken,
            Err(error) => break error,
        }
        assert!(sent < 8 << 20, "nothing holds it up");
    };
    assert!(matches!(error, LinkError::TimedOut), "{error}");
    cancel.cancel();
    let cancelled = near.write(&[IoSlice::new(&bytes)], Wait::within(LIMIT, Some(&cancel)));
    assert!(matches!(cancelled, Err(LinkError::Cancelled)));
    // All that was taken arrives once, in order, and then the end.
    std::thread::scope(|scope| {
        scope.spawn(|| near.finish());
        let (mut got, mut into) = (0, vec![0; 1 << 16]);
        while got < sent {
            let read = far.read(&mut into, wait()).unwrap();
            for (at, byte) in into[..read].iter().enumerate() {
                assert_eq!(*byte, ((got + at) % 251) as u8, "byte {}", got + at);
            }
            got += read;
        }
        assert_eq!(got, sent);
        assert!(matches!(far.read(&mut into, wait()), Err(LinkError::Closed)));
    });
}
