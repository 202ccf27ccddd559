//! The state machine: every path as recorded and as the standard has it, and the rules that hold on
//! any walk.

use limosa_protocol::fsm::{self, ARCS, Path, Refusal, Session, next, path};
use limosa_protocol::{Errno, MigrationFlags, NotAState, NotMigrationFlags, State};
use proptest::prelude::*;
use proptest::sample::select;

const ALL_FLAGS: MigrationFlags = MigrationFlags::SETS[3];

/// For a device with every flag, from each state but ERROR, what to enter next on the way to STOP,
/// RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY and PRE_COPY_P2P (by number; 0 is refused).
const NEXT: [(State, [u32; 7]); 7] = [
    (State::Stop, [1, 5, 3, 4, 5, 5, 5]),
    (State::Running, [5, 2, 5, 5, 5, 6, 5]),
    (State::StopCopy, [1, 1, 3, 1, 1, 0, 0]),
    (State::Resuming, [1, 1, 1, 4, 1, 1, 1]),
    (State::RunningP2p, [1, 2, 1, 1, 5, 2, 7]),
    (State::PreCopy, [2, 2, 7, 2, 2, 6, 7]),
    (State::PreCopyP2p, [5, 5, 3, 5, 5, 6, 7]),
];

fn pairs() -> impl Iterator<Item = (MigrationFlags, State, State)> {
    MigrationFlags::SETS
        .into_iter()
        .flat_map(|flags| State::ALL.into_iter().flat_map(move |from| State::ALL.map(|to| (flags, from, to))))
}

fn is_arc(from: State, to: State) -> bool {
    ARCS.iter().any(|arc| (arc.from, arc.to) == (from, to))
}

/// Whether the device gets from one state to the other by an arc, or by arcs over states that it
/// lacks.
fn is_arc_over_lacking(flags: MigrationFlags, from: State, to: State) -> bool {
    is_arc(from, to)
        || ARCS
            .iter()
            .any(|arc| arc.from == from && !flags.has(arc.to) && is_arc_over_lacking(flags, arc.to, to))
}

#[test]
fn all_flag_sets_and_pairs_are_as_recorded() {
    insta::assert_snapshot!("paths", fsm::paths_table());
}

#[test]
fn pictures_and_table_are_as_recorded() {
    insta::assert_snapshot!("table", fsm::table(ALL_FLAGS));
    insta::assert_snapshot!("table_least", fsm::table(MigrationFlags::SETS[0]));
    insta::assert_snapshot!("dot", fsm::dot());
    insta::assert_snapshot!("mermaid", fsm::mermaid());
}

#[test]
fn the_next_state_is_the_one_that_the_standards_table_gives() {
    for (from, row) in NEXT {
        for (to, number) in State::ALL.into_iter().skip(1).zip(row) {
            let step = next(ALL_FLAGS, from, to).map_or(0, State::raw);
            assert_eq!(step, number, "{from} -> {to}");
        }
    }
}

#[test]
fn all_256_pairs_keep_the_rules() {
    let mut longest = 0;
    for (flags, from, to) in pairs() {
        let Ok(path) = path(flags, from, to) else { continue };
        let states = path.states();
        assert_eq!((states[0], states[states.len() - 1]), (from, to));
        assert!(states.iter().all(|state| flags.has(*state) && *state != State::Error));
        for interior in states.iter().skip(1).rev().skip(1) {
            assert!(!interior.is_saving() || (from.is_saving() && to.is_saving()), "{path}");
        }
        for step in states.windows(2) {
            assert!(is_arc_over_lacking(flags, step[0], step[1]), "{path}");
            assert!(flags != ALL_FLAGS || is_arc(step[0], step[1]), "{path}");
        }
        for (at, state) in states.iter().enumerate() {
            assert!(!states[..at].contains(state), "{path} comes back to {state}");
            let rest = fsm::path(flags, *state, to).map(|rest| rest.states().to_vec());
            assert_eq!(rest, Ok(states[at..].to_vec()), "the way on from {state} on {path}");
        }
        longest = longest.max(path.arcs().count());
    }
    assert_eq!(longest, 4, "such as RESUMING>STOP>RUNNING_P2P>RUNNING>PRE_COPY");
}

#[test]
fn refusals_say_why_and_are_all_einval() {
    for (flags, from, to) in pairs() {
        let expected = if to == State::Error {
            Some(Refusal::ToError)
        } else if from == State::Error {
            Some(Refusal::FromError)
        } else if let Some(lacking) = [from, to].into_iter().find(|state| !flags.has(*state)) {
            Some(Refusal::Unsupported(lacking))
        } else if from == State::StopCopy && to.is_pre_copy() {
            Some(Refusal::Blocked(from, to))
        } else {
            None
        };
        assert_eq!(path(flags, from, to).err(), expected, "{flags} {from} -> {to}");
        assert_eq!(next(flags, from, to).err(), expected, "{flags} {from} -> {to}");
        assert!(expected.is_none_or(|refusal| Errno::from(refusal) == Errno::EINVAL));
    }
}

