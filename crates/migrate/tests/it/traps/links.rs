//! Links that are missing, fail, or are closed before the reason is heard.

use std::io::IoSlice;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use limosa_migrate::link::{Link, LinkError, SocketLink, Wait};
use limosa_migrate::{
    AbortCode, Cancel, Convergence, Destination, Error, Ledger, Memory, MovedDevice, Observer, Outcome,
    PAGE_BYTES, Received, Round, Source, WhenStalled,
};
use limosa_protocol::{MigrationFlags, State};
use limosa_stream::{Answer, Kind};
use limosa_testing::forward_link;

use super::{FLAGS, Log, region};
use crate::common::hooked::{Call, Hooked, before, ends_in_time};
use crate::common::peer::Peer;
use crate::common::{VecPages, move_over_links, options};

#[test]
fn a_part_of_the_further_links_is_enough() {
    let options = options().with_links(NonZeroU32::new(4).unwrap()).with_silence_max(Duration::from_secs(2));
    let (source, destination) = (Hooked::new("source", FLAGS, &[7; 9]), Hooked::new("there", FLAGS, &[]));
    let (here, there, ledger) =
        ([MovedDevice::new(&source)], [MovedDevice::new(&destination)], Ledger::new());
    let (near, far) = SocketLink::pair().unwrap();
    let waiting = Mutex::new(Vec::new());
    let asked = AtomicUsize::new(0);
    let connect = |_: Wait<'_>| -> Result<Box<dyn Link>, LinkError> {
        if asked.fetch_add(1, Ordering::SeqCst) == 1 {
            return Err(LinkError::Io(std::io::ErrorKind::ConnectionRefused.into()));
        }
        let (near, far) = SocketLink::pair()?;
        waiting.lock().unwrap().push(far);
        Ok(Box::new(near))
    };
    let accept = |wait: Wait<'_>| -> Result<Box<dyn Link>, LinkError> {
        loop {
            if let Some(link) = waiting.lock().unwrap().pop() {
                return Ok(Box::new(link));
            }
            wait.left()?;
            std::thread::yield_now();
        }
    };
    let (outcome, received) = std::thread::scope(|scope| {
        let destination = Destination::new(&there, &ledger, &options);
        let accept = &accept;
        let receiving = scope.spawn(move || destination.receive_over(&far, accept));
        let outcome = Source::new(&here, &options).send_over(&near, &connect);
        drop(near);
        (outcome, receiving.join().unwrap())
    });
    let Outcome::Moved(report) = outcome else { panic!("{outcome:?}") };
    assert!(matches!(received, Received::Runs(_)), "{received:?}");
    assert!(report.notes.iter().any(|note| note.contains("2 of 4 are used")), "{:?}", report.notes);
}

/// A destination that answers each FLUSH with these links' numbers; why the source went back. The source's device says
/// nothing before the stop, so that it flushes once.
fn flushed(links: &[u32]) -> Error {
    let options = options().with_silence_max(Duration::from_secs(5)).with_unauthenticated_peers(true);
    let source = Hooked::new("source", MigrationFlags::STOP_COPY, &[7; 9]);
    let here = [MovedDevice::new(&source)];
    let (near, far) = SocketLink::pair().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut peer = Peer::new(far);
            let id = peer.read_id();
            peer.preface(id);
            while let Some(header) = peer.next() {
                match header.kind {
                    Kind::OFFER => {
                        let window = Some(1 << 20);
                        let answer = Answer { accepted: true, window, ..Answer::default() };
                        peer.frame(Kind::ANSWER, 0, 0, &answer.encode().unwrap());
                    }
                    Kind::FLUSH => {
                        for link in links {
                            peer.frame(Kind::FLUSHED, *link, header.position, &[]);
                        }
                    }
                    _ => {}
                }
            }
        });
        let outcome = Source::new(&here, &options).send(&near);
        near.cut();
        let Outcome::Undone { why, .. } = outcome else { panic!("{outcome:?}") };
        assert_eq!(source.state(), State::Running);
        why
    })
}

#[test]
fn a_flush_was_answered_by_another_link_or_twice() {
    for (links, named) in [(&[0, 0][..], 0), (&[1], 1), (&[0, 1], 1), (&[40], 40), (&[u32::MAX], u32::MAX)] {
        let why = flushed(links);
        assert!(matches!(why, Error::Stream { .. }), "{links:?}: {why}");
        let expected = format!("flush 1 on link {named} is not waiting for an answer");
        assert!(why.to_string().contains(&expected), "{links:?}: {why}");
    }
}

/// A link of which one write fails, and which works again afterwards.
struct Failing {
    inner: SocketLink,
    writes: AtomicUsize,
    fails: usize,
    failed: Arc<AtomicBool>,
}

impl Link for Failing {
    fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        if self.writes.fetch_add(1, Ordering::SeqCst) == self.fails {
            self.failed.store(true, Ordering::SeqCst);
            return Err(LinkError::Io(std::io::ErrorKind::OutOfMemory.into()));
        }
        self.inner.write(slices, wait)
    }
    forward_link!(|this| this.inner; read, finish, peer);
}

