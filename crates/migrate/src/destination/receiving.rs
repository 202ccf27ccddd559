//! [`Receiving`]: the state that the threads of a destination share while data arrives, and the jobs of its devices.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use limosa_client::DeviceExt;
use limosa_clockwork::{Guard, Monitor, Scope};
use limosa_protocol::{MigrationFlags, State};
use limosa_stream::body::NEEDS_CREDIT;
use limosa_stream::buffer::Spares;
use limosa_stream::{Offer, Order, Proofs};

use super::device_loader::DeviceLoader;
use super::device_queue::{Command, DeviceQueue};
use crate::context::Context;
use crate::devices::{MovedDevice, failed};
use crate::link::Link;
use crate::memory::MemoryRegion;
use crate::protocol::credit::{ReceiveWindow, read_bytes, window};
use crate::protocol::state_limit::StateLimit;
use crate::report::Recorder;
use crate::transfer::device_workers::DeviceWorkers;
use crate::transfer::keep_alive::KeepAlive;
use crate::transfer::team::{Shared, Team};
use crate::wire::{Connection, FrameWriter, within};
use crate::{Cancel, Error, Options, Result};

/// Empty buffers of up to a quarter of the windows are kept for reuse, within these numbers of bytes.
const SPARE_BYTES_MIN: u64 = 8 << 20;
const SPARE_BYTES_MAX: u64 = 32 << 20;

/// The work between the offer and the end, and the state of its threads.
pub(super) struct Receiving<'w, 'a> {
    pub(super) context: &'w Context<'a>,
    /// The first link, over which this side answers.
    pub(super) connection: &'w Connection<'w>,
    pub(super) writers: [&'w FrameWriter<'w>; 1],
    pub(super) team: Team,
    pub(super) workers: DeviceWorkers,
    pub(super) alive: KeepAlive,
    pub(super) devices: &'a [MovedDevice<'a>],
    pub(super) queues: Vec<Shared<DeviceQueue>>,
    pub(super) loaders: Vec<Monitor<DeviceLoader<'a>>>,
    flags: OnceLock<Vec<MigrationFlags>>,
    /// Which devices stood in STOP when they were offered.
    stopped: Vec<bool>,
    /// The ids of the devices in the offer.
    pub(super) ids: Vec<u32>,
    /// The regions, by their index in the offer.
    pub(super) regions: Vec<Option<&'w MemoryRegion<'a>>>,
    pub(super) order: Monitor<Order>,
    pub(super) proofs: Proofs,
    /// The end of the time from the offer to the SUM, and that time; `None` if no peer sends.
    pub(super) until: Option<(Instant, Duration)>,
    /// The frames over all links that were not keep-alives.
    pub(super) frames: AtomicU64,
    /// Whether the source sends no more than the window allows.
    pub(super) has_credit: bool,
    pub(super) window: u64,
    /// By how many bytes all windows together may still grow.
    pub(super) windows_left: AtomicU64,
    /// Whether the limit for silence applies to further links as well.
    pub(super) keeps_links_alive: bool,
    pub(super) spares: Monitor<Spares>,
    pub(super) state: Shared<Progress>,
    /// How many commands are not done.
    commands: Monitor<usize>,
    /// Ends the wait for further links.
    pub(super) joined: Cancel,
    /// The further links. They stay open to the end, so that the source hears the reason, and not that a link is closed.
    pub(super) further: Monitor<Vec<Arc<dyn Link>>>,
}

#[derive(Default)]
pub(super) struct Progress {
    /// How many links the source uses, the first one included.
    pub(super) links: u32,
    /// Which further links have joined, a bit each.
    pub(super) joined: u32,
    pub(super) links_ended: u32,
    pub(super) loaded: usize,
}

