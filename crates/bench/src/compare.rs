//! [`compare`]: two documents, and which of their differences are beyond the spread of both runs.

use std::fmt;

use serde::Serialize;

use crate::document::Document;

/// A smaller relative change of the median does not count as a difference, whatever the spread.
pub const SHARE_LEAST: f64 = 0.05;

/// How a measure changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// The spreads overlap, or the difference is small.
    None,
    /// All of the second run's spread is below that of the first.
    Faster,
    /// All of it is above.
    Slower,
    /// One of the runs had too few samples to tell.
    Unknown,
}

/// One measure in both.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// The measure.
    pub id: String,
    /// The median of the first run, in ns.
    pub first_ns: u64,
    /// The median of the second one, in ns.
    pub second_ns: u64,
    /// The second over the first.
    pub ratio: f64,
    /// Whether that is a difference.
    pub change: Change,
}

/// Two runs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// Measures that are in both.
    pub rows: Vec<Row>,
    /// Measures of the first run that the second one lacks.
    pub only_first: Vec<String>,
    /// Measures of the second run that the first one lacks.
    pub only_second: Vec<String>,
    /// Other differences, such as another kernel: the numbers may not be comparable.
    pub notes: Vec<String>,
}

/// Compares two runs.
pub fn compare(first: &Document, second: &Document) -> Comparison {
    let lacks = |some: &Document, other: &Document| -> Vec<String> {
        let ids = some.measures.iter().map(|measure| &measure.id);
        ids.filter(|id| other.measures.iter().all(|measure| measure.id != **id)).cloned().collect()
    };
    let rows = first.measures.iter().filter_map(|one| {
        let other = second.measures.iter().find(|other| other.id == one.id)?;
        let ratio = other.p50_ns as f64 / one.p50_ns.max(1) as f64;
        let change = match (one.spread_ns, other.spread_ns) {
            (Some(_), Some(_)) if (ratio - 1.0).abs() < SHARE_LEAST => Change::None,
            (Some((_, high)), Some((low, _))) if low > high => Change::Slower,
            (Some((low, _)), Some((_, high))) if high < low => Change::Faster,
            (Some(_), Some(_)) => Change::None,
            _ => Change::Unknown,
        };
        Some(Row { id: one.id.clone(), first_ns: one.p50_ns, second_ns: other.p50_ns, ratio, change })
    });
    let mut notes = Vec::new();
    let mut differ = |what: &str, one: &dyn fmt::Display, other: &dyn fmt::Display| {
        let (one, other) = (one.to_string(), other.to_string());
        if one != other {
            notes.push(format!("{what} differs: {one} and {other}"));
        }
    };
    differ("kernel", &first.kernel, &second.kernel);
    differ("processors", &first.processors, &second.processors);
    differ("seconds", &first.seconds, &second.seconds);
    differ("limosa", &first.limosa, &second.limosa);
    for (which, run) in [("first", first), ("second", second)] {
        if let Some(why) = &run.ended_early {
            notes.push(format!("the {which} run ended early: {why}"));
        }
    }
    Comparison {
        rows: rows.collect(),
        only_first: lacks(first, second),
        only_second: lacks(second, first),
        notes,
    }
}

