//! Where a device of the tests can fail, and the script that says where it does.

use std::sync::{Mutex, PoisonError};

use limosa_device::Fault;

/// Where a device can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Quiesce,
    Stop,
    Start,
    SaveBegin,
    Save,
    SaveFinal,
    LoadBegin,
    Load,
    LoadFinish,
    Reset,
}

impl Step {
    /// Those of a move in which nothing else goes wrong.
    pub const ALL: [Step; 9] = [
        Step::Quiesce,
        Step::Stop,
        Step::Start,
        Step::SaveBegin,
        Step::Save,
        Step::SaveFinal,
        Step::LoadBegin,
        Step::Load,
        Step::LoadFinish,
    ];
}

/// A fault: at the step, after this many times that it went well, this way.
#[derive(Clone, Copy, Debug)]
struct Fail {
    step: Step,
    after: u32,
    how: Fault,
}

/// What is to go wrong with a device, once.
#[derive(Debug, Default)]
pub struct Script(Mutex<Option<Fail>>);

impl Script {
    /// It fails at this step, after this number of successes.
    pub fn fail(&self, step: Step, after: u32, how: Fault) {
        self.set(Some(Fail { step, after, how }));
    }

    /// It does not fail.
    pub fn clear(&self) {
        self.set(None);
    }

    fn set(&self, fail: Option<Fail>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = fail;
    }

    /// It comes to this step.
    pub fn step(&self, step: Step) -> Result<(), Fault> {
        let mut script = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *script {
            Some(fail) if fail.step == step && fail.after > 0 => fail.after -= 1,
            Some(fail) if fail.step == step => {
                let how = fail.how;
                *script = None;
                return Err(how);
            }
            _ => {}
        }
        Ok(())
    }
}
