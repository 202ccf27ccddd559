//! A snapshot that is saved to an object: a multipart upload, whose completion publishes it.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use bytes::Bytes;
use limosa_migrate::link::{LinkError, Wait};
use limosa_migrate::{Cancel, Durability, Publication, SnapshotWriter};
use object_store::multipart::{MultipartStore, PartId};
use object_store::{MultipartId, ObjectStoreExt, PutPayload};
use tokio::task::AbortHandle;

use crate::config::{Client, Unsettled};
use crate::error::{Doing, exists};
use crate::runtime::Wakeup;

/// Bytes of each of the first parts.
const PART_BYTES: usize = 8 << 20;
/// The part size doubles after this many parts, because S3 takes at most 10,000 of them.
const PARTS_OF_A_SIZE: usize = 1000;
/// How many parts, and how many bytes unless a single part has more, are in flight at most.
const PARTS_IN_FLIGHT: usize = 4;
const BYTES_IN_FLIGHT: usize = 32 << 20;
/// A part is handed to the connection in pieces of this many bytes, so that its progress can be seen.
const PIECE_BYTES: usize = 128 << 10;
/// The last bytes of a snapshot, which no other snapshot has: the SEAL, with the hash of the rest.
const TAIL_BYTES: usize = 72;
/// How long the abort of an upload, or a look at its object, may make no progress.
const ABORT_MAX: Duration = Duration::from_secs(10);

/// A multipart upload. It is aborted if it is dropped before it was published.
pub(crate) struct Upload {
    client: Arc<Client>,
    id: MultipartId,
    part: Vec<u8>,
    /// The number of parts that were passed to the store's client.
    parts: usize,
    in_flight: usize,
    done: Vec<Option<PartId>>,
    sender: Sender<Sent>,
    receiver: Receiver<Sent>,
    wakeup: Wakeup,
    tasks: Vec<AbortHandle>,
    bytes: u64,
    tail: Vec<u8>,
    /// Whether the upload was published or aborted, so that a drop leaves it alone.
    is_over: bool,
}

/// The result of sending a part.
struct Sent {
    part: usize,
    result: object_store::Result<PartId>,
}

fn part_bytes(part: usize) -> usize {
    PART_BYTES << (part / PARTS_OF_A_SIZE).min(9)
}

impl Upload {
    /// Begins an upload, which fails if the bucket is missing or refuses it.
    pub(crate) fn begin(client: Arc<Client>, replace: bool, wait: Wait<'_>) -> Result<Upload, LinkError> {
        if !replace {
            let remote = Arc::clone(&client.remote);
            let there = async move { remote.store.head(&remote.path).await.is_ok() };
            // These credentials may allow writes and no reads. The completion checks again.
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
            wakeup: Wakeup::new()?,
            tasks: Vec::new(),
            bytes: 0,
            tail: Vec::new(),
            is_over: false,
        })
    }

    /// Waits for the result of one part.
    fn take(&mut self, wait: Wait<'_>) -> Result<(), LinkError> {
        let Sent { part, result } = self.wakeup.wait_for(&self.receiver, &self.client.traffic, wait)?;
        self.in_flight -= 1;
        let id = result.map_err(|error| self.client.explain(&error, Doing::Writing))?;
        self.done[part] = Some(id);
        self.tasks.retain(|task| !task.is_finished());
        Ok(())
    }

    /// Sends the part that was filled, after waiting while too many are in flight.
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
        let task = self.client.runtime.spawn(&self.wakeup, async move {
            let result = remote.store.put_part(&remote.path, &id, part, payload).await;
            // It fails if the upload was dropped, and nobody waits for the result.
            let _ = sender.send(Sent { part, result });
        });
        self.tasks.push(task);
        self.done.push(None);
        self.parts += 1;
        self.in_flight += 1;
        Ok(())
    }

    /// After a completion that failed, or whose answer was lost: whether the object is this snapshot. `None` if the store
    /// does not say.
    fn is_published(&self) -> Option<bool> {
        let (remote, bytes, tail) = (Arc::clone(&self.client.remote), self.bytes, self.tail.clone());
        let look = async move {
            // The length first: a store may refuse a range of an object that is shorter.
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

    /// Aborts the upload. Returns whether the store has confirmed that the upload is gone, so that no completion of it can
    /// be carried out later.
    fn abort(&mut self) -> bool {
        self.is_over = true;
        self.tasks.iter().for_each(AbortHandle::abort);
        let aborted = abort(&self.client, &self.id, Wait::within(ABORT_MAX, None));
        if let Err(error) = &aborted {
            tracing::warn!("{}: an upload was not aborted: {error}", self.client.remote.path);
        }
        aborted.is_ok()
    }

    /// Sends what is left, and waits until all parts were taken.
    fn send_rest(&mut self, wait: Wait<'_>) -> Result<(), LinkError> {
        if !self.part.is_empty() {
            self.send(wait)?;
        }
        while self.in_flight > 0 {
            self.take(wait)?;
        }
        match wait.cancel.is_some_and(Cancel::is_cancelled) {
            true => Err(LinkError::Cancelled),
            false => Ok(()),
        }
    }

    /// After a completion that failed, or whose answer was lost: what became of it.
    fn settle(&mut self, why: LinkError) -> Publication {
        if self.is_published() == Some(true) {
            self.is_over = true;
            return Publication::Published { durability: Durability::Durable };
        }
        // A completion may still be on its way to the store. Once the upload is gone it cannot be carried out, and if it
        // was carried out before, the object is there now.
        let is_gone = self.abort();
        match self.is_published() {
            Some(true) => Publication::Published { durability: Durability::Durable },
            Some(false) if is_gone => Publication::NotPublished(why),
            _ => {
                self.client.unsettled().push(Unsettled { id: self.id.clone(), is_aborted: false });
                Publication::Unknown(why)
            }
        }
    }
}

/// What the store says of an upload that was to be aborted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Aborted {
    /// It was aborted now, so it had not been completed.
    Now,
    /// There is no such upload: it was completed, or aborted before.
    Before,
}

