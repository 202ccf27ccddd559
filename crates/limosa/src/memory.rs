//! The guest memory that a user named: opened, and refused if it cannot be the memory of one guest.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;

use limosa_host::{Descriptor, Entry, Named, User};
use limosa_migrate::{
    FilePages, FingerprintKey, FingerprintLog, Fingerprinted, GuestPages, MemoryRegion, PAGE_BYTES,
};
use rustix::fs::{FileType, OFlags, SealFlags, Uid};
use rustix::io::Errno;

use crate::args::Memory;
use crate::exit::{self, Code};
use crate::huge_pages::HugePages;

/// The file systems (`linux/magic.h`) whose files are memory: tmpfs, which memfds are on, and hugetlbfs.
const OF_MEMORY: [u64; 2] = [0x0102_1994, 0x9584_58f6];

/// One part of a guest's memory, open.
pub struct OpenMemory {
    named: Memory,
    file: File,
    size: u64,
    huge_pages: Option<HugePages>,
}

/// How it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Read,
    Write,
}

impl OpenMemory {
    /// To be read on the source.
    pub fn source(named: &Memory) -> anyhow::Result<OpenMemory> {
        if named.create {
            let what = format!("--memory {}: create is for where memory is written to", named.file.display());
            return Err(exit::error(Code::Usage, what));
        }
        OpenMemory::open(named, Use::Read)
    }

    /// To be written on the destination.
    pub fn destination(named: &Memory) -> anyhow::Result<OpenMemory> {
        OpenMemory::open(named, Use::Write)
    }

    fn open(named: &Memory, to: Use) -> anyhow::Result<OpenMemory> {
        let path = named.file.display();
        let fails = |error: io::Error| {
            let hint = match error.kind() {
                ErrorKind::NotFound if error.raw_os_error().is_none() => "",
                ErrorKind::NotFound if named.create => "; make its folder first",
                ErrorKind::NotFound => {
                    "; expected a file that the guest's memory is a mapping of, or ,size=BYTES,create to make one"
                }
                _ => "",
            };
            exit::error(Code::Unreachable, format!("--memory {path}: {error}{hint}"))
        };
        let opened = match limosa_host::resolve(&named.file).map_err(fails)? {
            Named::Descriptor(_) if named.create || named.owner.is_some() => {
                let what = "create and owner= are for files; expected neither for a descriptor of a process";
                return Err(exit::error(Code::Usage, format!("--memory {path}: {what}")));
            }
            Named::Descriptor(descriptor) => borrow(descriptor, to).map(|file| (file, None)),
            Named::Entry(entry) => {
                open_entry(named, &entry, to).map(|(file, is_new)| (file, is_new.then_some(entry)))
            }
        };
        let (file, made) = opened.map_err(fails)?;
        let measured = HugePages::of(&file)
            .map_err(fails)
            .and_then(|huge_pages| Ok((measure(named, &file, huge_pages, fails)?, huge_pages)));
        if let (Err(_), Some(made)) = (&measured, made) {
            // It was not used yet.
            let _ = made.remove();
        }
        let (size, huge_pages) = measured?;
        Ok(OpenMemory { named: named.clone(), file, size, huge_pages })
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Its first address, and the address after its last.
    fn range(&self) -> (u128, u128) {
        (self.named.address.into(), u128::from(self.named.address) + u128::from(self.size))
    }

    fn name(&self) -> String {
        format!("{}@{:#x}", self.named.file.display(), self.named.address)
    }

    /// Whether both are parts of one file that have bytes in common.
    fn shares_bytes_with(&self, other: &OpenMemory) -> io::Result<bool> {
        let (one, another) = (self.file.metadata()?, other.file.metadata()?);
        let (start, other_start) = (self.named.offset, other.named.offset);
        let is_one_file = (one.dev(), one.ino()) == (another.dev(), another.ino());
        Ok(is_one_file && start < other_start + other.size && other_start < start + self.size)
    }

    /// Mapped, if that is possible.
    fn pages(&self) -> anyhow::Result<FilePages> {
        self.mapped().or_else(|_| Ok(FilePages::new(self.file.try_clone()?, self.named.offset)))
    }

    fn mapped(&self) -> io::Result<FilePages> {
        FilePages::mapped(self.file.try_clone()?, self.named.offset, self.size)
    }

    /// The same, to be written.
    fn pages_to_write(&self) -> anyhow::Result<FilePages> {
        let Some(huge_pages) = self.huge_pages else { return self.pages() };
        // The mapping keeps all of them for this process.
        self.mapped().map_err(|error| {
            let what = huge_pages.why_not_mapped(self.size, &error);
            exit::error(Code::Refused, format!("--memory {}: {what}", self.named.file.display()))
        })
    }

    fn region<'a>(&self, id: usize, pages: &'a dyn GuestPages) -> MemoryRegion<'a> {
        MemoryRegion { id: id as u32, iova: self.named.address, size: self.size, pages }
    }
}

/// A refusal that only another command line can change.
fn refusal(what: impl Into<String>) -> io::Error {
    io::Error::other(what.into())
}

