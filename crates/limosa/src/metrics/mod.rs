//! `--metrics`: the metrics of a long-running command for monitoring, as OpenMetrics text over HTTP (`docs/command.md:
//! Metrics`; OpenMetrics 1.0).
//!
//! A [`Family`] of metrics is one constant, from which its lines and the table of the page are generated. Values are read where they are
//! counted, at the time of a scrape.

mod http;
mod listener;
mod receiver;
mod server;

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

pub use listener::{Address, Exposition, Listener};
pub use receiver::Receiver;
pub use server::{SWITCH_OVERS, Served};

/// The beginning of every name.
const PREFIX: &str = "limosa";

/// The kind of a metric (OpenMetrics 1.0: metric types).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A counter, which only grows.
    Counter,
    Gauge,
    /// A histogram.
    Histogram,
    /// Labels that do not change.
    Info,
}

/// The unit of a number, which its name ends with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum In {
    Number,
    Bytes,
    Seconds,
}

/// Metrics of one name.
#[derive(Debug)]
struct Family {
    /// Without the prefix, the unit and what a kind adds.
    name: &'static str,
    kind: Kind,
    unit: In,
    help: &'static str,
    labels: &'static [&'static str],
}

/// Which version of the command this is.
const BUILD: Family = Family {
    name: "build",
    kind: Kind::Info,
    unit: In::Number,
    help: "Version of limosa, and the command that runs",
    labels: &["version", "command"],
};

/// When this process began.
const START_TIME: Family = Family {
    name: "start_time",
    kind: Kind::Gauge,
    unit: In::Seconds,
    help: "Start time of this process, since 1970",
    labels: &[],
};

impl Family {
    /// The name of a sample, as a query has it. A histogram's ends with `_bucket`, `_sum` or `_count` as well.
    #[cfg(test)]
    fn sample(&self) -> String {
        let unit = match self.unit {
            In::Number => "",
            In::Bytes => "_bytes",
            In::Seconds => "_seconds",
        };
        let end = match self.kind {
            Kind::Counter => "_total",
            Kind::Info => "_info",
            Kind::Gauge | Kind::Histogram => "",
        };
        format!("{PREFIX}_{}{unit}{end}", self.name)
    }
}

/// A value, and the values of its family's labels.
struct Sample {
    labels: Vec<String>,
    value: Value,
}

enum Value {
    Count(u64),
    Number(f64),
    /// The sum, the count, and for each bucket its upper bound and its own count.
    Histogram(f64, u64, Vec<(f64, u64)>),
    /// Only labels, without a number.
    Words,
}

/// Where samples come from.
trait Source: fmt::Debug + Send + Sync + 'static {
    /// Its families, in the order in which they are printed.
    fn families(&self) -> &'static [&'static Family];
    /// The samples of one of them.
    fn samples(&self, family: &'static Family) -> Vec<Sample>;
}

/// A sample with these labels.
fn sample<const N: usize>(labels: [&str; N], value: Value) -> Sample {
    Sample { labels: labels.map(str::to_owned).to_vec(), value }
}

fn number(value: impl Into<f64>) -> Value {
    Value::Number(value.into())
}

/// 1 for yes, 0 for no.
fn yes(is: bool) -> Value {
    Value::Number(f64::from(u8::from(is)))
}

/// A source, as the encoder asks it.
#[derive(Debug)]
struct Told<S>(S);

impl<S: Source> Collector for Told<S> {
    fn encode(&self, mut to: DescriptorEncoder<'_>) -> fmt::Result {
        for family in self.0.families() {
            let samples = self.0.samples(family);
            let unit = match family.unit {
                In::Number => None,
                In::Bytes => Some(&Unit::Bytes),
                In::Seconds => Some(&Unit::Seconds),
            };
            let kind = match family.kind {
                Kind::Counter => MetricType::Counter,
                Kind::Gauge => MetricType::Gauge,
                Kind::Histogram => MetricType::Histogram,
                Kind::Info => MetricType::Info,
            };
            let metric = Samples { family, samples };
            metric.encode(to.encode_descriptor(family.name, family.help, unit, kind)?)?;
        }
        Ok(())
    }
}

struct Samples {
    family: &'static Family,
    samples: Vec<Sample>,
}

