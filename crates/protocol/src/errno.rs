//! Errno values as the protocol carries them (`vfio.h`: every refusal is a negative errno;
//! `vfio-user.rst: Header`, field *error*). The numbers are Linux's generic ones, shared by
//! x86-64 and aarch64.

use core::fmt;

/// An errno from the device's side of the protocol.
///
/// Unknown numbers survive a round trip: they print as `errno N`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Errno(u32);

macro_rules! errnos {
    ($($name:ident = $number:literal, $text:literal;)*) => {
        impl Errno {
            $(#[doc = concat!($text, ".")] pub const $name: Errno = Errno($number);)*

            /// The symbolic name, such as `EINVAL`, of a number that this crate knows.
            pub const fn name(self) -> Option<&'static str> {
                match self.0 { $($number => Some(stringify!($name)),)* _ => None }
            }

            /// What the number means, in a few words.
            pub const fn meaning(self) -> Option<&'static str> {
                match self.0 { $($number => Some($text),)* _ => None }
            }
        }
    };
}

errnos! {
    EPERM = 1, "operation not permitted";
    ENOENT = 2, "no such object";
    ESRCH = 3, "no such process";
    EINTR = 4, "interrupted";
    EIO = 5, "input/output error";
    ENXIO = 6, "no such device or address";
    E2BIG = 7, "more than the device's limit";
    EBADF = 9, "bad file descriptor, or not open for this direction";
    EAGAIN = 11, "try again";
    ENOMEM = 12, "out of memory";
    EACCES = 13, "permission denied";
    EFAULT = 14, "bad address";
    EBUSY = 16, "device or resource busy";
    EEXIST = 17, "already exists";
    ENODEV = 19, "no such device, or the data session has ended";
    EINVAL = 22, "invalid argument, or not in this state";
    EMFILE = 24, "too many open files";
    ENOTTY = 25, "feature not supported by this device";
    ENOSPC = 28, "no space left";
    ESPIPE = 29, "illegal seek";
    EPIPE = 32, "broken pipe";
    ERANGE = 34, "out of range";
    ENOSYS = 38, "message not implemented";
    ENOMSG = 42, "nothing to read for now";
    EPROTO = 71, "protocol error";
    EBADMSG = 74, "damaged data";
    EOVERFLOW = 75, "value overflows";
    EMSGSIZE = 90, "message too long";
    ENOTSUP = 95, "operation not supported";
    EADDRINUSE = 98, "address in use";
    ECONNRESET = 104, "connection reset by peer";
    ENOTCONN = 107, "not connected";
    ETIMEDOUT = 110, "timed out";
    ECONNREFUSED = 111, "connection refused";
    ECANCELED = 125, "cancelled";
}

impl Errno {
    /// The errno with this number. Numbers that Linux does not assign are kept as they are.
    pub const fn from_raw(number: u32) -> Errno {
        Errno(number)
    }

    /// The number, as on the wire.
    pub const fn raw(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.name(), self.meaning()) {
            (Some(name), Some(meaning)) => write!(f, "{name} ({meaning})"),
            _ => write!(f, "errno {}", self.0),
        }
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "errno {}", self.0),
        }
    }
}

impl core::error::Error for Errno {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_and_unknown_numbers_print() {
        extern crate alloc;
        use alloc::format;
        assert_eq!(format!("{:?}", Errno::EINVAL), "EINVAL");
        assert!(format!("{}", Errno::EINVAL).starts_with("EINVAL (invalid argument"));
        assert_eq!(format!("{} {:?}", Errno::from_raw(4096), Errno::from_raw(4096)), "errno 4096 errno 4096");
        assert_eq!(Errno::from_raw(4096).raw(), 4096);
    }
}
