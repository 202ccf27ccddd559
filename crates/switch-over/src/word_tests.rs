//! The word itself, and a model of both sides: every interleaving of their steps, with a death or a limit that passes at
//! each.

use std::collections::HashSet;

use super::*;

#[test]
fn the_first_of_take_and_withdraw_decides() {
    let word = Word::new().unwrap();
    assert!(!word.take(), "the old one has not collected all");
    assert!(word.open());
    assert!(!word.open());
    assert!(word.take());
    assert_eq!((word.withdraw(), word.withdraw()), (Serves::New, Serves::New), "asked again, the same");

    let word = Word::new().unwrap();
    assert!(word.open());
    assert_eq!(word.withdraw(), Serves::Old);
    assert!(!word.take());
    assert_eq!(word.withdraw(), Serves::Old);
}

#[test]
fn both_processes_have_the_same_word() {
    let old = Word::new().unwrap();
    let new = Word::adopt(old.memfd().as_fd().try_clone_to_owned().unwrap()).unwrap();
    old.open();
    assert!(new.take());
    assert_eq!(old.withdraw(), Serves::New);
}

#[test]
fn with_any_other_value_the_old_one_serves() {
    for value in [0, 1, u32::MAX, KEPT, WITHDRAWN, TAKEN ^ 1, OPEN ^ 1, OPEN.swap_bytes()] {
        let word = Word::new().unwrap();
        word.get().store(value, SeqCst);
        assert!(!word.take(), "{value:#x}");
        assert_eq!(word.withdraw(), Serves::Old, "{value:#x}");
    }
}

#[test]
fn threads_that_race_never_both_serve() {
    for round in 0..2000 {
        let old = Word::new().unwrap();
        let new = Word::adopt(old.memfd().as_fd().try_clone_to_owned().unwrap()).unwrap();
        old.open();
        let (taken, serves) = std::thread::scope(|scope| {
            let taken = scope.spawn(|| new.take());
            if round % 2 == 0 {
                std::thread::yield_now();
            }
            let serves = old.withdraw();
            (taken.join().unwrap(), serves)
        });
        assert_eq!(taken, serves == Serves::New);
    }
}

#[test]
fn a_file_that_may_become_shorter_is_no_word() {
    let unsealed = memfd("unsealed").unwrap();
    ftruncate(&unsealed, BYTES).unwrap();
    assert_eq!(Word::adopt(unsealed).unwrap_err(), Errno::INVAL);
    let short = memfd("short").unwrap();
    fcntl_add_seals(&short, SEALS).unwrap();
    assert_eq!(Word::adopt(short).unwrap_err(), Errno::INVAL);
    let (pipe, _other) = std::io::pipe().unwrap();
    assert!(Word::adopt(pipe.into()).is_err());
    assert!(Word::adopt(File::open("/proc/self/exe").unwrap().into()).is_err());
    // Sealed against writes too, it cannot be mapped.
    assert!(Word::adopt(sealed(&[0; BYTES as usize]).unwrap()).is_err());
}

#[test]
fn an_items_memfd_is_read_only_if_it_is_sealed_and_as_long_as_it_says() {
    let bytes = vec![7; 100_000];
    let memfd = sealed(&bytes).unwrap();
    assert_eq!(unsealed(&memfd, bytes.len()).unwrap(), bytes);
    assert!(unsealed(&memfd, bytes.len() + 1).is_err());
    assert!(unsealed(&memfd, bytes.len() - 1).is_err());
    let open = super::memfd("open").unwrap();
    ftruncate(&open, 10).unwrap();
    assert!(unsealed(&open, 10).is_err());
}

/// Where the old server is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Old {
    Serving,
    Frozen,
    Opened,
    /// END is in the socket.
    Sent,
    Serving2,
    Given,
    Dead,
}

/// A protocol that is wrong at one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Flaw {
    None,
    /// It looks at the word and thaws, rather than swap.
    OldThawsWithoutSwap,
    /// It writes TAKEN, rather than compare and swap.
    NewTakesWhateverIsThere,
    /// The new one may take while the old one serves.
    OpenBeforeFreeze,
    /// It believes that the new one took when it hears nothing.
    OldGivesAtTheEndOfTheSocket,
}

/// Where the new server is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum New {
    Waiting,
    /// It has END.
    Received,
    Loaded,
    Serving,
    /// It let go.
    Gone,
    Dead,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct State {
    old: Old,
    new: New,
    word: u32,
    /// END is in the socket. It stays there when the old process dies.
    end_sent: bool,
    /// The new one served at some time.
    new_served: bool,
    /// A third process may still write this into the word, once.
    meddler: Option<u32>,
    /// So many deaths may still come.
    deaths: u8,
    flaw: Flaw,
}

impl State {
    fn first(meddler: Option<u32>, flaw: Flaw) -> State {
        let (old, new) = (Old::Serving, New::Waiting);
        let is_early = flaw == Flaw::OpenBeforeFreeze;
        let word = if is_early { OPEN } else { KEPT };
        State { old, new, word, end_sent: is_early, new_served: false, meddler, deaths: 2, flaw }
    }

    fn old_serves(self) -> bool {
        matches!(self.old, Old::Serving | Old::Serving2)
    }

    fn old_lives(self) -> bool {
        self.old != Old::Dead
    }

