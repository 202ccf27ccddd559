//! The new devices, loaded side by side in the freeze. One that hangs is named to the old server before that takes back.

use std::time::{Duration, Instant};

use limosa_switch_over::{Item, Refusal};

use super::new::New;
use super::record::{self, decode, kind};
use super::workers::Workers;
use super::{ANSWER_LIMIT, deadline};

/// How long devices may take where the old server does not say when it takes back.
const LOAD_LIMIT: Duration = Duration::from_secs(1);

/// A device that is loaded, with what it is given in the freeze.
pub(super) struct Load {
    new: New,
    /// That of the device whose place it takes; one that takes nobody's place is given nothing.
    number: Option<u16>,
    items: Vec<Item>,
    outcome: Result<(), Refusal>,
}

impl Load {
    pub(super) fn new(new: New, number: Option<u16>, items: Vec<Item>) -> Load {
        Load { new, number, items, outcome: Ok(()) }
    }

    fn work(&mut self) {
        let Some(number) = self.number else { return };
        // One that panics says nothing else.
        let panicked = Refusal::of_device(number, "the new device panicked while it was loaded");
        self.outcome = Err(self.new.named(panicked));
        let items = std::mem::take(&mut self.items);
        let taken = items.into_iter().try_for_each(|item| self.new.take_rest(item));
        let done = taken.and_then(|()| self.new.complete(number));
        self.outcome = done.map_err(|refusal| self.new.named(refusal));
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

/// Loads all of them. The first refusal counts, in the order of the devices.
pub(super) fn load(workers: &Workers, loads: Vec<Load>, until: Instant) -> Result<Vec<New>, Refusal> {
    let names: Vec<_> = loads.iter().map(|load| (load.new.socket.clone(), load.number)).collect();
    // A device that is late is dropped on its thread once its model returns: it has changed nothing of the old server's.
    let done = workers.work(loads, until, Load::work, drop);
    for (load, (socket, number)) in done.iter().zip(names) {
        match load {
            None => {
                let what = "the new device was not loaded before the limit of the freeze: it hangs, or has too much state that \
                            cannot be transferred while the old one runs";
                let late = Refusal::of_device(number.unwrap_or_default(), what);
                return Err(match socket {
                    Some(path) => super::named(&path, late),
                    None => late,
                });
            }
            Some(load) => load.outcome.clone()?,
        }
    }
    Ok(done.into_iter().flatten().map(|load| load.new).collect())
}
