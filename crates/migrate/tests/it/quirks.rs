//! Devices that are not as the standard would have them: what can be lived with is, what cannot be is
//! refused by name.

use std::sync::Arc;

use crate::common::{Ends, Quirks, world};
use limosa_migrate::{FilePages, Outcome, PAGE_BYTES};
use limosa_protocol::{Errno, FeatureIndex, MigrationFlags};
use limosa_testing::memfd;

const PAGES: u64 = 64;

/// Moves a device with these quirks, and memory that it writes; why not, if it was not moved.
fn moved_with(quirks: Quirks) -> Option<String> {
    let (source, destination) = world("odd", MigrationFlags::SETS[3], 5000);
    let [here, there] = [(); 2].map(|()| memfd(PAGES * PAGE_BYTES));
    source.map(&here, PAGES * PAGE_BYTES);
    source.quirks(quirks.clone());
    let mut ends = Ends::new(vec![source], vec![destination]);
    ends.memory =
        Some((Arc::new(FilePages::new(here, 0)), Arc::new(FilePages::new(there, 0)), PAGES * PAGE_BYTES));
    let (outcome, received) = ends.run_plain();
    let why = match &outcome {
        Outcome::Undone { why, .. } => Some(why.to_string()),
        _ => None,
    };
    assert_eq!(ends.check(outcome, received, &format!("{quirks:?}")), why.is_none());
    why
}

#[test]
fn devices_without_optional_features_move() {
    let lacks = |features: &[FeatureIndex]| Quirks { lacks: features.to_vec(), ..Quirks::default() };
    let all =
        [FeatureIndex::MIG_DATA_SIZE, FeatureIndex::MIG_PRECOPY_INFO_V2, FeatureIndex::DMA_LOGGING_START];
    for quirks in [
        lacks(&all[..1]),
        lacks(&all[..2]),
        lacks(&all),
        Quirks { no_precopy_info: true, ..Quirks::default() },
        Quirks { end_in_precopy: true, ..Quirks::default() },
        Quirks { end_in_precopy: true, no_precopy_info: true, ..Quirks::default() },
        Quirks { no_info: true, ..Quirks::default() },
    ] {
        assert_eq!(moved_with(quirks), None);
    }
}

#[test]
fn coarse_logs_lose_no_page() {
    for bytes in [8192, 65536, PAGES * PAGE_BYTES] {
        assert_eq!(moved_with(Quirks { log_page_bytes: Some(bytes), ..Quirks::default() }), None, "{bytes}");
    }
}

#[test]
fn a_report_that_fails_makes_everything_dirty() {
    let refuses = Some((FeatureIndex::DMA_LOGGING_REPORT, Errno::EIO));
    assert_eq!(moved_with(Quirks { refuses, ..Quirks::default() }), None);
}

#[test]
fn a_log_that_does_not_start_undoes_the_move() {
    let refuses = Some((FeatureIndex::DMA_LOGGING_START, Errno::EBUSY));
    let why = moved_with(Quirks { refuses, ..Quirks::default() }).unwrap();
    assert!(why.contains("starting its DMA log") && why.contains("EBUSY"), "{why}");
}

#[test]
fn a_log_with_impossible_pages_undoes_the_move_and_is_stopped() {
    for bytes in [0, 1, 512, 5000, u64::MAX] {
        let quirks = Quirks { log_page_bytes_said: Some(bytes), ..Quirks::default() };
        let why = moved_with(quirks).unwrap();
        assert!(why.contains(&format!("pages of {bytes} bytes")), "{why}");
    }
}

#[test]
fn nothing_for_now_in_stop_copy_undoes_the_move() {
    let why = moved_with(Quirks { nothing_in_stop_copy: true, ..Quirks::default() }).unwrap();
    assert!(why.contains("in STOP_COPY it said \"nothing for now\""), "{why}");
}

#[test]
fn a_read_beyond_the_buffer_undoes_the_move() {
    let why = moved_with(Quirks { reads_too_much: true, ..Quirks::default() }).unwrap();
    assert!(why.contains("a read of up to"), "{why}");
}
