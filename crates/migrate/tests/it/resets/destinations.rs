//! A destination that is reset while it loads, holds for the commit, or starts.

use super::*;

/// Without a count, a reset between the engine's look and its SET cannot be seen at the destination: the same arcs are
/// legal from RUNNING.
fn is_hidden(call: Call, counts_resets: bool) -> bool {
    !counts_resets && matches!(call, Call::Set(_))
}

#[test]
fn a_destination_reset_before_any_call_never_runs_what_it_has_lost() {
    std::thread::scope(|scope| {
        for flags in MigrationFlags::SETS {
            scope.spawn(move || {
                for counts_resets in [true, false] {
                    for n in 0.. {
                        let what = format!("{flags}, counted: {counts_resets}, reset before call {n}");
                        let again = what.clone();
                        if !ends_in_time(&what, move || reset_destination(flags, counts_resets, n, &again)) {
                            break;
                        }
                    }
                }
            });
        }
    });
}

/// One move whose destination is reset before its n-th call. Whether there was such a call.
fn reset_destination(flags: MigrationFlags, counts_resets: bool, n: usize, what: &str) -> bool {
    let reset = Arc::new(Mutex::new(None));
    let (hook, fired) = {
        let reset = reset.clone();
        before_call(n, move |device, call| {
            if !is_hidden(call, counts_resets) {
                *reset.lock().unwrap() = Some(call);
                device.reset().unwrap();
            }
        })
    };
    let source = device("source", flags, counts_resets, &guest());
    let destination = device("destination", flags, counts_resets, &[]).hook(hook);
    let moved = run(&source, &destination, false, &options());
    let what = format!("{what} ({:?})", *reset.lock().unwrap());
    match &moved.received {
        Received::Runs(_) => assert_eq!(destination.data(), guest(), "{what}: it runs empty"),
        Received::Discarded { .. } => {
            assert!(matches!(moved.outcome, Outcome::Undone { .. }), "{what}: {:?}", moved.outcome);
            assert_eq!(source.state(), State::Running, "{what}");
        }
        Received::Broken { why, .. } => {
            assert!(moved.committed, "{what}: before COMMIT the guest is given back");
            assert!(matches!(why, Error::DeviceChanged { .. }), "{what}: {why}");
            assert!(matches!(moved.outcome, Outcome::InDoubt(_)), "{what}: {:?}", moved.outcome);
            assert!(!source.state().is_running(), "{what}");
        }
        received => panic!("{what}: {received:?}"),
    }
    fired.load(Ordering::SeqCst)
}

#[test]
fn a_destination_reset_in_the_set_of_stop_is_refused_and_the_source_runs() {
    for flags in MigrationFlags::SETS {
        let hook = before(Call::Set(State::Stop), |device| device.reset().unwrap());
        let source = device("source", flags, true, &guest());
        let destination = device("destination", flags, true, &[]).hook(hook);
        let moved = run(&source, &destination, false, &options());
        let Outcome::Undone { why: Error::Aborted { reason, .. }, .. } = &moved.outcome else {
            panic!("{flags}: {:?}", moved.outcome)
        };
        assert!(reason.contains("it has been reset 1 times"), "{flags}: {reason}");
        assert!(!moved.committed, "{flags}");
        assert_eq!(source.state(), State::Running, "{flags}");
    }
}

#[test]
fn a_destination_reset_in_a_set_after_the_commit_is_broken_and_no_other_runs() {
    for flags in MigrationFlags::SETS {
        for arc in [State::RunningP2p, State::Running] {
            if !flags.has(arc) {
                continue;
            }
            let hook = before(Call::Set(arc), |device| device.reset().unwrap());
            let source = device("source", flags, true, &guest());
            let destination = device("destination", flags, true, &[]).hook(hook);
            let moved = run(&source, &destination, false, &options());
            let Received::Broken { why, .. } = &moved.received else {
                panic!("{flags}: {:?}", moved.received)
            };
            let Error::DeviceChanged { found: Changed::Reset(1), .. } = why else { panic!("{why}") };
            assert!(matches!(moved.outcome, Outcome::InDoubt(_)), "{flags}: {:?}", moved.outcome);
            assert!(!source.state().is_running(), "{flags}");
        }
    }
}

#[test]
fn a_snapshot_that_a_reset_device_lost_is_discarded() {
    let folder = tempfile::tempdir().unwrap();
    let options = options();
    for flags in MigrationFlags::SETS {
        let path = folder.path().join(flags.to_string());
        let place = SnapshotFile::new(&path);
        let source = device("source", flags, true, &guest());
        let devices = [MovedDevice::new(&source)];
        let saved = Source::new(&devices, &options).save(&place, AfterSave::Stop);
        assert!(matches!(saved, Outcome::Moved(_)), "{saved:?}");
        for (after, counts_resets) in [
            (AfterLoad::Run, true),
            (AfterLoad::Run, false),
            (AfterLoad::Stop, true),
            (AfterLoad::Stop, false),
        ] {
            for n in 0.. {
                let what = format!("{flags}, {after:?}, counted: {counts_resets}, reset before call {n}");
                let (hook, fired) = before_call(n, move |device, call| {
                    if !is_hidden(call, counts_resets) {
                        device.reset().unwrap();
                    }
                });
                let destination = device("destination", flags, counts_resets, &[]).hook(hook);
                let (there, ledger) = ([MovedDevice::new(&destination)], Ledger::new());
                match Destination::new(&there, &ledger, &options).load(&place, after) {
                    Received::Runs(_) | Received::Stopped(_) => {
                        assert_eq!(destination.data(), guest(), "{what}: it was lost");
                    }
                    Received::Discarded { .. } => assert!(destination.data() != guest(), "{what}"),
                    received => panic!("{what}: {received:?}"),
                }
                if !fired.load(Ordering::SeqCst) {
                    break;
                }
            }
        }
    }
}

#[test]
fn a_device_that_was_reset_while_its_destination_held_was_broken_and_the_source_stopped() {
    for flags in MigrationFlags::SETS {
        for counts_resets in [true, false] {
            let source = device("source", flags, counts_resets, &guest());
            let destination = device("destination", flags, counts_resets, &[]);
            let (here, there) = ([MovedDevice::new(&source)], [MovedDevice::new(&destination)]);
            let (options, ledger) = (options(), Ledger::new());
            // READY has come.
            let vmm = AtCommit(|_: &_| destination.inner.reset().unwrap());
            let (outcome, received) = move_over_a_link(
                Source::new(&here, &options).with_vmm(&vmm),
                Destination::new(&there, &ledger, &options),
            );
            assert!(matches!(outcome, Outcome::Undone { .. }), "{flags}: {outcome:?}");
            let Received::Discarded { why, .. } = received else { panic!("{flags}: {received:?}") };
            assert!(matches!(why, Error::DeviceChanged { .. }), "{flags}: {why}");
            assert_eq!((source.state(), source.data()), (State::Running, guest()), "{flags}");
        }
    }
}
