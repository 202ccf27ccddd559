//! A snapshot on its way to an object: a multipart upload, whose completion is the publication.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use bytes::Bytes;
use limosa_migrate::SnapshotWriter;
use limosa_migrate::link::{LinkError, Wait};
use object_store::multipart::{MultipartStore, PartId};
use object_store::{MultipartId, ObjectStoreExt, PutPayload};
use tokio::task::AbortHandle;

use crate::config::Client;
use crate::error::{Doing, exists};
use crate::runtime::Bell;

/// Bytes of the first parts.
const PART_BYTES: usize = 8 << 20;
/// After how many parts they become twice as large, as there may be 10,000.
const PARTS_OF_A_SIZE: usize = 1000;
/// The most parts that are on their way, and the most bytes, unless one part has more.
const PARTS_IN_FLIGHT: usize = 4;
const BYTES_IN_FLIGHT: usize = 32 << 20;
/// In how many bytes a part is handed to the connection, so that its progress shows.
const PIECE_BYTES: usize = 128 << 10;
/// How many of the last bytes tell one snapshot from another: the SEAL.
const TAIL_BYTES: usize = 72;
/// How long an upload that is given up may take to be aborted.
const ABORT_MAX: Duration = Duration::from_secs(10);

/// A multipart upload. Aborted when it is dropped before it was published.
pub(crate) struct Upload {
    client: Arc<Client>,
    id: MultipartId,
    part: Vec<u8>,
    /// Parts that were given to the store's client.
    parts: usize,
    in_flight: usize,
    done: Vec<Option<PartId>>,
    sender: Sender<Sent>,
    receiver: Receiver<Sent>,
    bell: Bell,
    tasks: Vec<AbortHandle>,
    bytes: u64,
    tail: Vec<u8>,
    over: bool,
}

/// What became of a part.
struct Sent {
    part: usize,
    result: object_store::Result<PartId>,
}

fn part_bytes(part: usize) -> usize {
    PART_BYTES << (part / PARTS_OF_A_SIZE).min(9)
}

impl Upload {
    /// Begins an upload, which shows whether there is a bucket that takes it.
    pub(crate) fn begin(client: Arc<Client>, replace: bool, wait: Wait<'_>) -> Result<Upload, LinkError> {
        if !replace {
            let remote = Arc::clone(&client.remote);
            let there = async move { remote.store.head(&remote.path).await.is_ok() };
            // Whoever may not look may still be allowed to write, and the completion looks again.
            if client.runtime.run(&client.traffic, wait, there)? {
                return Err(exists());
            }
        }
        let remote = Arc::clone(&client.remote);
        let begun = async move { remote.store.create_multipart(&remote.path).await };
        let begun = client.runtime.run(&client.traffic, wait, begun)?;
        let id = begun.map_err(|error| client.explain(&error, Doing::Writing))?;
        let (sender, receiver) = channel();
        Ok(Upload {
            client,
            id,
            part: Vec::new(),
            parts: 0,
            in_flight: 0,
            done: Vec::new(),
            sender,
            receiver,
            bell: Bell::new()?,
            tasks: Vec::new(),
            bytes: 0,
            tail: Vec::new(),
            over: false,
        })
    }

    /// Takes word of one part, when there is some or after waiting for it.
    fn take(&mut self, wait: Wait<'_>) -> Result<(), LinkError> {
        let Sent { part, result } = self.bell.wait_for(&self.receiver, &self.client.traffic, wait)?;
        self.in_flight -= 1;
        let id = result.map_err(|error| self.client.explain(&error, Doing::Writing))?;
        self.done[part] = Some(id);
        self.tasks.retain(|task| !task.is_finished());
        Ok(())
    }

    /// Sends the part that has been filled, when not too many are on their way.
    fn send(&mut self, wait: Wait<'_>) -> Result<(), LinkError> {
        let most = (BYTES_IN_FLIGHT / part_bytes(self.parts)).clamp(1, PARTS_IN_FLIGHT);
        while self.in_flight >= most {
            self.take(wait)?;
        }
        let part = self.parts;
        let whole = Bytes::from(std::mem::take(&mut self.part));
        let pieces = (0..whole.len()).step_by(PIECE_BYTES);
        let payload: PutPayload =
            pieces.map(|at| whole.slice(at..whole.len().min(at + PIECE_BYTES))).collect();
        let (remote, id, sender) = (Arc::clone(&self.client.remote), self.id.clone(), self.sender.clone());
        let task = self.client.runtime.spawn(&self.bell, async move {
            let result = remote.store.put_part(&remote.path, &id, part, payload).await;
            // An upload that is gone does not want to know.
            let _ = sender.send(Sent { part, result });
        });
        self.tasks.push(task);
        self.done.push(None);
        self.parts += 1;
        self.in_flight += 1;
        Ok(())
    }

