//! A model that records what it is asked, fails where it is told to, and breaks its contract on
//! demand.
#![allow(dead_code)]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use limosa_client::{DataStream, DeviceExt, Error};
use limosa_device::{Bus, Description, Fault, Loopback, Machine, Region, Save, SimpleMigration, SimpleModel};
use limosa_protocol::feature::PrecopyInfo;
use limosa_protocol::info::RegionFlags;
use limosa_protocol::{Errno, FeatureHeader, FeatureIndex, FeatureOp, MigrationFlags, State, fsm};

/// What the test holds of a [`Recorder`].
#[derive(Default)]
pub struct Script {
    /// Every call, in order.
    pub calls: Vec<&'static str>,
    /// The next call of this name fails like that.
    pub faults: VecDeque<(&'static str, Fault)>,
    /// The next call of this name panics.
    pub panics: Option<&'static str>,
    /// What `save` answers; empty: the end in STOP_COPY, nothing for now before.
    pub saves: VecDeque<Answer>,
    /// All that was loaded in the session.
    pub loaded: Vec<u8>,
    /// Bytes of staging memory to lend at once; 0 for none.
    pub space: usize,
    pub running: bool,
    pub p2p: bool,
    pub saving: bool,
    pub loading: bool,
}

#[derive(Clone, Debug)]
pub enum Answer {
    Data(Vec<u8>),
    Nothing,
    End,
    Fails(Errno),
}

pub struct Recorder {
    pub flags: Option<MigrationFlags>,
    pub script: Arc<Mutex<Script>>,
    lent: Vec<u8>,
    memory: Vec<u8>,
}

pub const REGION_BYTES: u64 = 64;

impl Recorder {
    fn called(&mut self, name: &'static str) -> Result<(), Fault> {
        let mut script = self.script.lock().unwrap();
        script.calls.push(name);
        if script.panics == Some(name) {
            script.panics = None;
            drop(script);
            panic!("asked to panic in {name}");
        }
        match script.faults.front() {
            Some((at, fault)) if *at == name => {
                let fault = *fault;
                script.faults.pop_front();
                Err(fault)
            }
            _ => Ok(()),
        }
    }

    fn asked(&mut self, name: &'static str) -> Result<(), Errno> {
        self.called(name).map_err(Fault::errno)
    }

    /// Records the call, and on success what it makes of the device.
    fn arc(&mut self, name: &'static str, then: impl FnOnce(&mut Script)) -> Result<(), Fault> {
        self.called(name)?;
        then(&mut self.script.lock().unwrap());
        Ok(())
    }
}

impl SimpleModel for Recorder {
    fn description(&self) -> Description {
        let region = |flags, size| Region { flags, size, ..Region::default() };
        Description {
            regions: vec![
                region(RegionFlags::READ | RegionFlags::WRITE, REGION_BYTES),
                region(RegionFlags::READ, REGION_BYTES),
                region(RegionFlags::WRITE, REGION_BYTES),
                Region::default(),
            ],
            ..Description::default()
        }
    }

    fn attach(&mut self, _bus: Bus) {}

    fn region_read(&mut self, _region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.asked("region_read")?;
        let at = offset as usize;
        data.copy_from_slice(&self.memory[at..at + data.len()]);
        Ok(())
    }

