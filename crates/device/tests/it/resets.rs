//! The resets that RESET_COUNT counts (`docs/vfio-user-extensions.md: RESET_COUNT`), and their use to a caller that
//! drives a device over several arcs learns from it.

use crate::common::{Answer, Rig, feature, refused};
use limosa_client::{Device, DeviceExt};
use limosa_device::{ClientId, Fault, Loopback};
use limosa_protocol::{Errno, FeatureIndex, FeatureOp, MigrationFlags, State, fsm};

const ALL: MigrationFlags = MigrationFlags::SETS[3];

fn count(rig: &Rig) -> u64 {
    let count = rig.device.reset_count().unwrap().expect("every machine has it");
    assert_eq!(count, rig.machine.reset_count());
    count
}

#[test]
fn a_reset_counts_in_every_state() {
    for flags in MigrationFlags::SETS {
        for state in State::ALL.into_iter().filter(|state| flags.has(*state)) {
            let (rig, _stream) = Rig::at(flags, state);
            assert_eq!(count(&rig), 0, "{flags}: on the way to {state}");
            rig.device.reset().unwrap();
            assert_eq!(count(&rig), 1, "{flags}: out of {state}");
            rig.device.reset().unwrap();
            assert_eq!(count(&rig), 2);
        }
    }
}

#[test]
fn a_reset_that_fails_or_panics_counts() {
    let rig = Rig::new(ALL);
    rig.fault("reset", Fault::Broken(Errno::ETIMEDOUT));
    assert_eq!(refused(rig.device.reset()), Errno::ETIMEDOUT);
    assert_eq!((rig.state(), count(&rig)), (State::Error, 1));
    rig.script().panics = Some("reset");
    assert_eq!(refused(rig.device.reset()), Errno::EIO);
    assert_eq!((rig.state(), count(&rig)), (State::Error, 2));
    rig.device.reset().unwrap();
    assert_eq!((rig.state(), count(&rig)), (State::Running, 3));
    // A model that panics as its session ends is not even reset.
    let _stream = rig.device.set_state(State::StopCopy).unwrap();
    rig.script().panics = Some("save_end");
    assert_eq!(refused(rig.device.reset()), Errno::EIO);
    assert_eq!((rig.state(), count(&rig)), (State::Error, 4));
}

#[test]
fn error_is_no_reset_but_what_leads_out_of_it_is() {
    for broken in [true, false] {
        let rig = Rig::new(ALL);
        if broken {
            rig.fault("stop", Fault::Broken(Errno::EIO));
        } else {
            rig.script().panics = Some("stop");
        }
        assert_eq!(refused(rig.device.set_state(State::Stop)), Errno::EIO);
        assert_eq!((rig.state(), count(&rig)), (State::Error, 0));
        rig.device.reset().unwrap();
        assert_eq!((rig.state(), count(&rig)), (State::Running, 1));
    }
}

#[test]
fn no_arc_no_session_and_no_client_that_goes_counts() {
    for flags in MigrationFlags::SETS {
        let rig = Rig::new(flags);
        rig.device.reset().unwrap();
        for (from, to) in State::ALL.into_iter().flat_map(|from| State::ALL.map(|to| (from, to))) {
            if fsm::path(flags, State::Running, from).is_ok() && fsm::path(flags, from, to).is_ok() {
                rig.device.set_state(from).unwrap();
                let _stream = rig.device.set_state(to).unwrap();
                rig.device.set_state(State::Stop).unwrap();
                rig.device.set_state(State::Running).unwrap();
            }
        }
        assert_eq!(count(&rig), 1, "{flags}");
    }
    // Nor an arc that is refused, a session that is damaged or a client that goes.
    let (rig, stream) = Rig::at(ALL, State::Resuming);
    rig.fault("load", Fault::Refused(Errno::EINVAL));
    assert_eq!(refused(stream.unwrap().write(b"x")), Errno::EINVAL);
    assert_eq!(refused(rig.device.set_state(State::Stop)), Errno::EIO);
    rig.machine.client_gone(ClientId::VMM);
    assert_eq!((rig.state(), count(&rig)), (State::Resuming, 0));
    let other = Loopback::new("the next client", rig.machine.clone());
    assert_eq!(other.reset_count().unwrap(), Some(0));
    other.reset().unwrap();
    assert_eq!(count(&rig), 1, "a reset by one client is seen by all");
}

