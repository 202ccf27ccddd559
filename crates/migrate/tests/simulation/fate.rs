//! What goes wrong, at its moment.

use limosa_clockwork::Monitor;
use limosa_clockwork::simulation::{self, Process};
use std::sync::atomic::Ordering;

use crate::link::{Hand, Network};
use crate::machine::Computer;
use crate::model::set;
use crate::plan::{Fault, Planned, When};

pub struct Fates<'a> {
    pub computers: [&'a Computer; 2],
    pub processes: [Process; 2],
    pub network: &'a Network,
    pub fired: Monitor<u32>,
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
        if came && !self.computers[0].phases.lock().over {
            *self.fired.lock() += 1;
            simulation::note(|| format!("FAULT: {:?}", planned.fault));
            self.fire(planned.fault);
        }
    }

    /// Nothing goes wrong any more.
    pub fn end(&self) {
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
            Fault::DiskFails => self.network.disk.fail(),
            Fault::DiskFlips(bit) => self.network.disk.flip(bit),
            Fault::NoteFull => source.note_full.store(true, Ordering::SeqCst),
            Fault::PrepareRefused => destination.prepare_refused.store(true, Ordering::SeqCst),
            Fault::StopRefused => source.stop_refused.store(true, Ordering::SeqCst),
            Fault::LogLost => source.log_lost.store(true, Ordering::SeqCst),
            Fault::MemoryFails(end) => computer(end).memory.fails.store(true, Ordering::SeqCst),
            Fault::DeviceGone(end, device) => computer(end).devices[device].lose(),
            Fault::Device(end, device, step, how) => {
                set(&computer(end).devices[device].outside.fail, Some((step, how)));
            }
        }
    }
}
