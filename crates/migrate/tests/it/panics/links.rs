//! Panics of a link.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use limosa_migrate::Outcome;
use limosa_migrate::link::{Link, LinkError, SocketLink, Wait};
use limosa_testing::forward_link;

use super::{FLAGS, Machine};
use crate::common::hooked::{ends_in_time, panic_quietly};

/// A link that panics in its n-th call, or in all from that on.
struct PanickingLink {
    inner: SocketLink,
    calls: AtomicUsize,
    panics: Range<usize>,
}

impl PanickingLink {
    fn called(&self) -> &SocketLink {
        if self.panics.contains(&self.calls.fetch_add(1, Ordering::SeqCst)) {
            panic_quietly();
        }
        &self.inner
    }
}

impl Link for PanickingLink {
    forward_link!(|this| this.called(); write, read);
    forward_link!(|this| this.inner; finish, peer);
}

/// Moves over links of which one side's panics there.
fn panics_of_a_link(at_source: bool, panics: Range<usize>) {
    let what = format!("calls {panics:?} of the link, source: {at_source}");
    let again = what.clone();
    ends_in_time(&what, move || {
        let mut machine = Machine::new(FLAGS);
        machine.options = machine.options.with_silence_max(std::time::Duration::from_millis(200));
        let (outcome, received) = machine.run_over(|inner, is_source| {
            let panics = if is_source == at_source { panics.clone() } else { 0..0 };
            Box::new(PanickingLink { inner, calls: AtomicUsize::new(0), panics })
        });
        match outcome {
            // A COMMIT that was not sent: it is in doubt until the source has asked.
            Outcome::InDoubt(_) => assert!(!machine.source.state().is_running(), "{again}"),
            outcome => machine.check(&outcome, &received, &again),
        }
    });
}

#[test]
fn a_panic_in_any_call_of_a_link_is_an_error() {
    for at_source in [true, false] {
        for n in 0..60 {
            panics_of_a_link(at_source, n..n + 1);
        }
    }
}

#[test]
fn a_link_that_panics_from_any_call_on_is_an_error() {
    for at_source in [true, false] {
        for n in 0..60 {
            panics_of_a_link(at_source, n..usize::MAX);
        }
    }
}
