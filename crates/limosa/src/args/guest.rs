//! Options of the moving commands for the guest around the devices: its memory, and how it is stopped and started.

use std::path::PathBuf;

use clap::Args;
use limosa_host::User;
use limosa_migrate::{AfterLoad, PAGE_BYTES};

use super::values::bytes;

/// What `--memory` takes. Part of the help of every command that has it.
pub const MEMORY: &str = "\
Guest memory is named by FILE@GPA[,size=BYTES][,offset=BYTES][,create][,owner=USER]
  FILE    a file that the guest's memory is a shared mapping of: in /dev/shm, on
          a tmpfs, or /proc/PID/fd/N for a memfd that a VMM holds
  GPA     its first address for devices and the guest: 0x100000000, or 4G
  size    how much of the file it is; by default all from the offset to its end
  offset  where in the file it begins; by default 0
  create  where memory is written to: make the file if it is not there, without
          taking room, or make it longer; needs size
  owner   whose file it is, a name or a number; by default it has to be that of
          the user who runs limosa. One that create makes is given to this user";

/// One part of a guest's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    pub file: PathBuf,
    pub address: u64,
    pub size: Option<u64>,
    pub offset: u64,
    pub create: bool,
    /// The user whose file it has to be, if another one than who runs this.
    pub owner: Option<User>,
}

/// `FILE@GPA[,size=BYTES][,offset=BYTES][,create][,owner=USER]`. FILE may have any of these characters in it.
pub fn memory(text: &str) -> Result<Memory, String> {
    let expected =
        || format!("`{text}`: expected FILE@GPA, such as /dev/shm/guest@0 or /proc/123/fd/9@0x100000000");
    let (file, rest) = text.rsplit_once('@').ok_or_else(expected)?;
    let mut words = rest.split(',');
    let whole_pages = |what: &str, bytes: u64| match bytes.is_multiple_of(PAGE_BYTES) {
        true => Ok(bytes),
        false => Err(format!("`{text}`: {what} {bytes:#x} is not a multiple of {PAGE_BYTES}, a page")),
    };
    let first = words.next().filter(|first| !first.is_empty() && !file.is_empty()).ok_or_else(expected)?;
    let address = whole_pages("the address", number(first).map_err(|error| format!("`{text}`: {error}"))?)?;
    let mut memory = Memory { file: file.into(), address, size: None, offset: 0, create: false, owner: None };
    for word in words {
        let (key, given) = word.split_once('=').unwrap_or((word, ""));
        let value = || number(given).map_err(|error| format!("`{text}`: {key}: {error}"));
        match key {
            "size" => memory.size = Some(whole_pages("size", value()?)?),
            "offset" => memory.offset = whole_pages("offset", value()?)?,
            "create" if word == key => memory.create = true,
            "owner" => {
                memory.owner = Some(given.parse().map_err(|error| format!("`{text}`: {key}: {error}"))?);
            }
            _ => {
                return Err(format!(
                    "`{text}`: `{word}` is not known; expected size=, offset=, create or owner="
                ));
            }
        }
    }
    if memory.size == Some(0) {
        return Err(format!("`{text}`: expected a size of at least {PAGE_BYTES}, a page"));
    }
    if memory.create && memory.size.is_none() {
        return Err(format!("`{text}`: create goes with size=, which says how long the file is to be"));
    }
    Ok(memory)
}

/// A number of bytes or an address: decimal with K, M, G or T, or hexadecimal.
pub(super) fn number(text: &str) -> Result<u64, String> {
    match text.strip_prefix("0x") {
        Some(digits) if digits.bytes().all(|digit| digit.is_ascii_hexdigit()) => {
            u64::from_str_radix(digits, 16).map_err(|_| format!("`{text}` is no number below 2^64"))
        }
        Some(_) => Err(format!("`{text}` is not hexadecimal")),
        None => bytes(text),
    }
}

/// How the guest on the source stands still, so that nobody writes its memory while the rest of it is moved.
#[derive(Debug, Args)]
#[command(next_help_heading = "Guest")]
pub struct Stopping {
    /// Stop this process before the devices, by SIGSTOP, and let it go on if the move is undone: the one that runs the
    /// guest; many times. After the move it stays stopped. What it has asked the kernel to write for it (asynchronous
    /// reads, vhost) does not stop with it.
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pub stop_with: Vec<i32>,

    /// Run this by the shell to stop the guest before the devices: nobody may write its memory any more when it ends.
    /// If it fails, the move is called off.
    #[arg(long, value_name = "COMMAND")]
    pub on_stop: Option<String>,

    /// Run this by the shell to let the guest go on when the move was undone after --on-stop.
    #[arg(long, value_name = "COMMAND", requires = "on_stop")]
    pub on_resume: Option<String>,

