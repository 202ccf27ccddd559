//! Publications that fail, run full or lose their answer: the source runs again only where the snapshot is not.

use super::*;

#[test]
fn a_source_runs_again_wherever_its_snapshot_s_place_runs_full() {
    let whole = saved().0.len();
    for room in (0..whole).step_by(97).chain([whole - 1]) {
        let (ends, _) = ends();
        let (outcome, place) = save(&ends, Place { room: Some(room), ..Place::default() }, AfterSave::Stop);
        // How often devices are looked at, and so how many frames there are, differs from one save to the next.
        if matches!(outcome, Outcome::Moved(_)) && room + 97 >= whole {
            assert!(place.bytes().len() <= room, "{room}");
            continue;
        }
        let Outcome::Undone { why: Error::Snapshot { name, error, .. }, .. } = &outcome else {
            panic!("{room}: {outcome:?}")
        };
        assert_eq!((name.as_str(), error.kind()), ("the place", io::ErrorKind::StorageFull), "{room}");
        assert!(place.published.lock().unwrap().is_none(), "{room}");
        assert_eq!(ends.source[0].state(), State::Running, "{room}");
        assert!(ends.source[0].holds_guest() && !ends.source[0].is_logging(), "{room}");
    }
}

#[test]
fn a_source_runs_again_when_its_snapshot_cannot_be_published() {
    for after in [AfterSave::Run, AfterSave::Stop] {
        let (ends, _) = ends();
        let (outcome, _) = save(&ends, Place { publishes: Publishes::Refuses, ..Place::default() }, after);
        let Outcome::Undone { why, .. } = outcome else { panic!("{after:?}: {outcome:?}") };
        assert!(why.to_string().starts_with("the place: publishing it: "), "{why}");
        assert_eq!(ends.source[0].state(), State::Running, "{after:?}");
        assert!(ends.source[0].holds_guest() && !ends.source[0].is_logging(), "{after:?}");
    }
}

#[test]
fn a_snapshot_that_may_not_survive_a_power_failure_is_noted_in_the_report() {
    for after in [AfterSave::Run, AfterSave::Stop] {
        let (ends, _) = ends();
        let (outcome, place) =
            save(&ends, Place { publishes: Publishes::NotDurably, ..Place::default() }, after);
        let Outcome::Moved(report) = outcome else { panic!("{after:?}: {outcome:?}") };
        let [note] = &report.notes[..] else { panic!("{:?}", report.notes) };
        assert!(note.starts_with("the place: it was saved, and may not survive a power failure: "), "{note}");
        let expected = if after == AfterSave::Run { State::Running } else { State::Stop };
        assert_eq!(ends.source[0].state(), expected);
        assert!(matches!(load(&ends, Place::of(&place.bytes())), Received::Runs(_)));
    }
}

fn loses_answer(is_there: bool, can_withdraw: bool) -> Place {
    Place { publishes: Publishes::LosesAnswer { is_there, can_withdraw }, ..Place::default() }
}

#[test]
fn a_guest_that_runs_on_is_undone_where_the_answer_to_its_publication_was_lost() {
    for is_there in [false, true] {
        let (ends, _) = ends();
        let (outcome, _) = save(&ends, loses_answer(is_there, true), AfterSave::Run);
        let Outcome::Undone { why: why @ Error::PublicationUnknown { .. }, .. } = outcome else {
            panic!("{outcome:?}")
        };
        let why = why.to_string();
        assert!(why.contains("it is not known whether the snapshot was published"), "{why}");
        assert!(why.contains("`limosa verify the place`"), "{why}");
        assert_eq!(ends.source[0].state(), State::Running);
        assert!(ends.source[0].holds_guest() && !ends.source[0].is_logging());
    }
}

#[test]
fn a_stopped_guest_ran_again_where_the_answer_to_its_publication_was_lost() {
    for (is_there, can_withdraw, decision) in [
        (true, true, Decision::Committed),
        (true, false, Decision::Committed),
        (false, true, Decision::NotCommitted),
        (false, false, Decision::Unknown),
    ] {
        let what = format!("there: {is_there}, can be withdrawn: {can_withdraw}");
        let (ends, _) = ends();
        let (outcome, place) = save(&ends, loses_answer(is_there, can_withdraw), AfterSave::Stop);
        let Outcome::InDoubt(doubt) = outcome else { panic!("{what}: {outcome:?}") };
        assert!(matches!(doubt.why, Error::PublicationUnknown { .. }), "{what}: {doubt:?}");
        assert!(!ends.source[0].state().is_running(), "{what}");
        let found = published(&Handle(place), doubt.id, ends.options.silence_max, None).unwrap();
        assert_eq!(found, decision, "{what}");
        match (ends.with_source(|source| source.decide(found, doubt)), decision) {
            (Outcome::Moved(_), Decision::Committed) => assert_eq!(ends.source[0].state(), State::Stop),
            (Outcome::Undone { .. }, Decision::NotCommitted) => {
                assert_eq!(ends.source[0].state(), State::Running, "{what}");
                assert!(ends.source[0].holds_guest() && !ends.source[0].is_logging(), "{what}");
            }
            (Outcome::InDoubt(_), Decision::Unknown) => assert!(!ends.source[0].state().is_running()),
            (outcome, _) => panic!("{what}: {outcome:?}"),
        }
    }
}

#[test]
fn another_snapshot_or_a_damaged_one_does_not_tell_what_became_of_this_one() {
    let (bytes, ends) = saved();
    let id = MigrationId([9; 16]);
    let of = |bytes: &[u8]| Handle(Arc::new(Place::of(bytes)));
    for bytes in [&bytes[..], &bytes[..bytes.len() / 2], b"something else", b""] {
        let found = published(&of(bytes), id, ends.options.silence_max, None).unwrap();
        assert_eq!(found, Decision::Unknown);
    }
    let found = published(&of(&forged(&bytes)), preface_id(&bytes), ends.options.silence_max, None);
    assert_eq!(found.unwrap(), Decision::Unknown, "it is there, and not complete");
}

fn preface_id(bytes: &[u8]) -> MigrationId {
    limosa_stream::Preface::decode(bytes.first_chunk::<PREFACE_BYTES>().unwrap()).unwrap().id
}

#[test]
fn a_file_that_was_not_published_is_withdrawn_and_its_source_may_run() {
    let (bytes, ends) = saved();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("snapshot");
    let (file, id) = (SnapshotFile::new(&path), preface_id(&bytes));
    let find = || published(&file, id, ends.options.silence_max, None).unwrap();
    assert_eq!(find(), Decision::Unknown, "it may be another folder that is mounted there now");
    let partial = folder.path().join(".snapshot.1.partial");
    std::fs::write(&partial, &bytes).unwrap();
    assert_eq!(find(), Decision::NotCommitted);
    assert_eq!(find(), Decision::NotCommitted, "as a later process finds it");
    assert_eq!(std::fs::read(&partial).unwrap(), &bytes[..PREFACE_BYTES], "nothing that could be loaded");
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(find(), Decision::Committed);
    let nowhere = SnapshotFile::new(folder.path().join("no/where"));
    assert!(published(&nowhere, id, ends.options.silence_max, None).is_err());
}
