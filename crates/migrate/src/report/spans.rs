//! [`Spans`]: the spans of one device. Pieces of data that follow each other closely are joined, so that a move of any length
//! has a bounded number of spans.

use super::{Act, SpanReport};

/// Data after a shorter pause is joined to the span before it.
const PAUSE_NS: u64 = 1_000_000;
/// The maximum number of spans. When it is reached, data after longer pauses is joined as well.
const SPANS_MAX: usize = 512;

/// The activities of a device so far.
#[derive(Debug)]
pub(super) struct Spans {
    spans: Vec<SpanReport>,
    pause_ns: u64,
}

impl Default for Spans {
    fn default() -> Spans {
        Spans { spans: Vec::new(), pause_ns: PAUSE_NS }
    }
}

impl Spans {
    pub(super) fn add(&mut self, span: SpanReport) {
        if self.spans.len() >= SPANS_MAX {
            self.thin();
        }
        match self.spans.last_mut() {
            Some(last) if follows(last, &span, self.pause_ns) => join(last, &span),
            _ => self.spans.push(span),
        }
    }

    /// By time.
    pub(super) fn report(&self) -> Vec<SpanReport> {
        let mut spans = self.spans.clone();
        spans.sort_by_key(|span| span.start_ns);
        spans
    }

    /// Makes room by joining data after longer pauses. Arcs are kept, since a move has only a few.
    fn thin(&mut self) {
        while self.spans.len() > SPANS_MAX / 2 && self.pause_ns < u64::MAX / 2 {
            self.pause_ns *= 2;
            self.spans.dedup_by(|span, last| {
                let joined = follows(last, span, self.pause_ns);
                if joined {
                    join(last, span);
                }
                joined
            });
        }
    }
}

/// Whether a span continues the last one.
fn follows(last: &SpanReport, span: &SpanReport, pause_ns: u64) -> bool {
    let is_data = matches!(span.act, Act::PrecopyData | Act::FinalData | Act::Load);
    is_data && last.act == span.act && span.start_ns.saturating_sub(end(last)) <= pause_ns
}

fn join(last: &mut SpanReport, span: &SpanReport) {
    last.duration_ns = end(last).max(end(span)).saturating_sub(last.start_ns);
    last.busy_ns += span.busy_ns;
    last.bytes += span.bytes;
}

fn end(span: &SpanReport) -> u64 {
    span.start_ns.saturating_add(span.duration_ns)
}

#[cfg(test)]
mod tests {
    use limosa_protocol::State;

    use super::*;

    fn span(act: Act, start_ns: u64, duration_ns: u64) -> SpanReport {
        SpanReport { act, start_ns, duration_ns, busy_ns: duration_ns, bytes: 1 }
    }

    #[test]
    fn data_that_follows_closely_is_one_span_and_arcs_are_never_joined() {
        let mut spans = Spans::default();
        let enter = Act::Enter { state: State::StopCopy };
        for (act, at) in [(Act::PrecopyData, 0), (Act::PrecopyData, 900_000), (Act::PrecopyData, 9_000_000)] {
            spans.add(span(act, at, 100_000));
        }
        spans.add(span(enter, 9_100_000, 5));
        spans.add(span(enter, 9_100_005, 5));
        spans.add(span(Act::FinalData, 9_100_010, 5));
        let report = spans.report();
        assert_eq!(report.len(), 5);
        assert_eq!((report[0].duration_ns, report[0].busy_ns, report[0].bytes), (1_000_000, 200_000, 2));
        assert_eq!(report[1].start_ns, 9_000_000);
    }

    #[test]
    fn a_move_without_end_has_a_bounded_number_of_spans() {
        let mut spans = Spans::default();
        for at in 0..100_000 {
            spans.add(span(Act::PrecopyData, at * 1_000_000_000, 100));
        }
        let report = spans.report();
        assert!(report.len() <= SPANS_MAX, "{}", report.len());
        assert_eq!(report.iter().map(|span| span.bytes).sum::<u64>(), 100_000);
        assert_eq!(report.iter().map(|span| span.busy_ns).sum::<u64>(), 10_000_000);
    }
}
