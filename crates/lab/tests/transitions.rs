//! Every pair of states on every kind of device through both doors, against the table of arcs
//! (`vfio.h: enum vfio_device_mig_state`): what SET answers, what GET says afterwards, where a data stream comes,
//! and which of the streams is alive.

use limosa_client::{Chunk, DataStream, Device, DeviceExt, FeatureRequest, Refers};
use limosa_lab::{Kind, Mdev, kinds};
use limosa_protocol::feature::FeatureMigState;
use limosa_protocol::{Errno, FeatureIndex, FeatureOp, MigrationFlags, State, fsm};
use limosa_vfio_kernel::{Door, KernelDevice, Options};
use zerocopy::IntoBytes;

type Stream = Option<Box<dyn DataStream>>;

/// A device under test.
struct Subject {
    what: String,
    /// Closed before `mdev` is removed.
    device: KernelDevice,
    mdev: Mdev,
    is_ours: bool,
    flags: MigrationFlags,
    /// Its whole state, to have something to resume from.
    saved: Vec<u8>,
}

impl Subject {
    /// `None` for a kind without migration.
    fn new(kind: &Kind, door: Door) -> Option<Subject> {
        let mdev = kind.create();
        let is_ours = kind.parent == "limosa";
        if is_ours {
            mdev.set("limosa/state_bytes", 8192);
        }
        let options = Options { door: Some(door), ..Options::default() };
        let device = KernelDevice::open(mdev.uuid(), &options).unwrap();
        let flags = device.migration_flags().unwrap();
        if flags.is_empty() {
            assert_eq!(kind.name, "limosa-none", "{kind:?} through its {door} has no migration");
            return None;
        }
        let mut saved = Vec::new();
        let mut stream = device.set_state(State::StopCopy).unwrap().unwrap();
        let mut chunk = [0; 4096];
        while let Chunk::Data(bytes) = stream.read(&mut chunk).unwrap() {
            saved.extend_from_slice(&chunk[..bytes]);
        }
        assert!(!saved.is_empty());
        Some(Subject {
            what: format!("{} through its {door}", kind.name),
            device,
            mdev,
            is_ours,
            flags,
            saved,
        })
    }

    fn states(&self) -> Vec<State> {
        State::ALL.into_iter().filter(|&state| state != State::Error && self.flags.has(state)).collect()
    }

    /// Takes the device from wherever it is into a state, and returns the session's stream.
    fn bring(&self, state: State) -> Stream {
        self.device.reset().unwrap();
        let stream = self.device.set_state(state).unwrap_or_else(|error| panic!("{}: {error}", self.what));
        assert_eq!(self.device.state().unwrap(), state, "{}", self.what);
        assert_eq!(stream.is_some(), state.has_session(), "{}: stream of {state}", self.what);
        stream
    }

    /// SET of MIG_DEVICE_STATE with any number.
    fn set(&self, number: u32) -> Result<Stream, Errno> {
        let mut payload = FeatureMigState { device_state: number, data_fd: -1 };
        let reply = self.device.feature(&mut FeatureRequest {
            index: FeatureIndex::MIG_DEVICE_STATE,
            op: FeatureOp::SET,
            payload: payload.as_mut_bytes(),
            refers: Refers::Nothing,
        });
        match reply {
            Ok(reply) => {
                assert_eq!(payload.data_fd, -1, "the fd is the stream's alone");
                Ok(reply.stream)
            }
            Err(error) => Err(error.errno().unwrap_or_else(|| panic!("{}: {error}", self.what))),
        }
    }

    /// Whether the session that the stream is of is still open.
    fn is_alive(&self, stream: &mut dyn DataStream, is_resuming: bool) -> bool {
        let answer = if is_resuming {
            // An empty write does not reach the kernel; reading from such a session is refused while it lives.
            stream.read(&mut [0]).map(drop)
        } else {
            stream.write(&[0]).map(drop)
        };
        match answer.map_err(|error| error.errno()) {
            Err(Some(Errno::EBADF)) => true,
            other => panic!("{}: wrong direction answered {other:?}", self.what),
        }
    }