#[test]
fn sessions_open_and_end_where_the_standard_says() {
    let of = |wanted| -> Vec<_> {
        ARCS.iter().filter(|arc| arc.session == wanted).map(|arc| (arc.from, arc.to)).collect()
    };
    assert_eq!(
        of(Session::Opens),
        [
            (State::Running, State::PreCopy),
            (State::RunningP2p, State::PreCopyP2p),
            (State::Stop, State::StopCopy),
            (State::Stop, State::Resuming),
        ]
    );
    assert_eq!(
        of(Session::Keeps),
        [
            (State::PreCopy, State::PreCopyP2p),
            (State::PreCopyP2p, State::PreCopy),
            (State::PreCopyP2p, State::StopCopy),
        ]
    );
    assert_eq!(
        of(Session::Ends),
        [
            (State::StopCopy, State::Stop),
            (State::Resuming, State::Stop),
            (State::PreCopy, State::Running),
            (State::PreCopyP2p, State::RunningP2p),
        ]
    );
}

#[test]
fn a_stream_is_handed_out_exactly_when_a_session_opened_and_is_still_open() {
    for (flags, from, to) in pairs() {
        let Ok(path) = path(flags, from, to) else { continue };
        // One session before and one after are the same if no state between had none.
        let kept = path.states().iter().all(|state| state.has_session());
        assert_eq!(path.opens_session(), to.has_session() && !kept, "{path}");
    }
}

#[test]
fn numbers_above_pre_copy_p2p_are_no_states() {
    assert_eq!(State::from_raw(8), None);
    assert_eq!(State::try_from(u32::MAX), Err(Errno::EINVAL));
    for (number, state) in State::ALL.into_iter().enumerate() {
        assert_eq!((state.raw() as usize, State::from_raw(number as u32)), (number, Some(state)));
    }
}

#[test]
fn flags_print_in_order_and_keep_unknown_bits() {
    assert_eq!(ALL_FLAGS.to_string(), "STOP_COPY+P2P+PRE_COPY");
    assert_eq!(MigrationFlags::empty().to_string(), "none");
    let newer = MigrationFlags::from_bits_retain(0x11);
    assert_eq!(newer.to_string(), "STOP_COPY+0x10");
    for wrong in ["", "+", "STOP_COPY+", "P2P+STOP", "0x", "0xg", "10", "none+P2P"] {
        assert_eq!(wrong.parse::<MigrationFlags>(), Err(NotMigrationFlags), "{wrong:?}");
    }
}

/// A name in any case, with `-` for some `_`.
fn respelled(name: String) -> impl Strategy<Value = String> {
    let letters = name.len();
    prop::collection::vec(0u8..3, letters).prop_map(move |how| {
        let respell = |(letter, how): (char, u8)| match (how, letter) {
            (1, '_') => '-',
            (1, letter) => letter.to_ascii_lowercase(),
            (_, letter) => letter,
        };
        name.chars().zip(how).map(respell).collect()
    })
}

proptest! {
    #[test]
    fn names_are_read_as_printed_and_in_other_spellings(
        (state, text) in select(&State::ALL[..]).prop_flat_map(|s| (Just(s), respelled(s.to_string()))),
    ) {
        prop_assert_eq!(text.parse(), Ok(state));
    }

    #[test]
    fn other_texts_are_no_states(text in "[A-Z_0-9p-]{0,14}") {
        let upper = text.to_uppercase().replace('-', "_");
        let expected = State::ALL.into_iter().find(|state| state.name() == upper).ok_or(NotAState);
        prop_assert_eq!(text.parse(), expected);
    }

    #[test]
    fn any_flags_are_read_as_printed(bits in prop_oneof![0u64..16, any::<u64>()]) {
        let flags = MigrationFlags::from_bits_retain(bits);
        prop_assert_eq!(flags.to_string().parse(), Ok(flags));
    }

    /// A device is asked for one state after the other; whatever is asked, it is in a state that it
    /// has, and there is a session exactly in the states that have one.
    #[test]
    fn on_any_walk_the_session_is_as_the_state_says(
        flags in select(&MigrationFlags::SETS[..]),
        wishes in prop::collection::vec(select(&State::ALL[..]), 0..40),
    ) {
        let mut state = State::Running;
        let mut open = false;
        for to in wishes {
            let Ok(path) = path(flags, state, to) else { continue };
            for arc in path.arcs() {
                prop_assert_eq!(arc.from, state);
                let allowed = match arc.session {
                    Session::None => !open,
                    Session::Opens => !core::mem::replace(&mut open, true),
                    Session::Keeps => open,
                    Session::Ends => core::mem::replace(&mut open, false),
                };
                prop_assert!(allowed, "{} with a session open: {}", arc, open);
                state = arc.to;
                prop_assert_eq!(open, state.has_session());
                prop_assert!(flags.has(state));
            }
            prop_assert_eq!(state, to);
        }
    }
}

#[test]
fn a_path_prints_its_states() {
    let path: Path = path(ALL_FLAGS, State::PreCopy, State::Stop).unwrap();
    assert_eq!(
        format!("{path} {path:?}"),
        "PRE_COPY>RUNNING>RUNNING_P2P>STOP PRE_COPY>RUNNING>RUNNING_P2P>STOP"
    );
}
