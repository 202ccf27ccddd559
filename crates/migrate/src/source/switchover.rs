//! The stop of a source: vCPUs, then the peer-to-peer DMA of all devices, then the devices, then the last dirty pages.

use limosa_client::DeviceExt;
use limosa_protocol::{MigrationFlags, State};

use super::rollback::Rollback;
use super::{Source, Stage};
use crate::context::Context;
use crate::devices::failed;
use crate::protocol::pace::Pace;
use crate::transfer::device_flow::Job;
use crate::vmm;
use crate::{Error, Obstacle, Result, WhenStalled};

impl<'a> Source<'a> {
    /// Whether each device has peer-to-peer DMA to be stopped first. Asked before the stop, of which it would be a part.
    pub(super) fn quiesces(&self, rollback: &Rollback) -> Result<Vec<bool>> {
        let devices = self.devices.iter().zip(&rollback.found);
        let quiesces = devices.map(|(moved, found)| {
            let flags = moved.device.migration_flags();
            let flags = flags.map_err(|error| failed(moved.device, "reading its flags", error))?;
            Ok(flags.contains(MigrationFlags::P2P) && found.is_running())
        });
        quiesces.collect()
    }

    /// Stops the vCPUs, then the peer-to-peer DMA of all devices, then the devices, which from then on give the rest of their
    /// data.
    pub(super) fn stop(
        &mut self,
        stage: &Stage<'_, '_, '_>,
        quiesces: &[bool],
        rollback: &mut Rollback,
    ) -> Result<()> {
        let sending = stage.sending;
        sending.team.check()?;
        sending.recorder().check()?;
        rollback.vmm_stopped = true;
        sending.alive.stands_still(stage.wires.connection.limits().standstill_max);
        sending.end_streams();
        vmm::ask("Vmm::stop", "stop", || self.vmm.stop())?;
        sending.wait_all()?;
        sending.give_all(|at| {
            let has_session = sending.flows[at].lock().has_session;
            let quiesced = if has_session { State::PreCopyP2p } else { State::RunningP2p };
            quiesces[at].then_some(Job::Enter(quiesced))
        });
        sending.wait_all()?;
        sending.stop_all()?;
        rollback.devices_stopped = true;
        Ok(())
    }

    /// Harvests the pages that were written since the last round, where devices have not logged them: their logs were harvested as
    /// each was stopped. If a log fails now, all pages are dirty. If the downtime
    /// goal is a limit and sending them would exceed it, that ends the move.
    pub(super) fn last_pages(
        &mut self,
        context: &Context<'a>,
        stage: &Stage<'_, '_, '_>,
        rollback: &mut Rollback,
        pace: &Pace,
    ) -> Result<()> {
        if rollback.logs.blind {
            rollback.logs.pages.everything();
            return Ok(());
        }
        let Some(lost) = rollback.logs.harvest_others(&mut self.memory)? else { return Ok(()) };
        context
            .recorder
            .note(format!("the log of dirty pages was lost at the stop, all is sent again: {lost}"));
        let goal = self.options.convergence.downtime_goal;
        let predicted = pace.downtime(stage.ram.bytes());
        if self.options.convergence.when_stalled == WhenStalled::Abort && predicted > goal {
            let obstacle = Obstacle::LogLost;
            return Err(Error::NotConverging { obstacle, predicted, is_minimum: false, goal });
        }
        Ok(())
    }
}
