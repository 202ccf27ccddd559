//! The floor: a request and a reply of given sizes over a bare AF_UNIX stream socket, answered by
//! another process with one read and one write where the kernel allows. No transport that carries
//! these bytes can be faster on this machine.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use anyhow::Context;

use crate::child::{Child, Role};

/// The client's end of the floor.
pub struct Floor {
    stream: UnixStream,
    request: Vec<u8>,
    reply: Vec<u8>,
    _child: Child,
}

impl Floor {
    /// Starts the other end in a process of its own. Sizes are in bytes, at least 1 each.
    pub fn start(request: usize, reply: usize) -> anyhow::Result<Floor> {
        let (stream, theirs) = UnixStream::pair().context("cannot make a socket pair")?;
        let child = Child::start(Role::Floor, theirs.into())?;
        let mut floor = Floor { stream, request: vec![0x5a; request], reply: vec![0; reply], _child: child };
        floor.stream.write_all(&(request as u64).to_le_bytes())?;
        floor.stream.write_all(&(reply as u64).to_le_bytes())?;
        Ok(floor)
    }

    /// One request and its reply.
    pub fn round_trip(&mut self) -> anyhow::Result<()> {
        self.stream.write_all(&self.request)?;
        self.stream.read_exact(&mut self.reply)?;
        Ok(())
    }
}

/// The other end: answers until the client goes away.
pub(crate) fn serve(mut stream: UnixStream) -> anyhow::Result<()> {
    let mut sizes = [0; 16];
    stream.read_exact(&mut sizes)?;
    let size = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| sizes[at + i])) as usize;
    let (mut request, reply) = (vec![0; size(0)], vec![0xa5; size(8)]);
    while stream.read_exact(&mut request).is_ok() && stream.write_all(&reply).is_ok() {}
    Ok(())
}