fn abort(client: &Client, id: &MultipartId, wait: Wait<'_>) -> Result<Aborted, LinkError> {
    let (remote, id) = (Arc::clone(&client.remote), id.clone());
    let aborted = async move { remote.store.abort_multipart(&remote.path, &id).await };
    match client.runtime.run(&client.traffic, wait, aborted)? {
        Ok(()) => Ok(Aborted::Now),
        Err(object_store::Error::NotFound { .. }) => Ok(Aborted::Before),
        Err(error) => Err(client.explain(&error, Doing::Writing)),
    }
}

/// Aborts the uploads whose completion was lost. Returns whether there was one and all of them are aborted by this, now or
/// earlier, which proves that none was completed.
pub(crate) fn withdraw(client: &Client, wait: Wait<'_>) -> Result<bool, LinkError> {
    let mut unsettled = client.unsettled();
    for upload in unsettled.iter_mut().filter(|upload| !upload.is_aborted) {
        // One that is gone may have been completed long ago, and the object replaced or deleted since.
        if abort(client, &upload.id, wait)? == Aborted::Before {
            return Ok(false);
        }
        upload.is_aborted = true;
    }
    Ok(!unsettled.is_empty())
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

    fn publish(mut self: Box<Self>, wait: Wait<'_>) -> Publication {
        if let Err(why) = self.send_rest(wait) {
            return Publication::NotPublished(why);
        }
        let parts: Vec<PartId> = self.done.drain(..).flatten().collect();
        let (remote, id) = (Arc::clone(&self.client.remote), self.id.clone());
        let complete = async move { remote.store.complete_multipart(&remote.path, &id, parts).await };
        // From its first byte on only an answer tells whether the snapshot is published, so a cancel comes too late.
        let completed =
            self.client.runtime.run(&self.client.traffic, Wait { cancel: None, ..wait }, complete);
        let why = match completed {
            Ok(Ok(_)) => {
                self.is_over = true;
                return Publication::Published { durability: Durability::Durable };
            }
            Ok(Err(object_store::Error::Precondition { .. } | object_store::Error::AlreadyExists { .. })) => {
                exists()
            }
            Ok(Err(error)) => self.client.explain(&error, Doing::Writing),
            Err(error) => error,
        };
        // Not even a refusal is definite: the client repeats a request whose answer was lost.
        self.settle(why)
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if !self.is_over {
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
