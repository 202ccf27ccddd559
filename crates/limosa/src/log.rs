//! Log lines on standard error: text for people, or with `--log-json` a JSON document in each line.

use std::fmt;

use serde_json::{Map, Value, json};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields};
use tracing_subscriber::registry::LookupSpan;

use crate::terminal::{self, Log};
use crate::text;

/// Begins to log: warnings, more of this project's with `-v`, anything with RUST_LOG.
pub fn begin(verbose: u8, json: bool) {
    let own = ["warn", "info", "debug", "trace"][usize::from(verbose.min(3))];
    let default = format!("warn,limosa={own}");
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(Log)
        // It would be said on standard error, which is what failed.
        .log_internal_errors(false);
    match json {
        true => log.with_ansi(false).event_format(Lines).fmt_fields(text::fields()).init(),
        false => {
            log.with_ansi(terminal::is_coloured()).with_target(false).fmt_fields(text::fields()).init();
        }
    }
}

/// Each event as a document: `timestamp`, `level`, `target` and `fields`, of which `message` is one; and `device`, the socket of the
/// device that it is about, where a server says so.
struct Lines;

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, of: &FmtContext<'_, S, N>, mut to: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let timestamp = now();
        let mut fields = Fields(Map::new());
        event.record(&mut fields);
        let about = event.metadata();
        let mut document = json!({
            "timestamp": timestamp,
            "level": about.level().as_str(),
            "target": about.target(),
            "fields": fields.0,
        });
        let mut spans = of.event_scope().into_iter().flatten();
        if let Some(span) = spans.find(|span| span.name() == "device")
            && let Some(fields) = span.extensions().get::<FormattedFields<N>>()
            && let Some(device) = fields.fields.strip_prefix("at=")
        {
            document["device"] = device.into();
        }
        writeln!(to, "{}", text::json(&document, true).map_err(|_| fmt::Error)?)
    }
}

/// The time now, by RFC 3339.
pub fn now() -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = SystemTime.format_time(&mut Writer::new(&mut text));
    text
}

struct Fields(Map<String, Value>);

impl Fields {
    fn put(&mut self, field: &Field, value: impl Into<Value>) {
        self.0.insert(field.name().to_owned(), value.into());
    }
}

impl Visit for Fields {
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}"));
    }
}
