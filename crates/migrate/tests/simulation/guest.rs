//! The guest's vCPU: it runs at the end whose VMM says so, writes memory, rings devices, and looks whether what it
//! wrote is still there.

use std::sync::Arc;
use std::time::Duration;

use limosa_client::Device;
use limosa_clockwork::{Monitor, simulation, sleep};
use limosa_protocol::State as DeviceState;

use crate::device::SimDevice;
use crate::machine::Computer;
use crate::model::{get, set};
use crate::plan::End;
use crate::world::{PAGE, World};

/// After this number of steps it rests twice as long.
const STEPS_AWAKE: u32 = 60;
/// The longest rest of a guest that was quick.
const QUIET: Duration = Duration::from_millis(300);

/// Of a large region no more than this is written.
pub const BUSY_PAGES: u64 = 40;

pub struct Guest {
    world: Arc<World>,
    state: Monitor<State>,
    rest: Duration,
}

#[derive(Default)]
struct State {
    /// Where it runs.
    at: Option<End>,
    /// It rests this many times as long.
    slowed: u32,
    /// How many steps it has made since something new began.
    steps: u32,
    /// When it was stopped at the source the last time, and when it ran again.
    stood: Option<(Duration, Option<Duration>)>,
    /// Nobody needs it any more.
    over: bool,
}

impl Guest {
    pub fn new(world: Arc<World>, rest: Duration) -> Guest {
        Guest { world, state: Monitor::default(), rest }
    }

    /// It runs there from now on.
    pub fn start(&self, end: End) {
        let mut state = self.state.lock();
        match state.at.replace(end) {
            None => {
                self.world.runs(end, true);
                if let Some((_, again @ None)) = &mut state.stood {
                    *again = Some(simulation::elapsed());
                }
            }
            Some(at) if at == end => {}
            Some(at) => {
                self.world.wrong(format!("the vCPU runs at the {at:?}, and is started at the {end:?}"))
            }
        }
        drop(state);
        self.state.notify_all();
    }

    /// When this returns it does not run there.
    pub fn stop(&self, end: End) {
        let mut state = self.state.lock();
        if state.at == Some(end) {
            state.at = None;
            self.world.runs(end, false);
            state.stood = (end == End::Source).then(|| (simulation::elapsed(), None));
        }
    }

    /// Somebody resets a device. For the guest, where that runs, and as long as the device runs and is not being saved.
    /// Otherwise the guest's state is lost: the result is the state that the device was in.
    pub fn reset(&self, end: End, device: &SimDevice) -> Option<DeviceState> {
        let state = self.state.lock();
        // Nothing else runs from here to the end of the reset.
        let (was, held) = (device.itself().machine().state(), get(&device.outside.holds));
        let runs = end == End::Source && was == DeviceState::Running;
        let by_guest = held && (runs || state.at == Some(end));
        set(&device.outside.reset_by_guest, by_guest);
        // A device that failed does not answer.
        let _ = device.itself().reset();
        set(&device.outside.reset_by_guest, false);
        (held && !by_guest).then_some(was)
    }

    /// Since when it has stood still, or how long it did the last time: from the stop at the source until it ran again.
    pub fn stood(&self) -> Option<(Duration, Option<Duration>)> {
        self.state.lock().stood
    }

    pub fn slow(&self, step: u32) {
        self.state.lock().slowed = step;
    }

    /// Something new begins.
    pub fn wake(&self) {
        self.state.lock().steps = 0;
    }

    pub fn runs_at(&self) -> Option<End> {
        self.state.lock().at
    }

    pub fn end(&self) {
        self.state.lock().over = true;
        self.state.notify_all();
    }

    /// The vCPU's thread.
    pub fn run(&self, computers: [&Computer; 2]) {
        loop {
            let mut state = self.state.lock();
            while state.at.is_none() && !state.over {
                (state, _) = self.state.wait(state, None);
            }
            if state.over {
                return;
            }
            // With the state locked, so that a stop waits for the end of the step.
            if let Some(end) = state.at {
                self.step(computers[end as usize]);
            }
            let rest = self.rest * (1 + state.slowed);
            // It becomes quieter while nothing new happens: waits are long, and steps are what a run costs.
            let rest = (rest * 2u32.pow(state.steps / STEPS_AWAKE)).min(rest.max(QUIET));
            state.steps = (state.steps + 1).min(STEPS_AWAKE * 20);
            drop(state);
            sleep(Duration::from_nanos(1 + simulation::random(rest.as_nanos() as u64)));
        }
    }

    fn step(&self, computer: &Computer) {
        let memory = &computer.memory;
        let value = simulation::random(1 << 40);
        match simulation::random(8) {
            0..=2 => {
                let device = &computer.devices[value as usize % computer.devices.len()];
                if device.is_quiet() {
                    return;
                }
                // A device that failed does not answer.
                let _ = device.itself().region_write(0, 0, &value.to_le_bytes());
            }
            // Now and then a page becomes zero again.
            kind if memory.regions() > 0 => {
                let region = value as usize % memory.regions();
                let pages = memory.len(region) / PAGE as u64;
                let page = simulation::random(pages.min(BUSY_PAGES)) as usize * PAGE;
                match kind {
                    3 => memory.guest_writes(None, region, page, &[0; PAGE]),
                    4 => self.look(computer, region, page),
                    _ => {
                        memory.guest_writes(None, region, page + value as usize % 4000, &value.to_le_bytes())
                    }
                }
            }
            _ => {}
        }
    }

    /// Whether a page is what it was last made.
    fn look(&self, computer: &Computer, region: usize, page: usize) {
        let mut found = [0; PAGE];
        computer.memory.read(region, page, &mut found);
        if self.world.truth().memory[region][page..page + PAGE] != found {
            let end = computer.end;
            self.world.wrong(format!(
                "the guest at the {end:?} finds page {} of region {region} altered",
                page / PAGE
            ));
        }
    }
}
