//! Every transition of every device, whole and with every fault that can befall it
//! (`vfio.h: enum vfio_device_mig_state`).

use crate::common::{Rig, expected_calls, refused};
use limosa_client::{Device, DeviceExt};
use limosa_device::Fault;
use limosa_protocol::{Errno, MigrationFlags, State, fsm};

fn all_pairs() -> impl Iterator<Item = (MigrationFlags, State, State)> {
    MigrationFlags::SETS.into_iter().flat_map(|flags| {
        let reachable = move |state: &State| flags.has(*state);
        State::ALL
            .into_iter()
            .filter(reachable)
            .flat_map(move |from| State::ALL.into_iter().map(move |to| (flags, from, to)))
    })
}

#[test]
fn all_flag_sets_and_pairs_walk_the_standards_path() {
    for (flags, from, to) in all_pairs() {
        let (rig, stream) = Rig::at(flags, from);
        assert_eq!(stream.is_some(), from.has_session());
        rig.check();
        let session = rig.machine.session();
        match fsm::path(flags, from, to) {
            Ok(path) => {
                let opened = rig.device.set_state(to).unwrap();
                assert_eq!(opened.is_some(), path.opens_session(), "{flags}: {path}");
                assert_eq!(rig.state(), to);
                assert_eq!(rig.calls(), expected_calls(flags, from, to), "{flags}: {path}");
                if path.opens_session() {
                    assert_ne!(rig.machine.session(), session, "a new session has a new id");
                } else if to.has_session() {
                    assert_eq!(rig.machine.session(), session, "{flags}: {path}");
                }
            }
            Err(_) => {
                assert_eq!(refused(rig.device.set_state(to)), Errno::EINVAL);
                assert_eq!(rig.state(), from);
                assert_eq!(rig.machine.session(), session);
                assert!(rig.calls().is_empty());
            }
        }
        rig.check();
    }
}

#[test]
fn a_state_to_itself_does_nothing_and_gives_no_stream() {
    for flags in MigrationFlags::SETS {
        for state in State::ALL.into_iter().filter(|state| *state != State::Error && flags.has(*state)) {
            let (rig, _stream) = Rig::at(flags, state);
            let session = rig.machine.session();
            assert!(rig.device.set_state(state).unwrap().is_none());
            assert!(rig.calls().is_empty());
            assert_eq!(rig.machine.session(), session);
        }
    }
}

/// The calls that can fail, in the order of a path, each with the state on which its refusal
/// leaves the device.
fn failing_calls(flags: MigrationFlags, from: State, to: State) -> Vec<(&'static str, State)> {
    let path = fsm::path(flags, from, to).unwrap();
    path.arcs()
        .flat_map(|arc| expected_calls(flags, arc.from, arc.to).into_iter().map(move |call| (call, arc.from)))
        .filter(|(call, _)| *call != "save_end")
        .collect()
}

#[test]
fn a_refusal_on_any_arc_of_any_path_leaves_the_arcs_first_state() {
    for (flags, from, to) in all_pairs().filter(|(flags, from, to)| fsm::path(*flags, *from, *to).is_ok()) {
        for (call, stays) in failing_calls(flags, from, to) {
            let (rig, _stream) = Rig::at(flags, from);
            rig.fault(call, Fault::Refused(Errno::EBUSY));
            assert_eq!(refused(rig.device.set_state(to)), Errno::EBUSY, "{flags}: {from} -> {to} at {call}");
            assert_eq!(rig.state(), stays, "{flags}: {from} -> {to} at {call}");
            rig.check();
            // Nothing is lost: the same can be asked again.
            rig.device.set_state(to).unwrap();
            assert_eq!(rig.state(), to);
            rig.check();
        }
    }
}

#[test]
fn a_device_that_breaks_on_any_arc_is_in_error_until_it_is_reset() {
    for (flags, from, to) in all_pairs().filter(|(flags, from, to)| fsm::path(*flags, *from, *to).is_ok()) {
        for (call, _) in failing_calls(flags, from, to) {
            let (rig, stream) = Rig::at(flags, from);
            rig.fault(call, Fault::Broken(Errno::EIO));
            assert_eq!(refused(rig.device.set_state(to)), Errno::EIO);
            assert_eq!(rig.state(), State::Error);
            rig.check();
            for to in State::ALL {
                assert_eq!(refused(rig.device.set_state(to)), Errno::EINVAL, "only a reset leads out");
            }
            if let Some(mut stream) = stream {
                assert_eq!(refused(stream.write(b"x")), Errno::ENODEV);
            }
            rig.device.reset().unwrap();
            assert_eq!(rig.state(), State::Running);
            rig.check();
        }
    }
}

#[test]
fn a_refused_final_save_that_cannot_run_again_is_error() {
    for (flags, from) in
        [(MigrationFlags::SETS[2], State::PreCopy), (MigrationFlags::SETS[3], State::PreCopyP2p)]
    {
        let (rig, _stream) = Rig::at(flags, from);
        rig.fault("save_final", Fault::Refused(Errno::EBUSY));
        rig.fault("start", Fault::Refused(Errno::EIO));
        assert_eq!(refused(rig.device.set_state(State::StopCopy)), Errno::EBUSY);
        assert_eq!(rig.calls(), ["stop", "save_final", "start", "save_end"]);
        assert_eq!(rig.state(), State::Error);
        rig.check();
    }
}

#[test]
fn a_reset_leads_from_every_state_to_running_and_ends_the_session() {
    for flags in MigrationFlags::SETS {
        for state in State::ALL.into_iter().filter(|state| flags.has(*state)) {
            let (rig, stream) = Rig::at(flags, state);
            rig.device.reset().unwrap();
            assert_eq!(rig.state(), State::Running);
            rig.check();
            let ends = match state {
                State::Resuming => vec!["load_abort", "reset"],
                state if state.is_saving() => vec!["save_end", "reset"],
                _ => vec!["reset"],
            };
            assert_eq!(rig.calls(), ends);
            if let Some(mut stream) = stream {
                assert_eq!(refused(stream.read(&mut [0; 8])), Errno::ENODEV);
                assert_eq!(refused(stream.write(b"x")), Errno::ENODEV);
                assert_eq!(refused(stream.precopy_info()), Errno::ENODEV);
            }
        }
    }
}

#[test]
fn a_reset_that_fails_leaves_error_and_can_be_tried_again() {
    for flags in MigrationFlags::SETS {
        for state in State::ALL.into_iter().filter(|state| flags.has(*state)) {
            let (rig, _stream) = Rig::at(flags, state);
            rig.fault("reset", Fault::Broken(Errno::ETIMEDOUT));
            assert_eq!(refused(rig.device.reset()), Errno::ETIMEDOUT);
            assert_eq!(rig.state(), State::Error);
            assert_eq!(rig.machine.session(), None);
            rig.device.reset().unwrap();
            assert_eq!(rig.state(), State::Running);
            rig.check();
        }
    }
}