/// Memory that a process holds, with the access that the process has to it.
fn borrow(descriptor: Descriptor, to: Use) -> io::Result<File> {
    let borrowed = descriptor.borrow()?;
    let found = rustix::fs::fstat(&borrowed)?;
    let is_memory = FileType::from_raw_mode(found.st_mode) == FileType::RegularFile
        && OF_MEMORY.contains(&(rustix::fs::fstatfs(&borrowed)?.f_type as u64));
    if !is_memory {
        return Err(refusal(
            "the process holds something there that is no memory; expected a memfd, or a file on tmpfs or hugetlbfs",
        ));
    }
    if !borrowed.readable {
        return Err(refusal(
            "the process holds it for writing alone; expected a descriptor that can be read",
        ));
    }
    let seals = rustix::fs::fcntl_get_seals(&borrowed).unwrap_or(SealFlags::empty());
    if to == Use::Write
        && (!borrowed.writable || seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE))
    {
        return Err(refusal(
            "the process holds it for reading alone, or it is sealed against writing; expected a descriptor that \
             can be written to",
        ));
    }
    Ok(File::from(OwnedFd::from(borrowed)))
}

/// Memory in a file of the expected user's: by default that with whose rights this process acts, so that a file which
/// another user put under the name is neither read nor written with these rights. The second value is whether it was made.
fn open_entry(named: &Memory, entry: &Entry, to: Use) -> io::Result<(File, bool)> {
    if let Some(target) = entry.link() {
        let what = "it is a symbolic link; expected the file itself";
        return Err(refusal(format!("{what}, which the link says is {}", target.display())));
    }
    if named.create {
        match entry.create() {
            Ok(file) => return given(named, entry, file).map(|file| (file, true)),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    // Its kind is checked before it is opened, since opening a device node can have an effect.
    check(named, &entry.stat()?)?;
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = match entry.open(OFlags::RDWR | flags) {
        // Read-only memory cannot be mapped, but can be moved.
        Err(error) if to == Use::Read && is_denied(&error) => entry.open(OFlags::RDONLY | flags)?,
        opened => opened?,
    };
    check(named, &rustix::fs::fstat(&file)?)?;
    Ok((file, false))
}

/// The number of bytes of the file. Extends the file, if that is requested.
fn measure(
    named: &Memory,
    file: &File,
    huge_pages: Option<HugePages>,
    fails: impl Fn(io::Error) -> anyhow::Error + Copy,
) -> anyhow::Result<u64> {
    let path = named.file.display();
    let refuse = |what: String| Err(exit::error(Code::Refused, format!("--memory {path}: {what}")));
    let length = file.metadata().map_err(fails)?.len();
    let offset = named.offset;
    let size = named.size.unwrap_or(length.saturating_sub(offset));
    let Some(end) = offset.checked_add(size).filter(|end| i64::try_from(*end).is_ok()) else {
        return refuse(format!("{size} bytes from {offset} on are more than a file can have"));
    };
    if size == 0 || !size.is_multiple_of(PAGE_BYTES) {
        return refuse(format!(
            "it has {length} bytes, {size} of them from {offset} on; expected whole pages of {PAGE_BYTES}, or ,size="
        ));
    }
    if named.address.checked_add(size - 1).is_none() {
        return refuse(format!("{size:#x} bytes at {:#x} go beyond 2^64", named.address));
    }
    if end > length && !named.create {
        return refuse(format!("it has {length} bytes, and {end} are needed; ,create makes it longer"));
    }
    if end > length {
        if let Some(what) = huge_pages.and_then(|pages| pages.refuse_length(end)) {
            return refuse(what);
        }
        file.set_len(end).map_err(fails)?;
    }
    Ok(size)
}

/// Gives a file that was created here to its owner. Only the owner may access it, as it holds the guest's secrets.
fn given(named: &Memory, entry: &Entry, file: File) -> io::Result<File> {
    let Some(owner) = named.owner.filter(|owner| *owner != User::current()) else { return Ok(file) };
    let done = rustix::fs::fchown(&file, Some(Uid::from_raw(owner.0)), None);
    done.map(|()| file).map_err(|errno| {
        let error = io::Error::from(errno);
        // It was not used yet.
        let _ = entry.remove();
        io::Error::new(error.kind(), format!("giving it to {owner}, as owner= says: {error}; run as root"))
    })
}

fn is_denied(error: &io::Error) -> bool {
    let denied = [Errno::ACCESS, Errno::PERM, Errno::ROFS];
    Errno::from_io_error(error).is_some_and(|errno| denied.contains(&errno))
}

/// Refuses a file that is not a regular one, or not the expected user's.
fn check(named: &Memory, found: &rustix::fs::Stat) -> io::Result<()> {
    if let Some(kind) = limosa_host::other_than_file(found.st_mode) {
        let expected = "expected a regular file that the guest's memory is a mapping of";
        return Err(refusal(format!("it is {kind}; {expected}")));
    }
    let (owner, current) = (User(found.st_uid), User::current());
    match named.owner {
        Some(expected) if owner != expected => {
            return Err(refusal(format!("it belongs to {owner}, and owner= says that it is {expected}'s")));
        }
        None if owner != current => {
            return Err(refusal(format!(
                "it belongs to {owner}, and limosa runs as {current}; if that is the guest's memory all the same, say so \
                 with ,owner={}, or name it as /proc/PID/fd/N of the process that runs the guest",
                owner.0
            )));
        }
        _ => {}
    }
    // Its owner may have given it the other name for another purpose.
    match found.st_nlink {
        0 | 1 => Ok(()),
        names => Err(refusal(format!("the file has {names} names (hard links); expected this one alone"))),
    }
}

/// Opens all parts of a guest's memory, in the order of their addresses, as they are numbered on both sides. Refuses
/// those that overlap, in the guest or in a file.
pub fn open(
    named: &[Memory],
    how: impl Fn(&Memory) -> anyhow::Result<OpenMemory>,
) -> anyhow::Result<Vec<OpenMemory>> {
    let mut parts = named.iter().map(how).collect::<anyhow::Result<Vec<_>>>()?;
    parts.sort_by_key(|part| part.named.address);
    for (at, part) in parts.iter().enumerate() {
        if let Some(other) = parts[..at].iter().find(|other| part.range().0 < other.range().1) {
            let (from, to) = other.range();
            let what = format!(
                "--memory: {} and {} overlap: the first has {from:#x} to {:#x} of the guest's addresses",
                other.name(),
                part.name(),
                to - 1
            );
            return Err(exit::error(Code::Usage, what));
        }
    }
    apart(&parts, &parts, |at, other| at < other)?;
    Ok(parts)
}

/// Refuses memory that is moved onto itself.
pub fn different(from: &[OpenMemory], to: &[OpenMemory]) -> anyhow::Result<()> {
    apart(from, to, |_, _| true)
}

fn apart(
    some: &[OpenMemory],
    others: &[OpenMemory],
    compared: impl Fn(usize, usize) -> bool,
) -> anyhow::Result<()> {
    for (at, part) in some.iter().enumerate() {
        let others = others.iter().enumerate().filter(|(number, _)| compared(at, *number));
        for (_, other) in others {
            if part.shares_bytes_with(other)? {
                let what = format!(
                    "--memory: {} and {} are the same bytes of one file; expected different ones, and no --memory for \
                     what stays where it is",
                    part.name(),
                    other.name(),
                );
                return Err(exit::error(Code::Usage, what));
            }
        }
    }
    Ok(())
}

/// Memory to be read, and how changes to it are detected.
pub enum SourcePages {
    /// By comparison: all writes of any writer are detected.
    Compared(Vec<Fingerprinted<FilePages>>),
    /// By the devices' own logs: nothing else writes.
    Plain(Vec<FilePages>),
}

impl SourcePages {
    /// Of these parts; `compared` if there is a writer that no log covers.
    pub fn new(parts: &[OpenMemory], compared: bool) -> anyhow::Result<SourcePages> {
        if !compared || parts.is_empty() {
            return Ok(SourcePages::Plain(
                parts.iter().map(OpenMemory::pages).collect::<anyhow::Result<_>>()?,
            ));
        }
        let key = FingerprintKey::random()?;
        let pages = parts.iter().map(|part| Ok(Fingerprinted::new(part.pages()?, part.size, &key)?));
        Ok(SourcePages::Compared(pages.collect::<anyhow::Result<_>>()?))
    }

    /// In the engine's form.
    pub fn regions<'a>(&'a self, parts: &[OpenMemory]) -> Vec<MemoryRegion<'a>> {
        let pages: Vec<&dyn GuestPages> = match self {
            SourcePages::Compared(pages) => pages.iter().map(|pages| pages as &dyn GuestPages).collect(),
            SourcePages::Plain(pages) => pages.iter().map(|pages| pages as &dyn GuestPages).collect(),
        };
        regions(parts, pages)
    }

    /// The log, if it compares memory.
    pub fn log(&self) -> Option<FingerprintLog<'_, FilePages>> {
        match self {
            SourcePages::Compared(pages) => Some(FingerprintLog { regions: pages.iter().collect() }),
            SourcePages::Plain(_) => None,
        }
    }
}

/// Memory to be written.
pub struct DestinationPages(Vec<FilePages>);

impl DestinationPages {
    /// Of these parts.
    pub fn new(parts: &[OpenMemory]) -> anyhow::Result<DestinationPages> {
        Ok(DestinationPages(parts.iter().map(OpenMemory::pages_to_write).collect::<anyhow::Result<_>>()?))
    }

    /// In the engine's form.
    pub fn regions<'a>(&'a self, parts: &[OpenMemory]) -> Vec<MemoryRegion<'a>> {
        regions(parts, self.0.iter().map(|pages| pages as &dyn GuestPages).collect())
    }
}

fn regions<'a>(parts: &[OpenMemory], pages: Vec<&'a dyn GuestPages>) -> Vec<MemoryRegion<'a>> {
    parts.iter().zip(pages).enumerate().map(|(id, (part, pages))| part.region(id, pages)).collect()
}
