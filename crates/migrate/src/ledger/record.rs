//! The record of a move on disk, so that a source in doubt is answered after the process that received it has ended.
//!
//! It is a file of 96 bytes, named by the move's id and overwritten in place. That of a move without a secret has 64 bytes
//! and is of version 1. The process that decides about the move holds a lock on it until it has decided. The kernel releases
//! the lock when that process dies.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock};

use super::{Decision, Entry};
use limosa_stream::{MigrationId, Secret};

const MAGIC: [u8; 8] = *b"LMSAmove";
/// The length of a record of each version, from version 1 on: without and with a secret.
const BYTES: [usize; 2] = [64, 96];
/// The suffix of a record's name.
const SUFFIX: &str = "move";

/// The record of a move that this process decides about.
#[derive(Debug)]
pub(super) struct Record {
    file: File,
    id: MigrationId,
    secret: Option<Secret>,
}

impl Record {
    /// Creates a record (mode 0600); `None` if there is one with this id.
    pub fn create(folder: &Path, id: MigrationId, secret: Option<&Secret>) -> io::Result<Option<Record>> {
        let path = path(folder, id);
        let new = OpenOptions::new().write(true).read(true).create_new(true).mode(0o600).open(&path);
        let file = match new {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(None),
            file => file?,
        };
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        let record = Record { file, id, secret: secret.cloned() };
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
        self.file.write_all_at(&encode(self.id, number, &boot()?, self.secret.as_ref()), 0)?;
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
        let Record { file: locked, id, secret } = self;
        drop(locked);
        flock(&file, FlockOperation::NonBlockingLockExclusive).expect("nobody has it");
        Record { file, id, secret }
    }
}

/// The record of another process's move, locked.
pub(super) struct Found {
    record: Record,
    number: u8,
    boot: [u8; 16],
}

/// Finds the record of another process's move; `None` if it says nothing about the move.
pub(super) fn find(folder: &Path, id: MigrationId) -> io::Result<Option<Found>> {
    let file = match OpenOptions::new().read(true).write(true).open(path(folder, id)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        // Another process decides about it, or asks at the same moment.
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
        locked => locked?,
    }
    let (mut bytes, mut filled) = ([0; BYTES[1]], 0);
    while filled < bytes.len() {
        match file.read_at(&mut bytes[filled..], filled as u64)? {
            0 => break,
            read => filled += read,
        }
    }
    Ok(decode(id, &bytes[..filled]).map(|(number, boot, secret)| {
        let record = Record { file, id, secret };
        Found { record, number, boot }
    }))
}

impl Found {
    pub fn secret(&self) -> Option<&Secret> {
        self.record.secret.as_ref()
    }

