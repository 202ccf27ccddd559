//! Data sessions: who may read and write when, and what a model that breaks its contract brings
//! (`vfio.h: VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`, the data fd).

use crate::common::{Answer, Rig, refused};
use limosa_client::{Chunk, DataStream, Device, DeviceExt, Error};
use limosa_device::{Fault, Save};
use limosa_protocol::{Errno, MigrationFlags, State};

const ALL: MigrationFlags = MigrationFlags::SETS[3];

fn open(state: State) -> (Rig, Box<dyn DataStream>) {
    let (rig, stream) = Rig::at(ALL, state);
    (rig, stream.unwrap())
}

#[test]
fn saving_states_are_read_and_resuming_is_written() {
    for state in [State::PreCopy, State::PreCopyP2p, State::StopCopy] {
        let (rig, mut stream) = open(state);
        rig.script().saves.push_back(Answer::Data(b"state".to_vec()));
        assert_eq!(refused(stream.write(b"x")), Errno::EBADF);
        let mut data = [0; 3];
        assert_eq!(stream.read(&mut data).unwrap(), Chunk::Data(3));
        assert_eq!(&data, b"sta");
        assert_eq!(stream.read(&mut data).unwrap(), Chunk::Data(2));
        assert_eq!(&data[..2], b"te");
        let last = if state == State::StopCopy { Chunk::End } else { Chunk::NothingForNow };
        assert_eq!(stream.read(&mut data).unwrap(), last);
    }
    let (rig, mut stream) = open(State::Resuming);
    assert_eq!(refused(stream.read(&mut [0; 8])), Errno::EBADF);
    stream.write(b"sta").unwrap();
    stream.write(b"").unwrap();
    stream.write(b"te").unwrap();
    assert_eq!(rig.script().loaded, b"state");
    assert_eq!(rig.calls(), ["load", "load"], "an empty write does not reach the model");
}

#[test]
fn a_read_without_room_is_a_mistake_of_the_caller() {
    let (rig, mut stream) = open(State::StopCopy);
    assert!(matches!(stream.read(&mut []), Err(Error::Usage { .. })));
    let session = rig.machine.session().unwrap();
    assert_eq!(rig.machine.data_read(session, 0, |_| ()), Err(Errno::EINVAL));
    assert!(rig.calls().is_empty());
}

#[test]
fn one_session_goes_on_from_pre_copy_to_stop_copy_and_then_ends() {
    let (rig, mut stream) = open(State::PreCopy);
    rig.script().saves.extend([Answer::Data(b"a".to_vec()), Answer::Nothing, Answer::Data(b"b".to_vec())]);
    let mut data = [0; 8];
    assert_eq!(stream.read(&mut data).unwrap(), Chunk::Data(1));
    assert_eq!(stream.read(&mut data).unwrap(), Chunk::NothingForNow);
    assert!(rig.device.set_state(State::StopCopy).unwrap().is_none());
    assert_eq!(stream.read(&mut data).unwrap(), Chunk::Data(1));
    assert_eq!(data[0], b'b');
    assert_eq!(stream.read(&mut data).unwrap(), Chunk::End);
    rig.device.set_state(State::Stop).unwrap();
    assert_eq!(refused(stream.read(&mut data)), Errno::ENODEV);
    // The next session is another one: the old stream stays dead.
    let mut next = rig.device.set_state(State::StopCopy).unwrap().unwrap();
    assert_eq!(refused(stream.read(&mut data)), Errno::ENODEV);
    assert_eq!(next.read(&mut data).unwrap(), Chunk::End);
}

#[test]
fn an_unrelated_refusal_does_not_end_a_session() {
    let (rig, mut stream) = open(State::PreCopy);
    assert_eq!(refused(rig.device.set_state(State::Error)), Errno::EINVAL);
    assert_eq!(refused(rig.device.region_read(9, 0, &mut [0; 4])), Errno::EINVAL);
    assert_eq!(refused(rig.device.bus_master(true)), Errno::ENOTTY);
    rig.fault("quiesce_p2p", Fault::Refused(Errno::EBUSY));
    assert_eq!(refused(rig.device.set_state(State::PreCopyP2p)), Errno::EBUSY);
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), Chunk::NothingForNow);
}

#[test]
fn dropping_a_stream_changes_nothing_at_the_device() {
    let (rig, stream) = open(State::StopCopy);
    drop(stream);
    assert_eq!(rig.state(), State::StopCopy);
    rig.check();
}

#[test]
fn a_stream_is_read_by_a_thread_while_another_drives_states() {
    let (rig, mut stream) = open(State::PreCopy);
    rig.script().saves.extend((0..64).map(|n| Answer::Data(vec![n; 100])));
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        let mut data = [0; 64];
        loop {
            match stream.read(&mut data).unwrap() {
                Chunk::Data(bytes) => all.extend_from_slice(&data[..bytes]),
                Chunk::NothingForNow => std::thread::yield_now(),
                Chunk::End => return all,
            }
        }
    });
    rig.device.set_state(State::PreCopyP2p).unwrap();
    rig.device.set_state(State::StopCopy).unwrap();
    let want: Vec<u8> = (0..64).flat_map(|n| [n; 100]).collect();
    assert_eq!(reader.join().unwrap(), want);
}

