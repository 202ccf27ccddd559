//! The data of devices: over which link it goes, and when.

use limosa_clockwork::now;
use limosa_stream::Kind;

use super::{PAUSE_MAX, SMALL_BYTES, Sending};
use crate::Result;
use crate::transfer::device_flow::DeviceFlow;
use crate::wire::Frame;

impl Sending<'_, '_> {
    /// Waits until devices have not sent more than memory, or memory has nothing to send.
    fn await_share(&self, bytes: usize) -> Result<()> {
        loop {
            let mut share = self.share.lock();
            if share.is_free(now()) {
                share.device(bytes);
                return Ok(());
            }
            let until = now().checked_add(PAUSE_MAX);
            self.team.wait(&self.share, share, until, |share| share.is_free(now())).map(drop)?;
        }
    }

    /// Sends frames of a device over the first link, in one write, or queues them there if the link is busy.
    pub(crate) fn post_all(&self, frames: &[Frame<'_>]) -> Result<()> {
        match frames {
            [] => Ok(()),
            [first, others @ ..] => self.writers[0].post_all(&[], first, others, Some(self.team.ended())),
        }
    }

    /// Sends a device's data over the least busy link, once the destination has room for it. The frames before and after it are
    /// sent over the first link: in the same write, if the data is sent there as well.
    pub(crate) fn send_device(
        &self,
        device: usize,
        position: u64,
        data: &[u8],
        mut before: &[Frame<'_>],
        after: &[Frame<'_>],
    ) -> Result<()> {
        let end = position + data.len() as u64;
        let flow = &self.flows[device];
        // In the stop all data has to be sent, in any order.
        if flow.lock().streaming {
            self.await_share(data.len())?;
        }
        let mut guard = flow.lock();
        while !guard.window.has_room(end) {
            if guard.window.ask() {
                drop(guard);
                self.post_all(std::mem::take(&mut before))?;
                self.post(0, &Frame::of(device as u32, Kind::WINDOW_FULL, &[]))?;
                guard = flow.lock();
                continue;
            }
            // The limit applies to a destination that takes nothing at all.
            let (taken, until) = (guard.window.taken(), self.until_loaded());
            let moved;
            let has_news = |flow: &DeviceFlow| flow.window.taken() > taken || flow.window.has_room(end);
            (guard, moved) = self.team.wait(flow, guard, until, has_news)?;
            if !moved {
                return Err(self.timed_out("waiting for it to take a device's data"));
            }
        }
        // Credit for this data may arrive before the call that sends it returns.
        guard.window.send(end);
        if self.terms.is_some() {
            self.recorder().device_waits(device, guard.window.on_the_way());
        }
        drop(guard);
        // Devices begin the search at different links, so that an idle link is found at once.
        let links = self.writers.len();
        let among = if data.len() < SMALL_BYTES { 1 } else { links };
        let link = (0..among).map(|at| (at + device) % links).min_by_key(|at| self.writers[*at].busy());
        let frame = Frame::of(device as u32, Kind::DEVICE_DATA, data).at(position);
        match link.unwrap_or(0) {
            0 => {
                self.workers.send(|| self.writers[0].post_all(before, &frame, after, Some(self.team.ended())))
            }
            link => {
                self.post_all(before)?;
                self.workers.send(|| self.post(link, &frame))?;
                self.post_all(after)
            }
        }
    }
}
