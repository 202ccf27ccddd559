//! A link that fails at a byte.

use std::io::IoSlice;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use limosa_migrate::link::{Link, LinkError, SocketLink, Wait};

/// What happens at the byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The link is gone, for both ends.
    Cut,
    /// A bit of the byte flips.
    Flip(u8),
    /// Nothing after it arrives, though the sender is not told.
    Swallow,
    /// The byte is missing.
    Drop,
}

/// In which direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Out,
    In,
}

/// One end of a socket pair, with a fault at the n-th byte that it sends or receives.
pub struct FaultyLink {
    inner: Option<SocketLink>,
    way: Way,
    at: u64,
    fault: Fault,
    out: u64,
    read: u64,
    /// Bytes sent, for the test to know how many there are.
    pub sent: Arc<AtomicU64>,
    pub received: Arc<AtomicU64>,
}

impl FaultyLink {
    pub fn new(inner: SocketLink, way: Way, at: u64, fault: Fault) -> FaultyLink {
        FaultyLink {
            inner: Some(inner),
            way,
            at,
            fault,
            out: 0,
            read: 0,
            sent: Arc::default(),
            received: Arc::default(),
        }
    }
}

impl Link for FaultyLink {
    fn write(&mut self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        let Some(inner) = &mut self.inner else { return Err(LinkError::Closed) };
        let bytes: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
        if self.way == Way::In || self.at >= self.out + bytes.len() as u64 {
            let sent = inner.write(slices, wait)?;
            self.out += sent as u64;
            self.sent.store(self.out, Ordering::SeqCst);
            return Ok(sent);
        }
        let before = self.at.saturating_sub(self.out) as usize;
        if before > 0 {
            let sent = inner.write(&[IoSlice::new(&bytes[..before])], wait)?;
            self.out += sent as u64;
            return Ok(sent);
        }
        if self.fault == Fault::Swallow || self.out == self.at {
            match self.fault {
                Fault::Cut => {
                    self.inner = None;
                    return Err(LinkError::Closed);
                }
                Fault::Flip(bit) => {
                    inner.write(&[IoSlice::new(&[bytes[0] ^ 1 << bit])], wait)?;
                    self.out += 1;
                    return Ok(1);
                }
                Fault::Swallow => {
                    self.out += bytes.len() as u64;
                    return Ok(bytes.len());
                }
                Fault::Drop => {
                    self.out += 1;
                    return Ok(1);
                }
            }
        }
        let sent = inner.write(slices, wait)?;
        self.out += sent as u64;
        Ok(sent)
    }

    fn read(&mut self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError> {
        let Some(inner) = &mut self.inner else { return Err(LinkError::Closed) };
        if self.way == Way::In && self.fault == Fault::Cut && self.read >= self.at {
            self.inner = None;
            return Err(LinkError::Closed);
        }
        let room = match self.way {
            Way::In if self.fault == Fault::Cut => into.len().min((self.at - self.read) as usize),
            _ => into.len(),
        };
        let got = inner.read(&mut into[..room], wait)?;
        self.read += got as u64;
        self.received.store(self.read, Ordering::SeqCst);
        Ok(got)
    }

    fn finish(&mut self) {
        if let Some(inner) = &mut self.inner {
            inner.finish();
        }
    }

    fn peer(&self) -> &str {
        "the other side"
    }
}
