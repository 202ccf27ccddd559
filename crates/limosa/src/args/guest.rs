//! Options of the moving commands for the guest around the devices: its memory, and how it is stopped and started.

use std::path::PathBuf;

use clap::Args;
use limosa_host::User;
use limosa_migrate::{AfterLoad, PAGE_BYTES};

use super::values::{bytes, pid};

/// The values of `--memory`: a part of the help of every command that has it.
pub const MEMORY: &str = "\
Guest memory is named by FILE@GPA[,size=BYTES][,offset=BYTES][,create][,owner=USER]
  FILE    the file that backs the guest's memory through a shared mapping: in
          /dev/shm, on a tmpfs, or /proc/PID/fd/N for a memfd of a VMM
  GPA     the first address for devices and the guest: 0x100000000, or 4G
  size    bytes of the file to use; by default all from the offset to its end
  offset  the first byte in the file; by default 0
  create  at the destination: create the file if it does not exist, without
          allocating its blocks, or extend it; needs size
  owner   the owner of the file, a name or a number; by default the user who
          runs limosa. A file that create makes is given to this user";

/// One part of a guest's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    pub file: PathBuf,
    pub address: u64,
    pub size: Option<u64>,
    pub offset: u64,
    pub create: bool,
    /// The user who has to own the file, if it is not the user who runs this.
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
        return Err(format!("`{text}`: create needs size=, the length of the file"));
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

/// How the guest on the source is stopped, so that nothing writes its memory while the rest is moved.
#[derive(Debug, Args)]
#[command(next_help_heading = "Guest")]
pub struct Stopping {
    /// Stop this process, which runs the guest, with SIGSTOP before the devices, and continue it if the move is
    /// undone; may be repeated. After the move it stays stopped. Writes that it has requested from the kernel
    /// (asynchronous reads, vhost) do not stop with it.
    #[arg(long, value_name = "PID", value_parser = pid)]
    pub stop_with: Vec<i32>,

    /// Run this shell command to stop the guest before the devices: when it ends, nothing may write to the guest's
    /// memory. If it fails, the move is undone.
    #[arg(long, value_name = "COMMAND")]
    pub on_stop: Option<String>,

    /// Run this shell command to resume the guest if the move is undone after --on-stop.
    #[arg(long, value_name = "COMMAND", requires = "on_stop")]
    pub on_resume: Option<String>,

    /// Move devices in STOP as they are: they stay in STOP at the destination, and their guest is not started
    /// there. Without this option a device in STOP is refused, since an earlier move leaves its source in STOP while
    /// the guest runs elsewhere. Running devices move as usual.
    #[arg(long, conflicts_with = "on_stop")]
    pub stopped: bool,

    /// The guest is already stopped and stays stopped during the move, or there is none: only the devices write to
    /// its memory.
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
    /// Run this shell command to start the guest once the devices run here; not if they stay in STOP.
    #[arg(long, value_name = "COMMAND")]
    pub on_start: Option<String>,

    /// Also run devices that were in STOP when they were moved or saved; without it they stay in STOP.
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
    /// Also move this part of the guest's memory; may be repeated. Needs --stop-with, --on-stop or --guest-stopped.
    #[arg(long, value_name = "FILE@GPA", value_parser = memory)]
    pub memory: Vec<Memory>,
}

/// A guest's memory, to be written.
#[derive(Debug, Args)]
#[command(next_help_heading = "Guest")]
pub struct DestinationMemory {
    /// Write this part of the guest's memory; may be repeated, with the same addresses as on the source. The file
    /// has to exist and be long enough, unless `create` is given.
    #[arg(long, value_name = "FILE@GPA", value_parser = memory)]
    pub memory: Vec<Memory>,
}

/// A guest's memory, from file to file.
#[derive(Debug, Args)]
#[command(next_help_heading = "Guest")]
pub struct MemoryPairs {
    /// Also move this part of the guest's memory, from the first file to the second; may be repeated. Both have the
    /// same address. Needs --stop-with, --on-stop or --guest-stopped. If the guest's memory stays where it is, --memory
    /// is not needed.
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
            ("a@0,create", "needs size="),
            ("a@0,owner", "neither a number nor a name"),
            ("a@0,owner=no-such-user", "`no-such-user` is neither a number nor a name"),
            ("a@0,", "`` is not known"),
        ] {
            let said = memory(wrong).unwrap_err();
            assert!(said.contains(part) && said.contains(wrong), "{wrong}: {said}");
        }
    }
}
