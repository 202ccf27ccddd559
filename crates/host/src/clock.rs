//! [`clock`]: the kernel's state of the wall clock (adjtimex(2)): whether it is synchronised, and its maximum
//! error.

use std::io;
use std::time::Duration;

/// The kernel's view of the wall clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock {
    /// Whether a time service keeps it right. Without one the kernel calls it unsynchronised.
    pub synchronised: bool,
    /// The kernel's estimate of the maximum error; it grows while the clock is not corrected. Meaningless if the
    /// clock is not synchronised.
    pub error_max: Duration,
}

/// Asks the kernel about its wall clock, and changes nothing.
pub fn clock() -> io::Result<Clock> {
    // SAFETY: the structure is plain numbers, for which zeroes are a value.
    let mut now: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: the argument is a structure of the type that the call writes, alive until it returns. With no mode set the
    // call only reads the clock.
    let state = unsafe { libc::adjtimex(&raw mut now) };
    if state < 0 {
        return Err(io::Error::last_os_error());
    }
    let is_off = state == libc::TIME_ERROR || now.status & libc::STA_UNSYNC != 0;
    let error_max = Duration::from_micros(u64::try_from(now.maxerror).unwrap_or(0));
    Ok(Clock { synchronised: !is_off, error_max })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_answers_the_same_about_its_clock_when_asked_twice() {
        let (one, other) = (clock().unwrap(), clock().unwrap());
        assert_eq!(one.synchronised, other.synchronised);
    }
}
