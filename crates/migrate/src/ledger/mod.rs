//! [`Ledger`]: a destination's record of the moves that reached their commit, from which it answers a source in doubt
//! (`docs/stream.md: The commit`).

mod record;

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use limosa_stream::{MigrationId, Secret};
use record::Record;

use crate::{PrivateFolder, Result};

/// How many moves are remembered at most. The oldest decided ones are forgotten first.
const MOVES_MAX: usize = 1024;

/// The room for one more record, in bytes: a block of most file systems.
const RECORD_ROOM_BYTES: usize = 4096;

/// How a move ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Not known: the move was never heard of, was forgotten, or is not decided yet.
    Unknown,
    /// The destination will never run it. Of a save: there is no snapshot, and none will appear.
    NotCommitted,
    /// The destination runs it, or has run it. Of a save: the snapshot was published.
    Committed,
}

/// How far a received move came, by its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Recorded {
    /// Everything was loaded, and the destination has told the source. Nothing runs.
    Holding,
    /// The source has committed, and the devices are being started. If the process that received the move has ended,
    /// some of them may run, and a person has to look.
    Starting,
    /// It will never run here.
    NotCommitted,
    /// It runs here, or has run here.
    Committed,
}

/// How far a move came that was received into this folder ([`Ledger::open`]); `None` if there is no record of it. Unlike
/// [`Ledger::ask`], this decides nothing: a move that holds can still be committed.
pub fn recorded(folder: &PrivateFolder, id: MigrationId) -> io::Result<Option<Recorded>> {
    record::look(folder, id)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    /// READY was sent.
    Holding,
    /// COMMIT was received; devices are being started.
    Starting,
    Decided(Decision),
}

#[derive(Debug)]
struct Move {
    id: MigrationId,
    entry: Entry,
    /// The key of the proofs of sources that ask about it.
    secret: Option<Secret>,
    /// Until the decision is on the disk, if there is a folder.
    record: Option<Record>,
    /// Why the decision is not on the disk.
    unrecorded: Option<String>,
}

/// A destination's memory of its moves. A process has one for all the moves that it receives. Every method is
/// atomic.
#[derive(Debug, Default)]
pub struct Ledger {
    moves: Mutex<VecDeque<Move>>,
    folder: Option<Arc<PrivateFolder>>,
}

impl Ledger {
    /// An empty ledger in memory, for tests and for users who can do without an answer. It is lost with this process,
    /// and with it the answer to every source that is in doubt by then: such a source stays stopped until a person has
    /// looked. A destination whose process may end needs [`Ledger::open`].
    pub fn new() -> Ledger {
        Ledger::default()
    }

    /// A ledger in this folder, which is created if it does not exist (mode 0700). Later processes can answer from it,
    /// several of them at a time. Of more than 1024 moves the oldest are forgotten.
    ///
    /// The folder has to be a [`PrivateFolder`]. A record that another user could have written, read or locked is not
    /// believed: nothing is known of its move. A move that cannot be recorded is not committed.
    pub fn open(folder: &Path) -> io::Result<Ledger> {
        let folder = PrivateFolder::create(folder)?;
        record::prune(&folder, MOVES_MAX)?;
        Ok(Ledger { moves: Mutex::default(), folder: Some(Arc::new(folder)) })
    }

    /// Checks that one more move can be recorded. A destination checks this before it accepts a move, since a move that cannot
    /// be recorded is not committed.
    pub fn check_room(&self) -> io::Result<()> {
        self.folder.as_ref().map_or(Ok(()), |folder| folder.check_room(1, RECORD_ROOM_BYTES))
    }

    /// Whether the folder has no record of any move, so that nothing can be answered from it yet. A ledger in memory has no
    /// folder.
    pub fn has_no_record(&self) -> io::Result<bool> {
        self.folder.as_ref().map_or(Ok(true), |folder| record::is_empty(folder))
    }

    /// How a move ended, for the owner of this ledger. A move that is still *holding* becomes *not committed* by the
    /// question: a COMMIT that is on its way is refused from then on. So does a move whose process died while it was
    /// *holding*. Nothing is known of a move whose process died while it started its devices.
    pub fn ask(&self, id: MigrationId) -> Decision {
        self.ask_for_peer(id, |_| Ok(())).map_or(Decision::Unknown, |(decision, _)| decision)
    }