#[test]
fn a_frame_that_was_lost_by_a_link_that_works_again_was_forgotten() {
    let move_with = |fails| {
        let failed = Arc::<AtomicBool>::default();
        // Nothing depends on it but how long a side listens for a reason.
        let options = options().with_silence_max(Duration::from_millis(500));
        let (source, destination) =
            (Hooked::new("source", FLAGS, &[7; 999]), Hooked::new("there", FLAGS, &[]));
        let (here, there, ledger) =
            ([MovedDevice::new(&source)], [MovedDevice::new(&destination)], Ledger::new());
        let (near, far) = SocketLink::pair().unwrap();
        let near = Failing { inner: near, writes: AtomicUsize::new(0), fails, failed: failed.clone() };
        let (outcome, received) = std::thread::scope(|scope| {
            let destination = Destination::new(&there, &ledger, &options);
            let receiving = scope.spawn(move || destination.receive(&far));
            let outcome = Source::new(&here, &options).send(&near);
            drop(near);
            (outcome, receiving.join().unwrap())
        });
        match outcome {
            // Only DONE, or nothing, is missing.
            Outcome::Moved(_) => assert!(matches!(received, Received::Runs(_)), "{fails}: {received:?}"),
            Outcome::Undone { .. } => {
                assert_eq!(source.state(), State::Running, "{fails}");
                assert!(matches!(received, Received::Discarded { .. }), "{fails}: {received:?}");
            }
            Outcome::InDoubt(_) => assert!(!source.state().is_running(), "{fails}"),
        }
        failed.load(Ordering::SeqCst)
    };
    // All at once: most of them only wait.
    let failed = std::thread::scope(|scope| {
        let moves: Vec<_> = (0..40).map(|fails| scope.spawn(move || move_with(fails))).collect();
        moves.into_iter().map(|moved| moved.join().unwrap()).filter(|failed| *failed).count()
    });
    assert!((8..40).contains(&failed), "{failed}: each write was one of them");
}

/// Cancels in a round.
struct CancelInRound(Cancel);

impl Observer for CancelInRound {
    fn round(&self, round: &Round) {
        if round.round == 3 {
            self.0.cancel();
        }
    }
}

#[test]
fn a_receiver_with_several_links_was_told_of_a_closed_link_instead_of_the_reason() {
    for links in [1, 2, 4] {
        for cancels in [true, false] {
            let what = format!("{links} links, cancelled: {cancels}");
            let again = what.clone();
            ends_in_time(&what, move || {
                let when = if cancels { WhenStalled::KeepTrying } else { WhenStalled::Abort };
                let wanted = Convergence::default()
                    .with_downtime_goal(Duration::ZERO)
                    .with_stalled_rounds_max(1)
                    .with_when_stalled(when);
                let options = options().with_convergence(wanted).with_links(NonZeroU32::new(links).unwrap());
                let source = Hooked::new("source", FLAGS, &[7; 999]);
                let destination = Hooked::new("there", FLAGS, &[]);
                let (here, there) = ([MovedDevice::new(&source)], [MovedDevice::new(&destination)]);
                let size = 2048 * PAGE_BYTES as usize;
                let (near, far, ledger) = (VecPages::new(size), VecPages::new(size), Ledger::new());
                near.0.lock().unwrap().fill(7);
                let (mut log, regions) = (Log { all: true, ..Log::default() }, [region(&far)]);
                let observer = CancelInRound(Cancel::new().unwrap());
                let source = Source::new(&here, &options)
                    .with_memory(Memory::logged(vec![region(&near)], &mut log))
                    .with_observer(&observer)
                    .with_cancel(cancels.then_some(&observer.0));
                let (outcome, received) = move_over_links(
                    source,
                    Destination::new(&there, &ledger, &options).with_memory(&regions),
                    |_, inner| Box::new(inner),
                );
                let Outcome::Undone { why, .. } = outcome else { panic!("{again}: {outcome:?}") };
                let Received::Discarded { why: heard, .. } = received else {
                    panic!("{again}: {received:?}")
                };
                let Error::Aborted { code, reason, .. } = heard else { panic!("{again}: {heard}") };
                let expected = if cancels { AbortCode::Cancelled } else { AbortCode::Standstill };
                assert_eq!((code, reason), (expected, why.to_string()), "{again}");
                assert_eq!(matches!(why, Error::Cancelled), cancels, "{again}: {why}");
                assert_eq!(matches!(why, Error::NotConverging { .. }), !cancels, "{again}: {why}");
            });
        }
    }
}

#[test]
fn a_source_with_several_links_was_told_of_a_closed_link_instead_of_the_destination_s_reason() {
    for links in [1, 2, 4] {
        let what = format!("{links} links");
        let again = what.clone();
        ends_in_time(&what, move || {
            let options = options().with_links(NonZeroU32::new(links).unwrap());
            let cancel = Cancel::new().unwrap();
            let source = Hooked::new("source", FLAGS, &[7; 9]);
            let destination = {
                let cancel = cancel.clone();
                Hooked::new("there", FLAGS, &[]).hook(before(Call::Write, move |_| cancel.cancel()))
            };
            let (here, there, ledger) =
                ([MovedDevice::new(&source)], [MovedDevice::new(&destination)], Ledger::new());
            let (outcome, received) = move_over_links(
                Source::new(&here, &options),
                Destination::new(&there, &ledger, &options).with_cancel(Some(&cancel)),
                |_, inner| Box::new(inner),
            );
            let Outcome::Undone { why: Error::Aborted { code, reason, .. }, .. } = outcome else {
                panic!("{again}: {outcome:?}")
            };
            assert_eq!((code, reason.as_str()), (AbortCode::Cancelled, "cancelled"), "{again}");
            let Received::Discarded { why: Error::Cancelled, .. } = received else {
                panic!("{again}: {received:?}")
            };
        });
    }
}
