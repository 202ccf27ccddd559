//! [`within`]: work in a thread of its own, for which the caller waits no longer than a limit.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::time::Duration;

/// The end of work in a thread of its own.
#[derive(Debug)]
pub enum Done<T> {
    /// It ended with this.
    Value(T),
    /// It panicked, with this message.
    Panicked(String),
    /// It still waits for the device.
    Hangs,
}

/// Runs work that may wait for the device for ever. A thread that hangs is left behind.
pub fn within<T: Send + 'static>(limit: Duration, work: impl FnOnce() -> T + Send + 'static) -> Done<T> {
    let (send, receive) = mpsc::sync_channel(1);
    let run = move || {
        let done = catch_unwind(AssertUnwindSafe(work));
        // If this is too late, the receiver is gone.
        let _ = send.send(done);
    };
    if let Err(error) = std::thread::Builder::new().name("check".into()).spawn(run) {
        return Done::Panicked(format!("no thread for the check: {error}"));
    }
    match receive.recv_timeout(limit) {
        Ok(Ok(value)) => Done::Value(value),
        Ok(Err(panic)) => Done::Panicked(said(&*panic)),
        Err(_) => Done::Hangs,
    }
}

fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic".into())
}

/// What a thread may need beyond a check's own limit, to see that it has passed.
pub(crate) const GRACE: Duration = Duration::from_secs(2);