impl Comparison {
    /// How many measures are faster and slower beyond the spread.
    pub fn changed(&self) -> (usize, usize) {
        let count = |change| self.rows.iter().filter(|row| row.change == change).count();
        (count(Change::Faster), count(Change::Slower))
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<36} {:>13} {:>13} {:>8}", "", "first", "second", "ratio")?;
        for Row { id, first_ns, second_ns, ratio, change } in &self.rows {
            let micros = |ns: u64| format!("{:.2} us", ns as f64 / 1e3);
            let change = match change {
                Change::None => "",
                Change::Faster => "  faster, beyond the spread",
                Change::Slower => "  slower, beyond the spread",
                Change::Unknown => "  too few samples to tell",
            };
            let (first, second) = (micros(*first_ns), micros(*second_ns));
            writeln!(f, "{id:<36} {first:>13} {second:>13} {ratio:>8.2}{change}")?;
        }
        self.only_first.iter().try_for_each(|id| writeln!(f, "only in the first: {id}"))?;
        self.only_second.iter().try_for_each(|id| writeln!(f, "only in the second: {id}"))?;
        self.notes.iter().try_for_each(|note| writeln!(f, "note: {note}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::document::{Measure, VERSION};
    use crate::samples::measure;

    fn document(measures: Vec<Measure>) -> Document {
        Document {
            bench: VERSION,
            limosa: "0".into(),
            device: "a".into(),
            kernel: "6".into(),
            processors: 2,
            seconds: 0.5,
            measures,
            skipped: Vec::new(),
            ended_early: None,
            left_in: "RUNNING".into(),
        }
    }

    fn of(id: &str, from: u64, to: u64) -> Measure {
        measure(id.into(), 0, (0..81).map(|at| from + (to - from) * (at / 10 % 2)).collect())
    }

    #[test]
    fn only_what_is_beyond_the_spread_is_a_difference() {
        let first = document(vec![
            of("same", 100, 130),
            of("slow", 100, 110),
            of("fast", 100, 110),
            of("gone", 1, 1),
        ]);
        let second =
            document(vec![of("same", 120, 150), of("slow", 130, 140), of("fast", 50, 60), of("new", 1, 1)]);
        let found = compare(&first, &second);
        let changes: Vec<_> = found.rows.iter().map(|row| row.change).collect();
        assert_eq!(changes, [Change::None, Change::Slower, Change::Faster]);
        assert_eq!((found.changed(), found.only_first.len(), found.only_second.len()), ((1, 1), 1, 1));
        assert_eq!(compare(&first, &first).changed(), (0, 0));
        assert!(found.to_string().contains("slower, beyond the spread"));
    }

    #[test]
    fn a_small_difference_is_none_and_one_sample_tells_nothing() {
        let exact = |id: &str, ns: u64| measure(id.into(), 0, vec![ns; 100]);
        let first = document(vec![exact("x", 1000), exact("y", 1000)]);
        let second = document(vec![exact("x", 1040), measure("y".into(), 0, vec![5000])]);
        let changes: Vec<_> = compare(&first, &second).rows.iter().map(|row| row.change).collect();
        assert_eq!(changes, [Change::None, Change::Unknown]);
        let nothing = document(vec![measure("x".into(), 0, vec![0; 9])]);
        assert!(compare(&nothing, &nothing).rows[0].ratio.is_finite());
    }

    #[test]
    fn documents_come_back_from_json_and_others_are_refused() {
        let document = document(vec![of("x", 1, 2)]);
        let text = serde_json::to_string(&document).unwrap();
        assert_eq!(Document::parse(&text).unwrap(), document);
        for (wrong, why) in [
            ("", "no document"),
            ("[]", "no document"),
            ("{\"bench\": 7}", "version 7"),
            ("{\"bench\": 2}", "damaged"),
        ] {
            assert!(Document::parse(wrong).unwrap_err().contains(why), "{wrong}");
        }
    }

    /// Such documents were compared, or refused without the place.
    #[test]
    fn a_document_that_was_edited_was_taken_for_a_run() {
        let text = serde_json::to_string(&document(vec![of("x", 1, 2), of("y", 3, 4)])).unwrap();
        for (from, to, why) in [
            ("\"p50_ns\":3", "\"p50_ns\":-3", "at measures[1].p50_ns: invalid value: integer `-3`"),
            ("\"p50_ns\":3", "\"p50_ns\":3.5", "at measures[1].p50_ns"),
            ("\"p50_ns\":3", "\"p50_ns\":NaN", "it is no JSON"),
            ("\"p50_ns\":3,", "", "at measures[1]: missing field `p50_ns`"),
            ("\"p50_ns\":3", "\"p50_ns\":5", "measure `y`: p50_ns is 5, expected 3 (best_ns) to 4"),
            ("\"spread_ns\":[", "\"spred_ns\":[", "at measures[0].spred_ns: unknown field `spred_ns`"),
            ("\"spread_ns\":[1,", "\"spread_ns\":[9,", "measure `x`: spread_ns is from 9 down to"),
            ("\"id\":\"y\"", "\"id\":\"x\"", "the measure `x` twice"),
            ("\"each_ns\":500000000", "\"each_ns\":-1", "at each_ns: invalid value: integer `-1`"),
            ("\"each_ns\":500000000", "\"each_ns\":0", "at each_ns: 0, expected more than 0"),
            ("\"each_ns\":500000000", "\"each_ns\":1e999", "out of range"),
        ] {
            let edited = text.replacen(from, to, 1);
            assert_ne!(edited, text, "{from}");
            let said = Document::parse(&edited).unwrap_err();
            assert!(said.contains(why), "{to}: {said}");
        }
    }
}
