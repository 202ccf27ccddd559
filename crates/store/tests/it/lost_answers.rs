//! The request that publishes a snapshot, or its answer, is lost on the way: what the saver reports is true.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::support::{BUCKET, End, Gate, Plan, Server, object};
use limosa_client::DeviceExt;
use limosa_migrate::{AfterLoad, AfterSave, Decision, Error, Outcome, Received, SnapshotSource, published};
use limosa_protocol::State;
use limosa_store::Object;

/// The snapshot is whole, and the guest goes on where it is loaded.
#[track_caller]
fn is_there(server: &Server, source: &End) {
    assert_eq!((server.objects(), server.unfinished()), (vec!["lost".to_owned()], 0));
    let end = End::new(0);
    let received = end.load(&object(server, "lost"), AfterLoad::Run);
    assert!(matches!(received, Received::Runs(_)), "{received:?}");
    assert!(end.contents() == source.contents());
}

/// A save through a gate.
struct Saved {
    server: Server,
    gate: Arc<Gate>,
    object: Arc<Object>,
    source: End,
    outcome: Outcome,
}

fn save(plan: Plan, after: AfterSave) -> Saved {
    let (server, source) = (Server::start(), End::new(7));
    let (gate, variables) = Gate::new(&server, plan);
    let object = Arc::new(Object::new(&format!("s3://{BUCKET}/lost"), variables).unwrap());
    let outcome = source.save(&*object, after, None);
    Saved { server, gate, object, source, outcome }
}

impl Saved {
    /// It is reported as saved, and it is.
    #[track_caller]
    fn is_saved(&self) {
        assert!(matches!(self.outcome, Outcome::Moved(_)), "{:?}", self.outcome);
        assert_eq!(self.source.device.state().unwrap(), State::Stop);
        is_there(&self.server, &self.source);
    }

    fn completions(&self) -> usize {
        self.gate.completions.load(Ordering::SeqCst)
    }
}

#[test]
fn a_snapshot_whose_completion_is_lost_on_the_way_is_published_by_the_next_one() {
    let saved = save(Plan::RequestIsLost, AfterSave::Stop);
    saved.is_saved();
    assert!(saved.completions() > 1);
}

#[test]
fn a_snapshot_that_was_published_though_the_answer_was_lost_is_said_to_be_there() {
    let saved = save(Plan::AnswerIsLost, AfterSave::Stop);
    saved.is_saved();
    assert!(saved.completions() > 0);
}

#[test]
fn a_completion_that_is_carried_out_late_is_not_taken_for_one_that_failed() {
    save(Plan::ComesLate, AfterSave::Stop).is_saved();
}

#[test]
fn an_upload_that_another_client_has_aborted_is_no_snapshot_and_the_guest_runs_again() {
    let Saved { source, outcome, .. } = save(Plan::IsAborted, AfterSave::Stop);
    let Outcome::Undone { why: why @ Error::Snapshot { .. }, .. } = outcome else { panic!("{outcome:?}") };
    assert!(why.to_string().contains("the upload was aborted by another client"), "{why}");
    assert_eq!(source.device.state().unwrap(), State::Running);
}

#[test]
fn a_saver_that_cannot_learn_whether_it_published_says_so() {
    let Saved { server, source, outcome, .. } = save(Plan::NetworkIsLost, AfterSave::Run);
    let Outcome::Undone { why: why @ Error::PublicationUnknown { .. }, .. } = outcome else {
        panic!("{outcome:?}")
    };
    let why = why.to_string();
    assert!(why.contains("it is not known whether the snapshot was published"), "{why}");
    assert!(why.contains("look with `limosa verify s3://snapshots/lost`"), "{why}");
    assert_eq!(source.device.state().unwrap(), State::Running, "the guest goes on");
    // It is there, and a look finds it.
    let (there, limit) = (object(&server, "lost"), source.options.silence_max);
    limosa_migrate::verify(&there, limit, None).unwrap();
}

/// Settles a save in doubt by looking at this place.
fn settle(saved: Saved, place: &dyn SnapshotSource) -> (Server, End, Decision, Outcome) {
    let Saved { server, source, outcome, .. } = saved;
    assert!(!source.device.state().unwrap().is_running(), "it may be loaded elsewhere");
    let Outcome::InDoubt(doubt) = outcome else { panic!("{outcome:?}") };
    assert!(matches!(doubt.why, Error::PublicationUnknown { .. }), "{doubt:?}");
    let decision = published(place, doubt.id, source.options.silence_max, None).unwrap();
    let outcome = source.decide(decision, doubt);
    (server, source, decision, outcome)
}

#[test]
fn a_guest_that_was_to_stay_stopped_ran_again_though_its_snapshot_was_published() {
    let saved = save(Plan::NetworkIsLost, AfterSave::Stop);
    let by_another = object(&saved.server, "lost");
    let (server, source, decision, outcome) = settle(saved, &by_another);
    assert_eq!(decision, Decision::Committed);
    assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
    assert_eq!(source.device.state().unwrap(), State::Stop);
    is_there(&server, &source);
}

#[test]
fn a_completion_that_never_arrived_is_withdrawn_by_the_saver_and_its_guest_runs_again() {
    let saved = save(Plan::NetworkIsLostBefore, AfterSave::Stop);
    saved.gate.closed.store(false, Ordering::SeqCst);
    let same = Arc::clone(&saved.object);
    let (server, source, decision, outcome) = settle(saved, &*same);
    assert_eq!(decision, Decision::NotCommitted);
    assert!(matches!(outcome, Outcome::Undone { .. }), "{outcome:?}");
    assert_eq!(source.device.state().unwrap(), State::Running);
    assert_eq!((server.objects().len(), server.unfinished()), (0, 0));
}

#[test]
fn a_process_that_does_not_know_the_upload_cannot_tell_that_it_will_never_be_completed() {
    let saved = save(Plan::NetworkIsLostBefore, AfterSave::Stop);
    let by_another = object(&saved.server, "lost");
    let (_server, source, decision, outcome) = settle(saved, &by_another);
    assert_eq!(decision, Decision::Unknown);
    assert!(matches!(outcome, Outcome::InDoubt(_)), "{outcome:?}");
    assert!(!source.device.state().unwrap().is_running());
}
