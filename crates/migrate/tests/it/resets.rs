//! A device that somebody else resets while it is moved or saved: the guest by a function level reset, a VMM as it
//! comes up. What arrives is the state that the source had, or nothing does.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::common::closures::AtCommit;
use crate::common::hooked::{
    Call, Estimates, Hook, Hooked, before, before_call, ends_in_time, move_over_a_link,
};
use crate::common::options;
use limosa_client::Device;
use limosa_migrate::{
    AfterLoad, AfterSave, Changed, Destination, Error, Ledger, Loss, MovedDevice, Options, Outcome, Received,
    SnapshotFile, Source, Vmm, WhenStalled, verify,
};
use limosa_protocol::{FeatureIndex, MigrationFlags, State};

/// The guest's state: a reset device has zeroes.
fn guest() -> Vec<u8> {
    (0..1000_u32).map(|at| at as u8 | 1).collect()
}

fn device(name: &str, flags: MigrationFlags, counts_resets: bool, data: &[u8]) -> Hooked {
    let device = Hooked::new(name, flags, data);
    if counts_resets { device } else { device.without(FeatureIndex::RESET_COUNT) }
}

/// A VMM within whose stop the device is reset; it knows whether the destination was told to run.
#[derive(Default)]
struct Resetting<'a> {
    at_stop: Option<&'a Hooked>,
    prepared: AtomicBool,
}

impl Vmm for Resetting<'_> {
    fn stop(&self) -> Result<(), String> {
        self.at_stop.map_or(Ok(()), |device| device.inner.reset().map_err(|error| error.to_string()))
    }
    fn prepare(&self) -> Result<(), String> {
        self.prepared.store(true, Ordering::SeqCst);
        Ok(())
    }
}

struct Moved {
    outcome: Outcome,
    received: Received,
    /// COMMIT came.
    committed: bool,
}

fn run(source: &Hooked, destination: &Hooked, at_stop: bool, options: &Options) -> Moved {
    let (here, there) = ([MovedDevice::new(source)], [MovedDevice::new(destination)]);
    let vmm = Resetting { at_stop: at_stop.then_some(source), ..Resetting::default() };
    let ledger = Ledger::new();
    let (outcome, received) = move_over_a_link(
        Source::new(&here, options).with_vmm(&vmm),
        Destination::new(&there, &ledger, options).with_vmm(&vmm),
    );
    Moved { outcome, received, committed: vmm.prepared.into_inner() }
}

/// Whatever was moved is what the source had when it had given its last byte; otherwise the source runs.
fn check_source(source: &Hooked, destination: &Hooked, moved: &Moved, what: &str) {
    match &moved.outcome {
        Outcome::Moved(_) => {
            assert!(matches!(moved.received, Received::Runs(_)), "{what}: {:?}", moved.received);
            assert_eq!(Some(destination.data()), source.given(), "{what}: another state arrived");
            assert!(!source.state().is_running() || source.data() != guest(), "{what}: both run");
        }
        Outcome::Undone { .. } => {
            assert_eq!(source.state(), State::Running, "{what}");
            assert!(destination.data() != guest(), "{what}: the destination has it still");
        }
        Outcome::InDoubt(doubt) => panic!("{what}: {doubt:?}"),
    }
}

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
