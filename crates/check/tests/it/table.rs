//! The tables of faults in `docs/conformance`, held to what happens.

use std::path::Path;

/// What a run over all faults has shown.
pub struct Table<'a> {
    /// The page's file name.
    pub file: &'a str,
    /// The page as it ought to be.
    pub page: String,
    /// Faults that no check of their clause has found.
    pub missed: Vec<String>,
    /// Checks that fail for no fault.
    pub never: Vec<String>,
    /// Clauses that no fault breaks.
    pub unbroken: Vec<&'static str>,
}

impl Table<'_> {
    /// Compares the page that is kept with this one, or writes it anew with UPDATE_DOCS set.
    pub fn hold(self) {
        let Table { file, page, missed, never, unbroken } = self;
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/conformance").join(file);
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(&path, &page).unwrap();
        }
        assert!(missed.is_empty(), "no check of its clause finds it:\n{}", missed.join("\n"));
        assert!(never.is_empty(), "checks that never fail:\n{}", never.join("\n"));
        assert!(unbroken.is_empty(), "clauses that no fault breaks: {unbroken:?}");
        let kept = std::fs::read_to_string(path).unwrap();
        for (line, kept) in page.lines().zip(kept.lines()) {
            assert_eq!(line, kept, "the table says otherwise; UPDATE_DOCS=1 writes it anew");
        }
        assert_eq!(page.lines().count(), kept.lines().count());
    }
}
