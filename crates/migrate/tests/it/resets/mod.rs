//! A device that somebody else resets while it is moved or saved: the guest by a function level reset, a VMM as it
//! comes up. What arrives is the state that the source had, or nothing does.

mod destinations;
mod sources;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::common::closures::AtCommit;
use crate::common::hooked::{
    Call, Estimates, Hook, Hooked, before, before_call, ends_in_time, move_over_a_link,
};
use crate::common::options;
use limosa_client::Device;
use limosa_migrate::{
    AfterLoad, AfterSave, Changed, Destination, Error, Ledger, Loss, MovedDevice, Options, Outcome, Received,
    SnapshotFile, Source, Vmm, WhenStalled, verify,
};
use limosa_protocol::{FeatureIndex, MigrationFlags, State};

/// The guest's state: a reset device has zeroes.
fn guest() -> Vec<u8> {
    (0..1000_u32).map(|at| at as u8 | 1).collect()
}

fn device(name: &str, flags: MigrationFlags, counts_resets: bool, data: &[u8]) -> Hooked {
    let device = Hooked::new(name, flags, data);
    if counts_resets { device } else { device.without(FeatureIndex::RESET_COUNT) }
}

/// A VMM within whose stop the device is reset; it knows whether the destination was told to run.
#[derive(Default)]
struct Resetting<'a> {
    at_stop: Option<&'a Hooked>,
    prepared: AtomicBool,
}

impl Vmm for Resetting<'_> {
    fn stop(&self) -> Result<(), String> {
        self.at_stop.map_or(Ok(()), |device| device.inner.reset().map_err(|error| error.to_string()))
    }
    fn prepare(&self) -> Result<(), String> {
        self.prepared.store(true, Ordering::SeqCst);
        Ok(())
    }
}

struct Moved {
    outcome: Outcome,
    received: Received,
    /// COMMIT came.
    committed: bool,
}

fn run(source: &Hooked, destination: &Hooked, at_stop: bool, options: &Options) -> Moved {
    let (here, there) = ([MovedDevice::new(source)], [MovedDevice::new(destination)]);
    let vmm = Resetting { at_stop: at_stop.then_some(source), ..Resetting::default() };
    let ledger = Ledger::new();
    let (outcome, received) = move_over_a_link(
        Source::new(&here, options).with_vmm(&vmm),
        Destination::new(&there, &ledger, options).with_vmm(&vmm),
    );
    Moved { outcome, received, committed: vmm.prepared.into_inner() }
}

/// Whatever was moved is what the source had when it had given its last byte; otherwise the source runs.
fn check_source(source: &Hooked, destination: &Hooked, moved: &Moved, what: &str) {
    match &moved.outcome {
        Outcome::Moved(_) => {
            assert!(matches!(moved.received, Received::Runs(_)), "{what}: {:?}", moved.received);
            assert_eq!(Some(destination.data()), source.given(), "{what}: another state arrived");
            assert!(!source.state().is_running() || source.data() != guest(), "{what}: both run");
        }
        Outcome::Undone { .. } => {
            assert_eq!(source.state(), State::Running, "{what}");
            assert!(destination.data() != guest(), "{what}: the destination has it still");
        }
        Outcome::InDoubt(doubt) => panic!("{what}: {doubt:?}"),
    }
}
