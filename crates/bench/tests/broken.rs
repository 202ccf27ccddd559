//! The suite on devices in this process that break the protocol, hang or go away at a chosen request.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use limosa_bench::{Document, Event, Options, Target, measure};
use limosa_client::{Device, Error, FeatureReply, FeatureRequest, Result};
use limosa_device::{Loopback, Machine};
use limosa_models::synthetic::{Synthetic, SyntheticConfig};
use limosa_protocol::{FeatureIndex, FeatureOp};
use limosa_testing::forward_device;

/// What goes wrong.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    Garbage,
    Gone,
    Hangs,
}

/// A device whose faults come with every so-many-th SET of its state.
struct Broken {
    inner: Loopback,
    fault: Fault,
    every: u32,
    sets: Arc<AtomicU32>,
    // Never notified: it hangs for good.
    nothing: (Mutex<()>, Condvar),
}

impl Device for Broken {
    forward_device!(|this| this.inner; name, identity, reset, info, registers);

    fn feature(&self, request: &mut FeatureRequest<'_>) -> Result<FeatureReply> {
        let sets = request.index == FeatureIndex::MIG_DEVICE_STATE && request.op == FeatureOp::SET;
        if sets && (self.sets.fetch_add(1, Ordering::Relaxed) + 1).is_multiple_of(self.every) {
            let device = self.inner.name().to_owned();
            match self.fault {
                Fault::Garbage => return Err(Error::Misbehaved { device, what: "nonsense".into() }),
                Fault::Gone => return Err(Error::Disconnected { device, reason: "it died".into() }),
                Fault::Hangs => {
                    let held = self.nothing.0.lock().unwrap();
                    drop(self.nothing.1.wait_while(held, |()| true));
                }
            }
        }
        self.inner.feature(request)
    }
}

/// For an answer that comes.
const LIMIT: Duration = Duration::from_secs(60);

/// Runs the suite on a device with this fault, which can be opened this number of times.
fn run(fault: Fault, every: u32, opens: u32) -> Document {
    let config: SyntheticConfig = "state=256K,block=64K".parse().unwrap();
    let machine = Machine::simple(Synthetic::new(config).unwrap());
    let (sets, opened) = (Arc::new(AtomicU32::new(0)), AtomicU32::new(0));
    let open = move || -> Result<Box<dyn Device>> {
        if opened.fetch_add(1, Ordering::Relaxed) >= opens {
            return Err(Error::Disconnected { device: "device".into(), reason: "nobody listens".into() });
        }
        let inner = Loopback::new("device", Arc::clone(&machine));
        let nothing = (Mutex::new(()), Condvar::new());
        Ok(Box::new(Broken { inner, fault, every, sets: Arc::clone(&sets), nothing }))
    };
    // A loopback has no socket below it, and so no floor.
    let fd = Some(Arc::new(Mutex::new(None)));
    let target = Target { name: "device".into(), open: Arc::new(open), peer: None, fd, in_use: false };
    let options = Options {
        each: Duration::from_micros(1),
        // Three times what it costs where a device hangs; far above what a busy machine needs elsewhere.
        limit: if matches!(fault, Fault::Hangs) && every < 100 { Duration::from_secs(1) } else { LIMIT },
        cancel: Arc::new(AtomicBool::new(false)),
    };
    let mut begun = 0;
    let document = measure(&target, &options, &mut |event| {
        if matches!(event, Event::Begins { .. }) {
            begun += 1;
        }
    });
    let document = document.unwrap().document;
    assert!(begun > 0);
    document
}

#[test]
fn a_device_that_answers_nonsense_now_and_then_is_opened_again_and_measured_on() {
    let document = run(Fault::Garbage, 9, u32::MAX);
    assert!(document.measures.len() > 10 && !document.skipped.is_empty(), "{document:#?}");
    assert!(document.skipped.iter().all(|skipped| skipped.why.contains("nonsense")), "{document:#?}");
    assert_eq!(document.ended_early, None);
    assert!(document.left_in.starts_with("RUNNING"), "{}", document.left_in);
}

#[test]
fn a_device_that_dies_and_does_not_come_back_ends_the_run_and_that_says_where() {
    let document = run(Fault::Gone, 20, 1);
    let why = document.ended_early.as_deref().unwrap();
    assert!(why.contains("after ") && why.contains("cannot be opened any more"), "{why}");
    assert!(!document.measures.is_empty(), "{document:#?}");
    assert!(document.left_in.starts_with("an unknown state"), "{}", document.left_in);
}

#[test]
fn a_device_that_hangs_costs_the_limit_three_times_and_no_more() {
    let document = run(Fault::Hangs, 1_000_000, u32::MAX);
    assert_eq!(document.ended_early, None, "it did not come to that");
    let document = run(Fault::Hangs, 10, u32::MAX);
    assert!(!document.measures.is_empty() && !document.skipped.is_empty(), "{document:#?}");
    let silent = document.skipped.iter().filter(|skipped| skipped.why.contains("no answer within"));
    assert!(silent.count() > 0, "{document:#?}");
}
