//! A door between threads of a test.

use std::sync::{Condvar, Mutex};
use std::time::Duration;

/// A door that opens once.
#[derive(Default)]
pub struct Door {
    open: Mutex<bool>,
    opened: Condvar,
}

impl Door {
    pub fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }

    /// Waits until the door is open, for 20 seconds at most. Returns whether it is.
    pub fn pass(&self) -> bool {
        let open = self.open.lock().unwrap();
        let limit = Duration::from_secs(20);
        *self.opened.wait_timeout_while(open, limit, |open| !*open).unwrap().0
    }
}
