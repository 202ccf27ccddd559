//! Two clients of one machine: who drives it, whose accesses are held back, and a device that stays
//! (`docs/vfio-user-extensions.md: The control role`).

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Instant;

use crate::common::{Answer, Rig};
use limosa_client::Refers;
use limosa_device::{
    Bus, ClientId, Description, Fault, Held, Machine, Migration, Model, Region, Released, Save,
};
use limosa_protocol::feature::FeatureMigState;
use limosa_protocol::info::RegionFlags;
use limosa_protocol::{Errno, FeatureHeader, FeatureIndex, FeatureOp, MigrationFlags, State};
use zerocopy::IntoBytes;

const ALL: MigrationFlags = MigrationFlags::SETS[3];
const VMM: ClientId = ClientId::VMM;
const ID: [u8; 16] = [1; 16];
const OTHER_ID: [u8; 16] = [2; 16];

fn set(rig: &Rig, client: ClientId, to: State) -> Result<(), Errno> {
    let mut payload = FeatureMigState::new(to);
    let call = FeatureHeader::new(FeatureIndex::MIG_DEVICE_STATE, FeatureOp::SET, 8).call().unwrap();
    rig.machine.feature_for(client, call, payload.as_mut_bytes(), Refers::Nothing).map(drop)
}

fn read(rig: &Rig) -> Result<Result<(), Errno>, Held> {
    rig.machine.region_read_or_held(0, 0, &mut [0; 4])
}

/// How often the VMM was told that its accesses may go on.
fn releases(rig: &Rig) -> (Arc<AtomicUsize>, Arc<Released>) {
    let count = Arc::new(AtomicUsize::new(0));
    let counts = Arc::clone(&count);
    let released: Arc<Released> = Arc::new(move || _ = counts.fetch_add(1, Ordering::SeqCst));
    rig.machine.on_release(&released);
    (count, released)
}

#[test]
fn the_client_that_leads_a_device_out_of_running_drives_it_until_it_is_back() {
    for flags in MigrationFlags::SETS {
        let rig = Rig::new(flags);
        let (one, two) = (rig.machine.new_client(), rig.machine.new_client());
        assert_ne!(one, two);
        for state in State::ALL.into_iter().filter(|state| flags.has(*state) && *state != State::Running) {
            if state == State::Error {
                continue;
            }
            for (drives, others) in [(VMM, [one, two]), (one, [VMM, two]), (two, [VMM, one])] {
                set(&rig, drives, state).unwrap();
                assert!(rig.machine.is_driven_by(drives));
                for other in others {
                    for to in [State::Running, State::Stop, State::StopCopy, state] {
                        assert_eq!(set(&rig, other, to), Err(Errno::EBUSY), "{flags}: from {state} to {to}");
                    }
                    assert_eq!(rig.machine.session_for(other), None);
                }
                assert_eq!(rig.machine.session_for(drives), rig.machine.session());
                // RESUMING has no way to RUNNING but by what was loaded.
                set(&rig, drives, State::Running).unwrap();
                assert!(![VMM, one, two].iter().any(|client| rig.machine.is_driven_by(*client)));
                rig.check();
            }
        }
    }
}

#[test]
fn accesses_are_held_back_only_while_another_client_has_stopped_the_device() {
    let rig = Rig::new(ALL);
    let control = rig.machine.new_client();
    let (count, _released) = releases(&rig);
    for state in State::ALL.into_iter().filter(|state| *state != State::Error) {
        if state != State::Running {
            set(&rig, VMM, state).unwrap();
            assert_eq!(read(&rig), Ok(Ok(())), "the VMM's own {state}");
            set(&rig, VMM, State::Running).unwrap();
        }
        let before = count.load(Ordering::SeqCst);
        set(&rig, control, state).unwrap();
        let held = !state.is_running();
        assert_eq!(rig.machine.holds_accesses(), held, "{state}");
        assert_eq!(read(&rig), if held { Err(Held) } else { Ok(Ok(())) }, "{state}");
        assert_eq!(rig.machine.region_write(0, 0, &[1]), if held { Err(Errno::EBUSY) } else { Ok(()) });
        // What cannot be done at all is refused at once, and what must be answered is.
        assert_eq!(rig.machine.region_read_or_held(0, 1 << 20, &mut [0; 4]), Ok(Err(Errno::EINVAL)));
        rig.machine.region_read_unheld(0, 0, &mut [0; 4]).unwrap();
        rig.machine.region_write_unheld(0, 0, &[1]).unwrap();
        set(&rig, control, State::Running).unwrap();
        assert_eq!(read(&rig), Ok(Ok(())));
        assert_eq!(count.load(Ordering::SeqCst) - before, usize::from(held), "{state}");
    }
}

