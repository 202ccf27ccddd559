//! [`Document`]: the measures of a device, as JSON that a later run is compared with, and as text.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::table::size;

/// The version of the document.
pub const VERSION: u32 = 2;

/// The most bytes of a document that is read.
pub const BYTES_MAX: u64 = 64 << 20;

/// One run of the bench on one device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Document {
    /// The version of the document, [`VERSION`].
    pub bench: u32,
    /// The version of the program.
    pub limosa: String,
    /// The device, as the user named it.
    pub device: String,
    /// The kernel's release.
    pub kernel: String,
    /// How many processors the program had.
    pub processors: usize,
    /// The share of each measure, in seconds; in JSON in nanoseconds.
    #[serde(rename = "each_ns", with = "as_ns")]
    pub seconds: f64,
    /// The measures, in order.
    pub measures: Vec<Measure>,
    /// The measures that were left out, and why.
    pub skipped: Vec<Skipped>,
    /// Why the run ended before all measures.
    pub ended_early: Option<String>,
    /// The state in which the device was left, if known.
    pub left_in: String,
}

/// Seconds as whole nanoseconds.
mod as_ns {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(seconds: &f64, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64((seconds * 1e9) as u64)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
        Ok(u64::deserialize(from)? as f64 / 1e9)
    }
}

/// One measure.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measure {
    /// The name of the measure, the same in every run: `arc RUNNING>STOP`.
    pub id: String,
    /// Bytes moved by one operation, on average; 0 where time is what counts.
    pub bytes: u64,
    /// How many operations were timed.
    pub samples: u64,
    /// The fastest, in ns.
    pub best_ns: u64,
    /// The median, in ns.
    pub p50_ns: u64,
    /// In ns.
    pub p90_ns: u64,
    /// In ns.
    pub p99_ns: u64,
    /// The slowest, in ns.
    pub max_ns: u64,
    /// The lowest and the highest median of parts of the run, in ns; `None` of too few samples.
    pub spread_ns: Option<(u64, u64)>,
    /// The histogram: (ns, number of operations up to that time) in ascending order, without empty buckets.
    pub histogram: Vec<(u64, u64)>,
    /// The floor, which was timed alternately.
    #[serde(default)]
    pub beside: Option<Beside>,
    /// A remark.
    #[serde(default)]
    pub note: Option<String>,
}

/// A baseline, timed in the same run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Beside {
    /// Its name.
    pub name: String,
    /// The median, in ns.
    pub p50_ns: u64,
    /// How many operations were timed.
    pub samples: u64,
}

/// A measure that was left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Skipped {
    /// The measure, or several of them.
    pub id: String,
    /// Why.
    pub why: String,
}

impl Document {
    /// Reads a document. The error names the problem and its position.
    pub fn parse(text: &str) -> Result<Document, String> {
        const EXPECTED: &str = "expected what `limosa --json bench DEVICE` prints";
        let mut read: serde_json::Value = serde_json::from_str(text)
            .map_err(|error| format!("it is no document of the bench: it is no JSON: {error}; {EXPECTED}"))?;
        let version = read.get("bench").and_then(serde_json::Value::as_u64);
        match version {
            Some(version) if version == u64::from(VERSION) => {}
            Some(version) => {
                return Err(format!("it has version {version}, expected {VERSION}; measure again"));
            }
            None => {
                return Err(format!("it is no document of the bench: its `bench` is no version; {EXPECTED}"));
            }
        }
        // The command adds which of the documents it is.
        if let Some(fields) = read.as_object_mut() {
            fields.remove("schema");
            fields.remove("command");
        }
        let document: Document = serde_path_to_error::deserialize(read)
            .map_err(|error| format!("it is damaged at {}: {}", error.path(), error.inner()))?;
        document.check()?;
        Ok(document)
    }

    /// Refuses numbers that no run can have.
    fn check(&self) -> Result<(), String> {
        // NaN is not above anything.
        if !(self.seconds > 0.0 && self.seconds.is_finite()) {
            return Err(format!("it is damaged at each_ns: {}, expected more than 0", self.seconds * 1e9));
        }
        let mut known = BTreeSet::new();
        for measure in &self.measures {
            measure.check().map_err(|why| format!("it is damaged in the measure `{}`: {why}", measure.id))?;
            if !known.insert(&measure.id) {
                return Err(format!("it is damaged: it has the measure `{}` twice", measure.id));
            }
        }
        Ok(())
    }
}

impl Measure {
    fn check(&self) -> Result<(), String> {
        let Measure { best_ns, p50_ns, max_ns, .. } = *self;
        if best_ns > p50_ns || p50_ns > max_ns {
            return Err(format!("p50_ns is {p50_ns}, expected {best_ns} (best_ns) to {max_ns} (max_ns)"));
        }
        match self.spread_ns {
            Some((low, high)) if low > high => Err(format!("spread_ns is from {low} down to {high}")),
            _ if self.samples == 0 => Err("samples is 0, expected one at least".into()),
            _ => Ok(()),
        }
    }

    /// Bytes a second at the median; `None` where time is what counts.
    pub fn rate(&self) -> Option<f64> {
        (self.bytes > 0).then(|| self.bytes as f64 * 1e9 / self.p50_ns.max(1) as f64)
    }
}

/// The head of the table.
pub const HEAD: &str = "                                        median       99 % samples  GiB/s x floor";

impl fmt::Display for Measure {
    /// One line of the table, of 80 columns, and its note below it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let micros = |ns: u64| format!("{:.2} us", ns as f64 / 1e3);
        let rate = self.rate().map_or(String::new(), |rate| format!("{:.2}", rate / f64::from(1 << 30)));
        let floor = self.beside.as_ref().map(|floor| self.p50_ns as f64 / floor.p50_ns.max(1) as f64);
        let floor = floor.map_or("-".into(), |ratio| format!("{ratio:.2}"));
        write!(
            f,
            "{:<35} {:>10} {:>10} {:>7} {rate:>6} {floor:>7}",
            self.id,
            micros(self.p50_ns),
            micros(self.p99_ns),
            self.samples,
        )?;
        self.note.as_ref().map_or(Ok(()), |note| write!(f, "\n    {note}"))
    }
}

impl fmt::Display for Document {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{HEAD}")?;
        self.measures.iter().try_for_each(|measure| writeln!(f, "{measure}"))?;
        self.end(f)
    }
}

impl Document {
    /// The lines after the table: the measures that were left out, and how the device was left.
    pub fn end(&self, f: &mut dyn fmt::Write) -> fmt::Result {
        self.skipped.iter().try_for_each(|Skipped { id, why }| writeln!(f, "not measured: {id}: {why}"))?;
        if let Some(why) = &self.ended_early {
            writeln!(f, "ended early: {why}")?;
        }
        writeln!(f, "left in {}", self.left_in)
    }
}

/// The id of a measure that moves data in chunks.
pub(crate) fn by_chunk(what: &str, bytes: usize) -> String {
    format!("{what} by {}", size(bytes))
}