    fn check(&self, from: State, to: u32, with_data: bool) {
        let mut before = self.bring(from);
        if with_data {
            before.as_mut().unwrap().write(&self.saved).unwrap();
        }
        let what = format!("{}: {from} -> {to}{}", self.what, if with_data { ", loaded" } else { "" });
        let path = State::from_raw(to)
            .ok_or(Errno::EINVAL)
            .and_then(|to| fsm::path(self.flags, from, to).map_err(Errno::from));
        let leaves_unloaded = from == State::Resuming && !with_data && to != from.raw();
        let answer = self.set(to);
        let now = self.device.state().unwrap();
        match (path, answer) {
            (Ok(path), Ok(after)) if !leaves_unloaded => {
                assert_eq!(now.raw(), to, "{what}");
                assert_eq!(after.is_some(), path.opens_session(), "{what}: stream");
                let ended = path.arcs().any(|arc| arc.session == fsm::Session::Ends);
                if let (Some(before), true) = (&mut before, from.is_saving()) {
                    let read = before.read(&mut [0; 1]).map_err(|error| error.errno());
                    match ended {
                        true => assert_eq!(read, Err(Some(Errno::ENODEV)), "{what}: the old session"),
                        false => {
                            assert!(matches!(read, Ok(Chunk::Data(1))), "{what}: the old session: {read:?}")
                        }
                    }
                }
                if let Some(mut after) = after {
                    assert!(self.is_alive(&mut *after, now == State::Resuming), "{what}: the new session");
                }
            }
            (Ok(_), Err(errno)) if leaves_unloaded => {
                assert_eq!((errno, now), (Errno::EINVAL, from), "{what}");
                assert!(self.is_alive(&mut *before.unwrap(), true), "{what}: the session stays");
            }
            (Err(expected), Err(errno)) => {
                assert_eq!((errno, now), (expected, from), "{what}");
            }
            (path, answer) => panic!(
                "{what}: expected {path:?}, answered {:?}, now in {now}",
                answer.map(|stream| stream.is_some())
            ),
        }
    }
}

fn subjects() -> impl Iterator<Item = Subject> {
    let pairs =
        kinds().into_iter().flat_map(|kind| [Door::Cdev, Door::Group].map(|door| (kind.clone(), door)));
    pairs.filter_map(|(kind, door)| Subject::new(&kind, door))
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn every_pair_of_states_is_answered_as_the_table_says() {
    let mut count = 0;
    for subject in subjects() {
        for from in subject.states() {
            for to in 0..=State::COUNT as u32 {
                subject.check(from, to, false);
                count += 1;
            }
        }
    }
    // Four states at least, nine numbers to go to, three kinds of device, two doors.
    assert!(count >= 4 * 9 * 3 * 2, "{count}");
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_loaded_device_goes_wherever_the_table_says() {
    for subject in subjects() {
        for to in 0..=State::COUNT as u32 {
            subject.check(State::Resuming, to, true);
        }
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn from_error_only_a_reset_leads_out() {
    for subject in subjects().filter(|subject| subject.is_ours) {
        for to in 0..=State::COUNT as u32 {
            subject.device.reset().unwrap();
            let mut session = subject.device.set_state(State::StopCopy).unwrap().unwrap();
            subject.mdev.set("limosa/state", "ERROR");
            assert_eq!(subject.device.state().unwrap(), State::Error);
            let read = session.read(&mut [0]).unwrap_err();
            assert!(read.is_refused(Errno::ENODEV), "{}: {read}", subject.what);
            let answer = subject.set(to).map(|stream| stream.is_some());
            // From a state to itself there is nothing to do: Linux' drivers do not look further.
            let expected = if to == State::Error.raw() { Ok(false) } else { Err(Errno::EINVAL) };
            assert_eq!(answer, expected, "{}: ERROR -> {to}", subject.what);
            assert_eq!(subject.device.state().unwrap(), State::Error);
            subject.device.reset().unwrap();
            assert_eq!(subject.device.state().unwrap(), State::Running);
        }
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_reset_leads_from_every_state_to_running_and_ends_the_session() {
    for subject in subjects() {
        for from in subject.states() {
            let mut session = subject.bring(from);
            subject.device.reset().unwrap();
            assert_eq!(subject.device.state().unwrap(), State::Running, "{}: {from}", subject.what);
            if let Some(session) = &mut session {
                let answer = match from {
                    State::Resuming => session.write(&subject.saved[..1]),
                    _ => session.read(&mut [0]).map(drop),
                };
                let error = answer.unwrap_err();
                assert!(error.is_refused(Errno::ENODEV), "{}: {from}: {error}", subject.what);
            }
        }
    }
}
