//! Items on their way: sent in batches and followed by END, received and compared with it. Each side counts the items of all
//! parts of a switch-over together.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::body::{End, ItemHead, Part};
use crate::channel::{Channel, FdTransport};
use crate::error::{Cause, Step};
use crate::frame::{INLINE_BYTES_MAX, Kind, Malformed};
use crate::item::{Item, Totals};
use crate::word::{sealed, unsealed};

/// Fds that wait at once for the new server to take them. Those of one batch are open twice in the old one.
const BATCH_FDS_MAX: usize = 256;

/// How a switch-over went.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// The other server's program and version, printable.
    pub other: String,
    /// The number of the other server's process.
    pub other_pid: i32,
    /// The totals of the transfer.
    pub totals: Totals,
    /// How long each step took that this side did.
    pub steps: Vec<(Step, Duration)>,
    /// How long neither served. For the old server: from before its freeze until it knew that the new one serves.
    /// For the new server: from the last READY before the freeze until it served, which is longer and includes the
    /// former.
    pub standstill: Duration,
}

impl Report {
    /// How long a step took, all its rounds together; `None` if this side did not do it.
    pub fn step(&self, step: Step) -> Option<Duration> {
        self.steps.iter().find(|(done, _)| *done == step).map(|(_, time)| *time)
    }
}

/// Times the steps of one side and tells its observer.
pub(crate) struct Clock<'a> {
    observer: Option<&'a dyn Fn(Step)>,
    since: Instant,
    pub(crate) steps: Vec<(Step, Duration)>,
}

impl<'a> Clock<'a> {
    pub(crate) fn new(observer: Option<&'a dyn Fn(Step)>) -> Clock<'a> {
        Clock { observer, since: Instant::now(), steps: Vec::with_capacity(Step::ALL.len()) }
    }

    /// A step, or another round of one, is done.
    pub(crate) fn done(&mut self, step: Step) {
        let now = Instant::now();
        match self.steps.last_mut() {
            Some((last, time)) if *last == step => *time += now - self.since,
            _ => self.steps.push((step, now - self.since)),
        }
        if let Some(observer) = self.observer {
            observer(step);
        }
        self.since = now;
    }
}

/// A limit from now on.
pub(crate) fn until(limit: Duration) -> Instant {
    const LONGEST: Duration = Duration::from_secs(365 * 86_400);
    Instant::now() + limit.min(LONGEST)
}

/// Checks the items of a part against the bounds. Nothing of it is sent if it is too much.
pub(crate) fn add_up(totals: &mut Totals, items: &[Item]) -> Result<(), Cause> {
    let mut sum = *totals;
    for item in items {
        sum.add(item.kind, item.device, item.bytes.len() as u64, item.fds.len())?;
    }
    *totals = sum;
    Ok(())
}

/// Fds that the new server has still to take.
pub(crate) type Waiting = Vec<Item>;

/// Sends the items of a part, and END. What is returned is to be kept until the new server has answered.
///
/// END goes out with the last items at once, so that a new server which has all items knows that it does.
pub(crate) fn send_items(
    channel: &mut Channel,
    part: Part,
    items: Vec<Item>,
    totals: &Totals,
    until: Instant,
) -> Result<(Waiting, Vec<OwnedFd>), Cause> {
    let (mut waiting, mut memfds, mut fds) = (Vec::new(), Vec::new(), 0);
    for item in items {
        let is_in_memfd = item.bytes.len() > INLINE_BYTES_MAX;
        fds += item.fds.len() + usize::from(is_in_memfd);
        if fds > BATCH_FDS_MAX {
            channel.send(Kind::Batch, &[], until)?;
            channel.expect(Kind::Pulled, "6 (PULLED)", until)?;
            waiting.clear();
            memfds.clear();
            fds = item.fds.len() + usize::from(is_in_memfd);
        }
        send_item(channel, &item, is_in_memfd, &mut memfds, until)?;
        waiting.push(Item { bytes: Vec::new(), ..item });
    }
    let Totals { items, fds, bytes } = *totals;
    let end = End { part, items: items as u32, fds: fds as u32, bytes };
    channel.send(Kind::End, &end.encode(), until)?;
    Ok((waiting, memfds))
}

fn send_item(
    channel: &mut Channel,
    item: &Item,
    is_in_memfd: bool,
    memfds: &mut Vec<OwnedFd>,
    until: Instant,
) -> Result<(), Cause> {
    if is_in_memfd {
        memfds.push(sealed(&item.bytes)?);
    }
    let memfd = memfds.last().filter(|_| is_in_memfd);
    let head = ItemHead { kind: item.kind, device: item.device, bytes: item.bytes.len(), is_in_memfd };
    let inline = if is_in_memfd { &[][..] } else { &item.bytes };
    let fds: Vec<_> = memfd.map(AsFd::as_fd).into_iter().chain(item.fds.iter().map(AsFd::as_fd)).collect();
    channel.queue(Kind::Item, &[&head.encode(), inline], &fds, until)
}

/// Receives the items of one of these parts, and says of which.
pub(crate) fn receive_items(
    channel: &mut Channel,
    parts: &[Part],
    totals: &mut Totals,
    until: Instant,
) -> Result<(Part, Vec<Item>), Cause> {
    let mut items = Vec::new();
    loop {
        let mut frame = channel.receive(until)?;
        match frame.kind {
            Kind::Item => {
                let (head, inline) = ItemHead::decode(&frame.body, frame.fds.len())?;
                let own = frame.fds.len() - usize::from(head.is_in_memfd);
                totals.add(head.kind, head.device, head.bytes as u64, own)?;
                let bytes = match head.is_in_memfd {
                    false => inline.to_vec(),
                    true => {
                        let memfd = frame.fds.remove(0).into_memory();
                        let memfd =
                            memfd.map_err(|_| rustix::io::Errno::INVAL).map_err(std::io::Error::from)?;
                        unsealed(memfd, head.bytes)?
                    }
                };
                items.push(Item { kind: head.kind, device: head.device, bytes, fds: frame.fds });
            }
            Kind::Batch if frame.fds.is_empty() => channel.send(Kind::Pulled, &[], until)?,
            Kind::End if frame.fds.is_empty() => {
                let end = End::decode(&frame.body)?;
                let Totals { items: count, fds, bytes } = *totals;
                let expected = End { part: end.part, items: count as u32, fds: fds as u32, bytes };
                return match end == expected && parts.contains(&end.part) {
                    true => Ok((end.part, items)),
                    false => {
                        Err(Malformed::new("END's items", end.items, "the step, and the items that came")
                            .into())
                    }
                };
            }
            other => return Err(Malformed::new("a frame's kind", other as u16, "3 to 7 (items)").into()),
        }
    }
}

/// Whether fds are sent, as HELLO says it.
pub(crate) fn transport(sends_fds: bool) -> FdTransport {
    if sends_fds { FdTransport::Sent } else { FdTransport::Pulled }
}
