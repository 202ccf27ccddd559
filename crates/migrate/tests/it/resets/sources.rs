//! A source that is reset while it is moved or saved.

use super::*;

#[test]
fn a_source_reset_before_any_call_never_becomes_a_mixture_of_two_states() {
    std::thread::scope(|scope| {
        for flags in MigrationFlags::SETS {
            scope.spawn(move || {
                for counts_resets in [true, false] {
                    for n in 0.. {
                        let what = format!("{flags}, counted: {counts_resets}, reset before call {n}");
                        let again = what.clone();
                        let fired = ends_in_time(&what, move || {
                            let (hook, fired) = before_call(n, |device, _| device.reset().unwrap());
                            let source = device("source", flags, counts_resets, &guest()).hook(hook);
                            let destination = device("destination", flags, counts_resets, &[]);
                            let moved = run(&source, &destination, false, &options());
                            check_source(&source, &destination, &moved, &again);
                            fired.load(Ordering::SeqCst)
                        });
                        if !fired {
                            break;
                        }
                    }
                }
            });
        }
    });
}

#[test]
fn a_source_reset_while_the_vcpus_stop_is_noticed() {
    for flags in MigrationFlags::SETS {
        for counts_resets in [true, false] {
            let source = device("source", flags, counts_resets, &guest());
            let destination = device("destination", flags, counts_resets, &[]);
            let moved = run(&source, &destination, true, &options());
            let what = format!("{flags}, counted: {counts_resets}");
            check_source(&source, &destination, &moved, &what);
            let is_undone = matches!(moved.outcome, Outcome::Undone { .. });
            // Without pre-copy nothing was saved yet: what was reset moves.
            assert_eq!(is_undone, flags.contains(MigrationFlags::PRE_COPY), "{what}");
        }
    }
}

#[test]
fn a_source_reset_between_its_last_pre_copy_data_and_stop_copy_is_noticed() {
    for flags in [MigrationFlags::SETS[2], MigrationFlags::SETS[3]] {
        for counts_resets in [true, false] {
            for arc in [State::PreCopyP2p, State::StopCopy] {
                if !flags.has(arc) {
                    continue;
                }
                let hook = before(Call::Set(arc), |device| device.reset().unwrap());
                let source = device("source", flags, counts_resets, &guest()).hook(hook);
                let destination = device("destination", flags, counts_resets, &[]);
                let moved = run(&source, &destination, false, &options());
                let what = format!("{flags}, counted: {counts_resets}, before {arc}");
                check_source(&source, &destination, &moved, &what);
                let Outcome::Undone { why, .. } = moved.outcome else {
                    panic!("{what}: {:?}", moved.outcome)
                };
                let Error::DeviceChanged { found: Changed::SecondSession(at), .. } = why else {
                    panic!("{what}: {why}")
                };
                assert_eq!(at, arc);
            }
        }
    }
}

#[test]
fn a_source_reset_in_the_rounds_is_noticed_while_it_would_go_on_for_ever() {
    for counts_resets in [true, false] {
        let hook = {
            let (info, done) = (std::sync::atomic::AtomicU32::new(0), AtomicBool::new(false));
            let hook: Hook = Arc::new(move |device, call| {
                let late = call == Call::PrecopyInfo && info.fetch_add(1, Ordering::SeqCst) == 3;
                if late && !done.swap(true, Ordering::SeqCst) {
                    device.reset().unwrap();
                }
                Ok(())
            });
            hook
        };
        let estimates = Estimates { initial: Some(4096), ..Estimates::default() };
        let source =
            Hooked::with_estimates("source", MigrationFlags::SETS[3], &guest(), estimates).hook(hook);
        let source = if counts_resets { source } else { source.without(FeatureIndex::RESET_COUNT) };
        let destination = device("destination", MigrationFlags::SETS[3], counts_resets, &[]);
        let mut options = options();
        options.convergence.when_stalled = WhenStalled::KeepTrying;
        let moved = run(&source, &destination, false, &options);
        check_source(&source, &destination, &moved, "in the rounds");
        assert!(matches!(moved.outcome, Outcome::Undone { .. }));
    }
}

