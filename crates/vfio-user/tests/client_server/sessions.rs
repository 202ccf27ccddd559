//! States, sessions and resets.

use super::*;

/// Reads a stream until it has nothing for now or ends.
fn drain(stream: &mut dyn DataStream, into: &mut Vec<u8>, piece: usize) -> Chunk {
    let mut data = vec![0; piece];
    loop {
        match stream.read(&mut data).unwrap() {
            Chunk::Data(bytes) => into.extend_from_slice(&data[..bytes]),
            end => return end,
        }
    }
}

#[test]
fn a_device_moves_with_precopy() {
    let pieces = [1000, 65536, 1 << 20, 3 << 20];
    for (piece, data_socket) in pieces.into_iter().flat_map(|piece| [(piece, false), (piece, true)]) {
        let (from, to) = (Served::new(), Served::new());
        let options = Options { data_socket, ..Options::default() };
        let source = Client::connect(from.path(), options.clone()).unwrap();
        let destination = Client::connect(to.path(), options).unwrap();
        let flags = MigrationFlags::STOP_COPY | MigrationFlags::PRE_COPY;
        assert_eq!(source.migration_flags().unwrap(), flags);
        assert_eq!(source.state().unwrap(), State::Running);
        assert_eq!(source.mig_data_size().unwrap(), Some(3 << 20));
        assert!(source.probe(FeatureIndex::DMA_LOGGING_START, FeatureOp::SET).unwrap());
        let mut saved = Vec::new();
        let mut stream = source.set_state(State::PreCopy).unwrap().expect("a session opens");
        assert_eq!(drain(&mut *stream, &mut saved, piece), Chunk::NothingForNow);
        assert_eq!(saved.len(), 3 << 19);
        assert_eq!(stream.read(&mut [0; 10]).unwrap(), Chunk::NothingForNow);
        assert!(stream.write(&[1]).unwrap_err().is_refused(Errno::EBADF));
        assert!(source.set_state(State::StopCopy).unwrap().is_none(), "the session goes on");
        assert!(stream.precopy_info().is_err());
        // Another thread than the one that drives the states.
        let (mut stream, saved) = std::thread::spawn(move || {
            assert_eq!(drain(&mut *stream, &mut saved, piece), Chunk::End);
            assert_eq!(stream.read(&mut [0; 10]).unwrap(), Chunk::End, "the end stays the end");
            (stream, saved)
        })
        .join()
        .unwrap();
        assert_eq!(saved.len(), 3 << 20);
        source.set_state(State::Stop).unwrap();
        assert!(stream.read(&mut [0; 10]).unwrap_err().is_refused(Errno::ENODEV));

        let mut load = destination.set_state(State::Resuming).unwrap().expect("a session opens");
        assert!(load.read(&mut [0; 10]).unwrap_err().is_refused(Errno::EBADF));
        for chunk in saved.chunks(piece) {
            load.write(chunk).unwrap();
        }
        destination.set_state(State::Running).unwrap();
        assert!(load.write(&[1]).unwrap_err().is_refused(Errno::ENODEV));
        assert_eq!(destination.state().unwrap(), State::Running);
        // The old session's stream does not become the new one's.
        source.set_state(State::StopCopy).unwrap();
        assert!(stream.read(&mut [0; 10]).unwrap_err().is_refused(Errno::ENODEV));
    }
}

#[test]
fn precopy_info_comes_where_the_server_has_it() {
    let served = Served::new();
    let options = Options { data_socket: false, ..Options::default() };
    let client = Client::connect(served.path(), options).unwrap();
    let mut stream = client.set_state(State::PreCopy).unwrap().unwrap();
    assert_eq!(stream.precopy_info().unwrap().initial_bytes, 3 << 19);
    stream.read(&mut [0; 4096]).unwrap();
    assert_eq!(stream.precopy_info().unwrap().initial_bytes, (3 << 19) - 4096);
    client.set_state(State::Running).unwrap();
    assert!(stream.precopy_info().unwrap_err().is_refused(Errno::ENODEV));
}

#[test]
fn what_the_machine_refuses_leaves_the_client_right() {
    for data_socket in [false, true] {
        refused_states(data_socket);
    }
}

