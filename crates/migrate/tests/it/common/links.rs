//! Links that fail at a byte, and moves over several links.

use std::io::IoSlice;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use limosa_migrate::link::{Link, LinkError, SocketLink, Wait};
use limosa_migrate::{Destination, Outcome, Received, Source};
use limosa_stream::{HEADER_BYTES, Header, Kind};

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

/// One end of a socket pair, with a fault at the n-th byte that it sends or receives. A PROGRESS, which comes when a
/// machine is slow, does not count and goes through unless the fault is in the midst of something.
pub struct FaultyLink {
    inner: SocketLink,
    way: Way,
    at: u64,
    fault: Fault,
    /// Gone for both ends.
    is_cut: AtomicBool,
    writing: Mutex<()>,
    /// Bytes sent, for the test to know how many there are.
    pub sent: Arc<AtomicU64>,
    pub received: Arc<AtomicU64>,
}

impl FaultyLink {
    pub fn new(inner: SocketLink, way: Way, at: u64, fault: Fault) -> FaultyLink {
        FaultyLink {
            inner,
            way,
            at,
            fault,
            is_cut: AtomicBool::new(false),
            writing: Mutex::new(()),
            sent: Arc::default(),
            received: Arc::default(),
        }
    }

    fn cut(&self) -> LinkError {
        self.is_cut.store(true, Ordering::SeqCst);
        self.inner.cut();
        LinkError::Closed
    }
}

impl Link for FaultyLink {
    fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        let _alone = self.writing.lock().unwrap();
        if self.is_cut.load(Ordering::SeqCst) {
            return Err(LinkError::Closed);
        }
        let out = self.sent.load(Ordering::SeqCst);
        let bytes = slices.iter().map(|slice| &**slice).collect::<Vec<_>>().concat();
        let is_pulse = Header::decode(slices[0].first_chunk().unwrap_or(&[0; HEADER_BYTES]))
            .is_ok_and(|header| header.kind == Kind::PROGRESS);
        if is_pulse && out <= self.at {
            return self.inner.write(slices, wait);
        }
        let before = self.at.saturating_sub(out) as usize;
        let sent = if self.way == Way::In || before >= bytes.len() {
            self.inner.write(slices, wait)?
        } else if before > 0 {
            self.inner.write(&[IoSlice::new(&bytes[..before])], wait)?
        } else if self.fault == Fault::Swallow {
            bytes.len()
        } else if out > self.at {
            self.inner.write(slices, wait)?
        } else {
            match self.fault {
                Fault::Cut => return Err(self.cut()),
                Fault::Flip(bit) => self.inner.write(&[IoSlice::new(&[bytes[0] ^ 1 << bit])], wait)?,
                Fault::Drop | Fault::Swallow => 1,
            }
        };
        self.sent.fetch_add(sent as u64, Ordering::SeqCst);
        Ok(sent)
    }

    fn read(&self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError> {
        if self.is_cut.load(Ordering::SeqCst) {
            return Err(LinkError::Closed);
        }
        let read = self.received.load(Ordering::SeqCst);
        let cuts = self.way == Way::In && self.fault == Fault::Cut;
        if cuts && read >= self.at {
            return Err(self.cut());
        }
        let room = if cuts { into.len().min((self.at - read) as usize) } else { into.len() };
        let got = self.inner.read(&mut into[..room], wait)?;
        self.received.fetch_add(got as u64, Ordering::SeqCst);
        Ok(got)
    }

    fn finish(&self) {
        self.inner.finish();
    }

    fn peer(&self) -> &str {
        "the other side"
    }
}

/// One move over as many links as the options say. `wrap` makes the source's ends, the first link being number 0. A move
/// in doubt stays so.
pub fn move_over_links(
    source: Source<'_>,
    destination: Destination<'_>,
    wrap: impl Fn(usize, SocketLink) -> Box<dyn Link> + Sync,
) -> (Outcome, Received) {
    let (near, far) = SocketLink::pair().unwrap();
    let near = wrap(0, near);
    let (connected, accepted) = mpsc::channel();
    let (connected, accepted, count) = (Mutex::new(connected), Mutex::new(accepted), AtomicU64::new(0));
    let connect = |_: Wait<'_>| -> Result<Box<dyn Link>, LinkError> {
        let (near, far) = SocketLink::pair()?;
        connected.lock().unwrap().send(far).unwrap();
        Ok(wrap(count.fetch_add(1, Ordering::SeqCst) as usize + 1, near))
    };
    let accept = |wait: Wait<'_>| -> Result<Box<dyn Link>, LinkError> {
        loop {
            match accepted.lock().unwrap().recv_timeout(Duration::from_millis(5)) {
                Ok(far) => return Ok(Box::new(far)),
                Err(_) => wait.left()?,
            };
        }
    };
    std::thread::scope(|scope| {
        let accept = &accept;
        let receiving = scope.spawn(move || destination.receive_over(&far, accept));
        let outcome = source.send_over(&*near, &connect);
        drop(near);
        (outcome, receiving.join().unwrap())
    })
}