#[test]
fn precopy_info_is_refused_outside_pre_copy_and_shows_flags_only_after_the_opt_in() {
    let (rig, mut stream) = open(State::PreCopy);
    let info = stream.precopy_info().unwrap();
    assert_eq!((info.argsz, info.flags, info.initial_bytes, info.dirty_bytes), (24, 0, 10, 20));
    assert!(rig.device.precopy_info_v2().unwrap());
    assert!(stream.precopy_info().unwrap().reinit());
    rig.device.set_state(State::StopCopy).unwrap();
    assert_eq!(refused(stream.precopy_info()), Errno::EINVAL);
    rig.device.reset().unwrap();
    assert_eq!(refused(stream.precopy_info()), Errno::ENODEV);
    let mut stream = rig.device.set_state(State::PreCopy).unwrap().unwrap();
    assert_eq!(stream.precopy_info().unwrap().flags, 0, "the opt-in ends with a reset");

    let (_rig, mut stream) = open(State::Resuming);
    assert_eq!(refused(stream.precopy_info()), Errno::EINVAL);
    let (_rig, stream) = Rig::at(MigrationFlags::SETS[1], State::StopCopy);
    assert_eq!(refused(stream.unwrap().precopy_info()), Errno::ENOTTY, "no PRE_COPY, no info");
}

#[test]
fn a_model_that_breaks_the_contract_of_save_gives_eio_and_no_more_data() {
    let too_much = || Answer::Data(vec![1; 9]);
    for (state, answer) in [
        (State::StopCopy, Answer::Nothing),
        (State::PreCopy, Answer::End),
        (State::PreCopyP2p, Answer::Data(Vec::new())),
        (State::StopCopy, Answer::Data(Vec::new())),
        // With a single byte of room this model lends too much.
        (State::StopCopy, too_much()),
    ] {
        let (rig, mut stream) = open(state);
        rig.script().saves.extend([answer.clone(), Answer::Data(b"x".to_vec())]);
        let mut data = [0; 1];
        assert_eq!(refused(stream.read(&mut data)), Errno::EIO, "{state} {answer:?}");
        assert_eq!(refused(stream.read(&mut data)), Errno::EIO, "a gap must not be read over");
        assert_eq!(rig.state(), state);
        rig.device.set_state(State::Running).unwrap();
        rig.check();
    }
}

#[test]
fn a_failing_save_can_be_repeated() {
    let (rig, mut stream) = open(State::StopCopy);
    rig.script().saves.extend([Answer::Fails(Errno::ENOMEM), Answer::Data(b"x".to_vec())]);
    let mut data = [0; 4];
    assert_eq!(refused(stream.read(&mut data)), Errno::ENOMEM);
    assert_eq!(stream.read(&mut data).unwrap(), Chunk::Data(1));
}

#[test]
fn a_load_that_lost_data_cannot_be_finished() {
    let (rig, mut stream) = open(State::Resuming);
    rig.fault("load", Fault::Refused(Errno::EBADMSG));
    assert_eq!(refused(stream.write(b"bad")), Errno::EBADMSG);
    assert_eq!(refused(stream.write(b"good")), Errno::EIO);
    rig.calls();
    assert_eq!(refused(rig.device.set_state(State::Running)), Errno::EIO);
    assert!(rig.calls().is_empty(), "the model is not asked to finish it");
    assert_eq!(rig.state(), State::Resuming);
    rig.device.reset().unwrap();
    rig.check();
}

/// Fills with a running count, so that a test sees every byte that was asked for.
fn counting(next: &mut u8) -> impl FnMut(&mut [u8]) -> Result<usize, &'static str> {
    move |piece| {
        for byte in &mut *piece {
            *byte = *next;
            *next = next.wrapping_add(1);
        }
        Ok(piece.len())
    }
}

#[test]
fn data_fill_receives_into_the_models_memory_or_the_spare_buffer() {
    for space in [0, 1, 7, 100, 1 << 20] {
        let (rig, _stream) = open(State::Resuming);
        rig.script().space = space;
        let session = rig.machine.session().unwrap();
        let (mut next, mut spare) = (0, Vec::new());
        for mut bytes in [5, 1000] {
            // Nothing has come yet.
            let none = rig.machine.data_fill(session, bytes, &mut spare, |_| Ok::<_, ()>(0));
            assert_eq!(none, Ok(Ok(0)));
            while bytes > 0 {
                bytes -=
                    rig.machine.data_fill(session, bytes, &mut spare, counting(&mut next)).unwrap().unwrap();
            }
        }
        let want: Vec<u8> = (0..1005).map(|n| n as u8).collect();
        assert_eq!(rig.script().loaded, want);
        assert_eq!(spare.is_empty(), space > 0, "the spare buffer is for models that lend nothing");
    }
}

