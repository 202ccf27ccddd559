//! Users and groups: numbers to the kernel, names to people (passwd(5), group(5)).

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::str::FromStr;

/// The size limit for the files that have the names.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// A user, printed with the name: `nobody (65534)`. Names are those of `/etc/passwd`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct User(pub u32);

/// A group, printed with the name: `kvm (104)`. Names are those of `/etc/group`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Group(pub u32);

impl User {
    /// The user with all rights.
    pub const ROOT: User = User(0);

    /// The user with whose rights this process acts.
    pub fn current() -> User {
        User(rustix::process::geteuid().as_raw())
    }
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        print(f, "user", self.0, &names("/etc/passwd"))
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        print(f, "group", self.0, &names("/etc/group"))
    }
}

/// A number, or a name of `/etc/passwd`.
impl FromStr for User {
    type Err = String;

    fn from_str(text: &str) -> Result<User, String> {
        find(text, "/etc/passwd", &names("/etc/passwd")).map(User)
    }
}

/// A number, or a name of `/etc/group`.
impl FromStr for Group {
    type Err = String;

    fn from_str(text: &str) -> Result<Group, String> {
        find(text, "/etc/group", &names("/etc/group")).map(Group)
    }
}

/// The file's text; empty if it cannot be read.
fn names(path: &str) -> String {
    let mut bytes = Vec::new();
    // Without names, numbers do.
    let _ = File::open(path).and_then(|file| file.take(FILE_BYTES_MAX).read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The names and numbers of a file of `name:password:number:...` lines.
fn entries(names: &str) -> impl Iterator<Item = (&str, u32)> {
    names.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let (name, _, number) = (fields.next()?, fields.next()?, fields.next()?);
        Some((name, number.parse().ok()?))
    })
}

fn print(f: &mut fmt::Formatter<'_>, what: &str, number: u32, names: &str) -> fmt::Result {
    match entries(names).find(|entry| entry.1 == number) {
        Some((name, _)) => write!(f, "{name} ({number})"),
        None => write!(f, "{what} {number}"),
    }
}

fn find(text: &str, path: &str, names: &str) -> Result<u32, String> {
    // The last number means nobody to the kernel (chown(2)).
    let number = text.parse().ok().filter(|number| *number != u32::MAX);
    let found = number.or_else(|| entries(names).find(|entry| entry.0 == text).map(|entry| entry.1));
    found.ok_or_else(|| format!("`{text}` is neither a number nor a name in {path}; expected one of them"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: &str = "root:x:0:0:root:/root:/bin/sh\nbroken\n:x\nqemu:x:107:107::/:\nlast:x:x:1\n";

    #[test]
    fn names_and_numbers_are_found_in_both_directions() {
        assert_eq!(find("qemu", "f", NAMES), Ok(107));
        assert_eq!(find("4242", "f", NAMES), Ok(4242));
        for wrong in ["", "last", "broken", "-1", "4294967295", "4294967296"] {
            assert!(find(wrong, "f", NAMES).unwrap_err().contains("a name in f"), "{wrong}");
        }
        struct Printed(u32);
        impl fmt::Display for Printed {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                print(f, "user", self.0, NAMES)
            }
        }
        assert_eq!(Printed(107).to_string(), "qemu (107)");
        assert_eq!(Printed(108).to_string(), "user 108");
    }

    #[test]
    fn this_process_acts_for_a_user_that_can_be_named() {
        let current = User::current();
        assert_eq!(current.0.to_string().parse(), Ok(current));
        assert!(current.to_string().contains(&current.0.to_string()));
    }
}
