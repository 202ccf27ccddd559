//! [`Whole`]: a device whose state is one message, moved in any pieces, and states that it refuses.

use limosa_client::{Chunk, Device, DeviceExt};
use limosa_device::{Loopback, Machine, Whole};
use limosa_protocol::State;
use limosa_test_device::Memory;

/// A device of one register, which refuses a state with all bits of the register set.
fn cell(value: u64) -> Loopback {
    let memory: Memory = Memory::holding(value.to_le_bytes()).refusing([0xff; 8]);
    Loopback::new("cell", Machine::simple(Whole::new(memory)))
}

fn value(cell: &Loopback) -> u64 {
    let mut bytes = [0; 8];
    cell.region_read(0, 0, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

fn saved(cell: &Loopback) -> Vec<u8> {
    let mut stream = cell.set_state(State::StopCopy).unwrap().unwrap();
    let (mut all, mut piece) = (Vec::new(), [0; 7]);
    while let Chunk::Data(bytes) = stream.read(&mut piece).unwrap() {
        all.extend_from_slice(&piece[..bytes]);
    }
    assert_eq!(cell.mig_data_size().unwrap(), Some(all.len() as u64));
    all
}

#[test]
fn a_state_in_any_pieces_moves() {
    let state = saved(&cell(77));
    for bytes in [1, 5, state.len()] {
        let to = cell(1);
        let mut stream = to.set_state(State::Resuming).unwrap().unwrap();
        state.chunks(bytes).for_each(|chunk| stream.write(chunk).unwrap());
        to.set_state(State::Running).unwrap();
        assert_eq!(value(&to), 77);
    }
}

#[test]
fn truncated_altered_or_wrong_states_leave_the_device_as_it_was() {
    let state = saved(&cell(77));
    let wrong = saved(&cell(u64::MAX));
    let altered = |at: usize| {
        let mut state = state.clone();
        state[at] ^= 1;
        state
    };
    let mut refused: Vec<_> = (0..state.len()).map(|end| state[..end].to_vec()).collect();
    refused.extend((0..state.len()).map(altered));
    refused.push(wrong);
    for state in refused {
        let to = cell(1);
        let mut stream = to.set_state(State::Resuming).unwrap().unwrap();
        let written = stream.write(&state);
        assert!(written.is_err() || to.set_state(State::Stop).is_err());
        assert_eq!(to.state().unwrap(), State::Resuming);
        assert_eq!(value(&to), 1);
        to.reset().unwrap();
        assert_eq!(to.state().unwrap(), State::Running);
    }
}
