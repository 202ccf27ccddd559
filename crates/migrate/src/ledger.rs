//! [`Ledger`]: what a destination remembers of the moves that came to their commit, so that a source
//! in doubt can ask (`docs/stream.md: The commit`).

use std::collections::VecDeque;
use std::sync::Mutex;

use crate::stream::MigrationId;

/// The most moves that are remembered; the oldest that is decided gives way.
const MOVES_MAX: usize = 1024;

/// What became of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Not known: never heard of, forgotten, or not decided at this moment.
    Unknown,
    /// The destination will never run it.
    NotCommitted,
    /// The destination runs it, or has run it.
    Committed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    /// READY was sent.
    Holding,
    /// COMMIT has come; devices are being started.
    Starting,
    Decided(Decision),
}

/// The destination's memory. One for all the moves that a process receives; every method is one step
/// that no other can come between.
#[derive(Debug, Default)]
pub struct Ledger(Mutex<VecDeque<(MigrationId, Entry)>>);

impl Ledger {
    /// Remembers nothing yet.
    pub fn new() -> Ledger {
        Ledger::default()
    }

    /// Answers a source in doubt. A move that still holds becomes *not committed* by being asked for:
    /// its COMMIT, if one is under way, comes too late.
    pub fn ask(&self, id: MigrationId) -> Decision {
        let mut decision = Decision::Unknown;
        self.change(id, |entry| {
            if *entry == Entry::Holding {
                *entry = Entry::Decided(Decision::NotCommitted);
            }
            if let Entry::Decided(known) = *entry {
                decision = known;
            }
        });
        decision
    }

    /// READY is about to be sent. `false` when the id was used before.
    pub(crate) fn hold(&self, id: MigrationId) -> bool {
        let mut moves = self.lock();
        if moves.iter().any(|(known, _)| *known == id) {
            return false;
        }
        if moves.len() >= MOVES_MAX
            && let Some(oldest) = moves.iter().position(|(_, entry)| matches!(entry, Entry::Decided(_)))
        {
            moves.remove(oldest);
        }
        moves.push_back((id, Entry::Holding));
        true
    }

    /// COMMIT has come. `false` when the move was decided otherwise meanwhile: it must not run.
    pub(crate) fn start(&self, id: MigrationId) -> bool {
        self.change(id, |entry| {
            let holds = *entry == Entry::Holding;
            if holds {
                *entry = Entry::Starting;
            }
            holds
        })
    }

    /// The devices run, or cannot be kept from running.
    pub(crate) fn committed(&self, id: MigrationId) {
        self.decide(id, Decision::Committed);
    }

    /// The devices never run this.
    pub(crate) fn not_committed(&self, id: MigrationId) {
        self.decide(id, Decision::NotCommitted);
    }

    /// What is decided stays so.
    fn decide(&self, id: MigrationId, decision: Decision) {
        self.change(id, |entry| {
            if !matches!(entry, Entry::Decided(_)) {
                *entry = Entry::Decided(decision);
            }
        });
    }

    fn change<R: Default>(&self, id: MigrationId, change: impl FnOnce(&mut Entry) -> R) -> R {
        let mut moves = self.lock();
        moves.iter_mut().find(|(known, _)| *known == id).map(|(_, entry)| change(entry)).unwrap_or_default()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<(MigrationId, Entry)>> {
        // Each change is a single assignment, so that a panic leaves nothing half done.
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
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
        assert!(ledger.hold(ID));
        assert!(!ledger.hold(ID));
        assert_eq!(ledger.ask(ID), Decision::NotCommitted);
        assert!(!ledger.start(ID), "too late");
        assert_eq!(ledger.ask(ID), Decision::NotCommitted);
    }

    #[test]
    fn a_move_that_starts_is_not_known_until_it_runs_or_is_given_back() {
        for (end, decision) in [
            (Ledger::committed as fn(&Ledger, MigrationId), Decision::Committed),
            (Ledger::not_committed, Decision::NotCommitted),
        ] {
            let ledger = Ledger::new();
            ledger.hold(ID);
            assert!(ledger.start(ID));
            assert_eq!(ledger.ask(ID), Decision::Unknown);
            end(&ledger, ID);
            assert_eq!(ledger.ask(ID), decision);
        }
    }

    #[test]
    fn the_oldest_decided_moves_give_way() {
        let ledger = Ledger::new();
        ledger.hold(ID);
        for number in 0..2 * MOVES_MAX as u128 {
            let id = MigrationId((number + (1 << 100)).to_be_bytes());
            assert!(ledger.hold(id));
            ledger.not_committed(id);
        }
        assert!(ledger.lock().len() <= MOVES_MAX);
        assert!(ledger.start(ID), "one that holds is never forgotten");
    }
}