#[test]
fn a_source_reset_while_it_is_saved_leaves_no_snapshot_of_two_states() {
    let folder = tempfile::tempdir().unwrap();
    for flags in MigrationFlags::SETS {
        for n in 0.. {
            let what = format!("{flags}, reset before call {n}");
            let (hook, fired) = before_call(n, |device, _| device.reset().unwrap());
            let source = device("source", flags, n % 2 == 0, &guest()).hook(hook);
            let path = folder.path().join(format!("{flags}-{n}"));
            let (place, options) = (SnapshotFile::new(&path), options());
            let devices = [MovedDevice::new(&source)];
            match Source::new(&devices, &options).save(&place, AfterSave::Stop) {
                Outcome::Moved(_) => {
                    verify(&place, options.silence_max, None)
                        .unwrap_or_else(|error| panic!("{what}: {error}"));
                    let destination = device("destination", flags, true, &[]);
                    let (there, ledger) = ([MovedDevice::new(&destination)], Ledger::new());
                    let loaded = Destination::new(&there, &ledger, &options).load(&place, AfterLoad::Stop);
                    assert!(matches!(loaded, Received::Stopped(_)), "{what}: {loaded:?}");
                    assert_eq!(Some(destination.data()), source.given(), "{what}: another state was saved");
                }
                Outcome::Undone { .. } => {
                    assert_eq!(source.state(), State::Running, "{what}");
                    assert!(!path.exists(), "{what}: something was left");
                }
                Outcome::InDoubt(doubt) => panic!("{what}: {doubt:?}"),
            }
            if !fired.load(Ordering::SeqCst) {
                break;
            }
        }
    }
}

#[test]
fn a_source_reset_in_a_set_on_its_way_back_was_not_reported() {
    for flags in MigrationFlags::SETS {
        let refuses = before(Call::Set(State::Stop), |device| device.reset().unwrap());
        let destination = device("destination", flags, true, &[]).hook(refuses);
        let resets = before(Call::Set(State::Running), |device| device.reset().unwrap());
        let source = device("source", flags, true, &guest()).hook(resets);
        let moved = run(&source, &destination, false, &options());
        let Outcome::Undone { report, .. } = &moved.outcome else { panic!("{flags}: {:?}", moved.outcome) };
        assert_eq!(source.state(), State::Running, "{flags}");
        assert!(source.data() != guest(), "{flags}: it was reset");
        let lost: Vec<_> = report.unrecovered.iter().map(|lost| (lost.device.as_str(), lost.loss)).collect();
        assert_eq!(lost, [("source", Loss::WasReset)], "{flags}");
    }
}

#[test]
fn a_read_that_a_reset_refused_was_told_as_the_device_s_own_error() {
    for (flags, at_source) in
        MigrationFlags::SETS.into_iter().flat_map(|flags| [(flags, true), (flags, false)])
    {
        for counts_resets in [true, false] {
            let call = if at_source { Call::Read } else { Call::Write };
            let resets = || -> Hook {
                let fired = AtomicBool::new(false);
                Arc::new(move |device, made| {
                    if made == call && !fired.swap(true, Ordering::SeqCst) {
                        device.reset()?;
                    }
                    Ok(())
                })
            };
            let source = device("source", flags, counts_resets, &guest()).hook(resets());
            let destination = device("destination", flags, counts_resets, &[]).hook(resets());
            let moved = run(&source, &destination, false, &options());
            let Outcome::Undone { why: there, .. } = moved.outcome else { panic!("{:?}", moved.outcome) };
            let Received::Discarded { why: here, .. } = moved.received else {
                panic!("{:?}", moved.received)
            };
            let why = if at_source { there } else { here };
            assert!(matches!(why, Error::DeviceChanged { .. }), "{flags}, counted: {counts_resets}: {why}");
        }
    }
}
