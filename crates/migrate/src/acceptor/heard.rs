//! [`HeardLink`]: a link whose opening was read already, and can be read once more.

use std::io::{IoSlice, IoSliceMut};
use std::sync::Mutex;

use limosa_guest_memory::{PinnedBytes, SendPart};

use crate::link::{Link, LinkError, Wait, forward_link, read_first_part, read_through_buffer};
use crate::lock::lock;

/// Keeps what is read from a link, until [`HeardLink::replay`] or [`HeardLink::forget`]. Its user bounds what it reads before.
pub(super) struct HeardLink {
    inner: Box<dyn Link>,
    heard: Mutex<Heard>,
}

#[derive(Default)]
struct Heard {
    bytes: Vec<u8>,
    /// How many of the bytes were read again.
    again: usize,
    /// Nothing more is kept.
    is_over: bool,
}

impl HeardLink {
    pub(super) fn new(inner: Box<dyn Link>) -> HeardLink {
        HeardLink { inner, heard: Mutex::default() }
    }

    /// From now on reads begin with what was read before.
    pub(super) fn replay(&self) {
        let mut heard = lock(&self.heard);
        heard.is_over = true;
        heard.bytes.shrink_to_fit();
    }

    /// From now on reads go on where they are, and nothing is kept.
    pub(super) fn forget(&self) {
        *lock(&self.heard) = Heard { is_over: true, ..Heard::default() };
    }

    /// Whether reads are those of the link inside: nothing is kept, and nothing is left to be read again.
    fn is_through(&self) -> bool {
        let heard = lock(&self.heard);
        heard.is_over && heard.bytes.is_empty()
    }
}

impl Link for HeardLink {
    fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        self.inner.write(slices, wait)
    }

    fn read(&self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError> {
        let mut heard = lock(&self.heard);
        if heard.is_over {
            let part = &heard.bytes[heard.again..];
            if part.is_empty() || into.is_empty() {
                drop(heard);
                return self.inner.read(into, wait);
            }
            let length = part.len().min(into.len());
            into[..length].copy_from_slice(&part[..length]);
            heard.again += length;
            if heard.again == heard.bytes.len() {
                *heard = Heard { is_over: true, ..Heard::default() };
            }
            return Ok(length);
        }
        drop(heard);
        let bytes = self.inner.read(into, wait)?;
        lock(&self.heard).bytes.extend_from_slice(&into[..bytes]);
        Ok(bytes)
    }

    fn read_parts(&self, into: &mut [IoSliceMut<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        match self.is_through() {
            true => self.inner.read_parts(into, wait),
            false => read_first_part(self, into, wait),
        }
    }

    fn read_to_memory(
        &self,
        memory: &PinnedBytes,
        from: usize,
        behind: &mut [u8],
        wait: Wait<'_>,
    ) -> Result<usize, LinkError> {
        match self.is_through() {
            true => self.inner.read_to_memory(memory, from, behind, wait),
            false => read_through_buffer(self, memory, from, behind, wait),
        }
    }

    fn write_parts(&self, parts: &[SendPart<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        self.inner.write_parts(parts, wait)
    }

    forward_link!(|this| this.inner);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::link::SocketLink;

    #[test]
    fn what_was_heard_is_read_again_in_pieces_of_any_size_and_then_what_follows() {
        let (near, far) = SocketLink::pair().unwrap();
        let link = HeardLink::new(Box::new(near));
        let wait = Wait::within(Duration::from_secs(10), None);
        far.write(&[IoSlice::new(b"an opening")], wait).unwrap();
        let mut bytes = [0; 10];
        assert_eq!(link.read(&mut bytes, wait).unwrap(), 10);
        link.replay();
        far.write(&[IoSlice::new(b" and more")], wait).unwrap();
        let mut again = Vec::new();
        while again.len() < 19 {
            let mut piece = [0; 7];
            let read = link.read(&mut piece, wait).unwrap();
            again.extend_from_slice(&piece[..read]);
        }
        assert_eq!(again, b"an opening and more");
        assert!(lock(&link.heard).bytes.capacity() == 0, "it is kept no longer than needed");
    }

    #[test]
    fn nothing_is_kept_of_a_link_whose_opening_is_forgotten() {
        let (near, far) = SocketLink::pair().unwrap();
        let link = HeardLink::new(Box::new(near));
        let wait = Wait::within(Duration::from_secs(10), None);
        for words in [b"one", b"two"] {
            far.write(&[IoSlice::new(words)], wait).unwrap();
            let mut bytes = [0; 3];
            link.read(&mut bytes, wait).unwrap();
            assert_eq!(&bytes, words);
            link.forget();
        }
        assert!(lock(&link.heard).bytes.is_empty());
    }
}
