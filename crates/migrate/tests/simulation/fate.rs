//! What goes wrong, at its moment.

use limosa_clockwork::Monitor;
use limosa_clockwork::simulation::{self, Process};
use std::sync::atomic::Ordering;

use crate::link::{Hand, Network};
use crate::machine::Computer;
use crate::plan::{Fault, Planned, When};

pub struct Fates<'a> {
    pub computers: [&'a Computer; 2],
    pub processes: [Process; 2],
    pub network: &'a Network,
    pub state: Monitor<State>,
}

#[derive(Default)]
pub struct State {
    /// How often something has gone wrong.
    fired: u32,
    /// How much is going wrong at this moment.
    firing: u32,
    /// Nothing goes wrong any more.
    over: bool,
}

impl Fates<'_> {
    /// Waits for the moment; when it comes, something goes wrong.
    pub fn await_and_fire(&self, planned: &Planned) {
        let came = match planned.when {
            When::Point(end, points) => self.processes[end as usize].reaches(points),
            When::Phase(end, phase, points) => {
                let monitor = &self.computers[end as usize].phases;
                let mut phases = monitor.lock();
                while !phases.begun.contains(&phase) && !phases.over {
                    (phases, _) = monitor.wait(phases, None);
                }
                let over = phases.over;
                drop(phases);
                let process = self.processes[end as usize];
                !over && process.reaches(process.points() + points)
            }
        };
        let mut state = self.state.lock();
        if !came || state.over {
            return;
        }
        (state.fired, state.firing) = (state.fired + 1, state.firing + 1);
        drop(state);
        simulation::note(|| format!("FAULT: {:?}", planned.fault));
        self.computers[0].world.strikes();
        self.fire(planned.fault);
        self.state.lock().firing -= 1;
        self.state.notify_all();
    }

    /// How often something has gone wrong.
    pub fn fired(&self) -> u32 {
        self.state.lock().fired
    }

    /// Nothing goes wrong any more when this returns.
    pub fn end(&self) {
        let mut state = self.state.lock();
        state.over = true;
        while state.firing > 0 {
            (state, _) = self.state.wait(state, None);
        }
        drop(state);
        self.network.leave_alone();
        for computer in self.computers {
            computer.phases.lock().over = true;
            computer.phases.notify_all();
        }
    }

    fn fire(&self, fault: Fault) {
        let hands = self.network.hands();
        // Of a question there is one link.
        let hand = |link: usize| hands.get(link % hands.len().max(1)).into_iter();
        let [source, destination] = self.computers;
        let computer = |end| self.computers[end as usize];
        match fault {
            Fault::Cut(link) => hand(link).for_each(Hand::cut),
            Fault::NoMoreLinks => self.network.refuse(true),
            Fault::Silence(end, link) => hand(link).for_each(|hand| hand.silence(end as usize)),
            Fault::Stall(end, link, time) => hand(link).for_each(|hand| hand.stall(end as usize, time)),
            Fault::Flip(end, link, bit) => hand(link).for_each(|hand| hand.flip(end as usize, bit)),
            Fault::Crash { end, silent } => {
                if silent {
                    hands.iter().for_each(Hand::vanish);
                }
                self.processes[end as usize].crash();
            }
            Fault::Cancel(end) => computer(end).cancel(),
            Fault::LedgerFull => destination.fill_ledger(),
            Fault::DiskFull => self.network.disk.fill(),
            Fault::DiskPanics => self.network.disk.panic(),
            Fault::DiskFails => self.network.disk.fail(),
            Fault::PublicationFails => self.network.disk.fail_publication(),
            Fault::DiskFlips(bit) => self.network.disk.flip(bit),
            Fault::NoteFull => source.note_full.store(true, Ordering::SeqCst),
            Fault::PrepareRefused => destination.prepare_refused.store(true, Ordering::SeqCst),
            Fault::StopRefused => source.stop_refused.store(true, Ordering::SeqCst),
            Fault::LogLost => source.log_lost.store(true, Ordering::SeqCst),
            Fault::MemoryFails(end) => computer(end).memory.fails.store(true, Ordering::SeqCst),
            Fault::DeviceGone(end, device) => computer(end).devices[device].lose(),
            Fault::Reset(end, device) => computer(end).reset(device),
            Fault::Panic(end, place) => computer(end).panics.arm(place),
            Fault::Forge { from, forgery, .. } if forgery.instead_of.is_some() => {
                self.network.adversary.iter().for_each(|adversary| adversary.await_frame(from, forgery));
            }
            Fault::Forge { from, link, forgery } => {
                hand(link).for_each(|hand| hand.forge(from as usize, forgery));
            }
            Fault::ForgedLink(proof) => self.network.forge_link(proof),
            Fault::RefuseThreads(end, after) => self.processes[end as usize].refuse_threads(after),
            Fault::Device(end, device, step, how) => {
                computer(end).devices[device].outside.script.fail(step, 0, how);
            }
        }
    }
}
