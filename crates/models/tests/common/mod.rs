//! What the tests of models share: registers over a client, and a whole move.
#![allow(dead_code)]

use limosa_client::{Chunk, DataStream, Device, DeviceExt, Error};
use limosa_device::{Loopback, Machine, SimpleModel};
use limosa_protocol::{Errno, State};

pub fn device(name: &str, model: impl SimpleModel) -> Loopback {
    Loopback::new(name, Machine::simple(model))
}

/// The errno of a refusal.
pub fn refused<T>(result: Result<T, Error>) -> Errno {
    match result {
        Err(Error::Refused { errno, .. }) => errno,
        Err(other) => panic!("not refused, but: {other}"),
        Ok(_) => panic!("not refused"),
    }
}

pub fn drive(device: &dyn Device, to: State) -> Box<dyn DataStream> {
    device.set_state(to).unwrap().expect("a session opens")
}

/// Reads what there is.
pub fn drain(stream: &mut dyn DataStream, room: usize) -> (Vec<u8>, Chunk) {
    let (mut all, mut data) = (Vec::new(), vec![0; room]);
    loop {
        match stream.read(&mut data).unwrap() {
            Chunk::Data(bytes) => all.extend_from_slice(&data[..bytes]),
            last => return (all, last),
        }
    }
}

/// The whole state of a device, which is in STOP afterwards.
pub fn save(device: &dyn Device) -> Vec<u8> {
    let mut stream = drive(device, State::StopCopy);
    let (state, last) = drain(stream.as_mut(), 1 << 20);
    assert_eq!(last, Chunk::End);
    device.set_state(State::Stop).unwrap();
    state
}

/// Loads a state in pieces of that size and drives the device to STOP.
pub fn load(device: &dyn Device, state: &[u8], piece: usize) -> Result<(), Error> {
    let mut stream = drive(device, State::Resuming);
    state.chunks(piece).try_for_each(|piece| stream.write(piece))?;
    device.set_state(State::Stop).map(drop)
}
