//! The new devices, prepared while the old ones run and loaded in the freeze, in parallel. A device that hangs is named to the old
//! server, with what it was doing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use limosa_switch_over::{Item, Refusal};

use super::new::New;
use super::record::{self, decode, kind};
use super::workers::Workers;
use super::{ANSWER_LIMIT, deadline};

/// How long devices may take to load where the old server does not say when it takes back.
const LOAD_LIMIT: Duration = Duration::from_secs(1);

/// The stage of the new devices.
#[derive(Clone, Copy, Debug)]
pub(super) enum Stage {
    /// A round of the transfer while the old devices run, with its limit.
    Prepare(Duration),
    /// The freeze.
    Load,
}

/// A new device, and the items that it is given.
pub(super) struct Task {
    new: New,
    /// The number of the device that it replaces; a device without a predecessor is given nothing.
    number: Option<u16>,
    items: Vec<Item>,
    /// The kind of the item that it handles now; 0 once all are handled.
    doing: Arc<AtomicU16>,
    outcome: Result<(), Refusal>,
}

impl Task {
    pub(super) fn new(new: New, number: Option<u16>, items: Vec<Item>) -> Task {
        Task { new, number, items, doing: Arc::default(), outcome: Ok(()) }
    }

    fn work(&mut self, stage: Stage) {
        let Some(number) = self.number else { return };
        let during = match stage {
            Stage::Prepare(_) => "prepared",
            Stage::Load => "loaded",
        };
        // A device that panics has no other refusal.
        let panicked = Refusal::of_device(number, format!("the new device panicked while it was {during}"));
        self.outcome = Err(self.new.named(panicked));
        let Task { new, doing, .. } = self;
        let items = std::mem::take(&mut self.items);
        let taken = items.into_iter().try_for_each(|item| {
            doing.store(item.kind, Ordering::Relaxed);
            match stage {
                Stage::Prepare(_) => new.take_prepared(item),
                Stage::Load => new.take_rest(item),
            }
        });
        let done = taken.and_then(|()| {
            doing.store(0, Ordering::Relaxed);
            match stage {
                Stage::Prepare(_) => new.prepare(number),
                Stage::Load => new.complete(number),
            }
        });
        self.outcome = done.map_err(|refusal| new.named(refusal));
    }
}

/// A device's work on an item of this kind, for messages; 0 stands for the work after all items.
fn doing(kind: u16, stage: Stage) -> &'static str {
    match (kind, stage) {
        (0, Stage::Prepare(_)) => "entering RESUMING",
        (0, Stage::Load) => "entering STOP with its new state",
        (kind::FILES | kind::MAPPINGS, _) => "mapping guest memory",
        (kind::STATE, _) => "loading its state",
        (kind::REGION_FILE, _) => "receiving the file of a region",
        (kind::EVENTFDS | kind::IOEVENTFDS | kind::WIRING, _) => "receiving its eventfds",
        _ => "receiving its connections",
    }
}

/// By when devices have to be loaded, so that the old server hears of one that is not before it takes back.
pub(super) fn until(rest: &[Item]) -> Result<Instant, Refusal> {
    for item in rest.iter().filter(|item| item.kind == kind::MACHINE) {
        if let Some(theirs) = decode::<record::Machine>(item)?.until_ns.and_then(deadline::from_shared) {
            return Ok(theirs.checked_sub(ANSWER_LIMIT).unwrap_or(theirs));
        }
    }
    Ok(Instant::now() + LOAD_LIMIT)
}

/// Does this with all devices. The first refusal counts, in the order of the devices.
pub(super) fn work(
    workers: &Workers,
    tasks: Vec<Task>,
    stage: Stage,
    until: Instant,
) -> Result<Vec<New>, Refusal> {
    let known: Vec<_> =
        tasks.iter().map(|task| (task.new.socket.clone(), task.number, Arc::clone(&task.doing))).collect();
    // A device that is late is dropped on its thread once its model returns: it has changed nothing of the old server's.
    let done = workers.work(tasks, until, move |task| task.work(stage), drop);
    for (task, (socket, number, doing_now)) in done.iter().zip(known) {
        match task {
            None => {
                let doing = doing(doing_now.load(Ordering::Relaxed), stage);
                let late = Refusal::of_device(number.unwrap_or_default(), late(stage, doing));
                return Err(match socket {
                    Some(path) => super::named(&path, late),
                    None => late,
                });
            }
            Some(task) => task.outcome.clone()?,
        }
    }
    Ok(done.into_iter().flatten().map(|task| task.new).collect())
}

fn late(stage: Stage, doing: &str) -> String {
    match stage {
        Stage::Prepare(limit) => format!(
            "the new device was not prepared within {limit:?}, and hangs while {doing}; nothing of the old device was stopped"
        ),
        Stage::Load => format!(
            "the new device was not loaded before the limit of the freeze, while {doing}: it hangs, or has too much state that \
             cannot be transferred while the old one runs"
        ),
    }
}
