//! The migration state machine (`vfio.h: enum vfio_device_mig_state`, "The FSM takes actions on
//! the arcs between FSM states" and the rules for combination transitions after it).
//!
//! The machine is stated once, in [`ARCS`]. Every path is derived from that list at compile time:
//! the shortest one whose interior holds no saving-group state, unless both its ends are of that
//! group and the session goes on; states that a device lacks are skipped over. That the shortest
//! path is the only one of its length is checked at compile time too.

mod text;

use core::fmt;

pub use text::{dot, mermaid, paths_table, table};

use crate::{Errno, MigrationFlags, State};

/// What an arc does to the data session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Session {
    /// No session before, none after.
    None,
    /// A session opens: SET_STATE hands out a data stream.
    Opens,
    /// The session goes on over the same data stream.
    Keeps,
    /// The session ends; its data stream gives ENODEV from now on.
    Ends,
}

impl Session {
    /// The effect of a single step between two states.
    const fn of(from: State, to: State) -> Session {
        match (from.has_session(), to.has_session()) {
            (false, false) => Session::None,
            (false, true) => Session::Opens,
            (true, false) => Session::Ends,
            (true, true) => Session::Keeps,
        }
    }
}

/// One arc of the machine: a transition on which a driver takes an action.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Arc {
    /// The state that the arc leaves.
    pub from: State,
    /// The state that it reaches.
    pub to: State,
    /// What it does to the data session.
    pub session: Session,
}

impl Arc {
    /// The arc between two neighbouring states, with its effect on the session.
    const fn new(from: State, to: State) -> Arc {
        Arc { from, to, session: Session::of(from, to) }
    }
}

impl fmt::Display for Arc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {}", self.from, self.to)
    }
}

/// Every arc of the machine, in the order in which `vfio.h` describes them.
pub const ARCS: [Arc; 15] = [
    Arc::new(State::RunningP2p, State::Stop),
    Arc::new(State::StopCopy, State::Stop),
    Arc::new(State::Resuming, State::Stop),
    Arc::new(State::PreCopy, State::Running),
    Arc::new(State::RunningP2p, State::Running),
    Arc::new(State::PreCopyP2p, State::RunningP2p),
    Arc::new(State::Running, State::RunningP2p),
    Arc::new(State::Stop, State::RunningP2p),
    Arc::new(State::Running, State::PreCopy),
    Arc::new(State::RunningP2p, State::PreCopyP2p),
    Arc::new(State::Stop, State::StopCopy),
    Arc::new(State::PreCopy, State::PreCopyP2p),
    Arc::new(State::PreCopyP2p, State::PreCopy),
    Arc::new(State::PreCopyP2p, State::StopCopy),
    Arc::new(State::Stop, State::Resuming),
];

/// Why a transition is refused. Every reason is [`Errno::EINVAL`] on the wire, and the device
/// keeps its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    /// The device is in ERROR: only a reset leads out.
    #[error("the device is in ERROR and can only be reset")]
    FromError,
    /// ERROR was asked for.
    #[error("ERROR cannot be asked for")]
    ToError,
    /// The device lacks one of the two states.
    #[error("the device has no state {0}")]
    Unsupported(State),
    /// STOP_COPY to PRE_COPY or PRE_COPY_P2P.
    #[error("{0} -> {1} is not permitted by the standard")]
    Blocked(State, State),
}

impl From<Refusal> for Errno {
    fn from(_: Refusal) -> Errno {
        Errno::EINVAL
    }
}

/// The most states on one path: STOP_COPY or RESUMING to PRE_COPY and the like need five; a table
/// of six leaves the compile-time check something to compare with.
const PATH_STATES_MAX: usize = 6;

/// The states that a transition visits, the first and the last one included.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Path {
    states: [State; PATH_STATES_MAX],
    len: u8,
}

impl Path {
    /// The states in order; one alone where nothing is to be done.
    pub fn states(&self) -> &[State] {
        &self.states[..usize::from(self.len)]
    }

    /// The steps in order. A step over a state that the device lacks counts as one.
    pub fn arcs(&self) -> impl Iterator<Item = Arc> + '_ {
        self.states().windows(2).map(|step| Arc::new(step[0], step[1]))
    }

    /// Whether the caller of SET_STATE is handed a data stream: a session opened on the way is
    /// still open at the end.
    pub fn opens_session(&self) -> bool {
        self.arcs().last().is_some_and(|arc| match arc.session {
            Session::Opens => true,
            Session::Keeps => self.arcs().any(|arc| arc.session == Session::Opens),
            Session::None | Session::Ends => false,
        })
    }
}