fn refused_states(data_socket: bool) {
    let served = Served::new();
    let client = Client::connect(served.path(), Options { data_socket, ..Options::default() }).unwrap();
    let mut stream = client.set_state(State::StopCopy).unwrap().unwrap();
    assert!(client.set_state(State::PreCopy).map(drop).unwrap_err().is_refused(Errno::EINVAL));
    assert!(matches!(stream.read(&mut [0; 10]).unwrap(), Chunk::Data(10)), "the session is untouched");
    client.reset().unwrap();
    assert!(stream.read(&mut [0; 10]).unwrap_err().is_refused(Errno::ENODEV));
    assert_eq!(client.state().unwrap(), State::Running);
    // A load that is cut: SET fails, the device stays in RESUMING, its session goes on.
    let mut load = client.set_state(State::Resuming).unwrap().unwrap();
    load.write(&[0; 100]).unwrap();
    assert!(client.set_state(State::Stop).is_err());
    assert_eq!(client.state().unwrap(), State::Resuming);
    if data_socket {
        assert!(load.write(&[0; 100]).is_err(), "the end was said");
    } else {
        load.write(&[0; 100]).unwrap();
    }
    client.reset().unwrap();
    assert!(load.write(&[0; 100]).unwrap_err().is_refused(Errno::ENODEV));
}

#[test]
fn a_server_that_dies_is_not_taken_for_the_end_of_the_data() {
    for data_socket in [false, true] {
        let served = Served::new();
        let client = Client::connect(served.path(), Options { data_socket, ..Options::default() }).unwrap();
        let mut stream = client.set_state(State::StopCopy).unwrap().unwrap();
        drop(served);
        let mut data = vec![0; 1 << 20];
        let end = loop {
            match stream.read(&mut data) {
                Ok(Chunk::Data(_)) => {}
                Ok(other) => panic!("{other:?}"),
                Err(error) => break error,
            }
        };
        assert!(end.is_connection_lost(), "{end}");
    }
}

#[test]
fn data_over_its_own_socket_does_not_hold_up_other_requests() {
    let served = Served::new();
    let options = Options { data_socket: true, ..Options::default() };
    let client = Client::connect(served.path(), options).unwrap();
    let mut stream = client.set_state(State::StopCopy).unwrap().unwrap();
    // Nobody reads the state, and everything else goes on.
    for n in 0..100 {
        client.region_write(BAR0, n, &[n as u8]).unwrap();
    }
    let mut saved = Vec::new();
    assert_eq!(drain(&mut *stream, &mut saved, 100_000), Chunk::End);
    assert_eq!(saved.len(), 3 << 20);
    // A load that is refused says why, on the stream and on the SET.
    client.set_state(State::Stop).unwrap();
    let mut load = client.set_state(State::Resuming).unwrap().unwrap();
    load.write(&saved).unwrap();
    let refused = (0..1000).find_map(|_| load.write(&saved).err());
    assert!(refused.is_some_and(|error| error.errno().is_some()), "more than the device's state was taken");
    assert!(client.set_state(State::Stop).is_err());
    client.reset().unwrap();
}

#[test]
fn a_reset_that_the_states_do_not_show_is_seen_by_the_count() {
    let served = Served::new();
    let client = client(&served);
    assert!(client.probe(FeatureIndex::RESET_COUNT, FeatureOp::GET).unwrap());
    assert!(!client.probe(FeatureIndex::RESET_COUNT, FeatureOp::SET).unwrap());
    let mut state = Vec::new();
    drain(&mut *client.set_state(State::StopCopy).unwrap().unwrap(), &mut state, 1 << 20);
    client.set_state(State::Stop).unwrap();
    for by_the_client in [false, true] {
        let load = |count: u64| {
            client.set_state(State::Resuming).unwrap().unwrap().write(&state).unwrap();
            client.set_state(State::Stop).unwrap();
            assert_eq!(client.reset_count().unwrap(), Some(count), "no arc is a reset");
        };
        let before = client.reset_count().unwrap().unwrap();
        load(before);
        client.set_state(State::Running).unwrap();
        assert_eq!(client.reset_count().unwrap(), Some(before));
        // The same again, with a reset in between: both SETs succeed.
        load(before);
        if by_the_client {
            client.reset().unwrap()
        } else {
            served.machine.reset().unwrap()
        }
        client.set_state(State::Running).unwrap();
        assert_eq!(client.reset_count().unwrap(), Some(before + 1));
        assert_eq!(served.machine.reset_count(), before + 1);
    }
    // The device is as it was left, and the next client counts on.
    drop(client);
    let next = Client::connect(served.path(), Options::default()).unwrap();
    assert_eq!(next.reset_count().unwrap(), Some(2));
}

#[test]
fn a_server_is_asked_for_its_resets_only_if_features_are() {
    let served = Served::new();
    let client = Client::connect(served.path(), Options { features: false, ..Options::default() }).unwrap();
    assert_eq!(client.reset_count().unwrap(), None);
    client.info().unwrap();
}

#[test]
fn a_new_client_takes_over_a_session() {
    let served = Served::new();
    let first = client(&served);
    first.set_state(State::StopCopy).unwrap().unwrap();
    drop(first);
    let second = client(&served);
    assert_eq!(second.state().unwrap(), State::StopCopy);
    assert!(second.set_state(State::StopCopy).unwrap().is_none(), "no session opens");
    second.set_state(State::Running).unwrap();
}
