//! [`NextClient`]: the client that gets the device when its VMM has gone, with its own mappings and wiring
//! (`docs/vfio-user-extensions.md: NEXT`).
//!
//! Its mappings and its wiring are kept separately; accesses and interrupts of the device do not use them. When the VMM
//! goes they replace the VMM's in one step, so that a device that keeps working uses the memory and interrupts of one
//! or of the other.

use std::sync::{Mutex, MutexGuard, PoisonError};

use limosa_protocol::Errno;

use super::{ClientId, Machine};
use crate::{Mappings, SetIrqs, Wiring};

/// A client that prepares to become the VMM while another client is the VMM.
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
    /// It has gone without becoming the VMM.
    Gone,
}

#[derive(Debug)]
struct Prepared {
    mappings: Mappings,
    wiring: Wiring,
}

impl Machine {
    /// A new client that may become the VMM, with nothing mapped and nothing wired. [`Machine::hand_over`] gives it
    /// the device.
    pub fn next_client(&self) -> NextClient {
        let prepared =
            Prepared { mappings: Mappings::default(), wiring: Wiring::new(&self.description.irqs) };
        NextClient { stage: Mutex::new(Stage::Waits(Box::new(prepared))) }
    }

    /// The VMM has gone, and `next` is the VMM from now on: [`ClientId::VMM`] is its name.
    ///
    /// The former VMM's log, session and control of the device end as with [`Machine::client_gone`]. State and session
    /// stay as it left them. Then every wired vector is signalled once, since the former VMM may not have read its last
    /// signals.
    ///
    /// Returns `false` if `next` has gone or is already the VMM; then the former VMM's mappings and wiring are
    /// unchanged.
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
        tracing::info!("the next client has the device now, since its VMM has gone");
        self.tell_client_gone();
        self.wiring.raise_all();
        true
    }
}

impl NextClient {
    fn lock(&self) -> MutexGuard<'_, Stage> {
        // After a panic there is at worst one mapping too many or too few.
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it is the VMM.
    pub fn owns(&self) -> bool {
        matches!(*self.lock(), Stage::Owns)
    }

    /// The client has gone. Returns `false` if it is the VMM: then call [`Machine::client_gone`].
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

    /// Runs a function on its mappings: the separate ones, or the device's once it is the VMM.
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

    /// Performs its interrupt request ([`Machine::set_irqs`]). While its wiring is separate, interrupts that it
    /// triggers signal its own eventfds, and the model is not called.
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
