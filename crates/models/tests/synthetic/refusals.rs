//! Arcs that fail and states that are refused leave the device as it was.

use super::*;

#[test]
fn a_refused_arc_leaves_its_first_state_and_works_the_next_time() {
    for (fault, way, stays) in [
        ("fail:RUNNING>RUNNING_P2P", vec![State::Stop], State::Running),
        ("fail:RUNNING_P2P>STOP:2", vec![State::StopCopy], State::RunningP2p),
        ("fail:STOP>STOP_COPY", vec![State::StopCopy], State::Stop),
        ("fail:RUNNING>PRE_COPY", vec![State::PreCopy], State::Running),
        ("fail:RUNNING_P2P>PRE_COPY_P2P", vec![State::PreCopyP2p], State::RunningP2p),
        ("fail:PRE_COPY>PRE_COPY_P2P", vec![State::PreCopy, State::StopCopy], State::PreCopy),
        ("fail:PRE_COPY_P2P>STOP_COPY", vec![State::PreCopy, State::StopCopy], State::PreCopyP2p),
        ("fail:PRE_COPY_P2P>PRE_COPY", vec![State::PreCopyP2p, State::PreCopy], State::PreCopyP2p),
        ("fail:STOP>RESUMING", vec![State::Resuming], State::Stop),
        ("fail:STOP>RUNNING_P2P", vec![State::Stop, State::Running], State::Stop),
        ("fail:RUNNING_P2P>RUNNING", vec![State::Stop, State::Running], State::RunningP2p),
    ] {
        let device = synthetic(&format!("{SMALL},fault={fault}"));
        let (last, before) = way.split_last().unwrap();
        before.iter().for_each(|state| drop(device.set_state(*state).unwrap()));
        let times = if fault.ends_with(":2") { 2 } else { 1 };
        for _ in 0..times {
            assert_eq!(refused(device.set_state(*last)), Errno::EBUSY, "{fault}");
            assert_eq!(device.state().unwrap(), stays, "{fault}");
        }
        device.set_state(*last).unwrap();
        assert_eq!(get(&device, BAD_BLOCKS), 0);
    }
}

#[test]
fn a_refused_end_of_a_load_can_be_repeated() {
    let (source, destination) = (synthetic(SMALL), synthetic("state=256K,block=4K,fault=fail:RESUMING>STOP"));
    set(&source, DIRTY, 5);
    assert_eq!(refused(load(&destination, &save(&source), 4096)), Errno::EBUSY);
    assert_eq!(destination.state().unwrap(), State::Resuming);
    destination.set_state(State::Running).unwrap();
    assert_eq!(fingerprint(&destination), fingerprint(&source));
}

#[test]
fn a_device_that_breaks_is_in_error_until_it_is_reset() {
    for (fault, way) in [
        ("error:RUNNING>RUNNING_P2P", vec![State::Stop]),
        ("error:STOP>STOP_COPY", vec![State::StopCopy]),
        ("error:PRE_COPY_P2P>STOP_COPY", vec![State::PreCopy, State::StopCopy]),
        ("error:STOP>RESUMING", vec![State::Resuming]),
        ("error:RESUMING>STOP", vec![State::Resuming, State::Running]),
    ] {
        let device = synthetic(&format!("{SMALL},fault={fault}"));
        set(&device, DIRTY, 7);
        let (last, before) = way.split_last().unwrap();
        before.iter().for_each(|state| drop(device.set_state(*state).unwrap()));
        assert_eq!(refused(device.set_state(*last)), Errno::EIO, "{fault}");
        assert_eq!(device.state().unwrap(), State::Error, "{fault}");
        device.reset().unwrap();
        assert_eq!(fingerprint(&device), fingerprint(&synthetic(SMALL)), "as at power-on");
        way.iter().for_each(|state| {
            if *state != State::Running {
                drop(device.set_state(*state).unwrap());
            }
        });
    }
}

#[test]
fn a_truncated_state_is_refused_and_leaves_the_device_untouched() {
    for bytes in [0, 10, 16, 100, 5000, 200_000] {
        let source = synthetic(&format!("{SMALL},fault=truncate:{bytes}"));
        let destination = synthetic(SMALL);
        set(&destination, DIRTY, 3);
        let before = fingerprint(&destination);
        let state = save(&source);
        assert_eq!(state.len(), bytes);
        assert_eq!(refused(load(&destination, &state, 4096)), Errno::EBADMSG);
        assert_eq!(destination.state().unwrap(), State::Resuming);
        assert_eq!(fingerprint(&destination), before);
        destination.reset().unwrap();
        assert_eq!(destination.state().unwrap(), State::Running);
    }
}

#[test]
fn a_corrupted_state_is_refused_and_leaves_the_device_untouched() {
    for offset in [0, 15, 20, 70, 5000, 262_144, 262_200] {
        let source = synthetic(&format!("{SMALL},fault=corrupt:{offset}"));
        let destination = synthetic(SMALL);
        set(&destination, DIRTY, 3);
        let before = fingerprint(&destination);
        assert_eq!(refused(load(&destination, &save(&source), 4096)), Errno::EBADMSG, "{offset}");
        assert_eq!(destination.state().unwrap(), State::Resuming);
        assert_eq!(fingerprint(&destination), before);
        destination.reset().unwrap();
        load(&destination, &save(&synthetic(SMALL)), 4096).unwrap();
    }
}

#[test]
fn a_state_of_another_size_is_refused_and_leaves_the_device_untouched() {
    let destination = synthetic(SMALL);
    set(&destination, DIRTY, 3);
    let before = fingerprint(&destination);
    for other in ["state=128K,block=4K", "state=256K,block=8K"] {
        assert_eq!(refused(load(&destination, &save(&synthetic(other)), 4096)), Errno::EINVAL);
        assert_eq!(fingerprint(&destination), before);
        destination.reset().unwrap();
        set(&destination, DIRTY, 3);
    }
}

#[test]
fn a_stalled_arc_takes_its_time_and_then_works() {
    let device = synthetic(&format!("{SMALL},fault=stall:RUNNING_P2P>STOP:30"));
    let before = std::time::Instant::now();
    device.set_state(State::Stop).unwrap();
    assert!(before.elapsed() >= std::time::Duration::from_millis(30));
}

#[test]
fn without_verification_a_state_still_moves_and_the_self_check_tells() {
    let destination = synthetic("state=256K,block=4K,verify=off");
    let source = synthetic(&format!("{SMALL},fault=corrupt:5000"));
    load(&destination, &save(&source), 4096).unwrap();
    assert_eq!(get(&destination, BAD_BLOCKS), 1);
}
