//! A snapshot that is loaded from an object: in ranges, some of them ahead of the reader, all of one version.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use limosa_migrate::SnapshotReader;
use limosa_migrate::link::{LinkError, Wait};
use object_store::{GetOptions, GetRange, ObjectStore};
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::mpsc::{Receiver, channel};
use tokio::task::AbortHandle;

use crate::config::{Client, Remote};
use crate::error::{Doing, changed, is_beyond_the_end};
use crate::runtime::Wakeup;

/// Bytes of a range.
const RANGE_BYTES: u64 = 4 << 20;
/// How many ranges are requested at once.
const RANGES_IN_FLIGHT: usize = 4;
/// How many ranges wait for the reader at most.
const RANGES_AHEAD: usize = 2;

/// An object that is being read.
pub(crate) struct Download {
    client: Arc<Client>,
    bytes: u64,
    /// The version that is read.
    e_tag: Option<String>,
    wakeup: Wakeup,
    ranges: Option<Ranges>,
    range: Bytes,
}

/// The ranges, in order, from a task.
struct Ranges {
    receiver: Receiver<Fetched>,
    task: AbortHandle,
}

enum Fetched {
    Range(Bytes),
    Changed,
    Failed(object_store::Error),
}

impl Drop for Ranges {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Download {
    /// Looks up the object's length and version.
    pub(crate) fn open(client: Arc<Client>, wait: Wait<'_>) -> Result<Download, LinkError> {
        let look = {
            let remote = Arc::clone(&client.remote);
            // An answer to GET says why it is refused, one to HEAD does not.
            let options = GetOptions { range: Some(GetRange::Bounded(0..1)), ..GetOptions::default() };
            async move { remote.store.get_opts(&remote.path, options).await.map(|found| found.meta) }
        };
        let meta = client.runtime.run(&client.traffic, wait, look)?;
        let (bytes, e_tag) = match meta {
            Ok(meta) => (meta.size, meta.e_tag),
            // An empty object has no first byte.
            Err(error) if is_beyond_the_end(&error) => (0, None),
            Err(error) => return Err(client.explain(&error, Doing::Reading)),
        };
        Ok(Download { client, bytes, e_tag, wakeup: Wakeup::new()?, ranges: None, range: Bytes::new() })
    }

    fn begin(&self) -> Ranges {
        let (sender, receiver) = channel(RANGES_AHEAD);
        let (remote, e_tag, bytes) = (Arc::clone(&self.client.remote), self.e_tag.clone(), self.bytes);
        let wakeup = self.wakeup.clone();
        let task = self.client.runtime.spawn(&self.wakeup, async move {
            let count = bytes.div_ceil(RANGE_BYTES);
            let ranges = (0..count).map(|at| at * RANGE_BYTES..bytes.min((at + 1) * RANGE_BYTES));
            let fetch = |range| fetch(&remote, e_tag.as_deref(), range);
            let mut fetched = stream::iter(ranges).map(fetch).buffered(RANGES_IN_FLIGHT);
            while let Some(range) = fetched.next().await {
                if sender.send(range).await.is_err() {
                    return;
                }
                wakeup.notify();
            }
        });
        Ranges { receiver, task }
    }
}

async fn fetch(remote: &Remote, e_tag: Option<&str>, range: Range<u64>) -> Fetched {
    let bytes = range.end - range.start;
    let options = GetOptions {
        range: Some(GetRange::Bounded(range)),
        if_match: e_tag.map(str::to_owned),
        ..GetOptions::default()
    };
    let found = match remote.store.get_opts(&remote.path, options).await {
        Ok(found) => found,
        Err(object_store::Error::Precondition { .. }) => return Fetched::Changed,
        Err(error) => return Fetched::Failed(error),
    };
    // Some stores ignore If-Match.
    if e_tag.is_some() && found.meta.e_tag.as_deref() != e_tag {
        return Fetched::Changed;
    }
    match found.bytes().await {
        Ok(range) if range.len() as u64 == bytes => Fetched::Range(range),
        Ok(_) => Fetched::Changed,
        Err(error) => Fetched::Failed(error),
    }
}

impl SnapshotReader for Download {
    fn read(&mut self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError> {
        if self.range.is_empty() {
            if self.ranges.is_none() {
                self.ranges = Some(self.begin());
            }
            let Download { wakeup, client, ranges: Some(ranges), .. } = self else { return Ok(0) };
            let next = wakeup.wait_until(&client.traffic, wait, || match ranges.receiver.try_recv() {
                Ok(fetched) => Some(Some(fetched)),
                Err(TryRecvError::Empty) => None,
                Err(TryRecvError::Disconnected) => Some(None),
            })?;
            match next {
                None => return Ok(0),
                Some(Fetched::Range(range)) => self.range = range,
                Some(Fetched::Changed) => return Err(changed()),
                Some(Fetched::Failed(error)) => return Err(self.client.explain(&error, Doing::Reading)),
            }
        }
        let given = self.range.len().min(into.len());
        into[..given].copy_from_slice(&self.range.split_to(given));
        Ok(given)
    }

    fn rewind(&mut self, _: Wait<'_>) -> Result<(), LinkError> {
        self.ranges = None;
        self.range = Bytes::new();
        Ok(())
    }
}
