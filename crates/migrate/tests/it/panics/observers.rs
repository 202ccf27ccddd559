//! Panics of an observer.

use limosa_migrate::{Estimate, Observer, Outcome, Phase, Received, Round, Totals};
use std::sync::Arc;

use super::{FLAGS, Machine, Panicking, panicked};
use crate::common::hooked::ends_in_time;

impl Observer for Panicking<String> {
    fn phase(&self, phase: Phase) {
        self.call(format!("{phase:?}"));
    }
    fn moved(&self, _: Totals) {
        self.call("moved".into());
    }
    fn round(&self, _: &Round) {
        self.call("round".into());
    }
    fn estimate(&self, _: &Estimate) {
        self.call("estimate".into());
    }
}

#[test]
fn a_panic_in_any_call_of_an_observer_is_an_error_until_the_commit_and_then_a_note() {
    for at_source in [true, false] {
        for n in 0.. {
            let what = format!("the observer's call {n}, source: {at_source}");
            let again = what.clone();
            let fired = ends_in_time(&what, move || {
                let observer = Arc::new(Panicking::<String>::new(n));
                let mut machine = Machine::new(FLAGS);
                machine.observers[usize::from(!at_source)] = observer.clone();
                let (outcome, received) = machine.run();
                let place = observer.fired.lock().unwrap().clone();
                let what = format!("{again}: {place:?}");
                machine.check(&outcome, &received, &what);
                match (&outcome, &received, place.is_some()) {
                    (Outcome::Moved(here), Received::Runs(there), true) => {
                        let report = if at_source { here } else { there };
                        let noted = report.notes.iter().any(|note| note.contains("Observer panicked"));
                        assert!(noted, "{what}: {:?}", report.notes);
                        let after = ["Start", "Finish", "Commit", "moved"];
                        assert!(after.contains(&place.as_deref().unwrap()), "{what}: before the commit");
                    }
                    (_, _, true) => {
                        assert_eq!(panicked(&outcome, &received).as_deref(), Some("Observer"), "{what}");
                    }
                    (_, _, false) => assert!(matches!(outcome, Outcome::Moved(_)), "{what}: {outcome:?}"),
                }
                place.is_some()
            });
            if !fired {
                break;
            }
        }
    }
}
