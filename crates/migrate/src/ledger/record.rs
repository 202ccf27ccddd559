//! The record of a move on disk, so that a source in doubt is answered after the process that received it has ended.
//!
//! It is a file of 96 bytes, named by the move's id and overwritten in place. That of a move without a secret has 64 bytes
//! and is of version 1. The process that decides about the move holds a lock on it until it has decided. The kernel releases
//! the lock when that process dies.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{FlockOperation, flock};

use super::{Decision, Entry, Recorded};
use crate::PrivateFolder;
use limosa_stream::{MigrationId, Secret};

const MAGIC: [u8; 8] = *b"LMSAmove";
/// The length of a record of each version, from version 1 on: without and with a secret.
const BYTES: [usize; 2] = [64, 96];
/// The suffix of a record's name.
const SUFFIX: &str = ".move";

/// The record of a move that this process decides about.
#[derive(Debug)]
pub(super) struct Record {
    folder: Arc<PrivateFolder>,
    file: File,
    id: MigrationId,
    secret: Option<Secret>,
}

impl Record {
    /// Creates a record; `None` if there is one with this id.
    pub fn create(
        folder: &Arc<PrivateFolder>,
        id: MigrationId,
        secret: Option<&Secret>,
    ) -> io::Result<Option<Record>> {
        let Some(file) = folder.create_file(name(id))? else { return Ok(None) };
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        let record = Record { folder: Arc::clone(folder), file, id, secret: secret.cloned() };
        record.write(Entry::Holding)?;
        Ok(Some(record))
    }

    /// Records how far the move has come, for the processes of this machine. Only [`Record::sync`] makes it survive a
    /// power failure. A decision is final, and unlocks its record.
    pub fn write(&self, entry: Entry) -> io::Result<()> {
        let number = match entry {
            Entry::Holding => 0,
            Entry::Decided(Decision::NotCommitted) => 1,
            Entry::Decided(Decision::Committed) => 2,
            Entry::Starting | Entry::Decided(Decision::Unknown) => 3,
        };
        let bytes = encode(self.id, number, &boot()?, self.secret.as_ref());
        self.named(self.file.write_all_at(&bytes, 0))?;
        if matches!(entry, Entry::Decided(_)) {
            self.named(flock(&self.file, FlockOperation::Unlock).map_err(io::Error::from))?;
        }
        Ok(())
    }

    /// Writes the record to the disk.
    pub fn sync(&self) -> io::Result<()> {
        self.named(self.folder.sync(&self.file))
    }

    fn named(&self, done: io::Result<()>) -> io::Result<()> {
        done.map_err(|error| {
            let record = self.folder.path().join(name(self.id));
            io::Error::new(error.kind(), format!("{}: {error}", record.display()))
        })
    }
}

#[cfg(test)]
impl Record {
    /// The same record on a disk that takes no more writes.
    pub fn unwritable(self) -> Record {
        let file = File::open(self.folder.path().join(name(self.id))).expect("it is there");
        drop(self.file);
        flock(&file, FlockOperation::NonBlockingLockExclusive).expect("nobody has it");
        Record { file, ..self }
    }
}

/// The record of another process's move, locked.
pub(super) struct Found {
    record: Record,
    number: u8,
    boot: [u8; 16],
}

/// Finds the record of another process's move; `None` if it says nothing about the move.
pub(super) fn find(folder: &Arc<PrivateFolder>, id: MigrationId) -> io::Result<Option<Found>> {
    let Some(file) = folder.file(name(id))? else { return Ok(None) };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        // Another process decides about it, or asks at the same moment.
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
        locked => locked?,
    }
    Ok(read(&file, id)?.map(|(number, boot, secret)| {
        let record = Record { folder: Arc::clone(folder), file, id, secret };
        Found { record, number, boot }
    }))
}

/// How far a move has come by its record, without a lock and without a change. A record that is read while it is overwritten
/// fails its checksum, and is read again.
pub(super) fn look(folder: &PrivateFolder, id: MigrationId) -> io::Result<Option<Recorded>> {
    let Some(file) = folder.file(name(id))? else { return Ok(None) };
    let mut found = read(&file, id)?;
    if found.is_none() {
        found = read(&file, id)?;
    }
    Ok(found.map(|(number, ..)| match number {
        0 => Recorded::Holding,
        1 => Recorded::NotCommitted,
        2 => Recorded::Committed,
        _ => Recorded::Starting,
    }))
}

