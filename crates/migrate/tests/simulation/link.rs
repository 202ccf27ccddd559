//! A link of the simulation: two pipes with latency, bandwidth and a bounded buffer, which fail on demand.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::sync::Arc;
use std::time::{Duration, Instant};

use limosa_clockwork::{Monitor, now, simulation};
use limosa_migrate::link::{Link, LinkError, Wait};

use crate::disk::Disk;
use crate::plan::LinkPlan;

/// One direction.
struct Pipe {
    plan: LinkPlan,
    state: Monitor<Flow>,
}

#[derive(Default)]
struct Flow {
    /// What is on its way, and when it arrives.
    pieces: VecDeque<(Instant, Vec<u8>)>,
    /// How much of the first one has been read.
    read: usize,
    bytes: usize,
    /// When all that was sent has left.
    line_free: Option<Instant>,
    /// The sender sends no more.
    finished: bool,
    /// Gone for both.
    cut: bool,
    /// What is sent from now on never arrives.
    silent: bool,
    /// What is sent until then arrives no earlier.
    stalled: Option<Instant>,
    /// The bit to flip in what is sent next.
    flip: Option<u8>,
}

/// One end of a link.
pub struct SimLink {
    out: Arc<Pipe>,
    inward: Arc<Pipe>,
    name: String,
}

/// What lies between the two ends: the links of the move that is under way.
pub struct Network {
    plans: Vec<LinkPlan>,
    /// What both ends can reach as well.
    pub disk: Disk,
    state: Monitor<Lines>,
}

#[derive(Default)]
struct Lines {
    hands: Vec<Hand>,
    /// The ends of further links that the destination has not taken yet.
    calls: VecDeque<SimLink>,
    /// Nobody can connect.
    refuses: bool,
}

impl Network {
    pub fn new(plans: &[LinkPlan], disk: Disk) -> Network {
        Network { plans: plans.to_vec(), disk, state: Monitor::default() }
    }

    /// The first link of a move, or of a question.
    pub fn connect(&self) -> (SimLink, SimLink) {
        let (near, far, hand) = pair(self.plans[0]);
        let mut lines = self.state.lock();
        lines.hands = vec![hand];
        let left = std::mem::take(&mut lines.calls);
        drop(lines);
        drop(left);
        (near, far)
    }

    /// A further link, at the source.
    pub fn call(&self) -> Result<Box<dyn Link>, LinkError> {
        let mut lines = self.state.lock();
        if lines.refuses {
            return Err(LinkError::Closed);
        }
        let (near, far, hand) = pair(self.plans[lines.hands.len() % self.plans.len()]);
        lines.hands.push(hand);
        lines.calls.push_back(far);
        drop(lines);
        self.state.notify_all();
        Ok(Box::new(near))
    }

    /// A further link, at the destination.
    pub fn answer(&self, wait: Wait<'_>) -> Result<Box<dyn Link>, LinkError> {
        let mut lines = self.state.lock();
        loop {
            if let Some(link) = lines.calls.pop_front() {
                return Ok(Box::new(link));
            }
            wait.left()?;
            (lines, _) = self.state.wait_as_poll(lines, Some(wait.deadline));
        }
    }

    /// The links that there are.
    pub fn hands(&self) -> Vec<Hand> {
        self.state.lock().hands.clone()
    }

    pub fn refuse(&self, refuses: bool) {
        self.state.lock().refuses = refuses;
    }
}

/// A hand on a link, for what goes wrong with it.
#[derive(Clone)]
pub struct Hand {
    /// From the source to the destination, and back.
    pipes: [Arc<Pipe>; 2],
}

/// A link of this kind.
fn pair(plan: LinkPlan) -> (SimLink, SimLink, Hand) {
    let pipe = || Arc::new(Pipe { plan, state: Monitor::new(Flow::default()) });
    let (there, back) = (pipe(), pipe());
    let hand = Hand { pipes: [there.clone(), back.clone()] };
    let near = SimLink { out: there.clone(), inward: back.clone(), name: "the destination".into() };
    (near, SimLink { out: back, inward: there, name: "the source".into() }, hand)
}

