//! The record of a move on disk, so that a source in doubt is answered after the process that received it has ended.
//!
//! It is a file of 64 bytes, named by the move's id and overwritten in place. The process that decides about the move
//! holds a lock on it until it has decided. The kernel releases the lock when that process dies.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock};

use super::{Decision, Entry};
use limosa_stream::MigrationId;

const MAGIC: [u8; 8] = *b"LMSAmove";
const VERSION: u8 = 1;
const BYTES: usize = 64;
/// The suffix of a record's name.
const SUFFIX: &str = "move";

/// The record of a move that this process decides about.
#[derive(Debug)]
pub(super) struct Record {
    file: File,
    id: MigrationId,
}

impl Record {
    /// Creates a record (mode 0600); `None` if there is one with this id.
    pub fn create(folder: &Path, id: MigrationId) -> io::Result<Option<Record>> {
        let path = path(folder, id);
        let new = OpenOptions::new().write(true).read(true).create_new(true).mode(0o600).open(&path);
        let file = match new {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(None),
            file => file?,
        };
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        let record = Record { file, id };
        record.write(Entry::Holding)?;
        Ok(Some(record))
    }

    /// Records how far the move has come. A decision survives a power failure, anything else only this process.
    pub fn write(&self, entry: Entry) -> io::Result<()> {
        let number = match entry {
            Entry::Holding => 0,
            Entry::Decided(Decision::NotCommitted) => 1,
            Entry::Decided(Decision::Committed) => 2,
            Entry::Starting | Entry::Decided(Decision::Unknown) => 3,
        };
        self.file.write_all_at(&encode(self.id, number, &boot()?), 0)?;
        match entry {
            Entry::Decided(_) => self.file.sync_data(),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
impl Record {
    /// The same record on a disk that takes no more writes.
    pub fn unwritable(self, folder: &Path) -> Record {
        let file = File::open(path(folder, self.id)).expect("it is there");
        drop(self.file);
        flock(&file, FlockOperation::NonBlockingLockExclusive).expect("nobody has it");
        Record { file, id: self.id }
    }
}

/// The contents of the record of another process's move.
pub(super) fn ask(folder: &Path, id: MigrationId) -> io::Result<Decision> {
    let file = match OpenOptions::new().read(true).write(true).open(path(folder, id)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Decision::Unknown),
        file => file?,
    };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        // Another process decides about it, or asks at the same moment.
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(Decision::Unknown),
        locked => locked?,
    }
    let mut bytes = [0; BYTES];
    let read = file.read_exact_at(&mut bytes, 0);
    if read.is_err_and(|error| error.kind() != io::ErrorKind::UnexpectedEof) {
        return Ok(Decision::Unknown);
    }
    let Some((number, boot_then)) = decode(id, &bytes) else { return Ok(Decision::Unknown) };
    match number {
        1 => Ok(Decision::NotCommitted),
        2 => Ok(Decision::Committed),
        // Its process died while it was holding, so no process is left that could start the devices. If the machine was
        // restarted since, the last record may not have reached the disk.
        0 if boot_then == boot()? => {
            Record { file, id }.write(Entry::Decided(Decision::NotCommitted))?;
            Ok(Decision::NotCommitted)
        }
        _ => Ok(Decision::Unknown),
    }
}

/// Removes the oldest records beyond this number, except those that a process has locked.
pub(super) fn prune(folder: &Path, keep: usize) -> io::Result<()> {
    let mut records: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.path().extension().is_some_and(|extension| extension == SUFFIX) {
            let modified = entry.metadata().and_then(|metadata| metadata.modified());
            records.push((modified.unwrap_or(SystemTime::UNIX_EPOCH), entry.path()));
        }
    }
    records.sort();
    for (_, path) in records.iter().take(records.len().saturating_sub(keep)) {
        let Ok(file) = File::open(path) else { continue };
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            std::fs::remove_file(path)?;
        }
    }
    Ok(())
}

fn path(folder: &Path, id: MigrationId) -> PathBuf {
    folder.join(format!("{id}.{SUFFIX}"))
}

/// The kernel's id of this boot.
fn boot() -> io::Result<[u8; 16]> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    u128::from_str_radix(&digits, 16).map(u128::to_be_bytes).map_err(|_| io::ErrorKind::InvalidData.into())
}

fn encode(id: MigrationId, number: u8, boot: &[u8; 16]) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    (bytes[8], bytes[9]) = (VERSION, number);
    bytes[16..32].copy_from_slice(&id.0);
    bytes[32..48].copy_from_slice(boot);
    let crc = crc32c::crc32c(&bytes[..60]);
    bytes[60..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn decode(id: MigrationId, bytes: &[u8; BYTES]) -> Option<(u8, [u8; 16])> {
    let whole = bytes[60..] == crc32c::crc32c(&bytes[..60]).to_le_bytes();
    let fits = bytes[..8] == MAGIC && bytes[8] == VERSION && bytes[16..32] == id.0;
    (whole && fits).then(|| (bytes[9], bytes[32..48].try_into().unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: MigrationId = MigrationId([7; 16]);

    #[test]
    fn a_record_of_another_boot_that_still_held_is_not_believed() {
        let folder = tempfile::tempdir().unwrap();
        for (number, decision) in [
            (0, Decision::Unknown),
            (1, Decision::NotCommitted),
            (2, Decision::Committed),
            (3, Decision::Unknown),
        ] {
            std::fs::write(path(folder.path(), ID), encode(ID, number, &[9; 16])).unwrap();
            assert_eq!(ask(folder.path(), ID).unwrap(), decision, "{number}");
        }
        let this_boot = boot().unwrap();
        std::fs::write(path(folder.path(), ID), encode(ID, 0, &this_boot)).unwrap();
        assert_eq!(ask(folder.path(), ID).unwrap(), Decision::NotCommitted);
        assert_eq!(std::fs::read(path(folder.path(), ID)).unwrap()[9], 1, "and it stays so");
    }

    #[test]
    fn a_record_that_is_damaged_or_another_s_says_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let good = encode(ID, 2, &[9; 16]);
        for at in 0..BYTES {
            let mut bytes = good;
            bytes[at] ^= 1;
            std::fs::write(path(folder.path(), ID), bytes).unwrap();
            assert_eq!(ask(folder.path(), ID).unwrap(), Decision::Unknown, "byte {at}");
        }
        for length in 0..BYTES {
            std::fs::write(path(folder.path(), ID), &good[..length]).unwrap();
            assert_eq!(ask(folder.path(), ID).unwrap(), Decision::Unknown, "{length} bytes");
        }
        std::fs::write(path(folder.path(), ID), encode(MigrationId([8; 16]), 2, &[9; 16])).unwrap();
        assert_eq!(ask(folder.path(), ID).unwrap(), Decision::Unknown);
    }

    #[test]
    fn the_oldest_records_are_removed_and_those_in_use_stay() {
        let folder = tempfile::tempdir().unwrap();
        let id = |number: u8| MigrationId([number; 16]);
        let holding = Record::create(folder.path(), id(0)).unwrap().unwrap();
        for number in 1..10 {
            let record = Record::create(folder.path(), id(number)).unwrap().unwrap();
            record.write(Entry::Decided(Decision::Committed)).unwrap();
            let then = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(number.into());
            record.file.set_modified(then).unwrap();
        }
        holding.file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        std::fs::write(folder.path().join("other"), "kept").unwrap();
        prune(folder.path(), 4).unwrap();
        let left = |number| path(folder.path(), id(number)).exists();
        assert!(left(0), "it is in use");
        assert!(!left(5) && left(6) && left(9));
        assert!(folder.path().join("other").exists());
    }
}