#[test]
fn a_reset_between_two_sets_is_seen_by_the_count_alone() {
    // (STOP, RUNNING_P2P) and (RUNNING_P2P, RUNNING): each SET is legal from RUNNING as well.
    for reset_in in [State::Stop, State::RunningP2p] {
        let (rig, stream) = Rig::at(ALL, State::Resuming);
        let before = count(&rig);
        stream.unwrap().write(b"state").unwrap();
        for to in [State::Stop, State::RunningP2p, State::Running] {
            assert!(rig.device.set_state(to).unwrap().is_none(), "the SET succeeds");
            assert_eq!(rig.state(), to, "and the state is what was asked for");
            if to == reset_in {
                assert_eq!(count(&rig), before);
                rig.machine.reset().unwrap();
            }
        }
        assert_eq!(count(&rig), before + 1, "reset in {reset_in}");
    }
}

#[test]
fn a_reset_before_a_set_is_counted_when_the_set_is_done() {
    // Another thread resets while this one drives arcs: where a SET succeeded and the state is another, the count tells why.
    let rig = Rig::new(ALL);
    std::thread::scope(|scope| {
        let machine = &rig.machine;
        scope.spawn(move || (0..2000).for_each(|_| machine.reset().unwrap()));
        let mut last = 0;
        for _ in 0..2000 {
            let before = machine.reset_count();
            let stopped = rig.device.set_state(State::StopCopy).is_ok();
            let state = rig.state();
            let after = machine.reset_count();
            assert!(last <= before && before <= after, "it never decreases");
            assert!(!stopped || state == State::StopCopy || after > before, "a reset that was not counted");
            last = after;
        }
    });
    assert_eq!(count(&rig), 2000);
}

#[test]
fn the_count_is_answered_in_eight_bytes_and_cannot_be_set() {
    let rig = Rig::new(ALL);
    let index = FeatureIndex::RESET_COUNT.0;
    (0..3).for_each(|_| rig.device.reset().unwrap());
    let mut long = [0xaa; 12];
    assert_eq!(feature(&rig, index, FeatureOp::GET, &mut long), Ok(8));
    assert_eq!(long[..8], 3u64.to_ne_bytes());
    assert_eq!(long[8..], [0xaa; 4], "the rest is left alone");
    assert_eq!(feature(&rig, index, FeatureOp::GET, &mut [0; 7]), Err(Errno::EINVAL));
    assert_eq!(feature(&rig, index, FeatureOp::SET, &mut [0; 8]), Err(Errno::EINVAL));
    assert!(rig.device.probe(FeatureIndex::RESET_COUNT, FeatureOp::GET).unwrap());
    assert!(!rig.device.probe(FeatureIndex::RESET_COUNT, FeatureOp::SET).unwrap());
    assert_eq!(count(&rig), 3, "a read does not clear it");
}

#[test]
fn the_count_is_no_part_of_the_state_that_moves() {
    let (source, stream) = Rig::at(ALL, State::StopCopy);
    source.script().saves.push_back(Answer::Data(b"state".to_vec()));
    let mut data = [0; 16];
    stream.unwrap().read(&mut data).unwrap();
    let (destination, stream) = Rig::at(ALL, State::Resuming);
    (0..2).for_each(|_| source.machine.reset().unwrap());
    stream.unwrap().write(&data).unwrap();
    destination.device.set_state(State::Running).unwrap();
    assert_eq!((count(&source), count(&destination)), (2, 0));
}
