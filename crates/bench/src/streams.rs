//! Data streams: MIG_DATA_READ and MIG_DATA_WRITE by size. One operation is one chunk of a stream without an end, by messages
//! and over the session's own socket (`data fd`), which needs no request for each chunk.

use anyhow::{Context, bail, ensure};
use limosa_client::{Chunk, DataStream, Device, DeviceExt};
use limosa_protocol::State;
use limosa_vfio_user::client::Options;

use crate::Figure;
use crate::cases::{HEADER, Run};
use crate::child::own_device;
use crate::floor::Floor;
use crate::turns::{Contender, in_turns};

/// Bytes of a MIG_DATA message's fixed part.
pub(crate) const MIG_DATA: usize = 8;

pub(crate) const CHUNKS: [usize; 4] = [4 << 10, 64 << 10, 256 << 10, 1 << 20];

fn open(device: &dyn Device, state: State) -> anyhow::Result<Box<dyn DataStream>> {
    device.set_state(state)?.with_context(|| format!("{}: {state} opened no session", device.name()))
}

pub(crate) fn streams(run: &mut Run<'_>) -> anyhow::Result<()> {
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
