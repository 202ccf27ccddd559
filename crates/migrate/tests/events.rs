//! The events that `docs/embedding.md` promises, as a subscriber of the whole process gets them, and what the observer
//! is told of progress.

#[path = "it/common/mod.rs"]
mod common;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use crate::common::{Ends, VecPages, world};
use limosa_migrate::{Estimate, GuestPages, Observer, Outcome};
use limosa_protocol::MigrationFlags;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// One event: its target and its fields.
#[derive(Clone, Debug, Default)]
struct Seen {
    target: String,
    fields: BTreeMap<String, String>,
}

impl Visit for Seen {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.fields.insert(field.name().into(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.fields.insert(field.name().into(), value.into());
    }
}

struct Collector(Arc<Mutex<Vec<Seen>>>);

impl Subscriber for Collector {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, event: &Event<'_>) {
        let mut seen = Seen { target: event.metadata().target().into(), ..Seen::default() };
        event.record(&mut seen);
        self.0.lock().unwrap().push(seen);
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

#[derive(Default)]
struct Estimates(Mutex<Vec<Estimate>>);

impl Observer for Estimates {
    fn estimate(&self, estimate: &Estimate) {
        self.0.lock().unwrap().push(*estimate);
    }
}

#[test]
fn a_move_tells_what_the_docs_promise() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    tracing::subscriber::set_global_default(Collector(seen.clone())).unwrap();
    let (source, destination) = world("dev", MigrationFlags::SETS[3], 3 << 20);
    let mut ends = Ends::new(vec![source], vec![destination]);
    let pages = || Arc::new(VecPages::new(64 * 4096)) as Arc<dyn GuestPages + Send + Sync>;
    let estimates = Arc::new(Estimates::default());
    ends.memory = Some((pages(), pages(), 64 * 4096));
    ends.observer = estimates.clone();
    let (outcome, _) = ends.run_plain();
    let Outcome::Moved(report) = outcome else { panic!("{outcome:?}") };

    let seen = seen.lock().unwrap();
    let of = |target: &str, side: &str| -> Vec<&Seen> {
        seen.iter().filter(|seen| seen.target == target && seen.fields["side"] == side).collect()
    };
    for side in ["source", "destination"] {
        let phases: Vec<_> =
            of("limosa::phase", side).iter().map(|seen| seen.fields["phase"].clone()).collect();
        assert_eq!(phases[0], "handshake", "{side}");
        assert!(phases.contains(&"stop-copy".into()), "{side}: {phases:?}");
        let devices = of("limosa::device", side);
        assert!(devices.iter().all(|seen| seen.fields["device"].starts_with("dev")), "{devices:?}");
        let arc = if side == "source" { "STOP_COPY" } else { "RESUMING" };
        assert!(
            devices.iter().any(|seen| seen.fields["act"] == arc && seen.fields.contains_key("took_us")),
            "{side}"
        );
        let data = if side == "source" { "pre-copy data" } else { "loading" };
        assert!(
            devices.iter().any(|seen| seen.fields["act"] == data && seen.fields["bytes"] != "0"),
            "{side}"
        );
        let end = of("limosa::end", side);
        assert_eq!(end.len(), 1, "{side}");
        assert_eq!(end[0].fields["move_id"], report.id, "{side}");
        assert_eq!(end[0].fields["device_bytes"], report.bytes.device_bytes.to_string(), "{side}");
    }
    let rounds = of("limosa::round", "source");
    assert_eq!(rounds.len(), report.rounds.len());
    assert!(rounds.iter().all(|seen| seen.fields.contains_key("predicted_downtime_us")));
    let estimates = estimates.0.lock().unwrap();
    assert_eq!(estimates.len(), report.rounds.len(), "one for each round, on the source alone");
    let last = (estimates.last().unwrap(), report.rounds.last().unwrap());
    assert_eq!(last.0.predicted_downtime.as_nanos() as u64, last.1.predicted_downtime_ns);
    assert_eq!(last.0.remaining, Some(std::time::Duration::ZERO), "it stopped within its limit");
}
