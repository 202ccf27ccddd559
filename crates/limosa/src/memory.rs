//! The guest memory that a user named: opened, and refused where it cannot be one guest's.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use limosa_migrate::{
    FilePages, FingerprintKey, FingerprintLog, Fingerprinted, GuestPages, MemoryRegion, PAGE_BYTES,
};

use crate::args::Memory;
use crate::exit::{self, Code};
use crate::huge_pages::HugePages;

/// One part of a guest's memory, open.
pub struct OpenMemory {
    named: Memory,
    file: File,
    size: u64,
    huge_pages: Option<HugePages>,
}

impl OpenMemory {
    /// To be read on the source.
    pub fn source(named: &Memory) -> anyhow::Result<OpenMemory> {
        if named.create {
            let what = format!("--memory {}: create is for where memory is written to", named.file.display());
            return Err(exit::error(Code::Usage, what));
        }
        // One that may only be read cannot be mapped, and moves all the same.
        OpenMemory::open(named, OpenOptions::new().read(true).write(true))
            .or_else(|_| OpenMemory::open(named, OpenOptions::new().read(true)))
    }

    /// To be written on the destination. A file that is created is its owner's alone, as it holds the guest's secrets.
    pub fn destination(named: &Memory) -> anyhow::Result<OpenMemory> {
        OpenMemory::open(named, OpenOptions::new().read(true).write(true).create(named.create).mode(0o600))
    }

    fn open(named: &Memory, how: &OpenOptions) -> anyhow::Result<OpenMemory> {
        let path = named.file.display();
        let fails = |error: io::Error| {
            let hint = match error.kind() {
                io::ErrorKind::NotFound if named.create => "; make its folder first",
                io::ErrorKind::NotFound => {
                    "; expected a file that the guest's memory is a mapping of, or ,size=BYTES,create to make one"
                }
                _ => "",
            };
            exit::error(Code::Unreachable, format!("--memory {path}: {error}{hint}"))
        };
        let file = how.open(&named.file).map_err(fails)?;
        let found = file.metadata().map_err(fails)?;
        if !found.is_file() {
            let what = "it is no regular file; expected one that the guest's memory is a mapping of";
            return Err(exit::error(Code::Unreachable, format!("--memory {path}: {what}")));
        }
        let refuse = |what: String| Err(exit::error(Code::Refused, format!("--memory {path}: {what}")));
        let (length, offset) = (found.len(), named.offset);
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
        let huge_pages = HugePages::of(&file).map_err(fails)?;
        if end > length {
            if let Some(what) = huge_pages.and_then(|pages| pages.refuse_length(end)) {
                return refuse(what);
            }
            file.set_len(end).map_err(fails)?;
        }
        Ok(OpenMemory { named: named.clone(), file, size, huge_pages })
    }

    /// Its first address and the one behind its last.
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

    /// Mapped where that can be.
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

/// Memory to be read, and how changes to it are noticed.
pub enum SourcePages {
    /// By comparing: whoever writes.
    Compared(Vec<Fingerprinted<FilePages>>),
    /// By the devices' own logs: nobody else writes.
    Plain(Vec<FilePages>),
}

impl SourcePages {
    /// Of these parts; `compared` if somebody writes who is logged nowhere.
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

    /// As the engine takes it.
    pub fn regions<'a>(&'a self, parts: &[OpenMemory]) -> Vec<MemoryRegion<'a>> {
        let pages: Vec<&dyn GuestPages> = match self {
            SourcePages::Compared(pages) => pages.iter().map(|pages| pages as &dyn GuestPages).collect(),
            SourcePages::Plain(pages) => pages.iter().map(|pages| pages as &dyn GuestPages).collect(),
        };
        regions(parts, pages)
    }

    /// The log, where it is one that compares.
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

    /// As the engine takes it.
    pub fn regions<'a>(&'a self, parts: &[OpenMemory]) -> Vec<MemoryRegion<'a>> {
        regions(parts, self.0.iter().map(|pages| pages as &dyn GuestPages).collect())
    }
}

fn regions<'a>(parts: &[OpenMemory], pages: Vec<&'a dyn GuestPages>) -> Vec<MemoryRegion<'a>> {
    parts.iter().zip(pages).enumerate().map(|(id, (part, pages))| part.region(id, pages)).collect()
}
