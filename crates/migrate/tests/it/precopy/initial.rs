//! Initial bytes that come late, never end, or have to be loaded before the stop.

use super::*;

/// A device whose initial bytes are there only after it was asked some times for data. Later they may begin again.
struct Late {
    initial: u64,
    given: AtomicU64,
    /// How often it says "nothing for now" first.
    waits: AtomicU32,
    /// Further initial bytes, which are reported once all others were given.
    again: AtomicU64,
    reads: AtomicU32,
}

impl Late {
    fn new(waits: u32, again: u64) -> Arc<Late> {
        Arc::new(Late {
            initial: 1 << 16,
            given: AtomicU64::new(0),
            waits: AtomicU32::new(waits),
            again: AtomicU64::new(again),
            reads: AtomicU32::new(0),
        })
    }
    /// Of initial bytes that were reported.
    fn total(&self) -> u64 {
        self.initial + if self.again.load(Ordering::SeqCst) == u64::MAX { 1 << 16 } else { 0 }
    }
    fn left(&self) -> u64 {
        self.total() - self.given.load(Ordering::SeqCst)
    }
}

impl MadeUp for Late {
    fn read(&self, stopped: bool, into: &mut [u8]) -> Chunk {
        self.reads.fetch_add(1, Ordering::SeqCst);
        let waits = self.waits.load(Ordering::SeqCst);
        self.waits.store(waits.saturating_sub(1), Ordering::SeqCst);
        let left = self.left();
        if left == 0 || waits > 0 && !stopped {
            return if stopped { Chunk::End } else { Chunk::NothingForNow };
        }
        let bytes = left.min(into.len() as u64);
        self.given.fetch_add(bytes, Ordering::SeqCst);
        Chunk::Data(bytes as usize)
    }
    fn info(&self) -> PrecopyInfo {
        let mut flags = 0;
        // u64::MAX stands for "has been reported".
        if self.left() == 0 && self.again.load(Ordering::SeqCst) == 1 {
            self.again.store(u64::MAX, Ordering::SeqCst);
            flags = PrecopyFlags::REINIT.bits();
        }
        PrecopyInfo { flags, initial_bytes: self.left(), ..Default::default() }
    }
}

#[test]
fn initial_bytes_that_come_late_did_not_hold_the_stop_back() {
    std::thread::scope(|scope| {
        for when_stalled in EVERY {
            for again in [0, 1] {
                scope.spawn(move || {
                    // The pauses between its questions double: 1 + 2 + 4 + ... + 64 ms.
                    let late = Late::new(7, again);
                    let device = Hooked::new("late", FLAGS, &[]).making_up(late.clone());
                    let at_stop = AtomicU64::new(0);
                    let vmm = AtStop(|| at_stop.store(late.given.load(Ordering::SeqCst), Ordering::SeqCst));
                    let goal = Duration::from_secs(3600);
                    let options = options().with_convergence(convergence(goal, when_stalled));
                    let devices = [MovedDevice::new(&device)];
                    let saved =
                        Source::new(&devices, &options).with_vmm(&vmm).save(&Nowhere, AfterSave::Stop);
                    assert!(matches!(saved, Outcome::Moved(_)), "{when_stalled:?}: {saved:?}");
                    let expected = (1 << 16) * (1 + again);
                    assert_eq!(at_stop.into_inner(), expected, "{when_stalled:?}, again: {again}");
                });
            }
        }
    });
}

#[test]
fn the_stop_did_not_wait_until_initial_bytes_were_loaded() {
    let (door, loaded) = (Arc::new(Door::default()), Arc::new(AtomicBool::new(false)));
    let late = Late::new(0, 0);
    let source = {
        let (late, door) = (late.clone(), door.clone());
        Hooked::new("late", FLAGS, &[]).making_up(late.clone()).on(move |_, call| {
            // All is given, and it has been looked at a few times since.
            if call == Call::Read && late.left() == 0 && late.reads.load(Ordering::SeqCst) > 6 {
                door.open();
            }
        })
    };
    let destination = {
        let (door, loaded) = (door.clone(), loaded.clone());
        Hooked::new("destination", FLAGS, &[]).on(move |_, call| {
            if call == Call::Write {
                assert!(door.pass(), "nobody opened it");
                loaded.store(true, Ordering::SeqCst);
            }
        })
    };
    let was_loaded = AtomicBool::new(false);
    let vmm = AtStop(|| was_loaded.store(loaded.load(Ordering::SeqCst), Ordering::SeqCst));
    let options = options();
    let (here, there, ledger) =
        ([MovedDevice::new(&source)], [MovedDevice::new(&destination)], Ledger::new());
    let (outcome, received) = move_over_a_link(
        Source::new(&here, &options).with_vmm(&vmm),
        Destination::new(&there, &ledger, &options),
    );
    assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
    assert!(matches!(received, Received::Runs(_)), "{received:?}");
    assert!(was_loaded.into_inner(), "it stopped before");
}

#[test]
fn initial_bytes_that_never_end_were_not_named() {
    let estimates = Estimates { initial: Some(4096), ..Estimates::default() };
    let limit = Duration::from_millis(60);
    let with = |when| {
        options().with_convergence(options().convergence.with_initial_max(limit).with_when_stalled(when))
    };
    let (aborted, _) = moved(estimates, &[], None, &with(WhenStalled::Abort));
    let Err(Error::NotConverging { obstacle, .. }) = aborted else { panic!("{aborted:?}") };
    assert_eq!(obstacle, Obstacle::InitialData { device: "source".into(), left_bytes: 4096, limit });
    let (switched, _) = moved(estimates, &[], None, &with(WhenStalled::SwitchOver));
    assert!(switched.is_ok(), "{switched:?}");
}
