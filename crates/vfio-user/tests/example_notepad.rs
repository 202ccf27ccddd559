//! The device with pre-copy of `docs/device.md`: what its guest writes while it is copied is copied again.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use limosa_client::{Chunk, DataStream, Device, DeviceExt, Error};
use limosa_protocol::{Errno, State};
use limosa_testing::{LIMIT, Process, built_example};
use limosa_vfio_user::client::{Client, Options};

const PAGE: u64 = 4096;
const BYTES: usize = 256 * 4096;

fn serve(path: &Path) -> (Process, Client) {
    let server = Process::start(Command::new(built_example("limosa-vfio-user", "notepad")).arg(path));
    let begun = Instant::now();
    loop {
        match Client::connect(path, Options::default()) {
            Ok(client) => return (server, client),
            Err(error) => assert!(begun.elapsed() < LIMIT, "{error}"),
        }
        std::thread::yield_now();
    }
}

/// Reads what there is for now, or all that is left.
fn read(stream: &mut dyn DataStream, into: &mut Vec<u8>) -> Chunk {
    let mut chunk = [0; 10_000];
    loop {
        match stream.read(&mut chunk).unwrap() {
            Chunk::Data(bytes) => into.extend_from_slice(&chunk[..bytes]),
            none => return none,
        }
    }
}

fn memory(client: &Client) -> Vec<u8> {
    let mut bytes = vec![0; BYTES];
    for (at, piece) in bytes.chunks_mut(64 << 10).enumerate() {
        client.region_read(0, (at as u64) << 16, piece).unwrap();
    }
    bytes
}

#[test]
fn what_the_guest_writes_during_pre_copy_is_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let (_here, here) = serve(&folder.path().join("here"));
    let (_there, there) = serve(&folder.path().join("there"));
    let write = |at: u64, what: u8| here.region_write(0, at, &[what; 8]).unwrap();
    (0..256).for_each(|page| write(page * PAGE, 1));

    let mut stream = here.set_state(State::PreCopy).unwrap().expect("a session");
    let info = stream.precopy_info().unwrap();
    assert_eq!((info.initial_bytes, info.dirty_bytes), (BYTES as u64, 0));
    let mut data = Vec::new();
    assert_eq!(read(&mut *stream, &mut data), Chunk::NothingForNow);
    let first = data.len();
    assert!(first >= BYTES);
    // Two pages by one write, one by another, the first of them twice.
    write(5 * PAGE - 4, 2);
    write(100 * PAGE, 3);
    write(4 * PAGE, 4);
    let info = stream.precopy_info().unwrap();
    assert_eq!((info.initial_bytes, info.dirty_bytes), (0, 3 * PAGE));
    assert!(here.mig_data_size().unwrap().unwrap() < 5 * PAGE, "most of it was read");
    assert_eq!(read(&mut *stream, &mut data), Chunk::NothingForNow);
    assert!((3 * PAGE..4 * PAGE).contains(&((data.len() - first) as u64)), "only what changed");
    // The last one is read in STOP_COPY, with all that is not memory.
    write(200 * PAGE, 5);
    here.set_state(State::StopCopy).unwrap();
    let stopped = here.region_write(0, 0, &[9]);
    assert!(matches!(stopped, Err(Error::Refused { errno: Errno::EBUSY, .. })), "{stopped:?}");
    assert_eq!(read(&mut *stream, &mut data), Chunk::End);
    drop(stream);

    let mut target = there.set_state(State::Resuming).unwrap().expect("a session");
    target.write(&data).unwrap();
    drop(target);
    there.set_state(State::Stop).unwrap();
    let moved = memory(&there);
    assert_eq!(moved[5 * PAGE as usize - 4..][..8], [2; 8]);
    assert_eq!((moved[100 * PAGE as usize], moved[4 * PAGE as usize], moved[200 * PAGE as usize]), (3, 4, 5));
    assert!(moved == memory(&here));
}

#[test]
fn a_state_in_which_a_page_is_altered_or_missing_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (_here, here) = serve(&folder.path().join("here"));
    let (_there, there) = serve(&folder.path().join("there"));
    here.region_write(0, 0, &[1; 8]).unwrap();
    there.region_write(0, 0, &[7; 8]).unwrap();
    let mut stream = here.set_state(State::StopCopy).unwrap().expect("a session");
    let mut data = Vec::new();
    read(&mut *stream, &mut data);
    drop(stream);
    let half = data.len() / 2;
    let altered = [&data[..half], &[!data[half]], &data[half + 1..]].concat();
    for wrong in [&data[..half], &altered] {
        let mut target = there.set_state(State::Resuming).unwrap().expect("a session");
        // It is told by a write at once, or by the way to STOP.
        let written = target.write(wrong);
        drop(target);
        assert!(written.is_err() || there.set_state(State::Stop).is_err());
        let mut still = [0; 8];
        there.region_read(0, 0, &mut still).unwrap();
        assert_eq!(still, [7; 8], "it was not touched");
        there.reset().unwrap();
        there.region_write(0, 0, &[7; 8]).unwrap();
    }
}
