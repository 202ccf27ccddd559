//! The data stream of an mtty card.
//!
//! Input: how many ports the card has (u8, modulo 2, plus 1), in pieces of how many bytes the stream
//! comes (u8), how many accesses follow (u8), so many accesses, each a port and register (u8) and a
//! value (u8), and the stream.

use limosa_client::{Chunk, Device, DeviceExt};
use limosa_device::{Loopback, Machine};
use limosa_models::uart::Mtty;
use limosa_protocol::State;

use crate::input::Input;

/// See the module.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let ports = usize::from(input.take::<u8>() % 2) + 1;
    let piece = usize::from(input.take::<u8>().max(1));
    let accesses: Vec<_> =
        (0..input.take::<u8>()).map(|_| (input.take::<u8>(), input.take::<u8>())).collect();
    let card = card(ports);
    if !loads(&card, input.0, piece) {
        assert_eq!(card.state().ok(), Some(State::Resuming));
        card.reset().expect("a card can always be reset");
        assert!(loads(&card, &save(&self::card(ports)), 7), "after a refusal and a reset");
        return;
    }
    assert_eq!(save(&card), input.0, "what is taken is kept as it is");
    // Whatever was taken, the card works, and what it then has can be moved again.
    card.set_state(State::Running).expect("a loaded card runs");
    for (at, value) in accesses {
        let (port, register) = (u32::from(at >> 3) % ports as u32, u64::from(at % 8));
        card.region_write(port, register, &[value]).expect("a register");
        card.region_read(port, register, &mut [0]).expect("a register");
    }
    let moved = save(&card);
    assert!(loads(&card, &moved, piece), "what a card writes is refused");
    assert_eq!(save(&card), moved);
}

fn card(ports: usize) -> Loopback {
    let card = Mtty::new(ports).expect("one or two");
    Loopback::new("mtty", Machine::simple(card))
}

fn loads(card: &dyn Device, stream: &[u8], piece: usize) -> bool {
    let mut session = card.set_state(State::Resuming).expect("RESUMING").expect("a session");
    stream.chunks(piece).all(|piece| session.write(piece).is_ok()) && card.set_state(State::Stop).is_ok()
}

fn save(card: &dyn Device) -> Vec<u8> {
    let mut session = card.set_state(State::StopCopy).expect("STOP_COPY").expect("a session");
    let (mut stream, mut piece) = (Vec::new(), [0; 50]);
    while let Ok(Chunk::Data(bytes)) = session.read(&mut piece) {
        stream.extend_from_slice(&piece[..bytes]);
    }
    card.set_state(State::Stop).expect("STOP");
    stream
}

/// See [`Target::seeds`](crate::Target::seeds).
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let one = card(1);
    let bytes = |card: &Loopback, port| {
        for (register, value) in [(2, 0xc7), (3, 3), (1, 5), (7, 0x5a)] {
            card.region_write(port, register, &[value]).expect("a register");
        }
        b"limosa".iter().for_each(|byte| card.region_write(port, 0, &[*byte]).expect("a register"));
    };
    bytes(&one, 0);
    let two = card(2);
    bytes(&two, 1);
    vec![
        ("new", [&[0, 60, 0][..], &save(&card(1))].concat()),
        ("one_port", [&[0, 24, 2, 2, 7, 0, b'x'][..], &save(&one)].concat()),
        ("two_ports", [&[1, 5, 1, 8, b'y'][..], &save(&two)].concat()),
        ("cut", [&[1, 96, 0][..], &save(&two)[..70]].concat()),
    ]
}
