//! A device that is copied to be replaced, beside its VMM.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::common::Rig;
use limosa_client::DeviceExt;
use limosa_protocol::{MigrationFlags, State};

/// The VMM's session is its own, and its state is what it has set, whenever a copy begins or ends.
#[test]
fn a_copy_that_began_in_the_same_instant_hid_the_state_that_the_vmm_had_set_and_ended_its_session() {
    let rig = Rig::new(MigrationFlags::SETS[3]);
    let vmm = &rig.device;
    let ends = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ends.load(Ordering::Relaxed) {
                if let Ok(Some(copying)) = rig.machine.begin_copy() {
                    rig.machine.end_copy(copying);
                }
            }
        });
        let works = || {
            for _ in 0..20_000 {
                let session = vmm.set_state(State::PreCopy).map(|session| session.is_some());
                let state = vmm.state();
                let keeps = vmm.set_state(State::StopCopy).map(|session| session.is_none());
                let runs = vmm.set_state(State::Running).is_ok();
                let found = (session.ok(), state.ok(), keeps.ok(), runs);
                if found != (Some(true), Some(State::PreCopy), Some(true), true) {
                    return Some(found);
                }
            }
            None
        };
        let wrong = works();
        ends.store(true, Ordering::Relaxed);
        assert_eq!(wrong, None);
    });
}