impl<'w, 'a> Receiving<'w, 'a> {
    pub(super) fn new(
        context: &'w Context<'a>,
        connection: &'w Connection<'_>,
        devices: &'a [MovedDevice<'a>],
        memory: &'w [MemoryRegion<'a>],
        offer: &Offer,
        proofs: Proofs,
    ) -> Result<Receiving<'w, 'a>> {
        let team = Team::new(context.cancel)?;
        let joined = team.ended().child().map_err(|error| Error::Os { doing: "making an event", error })?;
        let window = window(&offer.devices, context.options);
        let windows = window * devices.len() as u64;
        let spare = (windows / 4).clamp(SPARE_BYTES_MIN, SPARE_BYTES_MAX).min(windows);
        let mut spares = Spares::new(spare as usize);
        // Touched now, and not in the downtime. As long as what a source reads at once: a payload does not keep a buffer that is much
        // larger.
        spares.fill(spare.min(windows / 4) as usize, read_bytes(window), context.recorder.buffers());
        // Regions are matched by id: this side may have them in another order than the offer.
        let region = |id| memory.iter().find(|region| region.id == id);
        let queue = |at: usize| {
            let mut limit = StateLimit::for_load(context.options);
            limit.said(offer.devices.get(at).and_then(|facts| facts.data_bytes).unwrap_or(0));
            DeviceQueue { window: ReceiveWindow::new(window), limit, ..DeviceQueue::default() }
        };
        Ok(Receiving {
            context,
            connection,
            writers: [&connection.writer],
            workers: DeviceWorkers::new(devices.len(), usize::MAX),
            alive: KeepAlive::default(),
            devices,
            queues: (0..devices.len()).map(|at| team.share(queue(at))).collect(),
            loaders: devices.iter().map(|moved| Monitor::new(DeviceLoader::new(moved.device))).collect(),
            flags: OnceLock::new(),
            stopped: offer.devices.iter().map(|facts| facts.stopped).collect(),
            ids: offer.devices.iter().map(|facts| facts.id).collect(),
            regions: offer.memory.iter().map(|facts| region(facts.id)).collect(),
            order: Monitor::new(Order::new(offer).with_proofs(proofs.clone())),
            proofs,
            until: within(connection.limits().move_max).filter(|_| connection.has_peer()),
            frames: AtomicU64::new(0),
            has_credit: offer.needs.iter().any(|need| need == NEEDS_CREDIT),
            window,
            windows_left: AtomicU64::new(context.options.windows_bytes_max.saturating_sub(windows)),
            keeps_links_alive: offer.keeps_links_alive,
            spares: Monitor::new(spares),
            state: team.share(Progress { links: 1, ..Progress::default() }),
            commands: Monitor::default(),
            joined,
            further: Monitor::default(),
            team,
        })
    }

    pub(super) fn recorder(&self) -> &'w Recorder<'a> {
        &self.context.recorder
    }

    pub(super) fn options(&self) -> &'a Options {
        self.context.options
    }

    /// A device's migration flags.
    pub(super) fn flags(&self, at: usize) -> MigrationFlags {
        self.flags.get().and_then(|flags| flags.get(at)).copied().unwrap_or(MigrationFlags::empty())
    }

    /// Whether a device stood in STOP when it was offered.
    pub(super) fn was_stopped(&self, at: usize) -> bool {
        self.stopped.get(at).copied().unwrap_or(false)
    }

    /// Starts the device workers and the keep-alive thread. They serve the commit and the rollback as well.
    pub(super) fn start<'scope>(&'scope self, scope: Scope<'scope, '_>) -> Result<()> {
        let interval = self.connection.limits().keep_alive;
        self.team.spawn(scope, "keep-alive".into(), move || {
            // The guest stands still at the source, which watches how long.
            self.alive.run(&self.team, &self.writers, interval, || None);
            Ok(())
        })?;
        for thread in 0..self.queues.len() {
            self.team.spawn(scope, format!("device worker {thread}"), move || {
                self.workers.work(thread, |at| self.work_on(at));
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Ends all threads.
    pub(super) fn end(&self) {
        self.team.end();
        self.workers.end();
        self.alive.end();
    }

    /// Opens a session on every device. They were found in these states.
    pub(super) fn open_sessions(&self, devices: &[MovedDevice<'_>], found: Vec<State>) -> Result<()> {
        let flags = devices.iter().map(|moved| {
            let flags = moved.device.migration_flags();
            flags.map_err(|error| failed(moved.device, "reading its flags", error))
        });
        let _ = self.flags.set(flags.collect::<Result<_>>()?);
        self.command(|at| Some(Command::Open(found[at]))).into_iter().collect()
    }

    /// The states in which devices were found that have been touched.
    pub(super) fn found(&self) -> Vec<Option<State>> {
        self.queues.iter().map(|queue| queue.lock().found).collect()
    }

    /// Drives loaded devices to these states. Fails if one of them refuses.
    pub(super) fn enter(&self, wanted: impl Fn(usize) -> Option<State>) -> Result<()> {
        // This waits for all devices, also after a failure.
        self.command(|at| wanted(at).map(Command::Enter)).into_iter().collect()
    }

    /// Checks that loaded devices are where the engine has left them.
    pub(super) fn check(&self, wanted: impl Fn(usize) -> bool) -> Result<()> {
        self.command(|at| wanted(at).then_some(Command::Check)).into_iter().collect()
    }

    /// Resets the devices that were asked to run, so that none of them ever runs this guest. Returns whether all resets
    /// succeeded. A device that was not asked stays in STOP, also if it can no longer be reached.
    pub(super) fn never_run(&self) -> bool {
        let asked: Vec<_> = self.queues.iter().map(|queue| queue.lock().asked_to_run).collect();
        self.command(|at| asked[at].then_some(Command::Reset)).iter().all(Result::is_ok)
    }

    /// Gives devices commands, all at once, and waits for all of them, for as long as the devices' own calls take.
    pub(super) fn command(&self, wanted: impl Fn(usize) -> Option<Command>) -> Vec<Result<()>> {
        let commands: Vec<_> = (0..self.queues.len()).map(wanted).collect();
        *self.commands.lock() += commands.iter().flatten().count();
        let mut idle = Vec::with_capacity(commands.len());
        for (at, command) in commands.into_iter().enumerate() {
            let mut queue = self.queues[at].lock();
            queue.done = if command.is_none() { Some(Ok(())) } else { None };
            let was_busy = queue.is_busy;
            queue.is_busy |= command.is_some();
            queue.command = command;
            idle.extend((queue.is_busy && !was_busy).then_some(at));
        }
        self.workers.post_all(idle.into_iter());
        let mut left = self.commands.lock();
        while *left > 0 {
            (left, _) = self.commands.wait(left, None);
        }
        drop(left);
        // Without a result only if its command was replaced by another, which does not happen.
        self.queues.iter().map(|queue| queue.lock().done.take().unwrap_or(Err(Error::Cancelled))).collect()
    }

    /// A device has done a command. Only the last one wakes the thread that waits for all.
    pub(super) fn command_is_done(&self) {
        let mut left = self.commands.lock();
        *left -= 1;
        if *left == 0 {
            drop(left);
            self.commands.notify_all();
        }
    }

    /// The source was told to use this many links.
    pub(super) fn expect_links(&self, links: u32) {
        self.state.lock().links = links;
    }

    /// Makes a worker do the work of a device.
    pub(super) fn see_to(&self, at: usize, mut queue: Guard<'_, DeviceQueue>) {
        let was_busy = std::mem::replace(&mut queue.is_busy, true);
        drop(queue);
        if !was_busy {
            self.workers.post(at);
        }
    }
}
