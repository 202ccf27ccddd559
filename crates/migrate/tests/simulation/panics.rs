//! Panics in what the engine calls, at the next call of a place.

use std::sync::{Mutex, PoisonError};

use crate::world::World;

/// What the engine calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Any call of a device but those of its data stream.
    Device(usize),
    Stream(usize),
    Observer,
    Stop,
    Committing,
    Resume,
    Prepare,
    Start,
    Throttle,
    Memory,
    Log,
    FurtherLinks,
}

impl Place {
    /// Those that are no device's.
    pub const OTHERS: [Place; 10] = [
        Place::Observer,
        Place::Stop,
        Place::Committing,
        Place::Resume,
        Place::Prepare,
        Place::Start,
        Place::Throttle,
        Place::Memory,
        Place::Log,
        Place::FurtherLinks,
    ];
}

/// Panics without the panic hook, which would print it.
pub fn panic_at(place: &str) -> ! {
    std::panic::resume_unwind(Box::new(format!("{place} has a defect")))
}

/// The places of one end that panic at their next call.
#[derive(Default)]
pub struct Panics(Mutex<Vec<Place>>);

impl Panics {
    pub fn arm(&self, place: Place) {
        self.armed().push(place);
    }

    pub fn disarm(&self) {
        self.armed().clear();
    }

    /// The engine calls this place.
    pub fn call(&self, place: Place, world: &World) {
        let mut armed = self.armed();
        let Some(at) = armed.iter().position(|armed| *armed == place) else { return };
        armed.swap_remove(at);
        drop(armed);
        world.strikes();
        limosa_clockwork::simulation::note(|| format!("PANIC: {place:?}"));
        panic_at(&format!("{place:?}"));
    }

    fn armed(&self) -> std::sync::MutexGuard<'_, Vec<Place>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
