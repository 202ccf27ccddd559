//! The list of clauses, and the page that comes from it.

use std::collections::BTreeSet;

use limosa_check::{CLAUSES, checks, clauses_document, coverage};

#[test]
fn every_clause_is_checked_or_has_a_reason_why_not() {
    let checks = checks();
    let covered = coverage(&checks.iter().collect::<Vec<_>>());
    for clause in CLAUSES {
        let checked = !covered[clause.id].is_empty();
        assert_eq!(
            checked,
            clause.unchecked.is_empty(),
            "{}: checked {checked}, reason `{}`",
            clause.id,
            clause.unchecked
        );
    }
}

#[test]
fn every_check_cites_clauses_that_there_are() {
    let ids: BTreeSet<_> = CLAUSES.iter().map(|clause| clause.id).collect();
    assert_eq!(ids.len(), CLAUSES.len(), "an id twice");
    let checks = checks();
    for check in &checks {
        assert!(!check.clauses.is_empty(), "{} cites none", check.id);
        assert!(check.clauses.iter().all(|clause| ids.contains(clause)), "{check:?}");
        assert!(check.id.starts_with(&format!("{}.", check.family)), "{check:?}");
    }
    let names: BTreeSet<_> = checks.iter().map(|check| &check.id).collect();
    assert_eq!(names.len(), checks.len(), "an id twice");
    assert!(checks.len() > 200, "{}", checks.len());
}

#[test]
fn the_page_of_clauses_is_that_of_the_source() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/conformance/clauses.md");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path, clauses_document()).unwrap();
    }
    let page = std::fs::read_to_string(path).unwrap();
    assert!(page == clauses_document(), "run `limosa check --clauses > docs/conformance/clauses.md`");
}