#[test]
fn a_client_that_goes_leaves_a_device_that_runs() {
    for state in State::ALL.into_iter().filter(|state| *state != State::Running) {
        let rig = Rig::new(ALL);
        let control = rig.machine.new_client();
        if state == State::Error {
            rig.fault("stop", Fault::Broken(Errno::EIO));
            assert!(set(&rig, control, State::Stop).is_err());
        } else {
            set(&rig, control, state).unwrap();
        }
        // Another one's end changes nothing.
        let another = rig.machine.new_client();
        rig.machine.client_gone(another);
        assert_eq!(rig.state(), state);
        rig.machine.client_gone(VMM);
        assert_eq!(rig.state(), state);
        rig.machine.client_gone(control);
        assert_eq!(rig.state(), State::Running, "out of {state}");
        rig.check();
        assert_eq!(read(&rig), Ok(Ok(())));
        set(&rig, VMM, State::Stop).unwrap();
    }
}

#[test]
fn a_device_that_does_not_run_again_is_told_of_and_held_no_more_than_it_is() {
    let rig = Rig::new(ALL);
    let control = rig.machine.new_client();
    set(&rig, control, State::Stop).unwrap();
    rig.fault("start", Fault::Broken(Errno::EIO));
    rig.machine.client_gone(control);
    assert_eq!(rig.state(), State::Error);
    // Nobody drives it: a reset by anybody brings it back.
    rig.machine.reset().unwrap();
    assert_eq!((rig.state(), read(&rig)), (State::Running, Ok(Ok(()))));
}

#[test]
fn a_device_is_taken_back_from_the_client_that_moves_it() {
    for state in [State::Stop, State::StopCopy, State::Resuming] {
        let rig = Rig::new(ALL);
        let control = rig.machine.new_client();
        set(&rig, control, state).unwrap();
        let session = rig.machine.session();
        rig.machine.take_back().unwrap();
        assert_eq!((rig.state(), read(&rig)), (State::Running, Ok(Ok(()))));
        assert_eq!(rig.machine.session_for(control), None);
        if let Some(session) = session {
            assert_eq!(rig.machine.data_write(session, b"late"), Err(Errno::ENODEV));
        }
        assert_eq!(rig.machine.stay(control, ID), Err(Errno::EBUSY));
        // The VMM's own is not taken from it.
        set(&rig, VMM, state).unwrap();
        rig.machine.take_back().unwrap();
        assert_eq!(rig.state(), state);
    }
}

#[test]
fn a_reset_ends_the_session_of_another_client() {
    let rig = Rig::new(ALL);
    let control = rig.machine.new_client();
    set(&rig, control, State::StopCopy).unwrap();
    rig.script().saves.push_back(Answer::Data(vec![1; 8]));
    let session = rig.machine.session_for(control).unwrap();
    rig.machine.reset().unwrap();
    assert_eq!(rig.machine.data_read(session, 8, |_| ()), Err(Errno::ENODEV));
    assert!(!rig.machine.is_driven_by(control));
    set(&rig, VMM, State::Stop).unwrap();
}

#[test]
fn a_device_stays_only_for_its_driver_and_only_where_it_stands() {
    for state in State::ALL.into_iter().filter(|state| *state != State::Error) {
        let rig = Rig::new(ALL);
        let (control, other) = (rig.machine.new_client(), rig.machine.new_client());
        set(&rig, control, state).unwrap();
        assert_eq!(rig.machine.stay(other, ID), Err(Errno::EBUSY));
        let stays = rig.machine.stay(control, ID);
        match state {
            State::Running => assert_eq!(stays, Err(Errno::EBUSY)),
            State::Stop | State::StopCopy => assert_eq!(stays, Ok(())),
            _ => assert_eq!(stays, Err(Errno::EINVAL), "{state}"),
        }
        assert_eq!(rig.machine.stays(), stays.ok().map(|()| ID));
    }
}

#[test]
fn nothing_but_the_decision_leads_a_device_that_stays_to_running() {
    for state in [State::Stop, State::StopCopy] {
        let rig = Rig::new(ALL);
        let (control, other) = (rig.machine.new_client(), rig.machine.new_client());
        let (count, _released) = releases(&rig);
        set(&rig, control, state).unwrap();
        rig.machine.stay(control, ID).unwrap();
        rig.machine.stay(control, ID).unwrap();
        assert_eq!(rig.machine.stay(control, OTHER_ID), Err(Errno::EEXIST));
        assert_eq!(rig.machine.release(other, OTHER_ID), Err(Errno::ENOENT));
        let resets = rig.machine.reset_count();
        let nothing_leads_out = |client| {
            assert_eq!(rig.machine.reset(), Err(Errno::EBUSY));
            for to in [State::Running, State::RunningP2p, State::Resuming] {
                assert_eq!(set(&rig, client, to), Err(Errno::EBUSY));
            }
            rig.machine.take_back().unwrap();
            assert_eq!((rig.state(), read(&rig)), (state, Err(Held)));
        };
        for client in [control, other, VMM] {
            nothing_leads_out(client);
            rig.machine.client_gone(client);
            nothing_leads_out(client);
        }
        assert_eq!((rig.machine.reset_count(), count.load(Ordering::SeqCst)), (resets, 0));
        // Decided for this side, by a client that comes later.
        let decides = rig.machine.new_client();
        rig.machine.release(decides, ID).unwrap();
        assert_eq!(rig.machine.release(decides, ID), Err(Errno::ENOENT));
        assert_eq!((rig.state(), read(&rig)), (state, Err(Held)), "it stands as it was left");
        assert_eq!(count.load(Ordering::SeqCst), 1, "whose accesses wait is told");
        set(&rig, decides, State::Running).unwrap();
        assert_eq!(read(&rig), Ok(Ok(())));
        rig.check();
    }
}