    /// As [`Ledger::ask`], for a peer that is allowed to ask: `may_ask` is called with the move's secret, if the move is known,
    /// before anything changes. Returns the secret as well.
    pub(crate) fn ask_for_peer(
        &self,
        id: MigrationId,
        may_ask: impl FnOnce(Option<&Secret>) -> Result<()>,
    ) -> Result<(Decision, Option<Secret>)> {
        let mut moves = self.lock();
        if let Some(found) = moves.iter_mut().find(|found| found.id == id) {
            may_ask(found.secret.as_ref())?;
            if found.entry == Entry::Holding {
                found.decide(Decision::NotCommitted);
                found.sync();
            }
            let decision = match found.entry {
                Entry::Decided(decision) => decision,
                _ => Decision::Unknown,
            };
            return Ok((decision, found.secret.clone()));
        }
        let unknown = (Decision::Unknown, None);
        let Some(folder) = &self.folder else { return Ok(unknown) };
        let failed = |error: io::Error| {
            tracing::error!("the outcome of move {id} is not known: {error}");
            unknown.clone()
        };
        match record::find(folder, id) {
            Ok(None) => Ok(unknown),
            Ok(Some(found)) => {
                may_ask(found.secret())?;
                Ok(found.decision().map_or_else(failed, |decision| (decision, found.secret().cloned())))
            }
            Err(error) => Ok(failed(error)),
        }
    }

    /// READY is about to be sent. `false` if the id was used before.
    pub(crate) fn begin_holding(&self, id: MigrationId, secret: Option<&Secret>) -> io::Result<bool> {
        let mut moves = self.lock();
        if moves.iter().any(|known| known.id == id) {
            return Ok(false);
        }
        let record = match &self.folder {
            None => None,
            Some(folder) => match Record::create(folder, id, secret)? {
                Some(record) => Some(record),
                None => return Ok(false),
            },
        };
        if moves.len() >= MOVES_MAX
            && let Some(oldest) = moves.iter().position(|known| matches!(known.entry, Entry::Decided(_)))
        {
            moves.remove(oldest);
        }
        let secret = secret.cloned();
        moves.push_back(Move { id, entry: Entry::Holding, secret, record, unrecorded: None });
        Ok(true)
    }

    /// COMMIT was received. `false` if the move was decided otherwise meanwhile, an error if the start cannot be recorded:
    /// in both cases the devices must not run.
    pub(crate) fn start(&self, id: MigrationId) -> io::Result<bool> {
        let mut moves = self.lock();
        let Some(found) = moves.iter_mut().find(|found| found.id == id && found.entry == Entry::Holding)
        else {
            return Ok(false);
        };
        if let Some(record) = &found.record {
            record.write(Entry::Starting)?;
        }
        found.entry = Entry::Starting;
        Ok(true)
    }

    /// The devices run, or cannot be kept from running. Processes of this machine see it at once; a power failure may undo that
    /// until [`Ledger::sync`].
    pub(crate) fn committed(&self, id: MigrationId) {
        self.decide(id, Decision::Committed);
    }

    /// The devices will never run this move; as lasting as [`Ledger::committed`].
    pub(crate) fn not_committed(&self, id: MigrationId) {
        self.decide(id, Decision::NotCommitted);
    }

    /// Writes the decision about a move to the disk. Returns the reason if that fails. A disk may take long, so this is called when
    /// nothing waits for it any more. If the machine loses power before this, it answers `Unknown`, as after a power failure right
    /// before the decision.
    pub(crate) fn sync(&self, id: MigrationId) -> Option<String> {
        let mut moves = self.lock();
        let found = moves.iter_mut().find(|found| found.id == id)?;
        found.sync();
        found.unrecorded.clone()
    }

    /// Whether a move of this process has committed. Unlike [`Ledger::ask`] this decides nothing.
    pub(crate) fn has_committed(&self, id: MigrationId) -> bool {
        let committed = Entry::Decided(Decision::Committed);
        self.lock().iter().any(|found| found.id == id && found.entry == committed)
    }