impl Hand {
    pub fn cut(&self) {
        self.pipes.iter().for_each(|pipe| pipe.change(|flow| flow.cut = true));
    }

    /// Nothing passes any more, in either direction: one end is without power.
    pub fn vanish(&self) {
        self.pipes.iter().for_each(|pipe| pipe.change(|flow| flow.silent = true));
    }

    pub fn silence(&self, way: usize) {
        self.pipes[way].change(|flow| flow.silent = true);
    }

    pub fn stall(&self, way: usize, time: Duration) {
        let until = now() + time;
        self.pipes[way].change(|flow| flow.stalled = Some(until));
    }

    pub fn flip(&self, way: usize, bit: u8) {
        self.pipes[way].change(|flow| flow.flip = Some(bit));
    }
}

impl Pipe {
    fn change(&self, change: impl FnOnce(&mut Flow)) {
        let mut flow = self.state.lock();
        change(&mut flow);
        drop(flow);
        self.state.notify_all();
    }
}

impl Link for SimLink {
    fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        let wanted: usize = slices.iter().map(|slice| slice.len()).sum();
        let mut flow = self.out.state.lock();
        let room = loop {
            if flow.cut || simulation::crashing() {
                return Err(LinkError::Closed);
            }
            let buffer_bytes = self.out.plan.buffer_bytes;
            let room = buffer_bytes - flow.bytes;
            // As sockets do: else small pieces would stay small for ever.
            if room >= wanted.min(buffer_bytes / 2) {
                break room;
            }
            wait.left()?;
            (flow, _) = self.out.state.wait_as_poll(flow, Some(wait.deadline));
        };
        let taken =
            wanted.min(room).min(1 + simulation::random(2 * self.out.plan.buffer_bytes as u64) as usize);
        let mut bytes = Vec::with_capacity(taken);
        for slice in slices {
            bytes.extend_from_slice(&slice[..slice.len().min(taken - bytes.len())]);
        }
        if let Some(bit) = flow.flip.take() {
            let at = simulation::random(bytes.len() as u64) as usize;
            bytes[at] ^= 1 << bit;
        }
        let begin = flow.line_free.unwrap_or_else(now).max(now());
        let seconds = taken as f64 / self.out.plan.bytes_per_second as f64;
        let left = begin + Duration::from_secs_f64(seconds);
        flow.line_free = Some(left);
        let due = (left + self.out.plan.latency).max(flow.stalled.unwrap_or(left));
        // What never arrives fills no buffer that anybody waits for: a network loses it.
        if !flow.silent {
            flow.bytes += taken;
            flow.pieces.push_back((due, bytes));
        }
        drop(flow);
        self.out.state.notify_all();
        Ok(taken)
    }

    fn read(&self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError> {
        let mut flow = self.inward.state.lock();
        loop {
            if flow.cut || simulation::crashing() {
                return Err(LinkError::Closed);
            }
            let mut until = wait.deadline;
            let ended = flow.finished && !flow.silent;
            match flow.pieces.front() {
                Some((due, piece)) if *due <= now() => {
                    let rest = &piece[flow.read..];
                    let bytes = rest.len().min(into.len());
                    into[..bytes].copy_from_slice(&rest[..bytes]);
                    let is_read = bytes == rest.len();
                    flow.read += bytes;
                    if is_read {
                        flow.pieces.pop_front();
                        flow.read = 0;
                    }
                    flow.bytes -= bytes;
                    drop(flow);
                    self.inward.state.notify_all();
                    return Ok(bytes);
                }
                Some((due, _)) => until = until.min(*due),
                None if ended => return Err(LinkError::Closed),
                None => {}
            }
            wait.left()?;
            (flow, _) = self.inward.state.wait_as_poll(flow, Some(until));
        }
    }

    fn finish(&self) {
        self.out.change(|flow| flow.finished = true);
    }

    fn peer(&self) -> &str {
        &self.name
    }
}

impl Drop for SimLink {
    fn drop(&mut self) {
        self.finish();
        // Whoever writes to an end that is closed is told, by a network that works.
        self.inward.change(|flow| flow.cut |= !flow.silent);
    }
}
