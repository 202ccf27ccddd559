//! A link of the simulation: two pipes with latency, bandwidth and a bounded buffer, which fail on demand.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use limosa_clockwork::{Monitor, now, simulation};
use limosa_guest_memory::PinnedBytes;
use limosa_migrate::link::{Link, LinkError, Wait};
use limosa_stream::{HEADER_BYTES, Header};

use crate::adversary::{Adversary, Forgery, Proof, Tap};
use crate::disk::Disk;
use crate::plan::{End, LinkPlan, Mutation, Plan};
use crate::world::World;

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
    /// Somebody reads along.
    tap: Option<Tap>,
}

/// One end of a link.
pub struct SimLink {
    out: Arc<Pipe>,
    inward: Arc<Pipe>,
    name: String,
    world: Arc<World>,
    mutation: Option<Mutation>,
}

/// What lies between the two ends: the links of the move that is under way.
pub struct Network {
    plans: Vec<LinkPlan>,
    world: Arc<World>,
    mutation: Option<Mutation>,
    /// What both ends can reach as well.
    pub disk: Disk,
    /// The adversary on all of them.
    pub adversary: Option<Adversary>,
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
    pub fn new(plan: &Plan, world: &Arc<World>) -> Network {
        let (plans, world, mutation) = (plan.links.clone(), Arc::clone(world), plan.mutation);
        let adversary = plan.has_adversary().then(Adversary::default);
        Network { plans, world, mutation, disk: Disk::new(mutation), adversary, state: Monitor::default() }
    }

    /// The first link of a move, or of a question.
    pub fn connect(&self) -> (SimLink, SimLink) {
        let (near, far, hand) = self.pair(self.plans[0], self.adversary.as_ref(), true);
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
        let plan = self.plans[lines.hands.len() % self.plans.len()];
        let (near, far, hand) = self.pair(plan, self.adversary.as_ref(), false);
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

    /// The adversary connects, says what it has to say, and leaves.
    pub fn forge_link(&self, proof: Proof) {
        let Some(adversary) = &self.adversary else { return };
        let (near, far, _) = self.pair(self.plans[0], None, false);
        let due = now() + self.plans[0].latency;
        near.out.change(|flow| flow.arrives(due, adversary.joins(proof)));
        self.state.lock().calls.push_back(far);
        self.state.notify_all();
    }

    /// The adversary does nothing more.
    pub fn leave_alone(&self) {
        if let Some(adversary) = &self.adversary {
            adversary.gives_up();
            for pipe in self.hands().iter().flat_map(|hand| &hand.pipes) {
                pipe.change(|flow| flow.tap.iter_mut().for_each(Tap::gives_up));
            }
        }
    }
}

impl Flow {
    fn arrives(&mut self, due: Instant, bytes: Vec<u8>) {
        if !bytes.is_empty() {
            self.bytes += bytes.len();
            self.pieces.push_back((due, bytes));
        }
    }
}

/// A hand on a link, for what goes wrong with it.
#[derive(Clone)]
pub struct Hand {
    /// From the source to the destination, and back.
    pipes: [Arc<Pipe>; 2],
}

impl Network {
    /// A link of this kind; the first one of a move or a question, or a further one.
    fn pair(
        &self,
        plan: LinkPlan,
        adversary: Option<&Adversary>,
        is_first: bool,
    ) -> (SimLink, SimLink, Hand) {
        let pipe = |from| {
            let tap = adversary.map(|adversary| Tap::new(adversary, from, is_first));
            Arc::new(Pipe { plan, state: Monitor::new(Flow { tap, ..Flow::default() }) })
        };
        let (there, back) = (pipe(End::Source), pipe(End::Destination));
        let hand = Hand { pipes: [there.clone(), back.clone()] };
        let end = |out: &Arc<Pipe>, inward: &Arc<Pipe>, name: &str| SimLink {
            out: out.clone(),
            inward: inward.clone(),
            name: name.into(),
            world: self.world.clone(),
            mutation: self.mutation,
        };
        (end(&there, &back, "the destination"), end(&back, &there, "the source"), hand)
    }
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

    /// A link with checksums of its own ends where a bit flips.
    pub fn flip(&self, way: usize, bit: u8) {
        if self.pipes[way].plan.finds_damage {
            return self.cut();
        }
        self.pipes[way].change(|flow| flow.flip = Some(bit));
    }

    pub fn forge(&self, way: usize, forgery: Forgery) {
        let due = now() + self.pipes[way].plan.latency;
        self.pipes[way].change(|flow| {
            let frame = flow.tap.as_mut().and_then(|tap| tap.forge(forgery));
            if let Some(frame) = frame.filter(|_| !flow.silent) {
                // Not before what is on its way.
                let due = flow.pieces.back().map_or(due, |(last, _)| due.max(*last));
                flow.arrives(due, frame);
            }
        });
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
        let mut headers = slices
            .iter()
            .filter_map(|slice| Header::decode(<&[u8; HEADER_BYTES]>::try_from(&**slice).ok()?).ok());
        if headers.any(|header| header.unchecked) {
            self.world.sent_unchecked.store(true, Ordering::SeqCst);
        }
        let wanted: usize = slices.iter().map(|slice| slice.len()).sum();
        let mut flow = self.out.state.lock();
        let room = loop {
            if flow.cut || simulation::crashing() {
                return Err(LinkError::Closed);
            }
            let buffer_bytes = self.out.plan.buffer_bytes;
            let room = buffer_bytes.saturating_sub(flow.bytes);
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
        if let Some(tap) = &mut flow.tap {
            bytes = tap.pass(&bytes);
        }
        // What never arrives fills no buffer that anybody waits for: a network loses it.
        if !flow.silent {
            flow.arrives(due, bytes);
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

    /// As the default does.
    fn read_to_memory(
        &self,
        memory: &PinnedBytes,
        from: usize,
        behind: &mut [u8],
        wait: Wait<'_>,
    ) -> Result<usize, LinkError> {
        let room = memory.len().saturating_sub(from);
        if room == 0 {
            return self.read(behind, wait);
        }
        let mut piece = vec![0; room.min(16 << 10)];
        let bytes = self.read(&mut piece, wait)?;
        if self.mutation != Some(Mutation::InPlaceForgets) || simulation::random(8) != 0 {
            memory.write(from, &piece[..bytes]).map_err(|errno| LinkError::Memory(errno.into()))?;
        }
        Ok(bytes)
    }

    fn finish(&self) {
        self.out.change(|flow| flow.finished = true);
    }

    fn peer(&self) -> &str {
        &self.name
    }

    fn is_authenticated(&self) -> bool {
        self.out.plan.is_authenticated
    }

    /// By the default of `write_parts`, which copies at each call what the guest may have written since the last one.
    fn sends_memory(&self) -> bool {
        true
    }
}

impl Drop for SimLink {
    fn drop(&mut self) {
        self.finish();
        // A network that works reports a write to a closed end.
        self.inward.change(|flow| flow.cut |= !flow.silent);
    }
}