    /// What became of the move. One that holds is decided by this.
    pub fn decision(&self) -> io::Result<Decision> {
        match self.number {
            1 => Ok(Decision::NotCommitted),
            2 => Ok(Decision::Committed),
            // Its process died while it was holding, so no process is left that could start the devices. If the machine was
            // restarted since, the last record may not have reached the disk.
            0 if self.boot == boot()? => {
                self.record.write(Entry::Decided(Decision::NotCommitted))?;
                Ok(Decision::NotCommitted)
            }
            _ => Ok(Decision::Unknown),
        }
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

fn encode(id: MigrationId, number: u8, boot: &[u8; 16], secret: Option<&Secret>) -> Vec<u8> {
    let version = if secret.is_some() { 2 } else { 1 };
    let mut bytes = vec![0; BYTES[version - 1]];
    bytes[..8].copy_from_slice(&MAGIC);
    (bytes[8], bytes[9]) = (version as u8, number);
    bytes[16..32].copy_from_slice(&id.0);
    bytes[32..48].copy_from_slice(boot);
    if let Some(secret) = secret {
        bytes[48..80].copy_from_slice(secret.bytes());
    }
    let end = bytes.len() - 4;
    let crc = crc32c::crc32c(&bytes[..end]);
    bytes[end..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn decode(id: MigrationId, bytes: &[u8]) -> Option<(u8, [u8; 16], Option<Secret>)> {
    let version = usize::from(*bytes.get(8)?);
    let (fields, crc) = bytes.get(..*BYTES.get(version.checked_sub(1)?)?)?.split_last_chunk()?;
    let whole = *crc == crc32c::crc32c(fields).to_le_bytes();
    let fits = fields[..8] == MAGIC && fields[16..32] == id.0;
    let secret = match version {
        1 => None,
        _ => Some(Secret::new(fields[48..80].try_into().ok()?)),
    };
    (whole && fits).then(|| (fields[9], fields[32..48].try_into().unwrap_or_default(), secret))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: MigrationId = MigrationId([7; 16]);

    /// Of a move without a secret, and of one with it.
    fn secrets() -> [Option<Secret>; 2] {
        [None, Some(Secret::new([3; 32]))]
    }

    fn ask(folder: &Path) -> Decision {
        find(folder, ID).unwrap().map_or(Decision::Unknown, |found| found.decision().unwrap())
    }

    #[test]
    fn a_record_of_another_boot_that_still_held_is_not_believed() {
        let folder = tempfile::tempdir().unwrap();
        for secret in secrets() {
            let secret = secret.as_ref();
            for (number, decision) in [
                (0, Decision::Unknown),
                (1, Decision::NotCommitted),
                (2, Decision::Committed),
                (3, Decision::Unknown),
            ] {
                std::fs::write(path(folder.path(), ID), encode(ID, number, &[9; 16], secret)).unwrap();
                assert_eq!(ask(folder.path()), decision, "{number}");
            }
            let this_boot = boot().unwrap();
            std::fs::write(path(folder.path(), ID), encode(ID, 0, &this_boot, secret)).unwrap();
            assert_eq!(ask(folder.path()), Decision::NotCommitted);
            let then = std::fs::read(path(folder.path(), ID)).unwrap();
            assert_eq!(then, encode(ID, 1, &this_boot, secret), "and it stays so");
        }
    }

    #[test]
    fn a_record_that_is_damaged_or_another_s_says_nothing() {
        let folder = tempfile::tempdir().unwrap();
        for secret in secrets() {
            let good = encode(ID, 2, &[9; 16], secret.as_ref());
            for at in 0..good.len() {
                let mut bytes = good.clone();
                bytes[at] ^= 1;
                std::fs::write(path(folder.path(), ID), bytes).unwrap();
                assert_eq!(ask(folder.path()), Decision::Unknown, "byte {at}");
            }
            for length in 0..good.len() {
                std::fs::write(path(folder.path(), ID), &good[..length]).unwrap();
                assert_eq!(ask(folder.path()), Decision::Unknown, "{length} bytes");
            }
            let other = encode(MigrationId([8; 16]), 2, &[9; 16], secret.as_ref());
            std::fs::write(path(folder.path(), ID), other).unwrap();
            assert_eq!(ask(folder.path()), Decision::Unknown);
        }
    }

    #[test]
    fn a_record_has_its_documented_layout() {
        let folder = tempfile::tempdir().unwrap();
        let crc = |bytes: &[u8]| crc32c::crc32c(bytes).to_le_bytes();
        let fields = |version: u8, number: u8| {
            [&b"LMSAmove"[..], &[version, number, 0, 0, 0, 0, 0, 0], &ID.0, &[9; 16]].concat()
        };
        let first = [&fields(1, 2)[..], &[0; 12]].concat();
        let second = [&fields(2, 2)[..], &[3; 32], &[0; 12]].concat();
        for (bytes, secret) in [first, second].into_iter().zip(secrets()) {
            let bytes = [&bytes[..], &crc(&bytes)].concat();
            assert_eq!(bytes, encode(ID, 2, &[9; 16], secret.as_ref()));
            std::fs::write(path(folder.path(), ID), bytes).unwrap();
            let found = find(folder.path(), ID).unwrap().unwrap();
            assert_eq!((found.decision().unwrap(), found.secret()), (Decision::Committed, secret.as_ref()));
        }
    }

    #[test]
    fn the_oldest_records_are_removed_and_those_in_use_stay() {
        let folder = tempfile::tempdir().unwrap();
        let id = |number: u8| MigrationId([number; 16]);
        let holding = Record::create(folder.path(), id(0), None).unwrap().unwrap();
        for number in 1..10 {
            let record = Record::create(folder.path(), id(number), None).unwrap().unwrap();
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