    fn region_write(&mut self, _region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.asked("region_write")?;
        let at = offset as usize;
        self.memory[at..at + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Errno> {
        self.asked("reset")?;
        let mut script = self.script.lock().unwrap();
        (script.running, script.p2p, script.saving, script.loading) = (true, true, false, false);
        self.memory.fill(0);
        Ok(())
    }

    fn migration(&mut self) -> Option<&mut dyn SimpleMigration> {
        self.flags.is_some().then_some(self as &mut dyn SimpleMigration)
    }
}

impl SimpleMigration for Recorder {
    fn flags(&self) -> MigrationFlags {
        self.flags.unwrap()
    }

    fn quiesce_p2p(&mut self) -> Result<(), Fault> {
        self.arc("quiesce_p2p", |device| {
            assert!(device.running && device.p2p);
            device.p2p = false;
        })
    }

    fn resume_p2p(&mut self) -> Result<(), Fault> {
        self.arc("resume_p2p", |device| {
            assert!(device.running && !device.p2p);
            device.p2p = true;
        })
    }

    fn stop(&mut self) -> Result<(), Fault> {
        let p2p = self.flags().contains(MigrationFlags::P2P);
        self.arc("stop", |device| {
            assert!(device.running && device.p2p != p2p);
            device.running = false;
        })
    }

    fn start(&mut self) -> Result<(), Fault> {
        self.arc("start", |device| {
            assert!(!device.running);
            device.running = true;
        })
    }

    fn save_begin(&mut self) -> Result<(), Fault> {
        self.arc("save_begin", |device| {
            assert!(!device.saving && !device.loading);
            device.saving = true;
        })
    }

    fn save(&mut self, bytes_max: usize, stopped: bool) -> Result<Save<'_>, Errno> {
        self.asked("save")?;
        let mut script = self.script.lock().unwrap();
        assert!(script.saving && stopped != script.running);
        let answer = script.saves.pop_front().unwrap_or(if stopped { Answer::End } else { Answer::Nothing });
        match answer {
            Answer::Data(mut data) => {
                if data.len() > bytes_max && bytes_max > 1 {
                    script.saves.push_front(Answer::Data(data.split_off(bytes_max)));
                }
                self.lent = data;
                Ok(Save::Data(&self.lent))
            }
            Answer::Nothing => Ok(Save::NothingForNow),
            Answer::End => Ok(Save::End),
            Answer::Fails(errno) => Err(errno),
        }
    }

    fn save_final(&mut self) -> Result<(), Fault> {
        self.arc("save_final", |device| assert!(device.saving && !device.running))
    }

    fn save_end(&mut self) {
        let _ = self.arc("save_end", |device| {
            assert!(device.saving);
            device.saving = false;
        });
    }

    fn precopy_info(&mut self, _reinit: bool) -> PrecopyInfo {
        let _ = self.called("precopy_info");
        PrecopyInfo { argsz: 0, flags: 1, initial_bytes: 10, dirty_bytes: 20 }
    }

    fn has_precopy_reinit(&self) -> bool {
        true
    }

    fn data_size(&self) -> u64 {
        1234
    }

    fn load_begin(&mut self) -> Result<(), Fault> {
        self.arc("load_begin", |device| {
            assert!(!device.saving && !device.loading && !device.running);
            device.loading = true;
            device.loaded.clear();
        })
    }

    fn load(&mut self, chunk: &[u8]) -> Result<(), Errno> {
        self.asked("load")?;
        self.script.lock().unwrap().loaded.extend_from_slice(chunk);
        Ok(())
    }

    fn load_space(&mut self, bytes_max: usize) -> Option<&mut [u8]> {
        let _ = self.called("load_space");
        let space = self.script.lock().unwrap().space.min(bytes_max);
        self.lent.resize(space, 0);
        (space > 0).then_some(&mut self.lent[..])
    }

    fn load_filled(&mut self, bytes: usize) -> Result<(), Errno> {
        self.asked("load_filled")?;
        self.script.lock().unwrap().loaded.extend_from_slice(&self.lent[..bytes]);
        Ok(())
    }

    fn load_finish(&mut self) -> Result<(), Fault> {
        self.arc("load_finish", |device| {
            assert!(device.loading);
            device.loading = false;
        })
    }

    fn load_abort(&mut self) {
        let _ = self.arc("load_abort", |device| {
            assert!(device.loading);
            device.loading = false;
        });
    }
}

/// A device whose model is a [`Recorder`].
pub struct Rig {
    pub device: Loopback,
    pub machine: Arc<Machine>,
    pub script: Arc<Mutex<Script>>,
    pub flags: MigrationFlags,
}

impl Rig {
    pub fn new(flags: MigrationFlags) -> Rig {
        Rig::build(Some(flags))
    }

    pub fn without_migration() -> Rig {
        Rig::build(None)
    }