    /// After a completion whose answer says that it failed, or that did not come: whether what lies there is this.
    fn is_published(&self) -> Option<bool> {
        let (remote, bytes, tail) = (Arc::clone(&self.client.remote), self.bytes, self.tail.clone());
        let look = async move {
            // The length first: of an object that is shorter than the tail a store may refuse to give one.
            if remote.store.head(&remote.path).await?.size != bytes {
                return Ok(false);
            }
            let range = bytes - tail.len() as u64..bytes;
            Ok(remote.store.get_range(&remote.path, range).await?[..] == tail[..])
        };
        let looked = self.client.runtime.run(&self.client.traffic, Wait::within(ABORT_MAX, None), look);
        match looked.ok()? {
            Ok(is_this) => Some(is_this),
            Err(object_store::Error::NotFound { .. }) => Some(false),
            Err(_) => None,
        }
    }

    /// Gives the upload up; whether the store knows.
    fn abort(&mut self) -> bool {
        self.over = true;
        self.tasks.iter().for_each(AbortHandle::abort);
        let (remote, id) = (Arc::clone(&self.client.remote), self.id.clone());
        let aborted = async move { remote.store.abort_multipart(&remote.path, &id).await };
        let wait = Wait::within(ABORT_MAX, None);
        match self.client.runtime.run(&self.client.traffic, wait, aborted) {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                tracing::warn!("{}: an upload was not aborted: {error}", self.client.remote.path);
                false
            }
            Err(error) => {
                tracing::warn!("{}: an upload was not aborted: {error}", self.client.remote.path);
                false
            }
        }
    }
}

impl SnapshotWriter for Upload {
    fn write(&mut self, bytes: &[u8], wait: Wait<'_>) -> Result<usize, LinkError> {
        let size = part_bytes(self.parts);
        if self.part.capacity() < size {
            self.part.reserve_exact(size);
        }
        let taken = bytes.len().min(size - self.part.len());
        let some = &bytes[..taken];
        self.part.extend_from_slice(some);
        self.bytes += taken as u64;
        self.tail.extend_from_slice(&some[taken.saturating_sub(TAIL_BYTES)..]);
        self.tail.drain(..self.tail.len().saturating_sub(TAIL_BYTES));
        if self.part.len() == size {
            self.send(wait)?;
        }
        Ok(taken)
    }

    fn publish(mut self: Box<Self>, wait: Wait<'_>) -> Result<(), LinkError> {
        if !self.part.is_empty() {
            self.send(wait)?;
        }
        while self.in_flight > 0 {
            self.take(wait)?;
        }
        let parts: Vec<PartId> = self.done.drain(..).flatten().collect();
        let (remote, id) = (Arc::clone(&self.client.remote), self.id.clone());
        let complete = async move { remote.store.complete_multipart(&remote.path, &id, parts).await };
        // From its first byte on only an answer tells whether it is published, so that nobody may call it off.
        let completed =
            self.client.runtime.run(&self.client.traffic, Wait { cancel: None, ..wait }, complete);
        let why = match completed {
            Ok(Ok(_)) => {
                self.over = true;
                return Ok(());
            }
            Ok(Err(object_store::Error::Precondition { .. } | object_store::Error::AlreadyExists { .. })) => {
                exists()
            }
            Ok(Err(error)) => self.client.explain(&error, Doing::Writing),
            Err(error) => error,
        };
        // An answer can be lost, and then the request is refused when it is made again.
        let mut published = self.is_published();
        if published != Some(true) {
            // One that is still on its way must not come about after it was said to have failed: after an abort it
            // cannot, and if it was before, it is there now.
            let aborted = self.abort();
            published = self.is_published();
            if aborted && published == Some(false) {
                return Err(why);
            }
        }
        if published == Some(true) {
            self.over = true;
            return Ok(());
        }
        let what = format!("{why}; it is not known whether it was published: look with `limosa verify`");
        Err(std::io::Error::other(what).into())
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if !self.over {
            self.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_thousand_parts_hold_the_largest_object() {
        let whole: u64 = (0..10_000).map(|part| part_bytes(part) as u64).sum();
        assert!(whole >= 5 << 40, "S3's limit of 5 TiB");
        assert!((0..10_000).all(|part| part_bytes(part) as u64 <= 5 << 30), "and of 5 GiB for a part");
        assert!(part_bytes(0) >= 5 << 20, "and at least 5 MiB");
    }
}