impl Samples {
    fn write(&self, value: &Value, to: &mut MetricEncoder<'_>) -> fmt::Result {
        match value {
            Value::Count(count) => to.encode_counter::<NoLabelSet, _, u64>(count, None),
            Value::Number(number) if self.family.kind == Kind::Counter => {
                to.encode_counter::<NoLabelSet, _, u64>(number, None)
            }
            Value::Number(number) => to.encode_gauge(number),
            Value::Histogram(sum, count, buckets) => {
                to.encode_histogram::<NoLabelSet>(*sum, *count, buckets, None)
            }
            // They are labels, and written as such.
            Value::Words => Ok(()),
        }
    }
}

impl EncodeMetric for Samples {
    fn encode(&self, mut to: MetricEncoder<'_>) -> fmt::Result {
        for Sample { labels, value } in &self.samples {
            let labels: Vec<(&str, &str)> =
                self.family.labels.iter().copied().zip(labels.iter().map(String::as_str)).collect();
            match value {
                Value::Words => to.encode_info(&labels)?,
                value if labels.is_empty() => self.write(value, &mut to)?,
                value => self.write(value, &mut to.encode_family(&labels)?)?,
            }
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Unknown
    }
}

/// The metrics that every command has.
#[derive(Debug)]
struct Process {
    command: &'static str,
    began: f64,
}

const PROCESS: &[&Family] = &[&BUILD, &START_TIME];

impl Source for Process {
    fn families(&self) -> &'static [&'static Family] {
        PROCESS
    }

    fn samples(&self, family: &'static Family) -> Vec<Sample> {
        match family.name {
            "build" => vec![sample([env!("CARGO_PKG_VERSION"), self.command], Value::Words)],
            _ => vec![sample([], number(self.began))],
        }
    }
}

/// Writes the text that a scrape gets.
struct Text(Registry);

impl Text {
    fn new(command: &'static str, source: impl Source) -> Text {
        let mut registry = Registry::with_prefix(PREFIX);
        registry.register_collector(Box::new(Told(Process { command, began: since_1970() })));
        registry.register_collector(Box::new(Told(source)));
        Text(registry)
    }

    fn write(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail, nor does a source.
        let _ = encode(&mut text, &self.0);
        text
    }
}

/// Seconds since 1970.
fn since_1970() -> f64 {
    std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0.0, |since| since.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A table of `docs/command.md`.
    fn table(families: &[&Family]) -> String {
        let row = |family: &&Family| {
            let labels: Vec<_> = family.labels.iter().map(|label| format!("`{label}`")).collect();
            let kind = format!("{:?}", family.kind).to_lowercase();
            format!("| `{}` | {kind} | {} | {} |\n", family.sample(), labels.join(", "), family.help)
        };
        let rows: String = families.iter().map(row).collect();
        format!("| metric | kind | labels | |\n|---|---|---|---|\n{rows}")
    }

    #[test]
    fn the_documented_metrics_are_those_of_the_command() {
        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/command.md");
        // A packaged crate has no pages beside it.
        let Ok(text) = std::fs::read_to_string(page) else { return };
        let tables = [PROCESS, server::FAMILIES, receiver::FAMILIES].map(table);
        let lacking: Vec<_> = tables.into_iter().filter(|table| !text.contains(table)).collect();
        assert!(lacking.is_empty(), "docs/command.md lacks:\n{}", lacking.join("\n"));
    }

    #[test]
    fn names_keep_the_conventions() {
        let all: Vec<_> = [PROCESS, server::FAMILIES, receiver::FAMILIES].concat();
        for (at, family) in all.iter().enumerate() {
            let name = family.sample();
            let is_plain = |c: char| c.is_ascii_lowercase() || c == '_';
            assert!(name.chars().all(is_plain) && !name.contains("__"), "{name}");
            for end in ["_total", "_info", "_bytes", "_seconds", "_count", "_sum", "_bucket", "_created"] {
                assert!(!family.name.ends_with(end), "{name}");
            }
            assert!(all[..at].iter().all(|other| other.name != family.name), "{name}");
            // The encoder adds a stop.
            assert!(!family.help.ends_with('.'), "{name}");
        }
    }
}
