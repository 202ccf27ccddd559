//! Random sequences of everything that a client can do and a model can do wrong, and what holds
//! after each step.

use crate::common::{Answer, Rig};
use limosa_client::{Chunk, DataStream, Device, DeviceExt, Error};
use limosa_device::Fault;
use limosa_protocol::{Errno, MigrationFlags, State, fsm};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Set(State),
    Reset,
    /// On the newest stream, or on one before it.
    Read {
        old: bool,
    },
    Write {
        old: bool,
        bytes: usize,
    },
    Info {
        old: bool,
    },
    Region,
    OptIn,
    Fault(&'static str, Fault),
    Panic(&'static str),
    Save(Answer),
    Space(usize),
}

const CALLS: [&str; 12] = [
    "quiesce_p2p",
    "resume_p2p",
    "stop",
    "start",
    "save_begin",
    "save",
    "save_final",
    "load_begin",
    "load",
    "load_finish",
    "reset",
    "region_read",
];

fn step() -> impl Strategy<Value = Step> {
    let state = prop::sample::select(&State::ALL[..]);
    let call = || prop::sample::select(&CALLS[..]);
    let fault = prop_oneof![Just(Fault::Refused(Errno::EBUSY)), Just(Fault::Broken(Errno::EIO))];
    let answer = prop_oneof![
        (0..20_usize).prop_map(|bytes| Answer::Data(vec![7; bytes])),
        Just(Answer::Nothing),
        Just(Answer::End),
        Just(Answer::Fails(Errno::ENOMEM)),
    ];
    prop_oneof![
        12 => state.prop_map(Step::Set),
        1 => Just(Step::Reset),
        3 => any::<bool>().prop_map(|old| Step::Read { old }),
        3 => (any::<bool>(), 0..20_usize).prop_map(|(old, bytes)| Step::Write { old, bytes }),
        2 => any::<bool>().prop_map(|old| Step::Info { old }),
        1 => Just(Step::Region),
        1 => Just(Step::OptIn),
        3 => (call(), fault).prop_map(|(call, fault)| Step::Fault(call, fault)),
        1 => call().prop_map(Step::Panic),
        2 => answer.prop_map(Step::Save),
        1 => (0..16_usize).prop_map(Step::Space),
    ]
}

struct Walk {
    rig: Rig,
    resets: u64,
    newest: Option<Box<dyn DataStream>>,
    older: Option<Box<dyn DataStream>>,
}

impl Walk {
    fn stream(&mut self, old: bool) -> Option<&mut Box<dyn DataStream>> {
        if old { self.older.as_mut() } else { self.newest.as_mut() }
    }

    fn take(&mut self, step: Step) {
        let before = self.rig.state();
        let session = self.rig.machine.session();
        let flags = self.rig.flags;
        match step {
            Step::Set(to) => {
                let path = fsm::path(flags, before, to);
                match self.rig.device.set_state(to) {
                    Ok(stream) => {
                        let path = path.expect("only what the standard allows succeeds");
                        assert_eq!(self.rig.state(), to);
                        assert_eq!(stream.is_some(), path.opens_session());
                        if let Some(stream) = stream {
                            self.older = self.newest.replace(stream);
                        }
                    }
                    Err(Error::Refused { .. }) => {
                        let now = self.rig.state();
                        match path {
                            Ok(path) => assert!(
                                now == State::Error || path.states().split_last().unwrap().1.contains(&now),
                                "{path} left {now}"
                            ),
                            Err(_) => assert_eq!((now, self.rig.machine.session()), (before, session)),
                        }
                    }
                    Err(other) => panic!("{other}"),
                }
            }
            Step::Reset => {
                let reset = self.rig.device.reset();
                self.resets += 1;
                assert_eq!(self.rig.machine.session(), None);
                assert_eq!(self.rig.state(), if reset.is_ok() { State::Running } else { State::Error });
            }
            Step::Read { old } => {
                let Some(stream) = self.stream(old) else { return };
                match stream.read(&mut [0; 16]) {
                    Ok(chunk) => {
                        assert!(!old, "an ended session was read");
                        match chunk {
                            Chunk::Data(bytes) => assert!((1..=16).contains(&bytes) && before.is_saving()),
                            Chunk::NothingForNow => assert!(before.is_pre_copy()),
                            Chunk::End => assert_eq!(before, State::StopCopy),
                        }
                    }
                    Err(error) => assert!(!error.is_connection_lost()),
                }
            }
            Step::Write { old, bytes } => {
                let Some(stream) = self.stream(old) else { return };
                let written = stream.write(&vec![1; bytes]);
                assert!(written.is_err() || (!old && before == State::Resuming));
            }
            Step::Info { old } => {
                let Some(stream) = self.stream(old) else { return };
                let info = stream.precopy_info();
                assert!(info.is_err() || (!old && before.is_pre_copy()));
            }
            Step::Region => drop(self.rig.device.region_read(0, 0, &mut [0; 4])),
            Step::OptIn => drop(self.rig.device.precopy_info_v2()),
            Step::Fault(call, fault) => self.rig.script().faults = [(call, fault)].into(),
            Step::Panic(call) => self.rig.script().panics = Some(call),
            Step::Save(answer) => self.rig.script().saves.push_back(answer),
            Step::Space(bytes) => self.rig.script().space = bytes,
        }
    }

    /// Holds after every step.
    fn check(&mut self, panicked: bool) {
        let state = self.rig.state();
        assert!(self.rig.flags.has(state), "a state that the device lacks");
        assert_eq!(self.rig.machine.session().is_some(), state.has_session());
        assert_eq!(self.rig.device.reset_count().unwrap(), Some(self.resets));
        if !panicked {
            self.rig.check();
        }
    }
}

proptest! {
    #[test]
    fn no_sequence_of_steps_breaks_the_machine(
        flags in prop::sample::select(&MigrationFlags::SETS[..]),
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let mut walk = Walk { rig: Rig::new(flags), resets: 0, newest: None, older: None };
        // After a panic the model is in a condition of its own until a reset that succeeds.
        let mut panicked = false;
        for step in steps {
            let armed = walk.rig.script().panics.is_some();
            let reset = matches!(step, Step::Reset);
            walk.take(step);
            let fired = armed && walk.rig.script().panics.is_none();
            panicked = (panicked || fired) && !(reset && walk.rig.state() == State::Running);
            walk.check(panicked);
        }
        // And it can always be brought back.
        walk.rig.script().faults.clear();
        walk.rig.script().panics = None;
        walk.rig.device.reset().unwrap();
        walk.resets += 1;
        walk.rig.device.set_state(State::StopCopy).unwrap();
        walk.check(false);
    }
}