#[test]
fn what_a_client_that_has_gone_has_loaded_cannot_be_completed() {
    for is_vmm in [true, false] {
        let rig = Rig::new(ALL);
        set(&rig, VMM, State::Resuming).unwrap();
        rig.machine.data_write(rig.machine.session().unwrap(), b"all of it").unwrap();
        rig.machine.client_gone(VMM);
        assert_eq!(rig.state(), State::Resuming);
        let next = if is_vmm { VMM } else { rig.machine.new_client() };
        for to in [State::Stop, State::Running] {
            assert_eq!(set(&rig, next, to), Err(Errno::EIO));
        }
        rig.machine.reset().unwrap();
        set(&rig, VMM, State::Resuming).unwrap();
        set(&rig, VMM, State::Stop).unwrap();
    }
}

/// A device whose reads last until they are told to end.
struct SlowRead {
    begun: mpsc::Sender<()>,
    may_end: Mutex<mpsc::Receiver<()>>,
}

impl Model for SlowRead {
    fn description(&self) -> Description {
        let region = Region { flags: RegionFlags::READ, size: 4, ..Region::default() };
        Description { regions: vec![region], ..Description::default() }
    }

    fn attach(&self, _: Bus) {}

    fn region_read(&self, _: u32, _: u64, _: &mut [u8]) -> Result<(), Errno> {
        self.begun.send(()).unwrap();
        self.may_end.lock().unwrap().recv().unwrap();
        Ok(())
    }

    fn region_write(&self, _: u32, _: u64, _: &[u8]) -> Result<(), Errno> {
        Ok(())
    }

    fn reset(&self) -> Result<(), Errno> {
        Ok(())
    }

    fn migration(&self) -> Option<&dyn Migration> {
        Some(self)
    }
}

impl Migration for SlowRead {
    fn flags(&self) -> MigrationFlags {
        MigrationFlags::STOP_COPY
    }

    fn stop(&self, _: Instant) -> Result<(), Fault> {
        Ok(())
    }

    fn start(&self) -> Result<(), Fault> {
        Ok(())
    }

    fn save_begin(&self) -> Result<(), Fault> {
        Ok(())
    }

    fn save(&self, _: usize, _: bool, take: &mut dyn FnMut(Save<'_>)) -> Result<(), Errno> {
        take(Save::End);
        Ok(())
    }

    fn save_end(&self) {}

    fn data_size(&self) -> u64 {
        0
    }

    fn load_begin(&self) -> Result<(), Fault> {
        Ok(())
    }

    fn load(&self, _: &[u8]) -> Result<(), Errno> {
        Ok(())
    }

    fn load_finish(&self) -> Result<(), Fault> {
        Ok(())
    }

    fn load_abort(&self) {}
}

#[test]
fn a_device_whose_mover_went_during_a_call_that_took_long_stood_until_it_was_reset() {
    let (begun, has_begun) = mpsc::channel();
    let (end, may_end) = mpsc::channel();
    let machine = Machine::new(SlowRead { begun, may_end: Mutex::new(may_end) });
    let control = machine.new_client();
    let to_stop = FeatureHeader::new(FeatureIndex::MIG_DEVICE_STATE, FeatureOp::SET, 8).call().unwrap();
    let mut payload = FeatureMigState::new(State::Stop);
    machine.feature_for(control, to_stop, payload.as_mut_bytes(), Refers::Nothing).unwrap();
    std::thread::scope(|scope| {
        let reads = scope.spawn(|| machine.region_read_unheld(0, 0, &mut [0; 4]));
        has_begun.recv().unwrap();
        // Gives up waiting for the read.
        machine.client_gone(control);
        assert!(machine.is_driven_by(control) && machine.state() == State::Stop);
        end.send(()).unwrap();
        reads.join().unwrap().unwrap();
    });
    assert!(!machine.is_driven_by(control) && machine.state() == State::Running);
    assert!(!machine.holds_accesses());
}