    /// A decision is final.
    fn decide(&self, id: MigrationId, decision: Decision) {
        let mut moves = self.lock();
        let open = moves.iter_mut().find(|found| found.id == id && !matches!(found.entry, Entry::Decided(_)));
        if let Some(found) = open {
            found.decide(decision);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<Move>> {
        // Each change is a single assignment, so that a panic leaves nothing half done.
        crate::lock::lock(&self.moves)
    }
}

impl Move {
    fn decide(&mut self, decision: Decision) {
        self.entry = Entry::Decided(decision);
        let written = self.record.as_ref().map_or(Ok(()), |record| record.write(self.entry));
        self.is_recorded(written);
    }

    /// Puts the decision on the disk.
    fn sync(&mut self) {
        if matches!(self.entry, Entry::Decided(_))
            && let Some(record) = self.record.take()
        {
            self.is_recorded(record.sync());
        }
    }

    /// Without the record a later process cannot tell, and the source stays stopped until a person looks: safe.
    fn is_recorded(&mut self, done: io::Result<()>) {
        if let Err(error) = done {
            tracing::error!("the outcome of move {} cannot be recorded: {error}", self.id);
            self.record = None;
            self.unrecorded = Some(error.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: MigrationId = MigrationId([1; 16]);

    #[test]
    fn being_asked_for_a_move_that_holds_decides_it() {
        let ledger = Ledger::new();
        assert_eq!(ledger.ask(ID), Decision::Unknown);
        assert!(ledger.begin_holding(ID, None).unwrap());
        assert!(!ledger.begin_holding(ID, None).unwrap());
        assert_eq!(ledger.ask(ID), Decision::NotCommitted);
        assert!(!ledger.start(ID).unwrap(), "too late");
        assert_eq!(ledger.ask(ID), Decision::NotCommitted);
    }

    #[test]
    fn a_question_that_may_not_be_asked_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let secret = Secret::new([3; 32]);
        let id = |number: u8| MigrationId([number; 16]);
        let ledger = Ledger::open(folder.path()).unwrap();
        (0..2).for_each(|number| assert!(ledger.begin_holding(id(number), Some(&secret)).unwrap()));
        let stranger = |known: Option<&Secret>| {
            assert_eq!(known, Some(&secret));
            Err(crate::Error::Cancelled)
        };
        assert!(ledger.ask_for_peer(id(0), stranger).is_err());
        assert!(ledger.start(id(0)).unwrap(), "it still holds");
        assert_eq!(
            ledger.ask_for_peer(id(9), |_| panic!("nobody knows it")).unwrap(),
            (Decision::Unknown, None)
        );
        // The same of a process that died.
        drop(ledger);
        let next = Ledger::open(folder.path()).unwrap();
        assert!(next.ask_for_peer(id(1), stranger).is_err());
        let record = std::fs::read(folder.path().join(format!("{}.move", id(1)))).unwrap();
        assert_eq!(record[9], 0, "it still holds");
        let owner = |known: Option<&Secret>| {
            assert_eq!(known, Some(&secret));
            Ok(())
        };
        let answer = next.ask_for_peer(id(1), owner).unwrap();
        assert_eq!(answer, (Decision::NotCommitted, Some(secret)));
    }

    #[test]
    fn a_move_that_starts_is_not_known_until_it_runs_or_is_given_back() {
        for (end, decision) in [
            (Ledger::committed as fn(&Ledger, MigrationId), Decision::Committed),
            (Ledger::not_committed, Decision::NotCommitted),
        ] {
            let ledger = Ledger::new();
            ledger.begin_holding(ID, None).unwrap();
            assert!(ledger.start(ID).unwrap());
            assert_eq!(ledger.ask(ID), Decision::Unknown);
            end(&ledger, ID);
            assert_eq!(ledger.ask(ID), decision);
        }
    }

    #[test]
    fn the_oldest_decided_moves_give_way() {
        let ledger = Ledger::new();
        ledger.begin_holding(ID, None).unwrap();
        for number in 0..2 * MOVES_MAX as u128 {
            let id = MigrationId((number + (1 << 100)).to_be_bytes());
            assert!(ledger.begin_holding(id, None).unwrap());
            ledger.not_committed(id);
        }
        assert!(ledger.lock().len() <= MOVES_MAX);
        assert!(ledger.start(ID).unwrap(), "one that holds is never forgotten");
    }

    #[test]
    fn a_process_that_died_is_answered_for_by_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let open = || Ledger::open(&folder.path().join("moves")).unwrap();
        let id = |number: u8| MigrationId([number; 16]);
        let dying = open();
        (0..4).for_each(|number| assert!(dying.begin_holding(id(number), None).unwrap()));
        (1..4).for_each(|number| assert!(dying.start(id(number)).unwrap()));
        dying.committed(id(2));
        dying.not_committed(id(3));
        let next = open();
        assert_eq!(next.ask(id(0)), Decision::Unknown, "the first still lives, and decides");
        assert!(!next.begin_holding(id(0), None).unwrap(), "an id is used once");
        assert_eq!(next.ask(id(2)), Decision::Committed);
        // Its locks go with it; nothing else is done.
        drop(dying);
        assert_eq!(next.ask(id(0)), Decision::NotCommitted, "it was holding");
        assert_eq!(next.ask(id(1)), Decision::Unknown, "it was starting");
        assert_eq!(next.ask(id(2)), Decision::Committed);
        assert_eq!(open().ask(id(3)), Decision::NotCommitted);
        assert_eq!(next.ask(id(9)), Decision::Unknown, "never heard of");
    }

    #[test]
    fn a_guest_waited_for_the_disk_on_which_a_decision_is_recorded() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(folder.path()).unwrap();
        assert!(ledger.begin_holding(ID, None).unwrap() && ledger.start(ID).unwrap());
        ledger.committed(ID);
        assert!(ledger.lock()[0].record.is_some(), "the source is told before the disk is waited for");
        assert_eq!(Ledger::open(folder.path()).unwrap().ask(ID), Decision::Committed, "others see it");
        assert_eq!(ledger.sync(ID), None);
        assert!(ledger.lock()[0].record.is_none());
    }

    /// Makes the records of undecided moves unwritable.
    fn unwritable(ledger: &Ledger) {
        for found in ledger.lock().iter_mut() {
            // The lock belongs to the open file and is released with it.
            found.record = found.record.take().map(Record::unwritable);
        }
    }

    #[test]
    fn a_decision_that_cannot_be_recorded_holds_as_long_as_the_process_and_is_never_the_opposite_later() {
        let id = |number: u8| MigrationId([number; 16]);
        let folder = tempfile::tempdir().unwrap();
        let open = || Ledger::open(folder.path()).unwrap();
        let ledger = open();
        (0..5).for_each(|number| assert!(ledger.begin_holding(id(number), None).unwrap()));
        (3..5).for_each(|number| assert!(ledger.start(id(number)).unwrap()));
        unwritable(&ledger);
        assert!(ledger.start(id(0)).is_err(), "a commit that cannot be recorded is not taken");
        ledger.not_committed(id(0));
        assert_eq!(ledger.ask(id(1)), Decision::NotCommitted);
        assert!(!ledger.start(id(1)).unwrap(), "it was answered");
        ledger.committed(id(3));
        ledger.not_committed(id(4));
        for (number, now, later) in [
            (0, Decision::NotCommitted, Decision::NotCommitted),
            (1, Decision::NotCommitted, Decision::NotCommitted),
            (2, Decision::NotCommitted, Decision::NotCommitted),
            (3, Decision::Committed, Decision::Unknown),
            (4, Decision::NotCommitted, Decision::Unknown),
        ] {
            assert_eq!(ledger.ask(id(number)), now, "{number}");
            assert_eq!(open().ask(id(number)), later, "{number}, by another process");
        }
        drop(ledger);
        assert_eq!(open().ask(id(0)), Decision::NotCommitted);
    }

    #[test]
    fn what_cannot_be_recorded_is_not_begun() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(folder.path()).unwrap();
        drop(folder);
        assert!(ledger.begin_holding(ID, None).is_err());
        assert!(!ledger.start(ID).unwrap());
    }
}
