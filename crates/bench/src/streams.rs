//! Data streams: MIG_DATA_READ and MIG_DATA_WRITE by size. On the bench's own device one operation is
//! one chunk of a stream without an end, by messages and over the session's own socket (`data fd`),
//! which is not asked again for each chunk; on any other it is the whole state, in chunks.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use limosa_client::{Chunk, DataStream, Device, DeviceExt};
use limosa_protocol::State;
use limosa_vfio_user::client::Options;

use crate::cases::{HEADER, Run};
use crate::child::own_device;
use crate::floor::Floor;
use crate::measure::{Contender, in_turns};
use crate::{Figure, Timing};

/// Bytes of a MIG_DATA message's fixed part.
const MIG_DATA: usize = 8;

/// The most state that is kept to be loaded again.
const STATE_BYTES_MAX: usize = 1 << 30;

const CHUNKS: [usize; 4] = [4 << 10, 64 << 10, 256 << 10, 1 << 20];

pub(crate) fn streams(run: &mut Run<'_>) -> anyhow::Result<()> {
    if run.own { endless(run) } else { whole_state(run.device, true, run.each, run.done) }
}

fn open(device: &dyn Device, state: State) -> anyhow::Result<Box<dyn DataStream>> {
    device.set_state(state)?.with_context(|| format!("{}: {state} opened no session", device.name()))
}

fn endless(run: &mut Run<'_>) -> anyhow::Result<()> {
    let (client, _child) = own_device(Options { data_socket: true, ..Options::default() })?;
    let mut stream = open(run.device, State::StopCopy)?;
    let mut socket = open(&client, State::StopCopy)?;
    for bytes in CHUNKS {
        let mut floor = Floor::start(HEADER + MIG_DATA, HEADER + MIG_DATA + bytes)?;
        let (mut data, mut same) = (vec![0; bytes], vec![0; bytes]);
        let contenders = &mut [
            Contender::new("limosa", || {
                ensure!(stream.read(&mut data)? == Chunk::Data(bytes), "a short read");
                Ok(())
            }),
            Contender::new("floor", || floor.round_trip()),
            Contender::new("data fd", || read_all(&mut *socket, &mut same)),
        ];
        let timings = in_turns(contenders, run.each)?;
        (run.done)(Figure::new("MIG_DATA_READ", bytes, timings));
    }
    drop((stream, socket));
    let mut stream = open(run.device, State::Resuming)?;
    let mut socket = open(&client, State::Resuming)?;
    for bytes in CHUNKS {
        let mut floor = Floor::start(HEADER + MIG_DATA + bytes, HEADER)?;
        let data = vec![0x5a; bytes];
        let contenders = &mut [
            Contender::new("limosa", || Ok(stream.write(&data)?)),
            Contender::new("floor", || floor.round_trip()),
            Contender::new("data fd", || Ok(socket.write(&data)?)),
        ];
        let timings = in_turns(contenders, run.each)?;
        (run.done)(Figure::new("MIG_DATA_WRITE", bytes, timings));
    }
    drop(stream);
    run.device.reset()?;
    Ok(())
}

/// As much as the buffer holds.
fn read_all(stream: &mut dyn DataStream, mut data: &mut [u8]) -> anyhow::Result<()> {
    while !data.is_empty() {
        match stream.read(data)? {
            Chunk::Data(bytes) => data = &mut data[bytes..],
            Chunk::NothingForNow | Chunk::End => bail!("a stream without an end has ended"),
        }
    }
    Ok(())
}

/// Saves and loads all of the device's state, and leaves the device with it; beside the floor of a socket, where
/// there is one between.
pub(crate) fn whole_state(
    device: &dyn Device,
    socket: bool,
    each: Duration,
    done: &mut dyn FnMut(Figure),
) -> anyhow::Result<()> {
    let found = device.state()?;
    let saved = save(device, &mut vec![0; 1 << 20])?;
    let result = whole_state_by_size(device, &saved, socket, each, done);
    // Whatever came of it: the device gets its state back.
    device.reset().context("cannot reset the device to give it back its state")?;
    load(device, &saved, 1 << 20).context("cannot load the device's own state back")?;
    device.set_state(found)?;
    result
}

fn whole_state_by_size(
    device: &dyn Device,
    saved: &[u8],
    socket: bool,
    each: Duration,
    done: &mut dyn FnMut(Figure),
) -> anyhow::Result<()> {
    for bytes in CHUNKS {
        let mut floor = floor(socket, saved, bytes, |chunk| (HEADER + MIG_DATA, HEADER + MIG_DATA + chunk))?;
        let mut data = vec![0; bytes];
        let mut reading = Contender::new("limosa", || save(device, &mut data).map(drop));
        reading.prepare = Box::new(|| Ok(device.set_state(State::Stop).map(drop)?));
        let timings = beside(reading, floor.as_mut(), saved.len().div_ceil(bytes), each)?;
        let what = format!("whole state out by {}", crate::table::size(bytes));
        done(Figure::new(&what, saved.len(), timings));
    }
    for bytes in CHUNKS {
        let mut floor = floor(socket, saved, bytes, |chunk| (HEADER + MIG_DATA + chunk, HEADER))?;
        let loading = Contender::new("limosa", || load(device, saved, bytes));
        let timings = beside(loading, floor.as_mut(), saved.len().div_ceil(bytes), each)?;
        let what = format!("whole state in by {}", crate::table::size(bytes));
        done(Figure::new(&what, saved.len(), timings));
    }
    Ok(())
}

/// A floor of the request's and reply's sizes that chunks of so many bytes need.
fn floor(
    socket: bool,
    saved: &[u8],
    bytes: usize,
    sizes: impl Fn(usize) -> (usize, usize),
) -> anyhow::Result<Option<Floor>> {
    let (request, reply) = sizes(bytes.min(saved.len().max(1)));
    socket.then(|| Floor::start(request, reply)).transpose()
}

fn beside(
    device: Contender<'_>,
    floor: Option<&mut Floor>,
    round_trips: usize,
    each: Duration,
) -> anyhow::Result<Vec<Timing>> {
    let floor = floor
        .map(|floor| Contender::new("floor", move || (0..round_trips).try_for_each(|_| floor.round_trip())));
    let mut contenders: Vec<_> = std::iter::once(device).chain(floor).collect();
    in_turns(&mut contenders, each)
}

/// From wherever the device is through STOP to STOP_COPY and to the end.
fn save(device: &dyn Device, chunk: &mut [u8]) -> anyhow::Result<Vec<u8>> {
    device.set_state(State::Stop)?;
    let mut stream = open(device, State::StopCopy)?;
    let mut saved = Vec::new();
    loop {
        match stream.read(chunk)? {
            Chunk::Data(bytes) => {
                ensure!(
                    saved.len() + bytes <= STATE_BYTES_MAX,
                    "{}: more than 1 GiB of state, which is too much to keep while measuring",
                    device.name()
                );
                saved.extend_from_slice(&chunk[..bytes]);
            }
            Chunk::NothingForNow | Chunk::End => return Ok(saved),
        }
    }
}

/// Loads a state; the device is in STOP afterwards.
fn load(device: &dyn Device, saved: &[u8], chunk_bytes: usize) -> anyhow::Result<()> {
    let mut stream = open(device, State::Resuming)?;
    for chunk in saved.chunks(chunk_bytes) {
        stream.write(chunk)?;
    }
    device.set_state(State::Stop)?;
    Ok(())
}