    /// Each state that can follow. The operations on the word are those of `Word`.
    fn next(self) -> Vec<State> {
        let mut next = Vec::new();
        let mut to = |state: State| next.push(state);
        match self.old {
            Old::Serving => to(State { old: Old::Frozen, ..self }),
            Old::Frozen if self.word == KEPT => to(State { old: Old::Opened, word: OPEN, ..self }),
            Old::Opened => to(State { old: Old::Sent, end_sent: true, ..self }),
            _ => {}
        }
        // A limit passes, the socket ends, something fails, or the new one says that it serves: all lead to the swap.
        if matches!(self.old, Old::Frozen | Old::Opened | Old::Sent) {
            to(match after_swap(self.word) {
                Serves::Old if self.flaw == Flaw::OldGivesAtTheEndOfTheSocket => {
                    State { old: Old::Given, ..self }
                }
                Serves::Old if self.flaw == Flaw::OldThawsWithoutSwap => State { old: Old::Serving2, ..self },
                Serves::Old => State { old: Old::Serving2, word: WITHDRAWN, ..self },
                Serves::New => State { old: Old::Given, ..self },
            });
        }
        match self.new {
            New::Waiting if self.end_sent => to(State { new: New::Received, ..self }),
            New::Received => to(State { new: New::Loaded, ..self }),
            New::Loaded if self.word == OPEN || self.flaw == Flaw::NewTakesWhateverIsThere => {
                to(State { new: New::Serving, word: TAKEN, new_served: true, ..self });
            }
            New::Loaded => to(State { new: New::Gone, ..self }),
            _ => {}
        }
        // A limit passes, it refuses, or the old process is gone before END.
        if matches!(self.new, New::Waiting | New::Received) {
            to(State { new: New::Gone, ..self });
        }
        if self.deaths > 0 {
            if self.old_lives() {
                to(State { old: Old::Dead, deaths: self.deaths - 1, ..self });
            }
            if self.new != New::Dead {
                to(State { new: New::Dead, deaths: self.deaths - 1, ..self });
            }
        }
        if let Some(word) = self.meddler {
            to(State { word, meddler: None, ..self });
        }
        next
    }
}

/// All states that can be reached.
fn reachable(first: State) -> HashSet<State> {
    let (mut seen, mut open) = (HashSet::from([first]), vec![first]);
    while let Some(state) = open.pop() {
        for next in state.next() {
            if seen.insert(next) {
                open.push(next);
            }
        }
    }
    seen
}

/// Never both; never the old one again once the new one has served.
fn at_most_one_serves(state: &State) -> bool {
    !state.old_serves() || (state.new != New::Serving && !state.new_served)
}

/// Where nothing but a further death can come, one serves that could: the old one if its process lives, unless the new one
/// served; the new one if it has everything.
fn one_serves_in_the_end(state: &State) -> bool {
    if !state.next().iter().all(|next| next.deaths < state.deaths) {
        return true;
    }
    let old_is_right =
        !state.old_lives() || state.old_serves() || (state.old == Old::Given && state.new_served);
    old_is_right && state.new != New::Loaded
}

#[test]
fn every_interleaving_with_two_deaths_leaves_one_that_serves() {
    let states = reachable(State::first(None, Flaw::None));
    for state in &states {
        assert!(at_most_one_serves(state), "both serve, or an old state serves again: {state:?}");
        assert!(one_serves_in_the_end(state), "nobody serves who could: {state:?}");
    }
    // The old one died after END, and the new one goes on.
    assert!(states.iter().any(|state| state.old == Old::Dead && state.new == New::Serving));
    // The new one died before each operation on the word, and after them all.
    for word in [KEPT, OPEN, TAKEN, WITHDRAWN] {
        assert!(states.iter().any(|state| state.new == New::Dead && state.word == word), "{word:#x}");
    }
    // Everything but the combinations that cannot be.
    assert_eq!(states.len(), 47);
}

#[test]
fn the_model_finds_what_is_wrong_with_a_wrong_protocol() {
    for flaw in [Flaw::OldThawsWithoutSwap, Flaw::NewTakesWhateverIsThere, Flaw::OpenBeforeFreeze] {
        let both = reachable(State::first(None, flaw)).iter().any(|state| !at_most_one_serves(state));
        assert!(both, "{flaw:?}");
    }
    let none = reachable(State::first(None, Flaw::OldGivesAtTheEndOfTheSocket));
    assert!(none.iter().any(|state| !one_serves_in_the_end(state)));
}

#[test]
fn a_new_one_that_has_everything_serves_although_the_old_process_died() {
    for state in reachable(State::first(None, Flaw::None)) {
        let is_left_alone = state.old == Old::Dead && state.new == New::Loaded && state.word == OPEN;
        if is_left_alone {
            let serves = |state: &State| state.new == New::Serving && state.old == Old::Dead;
            assert!(state.next().iter().any(serves), "{state:?}");
            assert!(!state.next().iter().any(|state| state.new == New::Gone), "{state:?}");
        }
    }
}

#[test]
fn another_value_in_the_word_leaves_the_old_one_serving() {
    for value in [0, 1, u32::MAX, KEPT, WITHDRAWN] {
        for state in reachable(State::first(Some(value), Flaw::None)) {
            // What was written over TAKEN is beyond help: the new one serves already, and the old one cannot know.
            let was_before_the_commit = !state.new_served;
            if was_before_the_commit {
                assert!(at_most_one_serves(&state) && one_serves_in_the_end(&state), "{value:#x}: {state:?}");
            }
        }
    }
}