/// The number, the boot and the secret of a record.
type Fields = (u8, [u8; 16], Option<Secret>);

/// The fields of a record, if it is whole and of this move.
fn read(file: &File, id: MigrationId) -> io::Result<Option<Fields>> {
    let (mut bytes, mut filled) = ([0; BYTES[1]], 0);
    while filled < bytes.len() {
        match file.read_at(&mut bytes[filled..], filled as u64)? {
            0 => break,
            read => filled += read,
        }
    }
    Ok(decode(id, &bytes[..filled]))
}

impl Found {
    pub fn secret(&self) -> Option<&Secret> {
        self.record.secret.as_ref()
    }

    /// How the move ended. This decides a move that is still *holding*.
    pub fn decision(&self) -> io::Result<Decision> {
        match self.number {
            1 => Ok(Decision::NotCommitted),
            2 => Ok(Decision::Committed),
            // Its process died while it was holding, so no process is left that could start the devices. If the machine was
            // restarted since, the last record may not have reached the disk.
            0 if self.boot == boot()? => {
                self.record.write(Entry::Decided(Decision::NotCommitted))?;
                self.record.sync()?;
                Ok(Decision::NotCommitted)
            }
            _ => Ok(Decision::Unknown),
        }
    }
}

/// Removes the oldest records beyond this number, except those that a process has locked. Files that are not records, or
/// are not trusted, are left alone.
pub(super) fn prune(folder: &PrivateFolder, keep: usize) -> io::Result<()> {
    let mut records: Vec<_> = (folder.names(SUFFIX)?.into_iter())
        .filter_map(|name| Some((folder.written_at(&name)?, name)))
        .collect();
    records.sort();
    for (_, name) in records.iter().take(records.len().saturating_sub(keep)) {
        match folder.file(name) {
            Ok(Some(file)) if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() => {
                folder.remove(name)?;
            }
            Ok(_) => {}
            Err(error) => tracing::warn!("{error}"),
        }
    }
    Ok(())
}

/// Whether there is no record.
pub(super) fn is_empty(folder: &PrivateFolder) -> io::Result<bool> {
    Ok(folder.names(SUFFIX)?.is_empty())
}

