//! [`Taken`]: a note that one process holds exclusively, by a lock on its file.

use std::fs::File;
use std::time::{Duration, Instant};

use limosa_migrate::PrivateFolder;
use rustix::fs::{FlockOperation, flock};

use super::failed;
use super::note::{Note, STOP};
use crate::exit::Code;

/// A note that this process holds exclusively.
pub struct Taken {
    folder: PrivateFolder,
    note: Note,
    _locked: File,
}

impl Taken {
    /// `file` is the file of the note, which this process has locked.
    pub(super) fn new(folder: PrivateFolder, note: Note, file: File) -> Taken {
        Taken { folder, note, _locked: file }
    }

    pub fn note(&self) -> &Note {
        &self.note
    }

    /// Forgets a move that is settled.
    pub fn forget(self) -> anyhow::Result<()> {
        let failed = |error| failed(Code::Failed, &error);
        // The note of the stop first: without the other note, it would look like that of a move that never committed.
        if let Some(stop) = self.note.doubt().and_then(|doubt| doubt.stop.as_ref()) {
            self.folder.remove(format!("{stop}{STOP}")).map_err(failed)?;
        }
        self.folder.remove(self.note.file()).map_err(failed)?;
        Ok(())
    }
}

/// Locks a note for this process, unless another one works on its move.
pub(super) fn is_ours(file: &File) -> bool {
    let until = Instant::now() + LOOKS_MAX;
    while is_in_use(file, FlockOperation::NonBlockingLockExclusive) {
        // A process that works on the move locks the note exclusively. A process that only reads it shares it, for a moment.
        if is_in_use(file, FlockOperation::NonBlockingLockShared) || Instant::now() >= until {
            return false;
        }
        // Two processes that want it exclusively would block each other.
        let _ = flock(file, FlockOperation::Unlock);
        std::thread::yield_now();
    }
    true
}

/// How long other processes may read a note one after the other.
const LOOKS_MAX: Duration = Duration::from_secs(5);

/// Whether another process has a lock on this file that excludes this one.
pub fn is_in_use(file: &File, how: FlockOperation) -> bool {
    flock(file, how) == Err(rustix::io::Errno::WOULDBLOCK)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn a_look_at_a_note_is_not_taken_for_work_on_its_move() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("note");
        let opened = || File::options().write(true).create(true).truncate(false).open(&path).unwrap();
        let (looks, done) = (opened(), AtomicBool::new(false));
        let ours = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    is_in_use(&looks, FlockOperation::NonBlockingLockShared);
                    flock(&looks, FlockOperation::Unlock).unwrap();
                    // On a busy machine it would otherwise be preempted within nearly every look.
                    std::thread::yield_now();
                }
            });
            let ours = (0..200).filter(|_| is_ours(&opened())).count();
            // Before any assertion: the scope waits for the reading thread.
            done.store(true, Ordering::Relaxed);
            ours
        });
        assert_eq!(ours, 200);
        let works = opened();
        assert!(is_ours(&works));
        assert!(!is_ours(&opened()), "somebody works on it");
    }
}