#[test]
fn data_fill_takes_no_bytes_that_the_session_refuses() {
    let fill = |rig: &Rig, session| {
        let (mut next, mut spare) = (0, Vec::new());
        let filled = rig.machine.data_fill(session, 3 << 20, &mut spare, counting(&mut next));
        assert!(spare.len() <= 256 << 10, "the spare buffer is bounded");
        filled.unwrap()
    };
    let (rig, _stream) = open(State::StopCopy);
    let old = rig.machine.session().unwrap();
    assert_eq!(fill(&rig, old), Err(Errno::EBADF));
    rig.device.set_state(State::Resuming).unwrap();
    assert_eq!(fill(&rig, old), Err(Errno::ENODEV));
    let session = rig.machine.session().unwrap();
    rig.fault("load", Fault::Refused(Errno::EBADMSG));
    assert_eq!(fill(&rig, session), Err(Errno::EBADMSG));
    assert_eq!(fill(&rig, session), Err(Errno::EIO), "damaged by the first");

    let (rig, _stream) = open(State::Resuming);
    rig.script().space = 1000;
    rig.fault("load_filled", Fault::Refused(Errno::EBADMSG));
    assert_eq!(fill(&rig, rig.machine.session().unwrap()), Err(Errno::EBADMSG));
}

#[test]
fn a_peer_that_goes_away_in_mid_chunk_damages_the_load() {
    for space in [0, 10] {
        let (rig, mut stream) = open(State::Resuming);
        rig.script().space = space;
        let session = rig.machine.session().unwrap();
        let mut calls = 0;
        let done = rig.machine.data_fill(session, 100, &mut Vec::new(), |_| {
            calls += 1;
            Err::<usize, _>("reset by peer")
        });
        assert_eq!((done, calls), (Err("reset by peer"), 1), "not called again once it failed");
        assert_eq!(refused(stream.write(b"x")), Errno::EIO);
        assert_eq!(refused(rig.device.set_state(State::Stop)), Errno::EIO);
        rig.device.reset().unwrap();
        rig.check();
    }
}

#[test]
fn a_closure_that_panics_leaves_a_usable_device() {
    let (rig, mut stream) = open(State::StopCopy);
    rig.script().saves.push_back(Answer::Data(b"lost".to_vec()));
    let session = rig.machine.session().unwrap();
    let machine = rig.machine.clone();
    let outcome = std::thread::spawn(move || {
        machine.data_read(session, 8, |_: Save<'_>| panic!("the caller's own fault")).unwrap()
    })
    .join();
    assert!(outcome.is_err());
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), Chunk::End);
    assert_eq!(rig.state(), State::StopCopy);
}

#[test]
fn a_model_that_panics_is_in_error_until_it_is_reset() {
    for call in
        ["region_read", "stop", "save_begin", "save", "load", "load_space", "precopy_info", "load_finish"]
    {
        let state = match call {
            "save" | "precopy_info" => State::PreCopy,
            "load" | "load_space" | "load_finish" => State::Resuming,
            _ => State::Running,
        };
        let (rig, mut stream) = Rig::at(ALL, state);
        rig.script().panics = Some(call);
        let errno = match (call, &mut stream) {
            ("region_read", _) => refused(rig.device.region_read(0, 0, &mut [0; 4])),
            ("save", Some(stream)) => refused(stream.read(&mut [0; 4])),
            ("precopy_info", Some(stream)) => refused(stream.precopy_info()),
            ("load", Some(stream)) => refused(stream.write(b"x")),
            ("load_space", _) => {
                let session = rig.machine.session().unwrap();
                let fill = |_: &mut [u8]| Ok::<usize, ()>(8);
                rig.machine.data_fill(session, 8, &mut Vec::new(), fill).unwrap().unwrap_err()
            }
            ("load_finish", _) => refused(rig.device.set_state(State::Stop)),
            _ => refused(rig.device.set_state(State::StopCopy)),
        };
        assert_eq!(errno, Errno::EIO, "{call}");
        assert_eq!(rig.state(), State::Error, "{call}");
        assert_eq!(rig.machine.session(), None);
        rig.calls();
        assert_eq!(refused(rig.device.region_read(0, 0, &mut [0; 4])), Errno::EIO);
        assert_eq!(refused(rig.device.mig_data_size()), Errno::EIO);
        assert!(rig.calls().is_empty(), "{call}: a model that panicked is not called");
        rig.device.reset().unwrap();
        assert_eq!(rig.calls(), ["reset"]);
        rig.device.region_read(0, 0, &mut [0; 4]).unwrap();
        rig.check();
    }
}