fn name(id: MigrationId) -> String {
    format!("{id}{SUFFIX}")
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

fn decode(id: MigrationId, bytes: &[u8]) -> Option<Fields> {
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
    use std::os::unix::fs::PermissionsExt;
    use std::time::SystemTime;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    const ID: MigrationId = MigrationId([7; 16]);

    /// Of a move without a secret, and of one with it.
    fn secrets() -> [Option<Secret>; 2] {
        [None, Some(Secret::new([3; 32]))]
    }

    fn ask(folder: &Arc<PrivateFolder>) -> io::Result<Decision> {
        find(folder, ID)?.map_or(Ok(Decision::Unknown), |found| found.decision())
    }

    /// A folder that is gone with the closure, and the closure, which writes the record of [`ID`].
    fn scene() -> (Arc<PrivateFolder>, impl Fn(&[u8])) {
        let parent = tempfile::tempdir().unwrap();
        let folder = Arc::new(PrivateFolder::create(&parent.path().join("moves")).unwrap());
        let writes = Arc::clone(&folder);
        let put = move |bytes: &[u8]| {
            assert!(parent.path().exists());
            drop(writes.write(name(ID), bytes).unwrap());
        };
        (folder, put)
    }

    #[test]
    fn a_record_of_another_boot_that_still_held_is_not_believed() {
        let (folder, put) = scene();
        for secret in secrets() {
            let secret = secret.as_ref();
            for (number, decision) in [
                (0, Decision::Unknown),
                (1, Decision::NotCommitted),
                (2, Decision::Committed),
                (3, Decision::Unknown),
            ] {
                put(&encode(ID, number, &[9; 16], secret));
                assert_eq!(ask(&folder).unwrap(), decision, "{number}");
            }
            let this_boot = boot().unwrap();
            put(&encode(ID, 0, &this_boot, secret));
            assert_eq!(ask(&folder).unwrap(), Decision::NotCommitted);
            let then = std::fs::read(folder.path().join(name(ID))).unwrap();
            assert_eq!(then, encode(ID, 1, &this_boot, secret), "and it stays so");
        }
    }

    #[test]
    fn a_record_that_is_damaged_or_another_s_says_nothing() {
        let (folder, put) = scene();
        for secret in secrets() {
            let good = encode(ID, 2, &[9; 16], secret.as_ref());
            for at in 0..good.len() {
                let mut bytes = good.clone();
                bytes[at] ^= 1;
                put(&bytes);
                assert_eq!(ask(&folder).unwrap(), Decision::Unknown, "byte {at}");
            }
            for length in 0..good.len() {
                put(&good[..length]);
                assert_eq!(ask(&folder).unwrap(), Decision::Unknown, "{length} bytes");
            }
            put(&encode(MigrationId([8; 16]), 2, &[9; 16], secret.as_ref()));
            assert_eq!(ask(&folder).unwrap(), Decision::Unknown);
        }
    }

    #[test]
    fn a_record_has_its_documented_layout() {
        let (folder, put) = scene();
        let fields =
            |version: u8| [&b"LMSAmove"[..], &[version, 2, 0, 0, 0, 0, 0, 0], &ID.0, &[9; 16]].concat();
        let first = [&fields(1)[..], &[0; 12]].concat();
        let second = [&fields(2)[..], &[3; 32], &[0; 12]].concat();
        for (bytes, secret) in [first, second].into_iter().zip(secrets()) {
            let bytes = [&bytes[..], &crc32c::crc32c(&bytes).to_le_bytes()].concat();
            assert_eq!(bytes, encode(ID, 2, &[9; 16], secret.as_ref()));
            put(&bytes);
            let found = find(&folder, ID).unwrap().unwrap();
            assert_eq!((found.decision().unwrap(), found.secret()), (Decision::Committed, secret.as_ref()));
        }
    }

    #[test]
    fn a_look_at_the_record_of_a_move_that_holds_decided_it() {
        let (folder, _put) = scene();
        assert_eq!(look(&folder, ID).unwrap(), None);
        // Locked by this process, which works on the move.
        let record = Record::create(&folder, ID, None).unwrap().unwrap();
        let path = folder.path().join(name(ID));
        for (entry, recorded) in [
            (Entry::Holding, Recorded::Holding),
            (Entry::Starting, Recorded::Starting),
            (Entry::Decided(Decision::Committed), Recorded::Committed),
            (Entry::Decided(Decision::NotCommitted), Recorded::NotCommitted),
        ] {
            record.write(entry).unwrap();
            let before = std::fs::read(&path).unwrap();
            assert_eq!(look(&folder, ID).unwrap(), Some(recorded));
            assert_eq!(std::fs::read(&path).unwrap(), before, "a look changes nothing");
        }
        std::fs::write(&path, "LMSAmove").unwrap();
        assert_eq!(look(&folder, ID).unwrap(), None, "it is damaged");
    }

    #[test]
    fn a_record_that_others_could_have_written_or_locked_was_believed() {
        let (folder, put) = scene();
        put(&encode(ID, 2, &[9; 16], None));
        let path = folder.path().join(name(ID));
        for mode in [0o644, 0o660, 0o666] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let error = ask(&folder).unwrap_err().to_string();
            assert!(error.contains(path.to_str().unwrap()) && error.contains("not trusted"), "{error}");
        }
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(ask(&folder).unwrap(), Decision::Committed);
    }

    #[test]
    fn a_fifo_in_place_of_a_record_blocked_questions_and_pruning() {
        let (folder, _put) = scene();
        let fifo = folder.path().join(name(ID));
        mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        assert!(ask(&folder).unwrap_err().to_string().contains("a FIFO"));
        prune(&folder, 0).unwrap();
        assert!(fifo.exists(), "it is no record");
        assert!(Record::create(&folder, ID, None).unwrap().is_none());
    }

    #[test]
    fn the_oldest_records_are_removed_and_those_in_use_stay() {
        let (folder, _put) = scene();
        let id = |number: u8| MigrationId([number; 16]);
        let holding = Record::create(&folder, id(0), None).unwrap().unwrap();
        assert!(!is_empty(&folder).unwrap());
        for number in 1..10 {
            let record = Record::create(&folder, id(number), None).unwrap().unwrap();
            record.write(Entry::Decided(Decision::Committed)).unwrap();
            let then = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(number.into());
            record.file.set_modified(then).unwrap();
        }
        holding.file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        std::fs::write(folder.path().join("other"), "kept").unwrap();
        prune(&folder, 4).unwrap();
        let left = |number| folder.path().join(name(id(number))).exists();
        assert!(left(0), "it is in use");
        assert!(!left(5) && left(6) && left(9));
        assert!(folder.path().join("other").exists());
    }
}