    fn build(flags: Option<MigrationFlags>) -> Rig {
        let script = Arc::new(Mutex::new(Script { running: true, p2p: true, ..Script::default() }));
        let memory = vec![0; REGION_BYTES as usize];
        let model = Recorder { flags, script: Arc::clone(&script), lent: Vec::new(), memory };
        let machine = Machine::simple(model);
        let device = Loopback::new("test", Arc::clone(&machine));
        Rig { device, machine, script, flags: flags.unwrap_or(MigrationFlags::empty()) }
    }

    /// Drives to a state by a way that the standard allows.
    pub fn at(flags: MigrationFlags, state: State) -> (Rig, Option<Box<dyn DataStream>>) {
        let rig = Rig::new(flags);
        let stream = match state {
            State::Error => {
                rig.fault("stop", Fault::Broken(Errno::EIO));
                // With P2P the device is on RUNNING_P2P when that happens.
                rig.device.set_state(State::Stop).err().expect("the fault");
                None
            }
            state => rig.device.set_state(state).unwrap(),
        };
        rig.script().calls.clear();
        assert_eq!(rig.state(), state);
        (rig, stream)
    }

    pub fn script(&self) -> std::sync::MutexGuard<'_, Script> {
        self.script.lock().unwrap()
    }

    pub fn fault(&self, call: &'static str, fault: Fault) {
        self.script().faults.push_back((call, fault));
    }

    pub fn calls(&self) -> Vec<&'static str> {
        std::mem::take(&mut self.script().calls)
    }

    pub fn state(&self) -> State {
        self.device.state().unwrap()
    }

    /// The model is in the condition that the state stands for, and a session is open exactly
    /// where one belongs.
    pub fn check(&self) {
        let state = self.state();
        let script = self.script();
        assert_eq!(self.machine.session().is_some(), state.has_session(), "{state}");
        if state != State::Error {
            assert_eq!(script.running, state.is_running(), "{state}");
            if script.running && self.flags.contains(MigrationFlags::P2P) {
                assert_eq!(script.p2p, matches!(state, State::Running | State::PreCopy), "{state}");
            }
        }
        assert_eq!(script.saving, state.is_saving(), "{state}");
        assert_eq!(script.loading, state == State::Resuming, "{state}");
    }
}

/// The errno of a refusal.
pub fn refused<T>(result: Result<T, Error>) -> Errno {
    match result {
        Err(Error::Refused { errno, .. }) => errno,
        Err(other) => panic!("not refused, but: {other}"),
        Ok(_) => panic!("not refused"),
    }
}

/// What each model call does to the device: the call that a step makes, from the list of arcs.
pub fn expected_calls(flags: MigrationFlags, from: State, to: State) -> Vec<&'static str> {
    let path = fsm::path(flags, from, to).unwrap();
    path.arcs().flat_map(|arc| calls_of(arc.from, arc.to)).copied().collect()
}

fn calls_of(from: State, to: State) -> &'static [&'static str] {
    use State::*;
    match (from, to) {
        (Running, RunningP2p) | (PreCopy, PreCopyP2p) => &["quiesce_p2p"],
        (RunningP2p, Running) | (PreCopyP2p, PreCopy) => &["resume_p2p"],
        (Running | RunningP2p, Stop) => &["stop"],
        (Stop, Running | RunningP2p) => &["start"],
        (Running, PreCopy) | (RunningP2p, PreCopyP2p) | (Stop, StopCopy) => &["save_begin"],
        (PreCopy, Running) | (PreCopyP2p, RunningP2p) | (StopCopy, Stop) => &["save_end"],
        (PreCopy | PreCopyP2p, StopCopy) => &["stop", "save_final"],
        (Stop, Resuming) => &["load_begin"],
        (Resuming, Stop) => &["load_finish"],
        _ => panic!("{from} -> {to} is no step"),
    }
}

/// A FEATURE request straight onto the machine.
pub fn feature(rig: &Rig, index: u16, op: FeatureOp, payload: &mut [u8]) -> Result<usize, Errno> {
    let call = FeatureHeader::new(FeatureIndex(index), op, payload.len() as u32).call()?;
    rig.machine.feature(call, payload, limosa_client::Refers::Nothing).map(|done| done.payload_bytes)
}
