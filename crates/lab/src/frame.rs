//! What a controller and an agent say to each other: a kind, a length (u32, little endian), so many bytes.

use std::io::{self, Error, ErrorKind, Read, Write};

/// The longest payload, bytes.
pub(crate) const PAYLOAD_MAX: usize = 64 << 10;

/// To the agent, first: a program and its arguments, each ended by NUL.
pub(crate) const RUN: u8 = 1;
/// To the agent, first: a file's path, NUL, and what to write to it. Answered by [`END`] or [`FAILED`].
pub(crate) const WRITE: u8 = 7;
/// To the agent, first: the path of a file to read. Answered by [`OUT`] and [`END`], or [`FAILED`].
pub(crate) const READ: u8 = 8;
/// To the agent: a signal's number (i32) for the program and all that it started.
pub(crate) const SIGNAL: u8 = 2;
/// From the agent: what the program said on standard output.
pub(crate) const OUT: u8 = 3;
/// From the agent: what it said on standard error.
pub(crate) const ERR: u8 = 4;
/// From the agent, last: its exit code (i32), or a signal's number below zero.
pub(crate) const END: u8 = 5;
/// From the agent, last: why the program could not be started.
pub(crate) const FAILED: u8 = 6;

/// Sends one frame. The payload is no longer than [`PAYLOAD_MAX`].
pub(crate) fn send(mut to: impl Write, kind: u8, payload: &[u8]) -> io::Result<()> {
    let length = u32::try_from(payload.len()).ok().filter(|_| payload.len() <= PAYLOAD_MAX);
    let length = length.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "a frame takes 64 KiB at most"))?;
    let mut frame = vec![kind];
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(payload);
    to.write_all(&frame)
}

/// Receives one frame.
pub(crate) fn receive(mut from: impl Read) -> io::Result<(u8, Vec<u8>)> {
    let mut head = [0; 5];
    from.read_exact(&mut head)?;
    let length = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if length > PAYLOAD_MAX {
        return Err(Error::new(ErrorKind::InvalidData, format!("a frame of {length} bytes")));
    }
    let mut payload = vec![0; length];
    from.read_exact(&mut payload)?;
    Ok((head[0], payload))
}

/// The number that [`SIGNAL`] and [`END`] carry.
pub(crate) fn number(payload: &[u8]) -> io::Result<i32> {
    let bytes = payload.try_into();
    Ok(i32::from_le_bytes(bytes.map_err(|_| Error::new(ErrorKind::InvalidData, "a number is 4 bytes"))?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_out_as_it_went_in() {
        let mut bytes = Vec::new();
        send(&mut bytes, OUT, b"text").unwrap();
        assert_eq!(receive(bytes.as_slice()).unwrap(), (OUT, b"text".to_vec()));
    }

    #[test]
    fn a_frame_that_is_too_long_is_neither_sent_nor_received() {
        assert!(send(Vec::new(), OUT, &vec![0; PAYLOAD_MAX + 1]).is_err());
        assert!(receive([OUT, 0, 0, 1, 1].as_slice()).is_err());
        assert!(receive([OUT, 4, 0, 0, 0, 1].as_slice()).is_err());
    }
}
