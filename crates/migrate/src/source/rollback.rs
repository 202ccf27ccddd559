//! The rollback of a source: every device runs again as it did before, and no dirty page is lost.

use limosa_client::DeviceExt;
use limosa_clockwork::catch;
use limosa_protocol::State;

use super::Source;
use crate::context::Context;
use crate::devices::each;
use crate::error::guard;
use crate::memory::DirtyLogs;
use crate::report::{Act, Loss, Phase, Unrecovered};
use crate::transfer::device_flow::Job;
use crate::transfer::sending::Sending;
use crate::transfer::way_back::WayBack;
use crate::vmm;

/// The changes that a source has made, and has to undo.
#[derive(Default)]
pub(super) struct Rollback {
    /// The state in which each device was found. A device without an entry was in RUNNING.
    pub(super) found: Vec<State>,
    /// The logs, and what was harvested from them.
    pub(super) logs: DirtyLogs,
    /// Whether the devices were changed.
    pub(super) touched: bool,
    /// The last step by which the VMM slowed its vCPUs down; 0 for none.
    pub(super) throttled: u32,
    /// Whether the VMM was asked to stop its vCPUs.
    pub(super) vmm_stopped: bool,
    /// Whether the engine has stopped all devices, so that one that runs was reset.
    pub(super) devices_stopped: bool,
}

impl Rollback {
    fn found(&self, at: usize) -> State {
        self.found.get(at).copied().unwrap_or(State::Running)
    }

    /// Whether the machine stood still before the move: there are devices, and all of them were found in STOP.
    pub(super) fn stood_still(&self) -> bool {
        !self.found.is_empty() && self.found.iter().all(|found| *found == State::Stop)
    }
}

impl<'a> Source<'a> {
    /// Returns every device to the state in which it was found: all that are stopped enter RUNNING_P2P first. A device in
    /// ERROR is reset, since no other arc leads out of it. Then ends the logs and lets the vCPUs go on. If one step fails or
    /// panics, the others are done all the same.
    ///
    /// The device workers do this, if they have started; otherwise threads that are started for it, or this thread if the
    /// system starts none.
    pub(super) fn roll_back(
        &mut self,
        context: &Context<'a>,
        rollback: &mut Rollback,
        workers: Option<&Sending<'_, '_>>,
    ) {
        let recorder = &context.recorder;
        let mut notes: Vec<_> = vmm::tell("Vmm::undoing", || self.vmm.undoing()).err().into_iter().collect();
        let losses: Vec<_> = match workers {
            Some(sending) => {
                sending.all_to_the_end(Job::ReturnP2p);
                sending.all_to_the_end(Job::Return);
                sending.flows.iter().map(|flow| flow.lock().loss.take()).collect()
            }
            None => self.return_without_workers(rollback),
        };
        losses.into_iter().flatten().for_each(|loss| recorder.unrecovered(loss));
        let stopped = guard("giving back the dirty log", || {
            rollback.logs.stop(self.devices, &mut self.memory, true, &mut notes);
            Ok(())
        });
        notes.extend(stopped.err().map(|error| format!("the dirty pages were not given back: {error}")));
        self.let_go(rollback, &mut notes);
        recorder.runs();
        notes.into_iter().for_each(|note| recorder.note(note));
    }

    fn return_without_workers(&self, rollback: &Rollback) -> Vec<Option<Unrecovered>> {
        let stopped = rollback.devices_stopped;
        let ways = each(self.devices, |at, device| WayBack::new(device, rollback.found(at), stopped));
        let reset = each(self.devices, |at, _| catch(|| ways[at].to_p2p()).unwrap_or_default());
        let returned = each(self.devices, |at, device| {
            catch(|| ways[at].to_the_end()).unwrap_or_else(|panic| {
                let why = panic.to_string();
                Some(Unrecovered { device: device.name().into(), loss: Loss::Unknown, why })
            })
        });
        returned.into_iter().zip(reset).map(|(returned, reset)| returned.or(reset)).collect()
    }

    /// Lets the vCPUs run again, at full speed.
    fn let_go(&self, rollback: &mut Rollback, notes: &mut Vec<String>) {
        if std::mem::take(&mut rollback.throttled) > 0 {
            notes.extend(vmm::tell("Vmm::throttle", || _ = self.vmm.throttle(0)).err());
        }
        if std::mem::take(&mut rollback.vmm_stopped) {
            notes.extend(vmm::tell("Vmm::resume", || self.vmm.resume()).err());
        }
    }

    /// The guest runs elsewhere: ends the sessions and the logs.
    pub(super) fn finish(
        &mut self,
        context: &Context<'a>,
        rollback: &mut Rollback,
        workers: Option<&Sending<'_, '_>>,
    ) {
        let recorder = &context.recorder;
        recorder.phase(Phase::Finish);
        let unfinished: Vec<_> = match workers {
            Some(sending) => {
                sending.all_to_the_end(Job::Finish);
                sending.flows.iter().filter_map(|flow| flow.lock().unfinished.take()).collect()
            }
            None => each(self.devices, |at, device| {
                let _span = recorder.span(at, Act::Enter { state: State::Stop });
                let doing = format!("entering {}", State::Stop);
                guard(device.name(), || {
                    let entered = device.set_state(State::Stop).map(drop);
                    entered.map_err(|error| crate::devices::failed(device, &doing, error))
                })
            })
            .into_iter()
            .filter_map(Result::err)
            .collect(),
        };
        for error in unfinished {
            recorder.note(format!(
                "{error}: its state was moved, and it must not run; reset it before it is used again"
            ));
        }
        let mut notes = Vec::new();
        rollback.vmm_stopped = false;
        self.let_go(rollback, &mut notes);
        let stopped = guard("ending the dirty log", || {
            rollback.logs.stop(self.devices, &mut self.memory, false, &mut notes);
            Ok(())
        });
        notes.extend(stopped.err().map(|error| error.to_string()));
        notes.into_iter().for_each(|note| recorder.note(note));
    }
}
