//! [`NextClient`]: the client that gets the device when its VMM has gone, with what it has mapped and wired by then
//! (`docs/vfio-user-extensions.md: NEXT`).
//!
//! Its mappings and its wiring are kept apart, where no access of the device and no interrupt finds them. When the VMM goes they
//! take the place of the VMM's in one step, so that a device which works all the while finds memory and interrupts of the one or
//! of the other.

use std::sync::{Mutex, MutexGuard, PoisonError};

use limosa_protocol::Errno;

use super::{ClientId, Machine};
use crate::{Mappings, SetIrqs, Wiring};

/// A client that prepares to be the VMM while another one is.
#[derive(Debug)]
pub struct NextClient {
    stage: Mutex<Stage>,
}

#[derive(Debug)]
enum Stage {
    /// Another client is the VMM.
    Waits(Box<Prepared>),
    /// It is the VMM.
    Owns,
    /// It has gone without having been the VMM.
    Gone,
}

#[derive(Debug)]
struct Prepared {
    mappings: Mappings,
    wiring: Wiring,
}

impl Machine {
    /// A client that may become the VMM, with nothing mapped and nothing wired. [`Machine::hand_over`] gives it the device.
    pub fn next_client(&self) -> NextClient {
        let prepared =
            Prepared { mappings: Mappings::default(), wiring: Wiring::new(&self.description.irqs) };
        NextClient { stage: Mutex::new(Stage::Waits(Box::new(prepared))) }
    }

    /// The VMM has gone, and `next` is the VMM from now on: [`ClientId::VMM`] is its name.
    ///
    /// The rest of what the former VMM had ends as with [`Machine::client_gone`]: its log, its session, its drive. State and
    /// session stay as it left them. Every vector that is wired then is signalled once: nobody reads any more what the former
    /// VMM was signalled last.
    ///
    /// `false` when `next` has gone, or is the VMM already; then the former VMM's mappings and wiring are as they were.
    pub fn hand_over(&self, next: &NextClient) -> bool {
        self.let_client_go(ClientId::VMM);
        let mut stage = next.lock();
        match std::mem::replace(&mut *stage, Stage::Owns) {
            Stage::Waits(prepared) => {
                self.mappings.replace(prepared.mappings);
                self.wiring.replace(&prepared.wiring);
            }
            other => {
                *stage = other;
                return false;
            }
        }
        drop(stage);
        tracing::info!("the device is its next client's, as its VMM has gone");
        self.tell_client_gone();
        self.wiring.raise_all();
        true
    }
}

impl NextClient {
    fn lock(&self) -> MutexGuard<'_, Stage> {
        // What a panic left is at worst a mapping more, or less.
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it is the VMM.
    pub fn owns(&self) -> bool {
        matches!(*self.lock(), Stage::Owns)
    }

    /// It has gone. `false` when it is the VMM: then its end is that of the VMM ([`Machine::client_gone`]).
    pub fn withdraw(&self) -> bool {
        let mut stage = self.lock();
        if matches!(*stage, Stage::Owns) {
            return false;
        }
        let prepared = std::mem::replace(&mut *stage, Stage::Gone);
        drop(stage);
        drop(prepared);
        true
    }

    /// Does something with its mappings: those that are kept apart, or once it is the VMM the device's.
    pub fn with_mappings<R>(&self, machine: &Machine, act: impl FnOnce(&Mappings) -> R) -> R {
        let stage = self.lock();
        match &*stage {
            Stage::Waits(prepared) => act(&prepared.mappings),
            Stage::Owns | Stage::Gone => {
                drop(stage);
                act(&machine.mappings)
            }
        }
    }

    /// Does what it asks of its interrupts ([`Machine::set_irqs`]). While they are kept apart, what it triggers signals its own
    /// eventfds, and nothing is told to the model.
    pub fn set_irqs(&self, machine: &Machine, index: u32, start: u32, set: SetIrqs) -> Result<(), Errno> {
        let stage = self.lock();
        match &*stage {
            Stage::Waits(prepared) => prepared.wiring.set(index, start, set),
            Stage::Owns | Stage::Gone => {
                drop(stage);
                machine.set_irqs(index, start, set)
            }
        }
    }
}