impl fmt::Display for Path {
    /// The states joined by `>`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, state) in self.states().iter().enumerate() {
            write!(f, "{}{state}", if at == 0 { "" } else { ">" })?;
        }
        Ok(())
    }
}

impl fmt::Debug for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The state to enter next on the way from `from` to `to`, `to` itself when already there
/// (`vfio_mig_get_next_state()`).
pub const fn next(flags: MigrationFlags, from: State, to: State) -> Result<State, Refusal> {
    if matches!(to, State::Error) {
        return Err(Refusal::ToError);
    }
    if matches!(from, State::Error) {
        return Err(Refusal::FromError);
    }
    if !flags.has(from) {
        return Err(Refusal::Unsupported(from));
    }
    if !flags.has(to) {
        return Err(Refusal::Unsupported(to));
    }
    let mut at = from;
    loop {
        at = match NEXT[at as usize][to as usize] {
            Some(state) => state,
            None => return Err(Refusal::Blocked(from, to)),
        };
        if flags.has(at) {
            return Ok(at);
        }
    }
}

/// All the states on the way from `from` to `to` for a device with these flags.
pub const fn path(flags: MigrationFlags, from: State, to: State) -> Result<Path, Refusal> {
    let mut path = Path { states: [from; PATH_STATES_MAX], len: 1 };
    loop {
        let at = path.states[path.len as usize - 1];
        let step = match next(flags, at, to) {
            Ok(step) => step,
            Err(refusal) => return Err(refusal),
        };
        if step as u32 == at as u32 {
            return Ok(path);
        }
        path.states[path.len as usize] = step;
        path.len += 1;
    }
}

/// For a device with every flag: the next state on the way, `None` where there is no way.
const NEXT: [[Option<State>; State::COUNT]; State::COUNT] = derive();

const fn derive() -> [[Option<State>; State::COUNT]; State::COUNT] {
    let mut table = [[None; State::COUNT]; State::COUNT];
    let mut from = 0;
    while from < State::COUNT {
        let mut to = 0;
        while to < State::COUNT {
            table[from][to] = first_step(State::ALL[from], State::ALL[to]);
            to += 1;
        }
        from += 1;
    }
    table
}

/// The transitions that the standard names as not permitted, though arcs would lead there.
const fn blocked(from: State, to: State) -> bool {
    matches!((from, to), (State::StopCopy, State::PreCopy | State::PreCopyP2p))
}

const fn first_step(from: State, to: State) -> Option<State> {
    if matches!(from, State::Error) || matches!(to, State::Error) || blocked(from, to) {
        return None;
    }
    if from as u32 == to as u32 {
        return Some(to);
    }
    // Distances to `to`, found by relaxing every arc as often as a path can have states.
    const FAR: usize = usize::MAX;
    let may_hold_saving = from.is_saving() && to.is_saving();
    let mut distance = [FAR; State::COUNT];
    distance[to as usize] = 0;
    let mut round = 0;
    while round < State::COUNT {
        let mut at = 0;
        while at < ARCS.len() {
            let Arc { from: tail, to: head, .. } = ARCS[at];
            let interior_ok = head as u32 == to as u32 || !head.is_saving() || may_hold_saving;
            if interior_ok && distance[head as usize] != FAR {
                let through = distance[head as usize] + 1;
                if through < distance[tail as usize] {
                    distance[tail as usize] = through;
                }
            }
            at += 1;
        }
        round += 1;
    }
    if distance[from as usize] == FAR {
        return None;
    }
    let mut step = None;
    let mut at = 0;
    while at < ARCS.len() {
        let Arc { from: tail, to: head, .. } = ARCS[at];
        let interior_ok = head as u32 == to as u32 || !head.is_saving() || may_hold_saving;
        if tail as u32 == from as u32
            && interior_ok
            && distance[head as usize] != FAR
            && distance[head as usize] + 1 == distance[from as usize]
        {
            assert!(step.is_none(), "two shortest paths: the standard's rules would not decide");
            step = Some(head);
        }
        at += 1;
    }
    step
}