    /// Move devices that stand in STOP, as they stand: they stay in STOP where they are moved to, and their guest is not
    /// started there. Without it a device in STOP is refused, since an earlier move leaves its source so, whose guest runs
    /// elsewhere. Devices that run are moved as ever.
    #[arg(long, conflicts_with = "on_stop")]
    pub stopped: bool,

    /// The guest stands still already and will not be run meanwhile, or there is none: only the devices write its
    /// memory.
    #[arg(long, conflicts_with_all = ["stop_with", "on_stop"])]
    pub guest_stopped: bool,
}

impl Stopping {
    /// Whether the guest is stopped in the move.
    pub fn stops_the_guest(&self) -> bool {
        !self.stop_with.is_empty() || self.on_stop.is_some()
    }
}

/// How the guest on the destination is started.
#[derive(Debug, Args)]
#[command(next_help_heading = "Guest")]
pub struct Starting {
    /// Run this by the shell when the devices run here, to start the guest; not where they stay in STOP.
    #[arg(long, value_name = "COMMAND")]
    pub on_start: Option<String>,

    /// Let devices run here that stood in STOP when they were moved or saved; without it they stay in STOP.
    #[arg(long)]
    pub run: bool,
}

impl Starting {
    /// Which devices run once they are loaded.
    pub fn after(&self) -> AfterLoad {
        if self.run { AfterLoad::Run } else { AfterLoad::AsFound }
    }
}

/// A guest's memory, to be read.
#[derive(Debug, Args)]
#[command(next_help_heading = "Guest")]
pub struct SourceMemory {
    /// Move this part of the guest's memory too; many times. Needs --stop-with, --on-stop or --guest-stopped.
    #[arg(long, value_name = "FILE@GPA", value_parser = memory)]
    pub memory: Vec<Memory>,
}

/// A guest's memory, to be written.
#[derive(Debug, Args)]
#[command(next_help_heading = "Guest")]
pub struct DestinationMemory {
    /// Write this part of the guest's memory; many times, at the same addresses as on the source. The file has to be
    /// there and long enough, or `create` makes it.
    #[arg(long, value_name = "FILE@GPA", value_parser = memory)]
    pub memory: Vec<Memory>,
}

/// A guest's memory, from file to file.
#[derive(Debug, Args)]
#[command(next_help_heading = "Guest")]
pub struct MemoryPairs {
    /// Move this part of the guest's memory too, from the first file to the second; many times. Both have the same
    /// address. Needs --stop-with, --on-stop or --guest-stopped. A guest whose memory stays where it is needs no --memory.
    #[arg(long, num_args = 2, value_names = ["FILE@GPA", "FILE@GPA"], value_parser = memory)]
    pub memory: Vec<Memory>,
}

impl MemoryPairs {
    /// To be read, in their order.
    pub fn from(&self) -> Vec<Memory> {
        self.memory.iter().step_by(2).cloned().collect()
    }

    /// To be written, in the same order.
    pub fn to(&self) -> Vec<Memory> {
        self.memory.iter().skip(1).step_by(2).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_named_by_file_address_and_part() {
        let named = memory("/dev/shm/a@b,c@0x1_0".replace('_', "000").as_str()).unwrap();
        assert_eq!((named.file.to_str().unwrap(), named.address), ("/dev/shm/a@b,c", 0x10000));
        assert_eq!((named.size, named.offset, named.create), (None, 0, false));
        let named = memory("f@4G,size=1M,offset=0x2000,create").unwrap();
        assert_eq!((named.address, named.size, named.offset), (4 << 30, Some(1 << 20), 0x2000));
        assert!(named.create && named.owner.is_none());
        let named = memory("f@0,owner=4242").unwrap();
        assert_eq!(named.owner, Some(User(4242)));
        assert_eq!(memory("f@0,owner=root").unwrap().owner, Some(User::ROOT));
        for (wrong, part) in [
            ("/dev/shm/a", "expected FILE@GPA"),
            ("@0", "expected FILE@GPA"),
            ("a@", "expected FILE@GPA"),
            ("a@x", "is not a size"),
            ("a@0x", "below 2^64"),
            ("a@0xfg", "not hexadecimal"),
            ("a@0x10000000000000000", "below 2^64"),
            ("a@-1", "is not a size"),
            ("a@0x800", "not a multiple of 4096"),
            ("a@0,size=5", "not a multiple of 4096"),
            ("a@0,size=0", "at least 4096"),
            ("a@0,offset=1", "not a multiple of 4096"),
            ("a@0,length=5", "`length=5` is not known"),
            ("a@0,create=yes", "`create=yes` is not known"),
            ("a@0,create", "goes with size="),
            ("a@0,owner", "neither a number nor a name"),
            ("a@0,owner=no-such-user", "`no-such-user` is neither a number nor a name"),
            ("a@0,", "`` is not known"),
        ] {
            let said = memory(wrong).unwrap_err();
            assert!(said.contains(part) && said.contains(wrong), "{wrong}: {said}");
        }
    }
}
