//! [`catch`]: turns a panic into an error.

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use crate::hook;

/// A panic that [`catch`] caught.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Panic {
    /// The text that the code panicked with. For a payload that is not text, this says that its kind is unknown.
    pub message: String,
}

/// Runs `f` and catches its panic.
///
/// The panic hook still runs, and by default prints the panic. State that `f` changed before it panicked stays as
/// it is; the caller decides whether that state is still usable.
///
/// In a simulation, a panic that is caught does not fail the simulation. The unwinding of a thread whose process was
/// crashed (`simulation::Process::crash`) is not caught, and continues in the caller.
///
/// # Errors
///
/// The message of the panic.
pub fn catch<R>(f: impl FnOnce() -> R) -> Result<R, Panic> {
    if hook::current().is_some_and(|task| !task.catches_panics()) {
        return Ok(f());
    }
    let payload = match catch_unwind(AssertUnwindSafe(f)) {
        Ok(returned) => return Ok(returned),
        Err(payload) if hook::is_crash(payload.as_ref()) => resume_unwind(payload),
        Err(payload) => payload,
    };
    let panic = Panic { message: message(payload.as_ref()) };
    // A payload is any type, and its destructor may panic as well.
    if let Err(payload) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
        std::mem::forget(payload);
    }
    // Code that runs while its process crashes may panic with a payload of its own. The process must still end.
    if let Some(task) = hook::current() {
        task.end_if_crashed();
    }
    Err(panic)
}

/// The text of a panic's payload.
pub(crate) fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "a payload of an unknown kind".into())
}

impl fmt::Display for Panic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "panicked: {}", self.message)
    }
}

impl std::error::Error for Panic {}

#[cfg(test)]
mod tests {
    use super::*;

    /// Panics without a call of the panic hook.
    fn quiet_panic(payload: impl Any + Send) {
        resume_unwind(Box::new(payload));
    }

    #[test]
    fn catch_returns_what_the_closure_returns() {
        assert_eq!(catch(|| 7), Ok(7));
    }

    #[test]
    fn a_caught_panic_has_its_message() {
        let panic = catch(|| quiet_panic("static text")).unwrap_err();
        assert_eq!(
            (panic.message.as_str(), panic.to_string().as_str()),
            ("static text", "panicked: static text")
        );
        assert_eq!(catch(|| quiet_panic(String::from("formatted"))).unwrap_err().message, "formatted");
    }

    #[test]
    fn a_caught_panic_without_text_is_of_an_unknown_kind() {
        let panic = catch(|| quiet_panic(5u32)).unwrap_err();
        assert_eq!(panic.to_string(), "panicked: a payload of an unknown kind");
    }

    #[test]
    fn a_payload_whose_destructor_panics_is_caught() {
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                quiet_panic("in the destructor");
            }
        }
        assert_eq!(catch(|| quiet_panic(Bomb)).unwrap_err().message, "a payload of an unknown kind");
    }
}
