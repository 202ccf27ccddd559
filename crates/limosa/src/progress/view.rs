//! [`View`]: what is known of a move under way, as a line of any width. It has no clock and no terminal.

use std::time::Duration;

use limosa_migrate::Estimate;

/// The known facts about a move.
#[derive(Clone, Debug, Default)]
pub struct View {
    pub phase: &'static str,
    pub moved_bytes: u64,
    /// What there was to move in the beginning.
    pub total_bytes: Option<u64>,
    /// Over the last seconds.
    pub bytes_per_second: Option<u64>,
    /// The last round of pre-copy that is over, 0 for none.
    pub round: u32,
    /// Bytes that were left after that round.
    pub left_bytes: Option<u64>,
    pub estimate: Option<Estimate>,
}

impl View {
    /// A line of at most this many columns. What matters least is left out first.
    pub fn line(&self, columns: usize) -> String {
        let mut parts = self.parts();
        let width = |parts: &[(u8, String)]| {
            parts.iter().map(|(_, text)| text.chars().count()).sum::<usize>()
                + 2 * parts.len().saturating_sub(1)
        };
        while parts.len() > 1 && width(&parts) > columns {
            let least = parts.iter().enumerate().max_by_key(|(_, (rank, _))| *rank).map_or(0, |(at, _)| at);
            parts.remove(least);
        }
        let text: Vec<String> = parts.into_iter().map(|(_, text)| text).collect();
        text.join("  ").chars().take(columns).collect()
    }

    /// The parts in their order, each with its rank: the highest one is left out first.
    fn parts(&self) -> Vec<(u8, String)> {
        let mut parts = vec![(0, self.phase.to_owned())];
        match self.total_bytes.filter(|total| self.moved_bytes < *total) {
            Some(total) => {
                let percent = u128::from(self.moved_bytes) * 100 / u128::from(total);
                parts.push((2, format!("{percent} %")));
                parts.push((4, format!("{} of {}", amount(self.moved_bytes), amount(total))));
            }
            None => parts.push((6, format!("{} moved", amount(self.moved_bytes)))),
        }
        if self.round > 0 {
            parts.push((5, format!("round {}", self.round)));
        }
        if self.total_bytes.is_none_or(|total| self.moved_bytes >= total) {
            parts.extend(self.left_bytes.map(|left| (2, format!("{} left", amount(left)))));
        }
        parts.extend(self.bytes_per_second.map(|rate| (3, format!("{}/s", amount(rate)))));
        parts.extend(self.end());
        parts
    }

    /// When it comes to its end.
    fn end(&self) -> Option<(u8, String)> {
        if let Some(estimate) = self.estimate.filter(|estimate| estimate.bytes_per_second > 0) {
            return match estimate.remaining {
                Some(remaining) => Some((1, about(remaining))),
                None => Some((1, "will not converge at this rate".into())),
            };
        }
        let (total, rate) = (self.total_bytes?, self.bytes_per_second.filter(|rate| *rate > 0)?);
        let left = total.saturating_sub(self.moved_bytes);
        (left > 0).then(|| (1, about(Duration::from_secs_f64(left as f64 / rate as f64))))
    }
}

/// Bytes in three digits.
fn amount(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 999.5 && unit + 1 < UNITS.len() {
        (value, unit) = (value / 1024.0, unit + 1);
    }
    let digits = if unit == 0 || value >= 99.95 {
        0
    } else if value >= 9.995 {
        1
    } else {
        2
    };
    format!("{value:.digits$} {}", UNITS[unit])
}

fn about(time: Duration) -> String {
    match time.as_secs() {
        0 => "under 1 s to go".into(),
        seconds @ 1..60 => format!("about {seconds} s to go"),
        seconds @ 60..3600 => format!("about {} min to go", seconds.div_ceil(60)),
        seconds => format!("about {} h to go", seconds.div_ceil(3600)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn first_round() -> View {
        View {
            phase: "pre-copy",
            moved_bytes: 5300 * MIB,
            total_bytes: Some(8192 * MIB),
            bytes_per_second: Some(412 * MIB),
            ..View::default()
        }
    }

    fn later_round(remaining: Option<Duration>) -> View {
        let mut estimate = Estimate::default();
        (estimate.left_bytes, estimate.bytes_per_second, estimate.remaining) =
            (180 * MIB, 412 * MIB, remaining);
        View {
            round: 12,
            moved_bytes: 9000 * MIB,
            left_bytes: Some(180 * MIB),
            estimate: Some(estimate),
            ..first_round()
        }
    }

    #[test]
    fn the_first_round_tells_of_the_total() {
        let view = first_round();
        assert_eq!(view.line(69), "pre-copy  64 %  5.18 GiB of 8.00 GiB  412 MiB/s  about 7 s to go");
        assert_eq!(view.line(49), "pre-copy  64 %  412 MiB/s  about 7 s to go");
    }

    #[test]
    fn later_rounds_tell_what_is_left_and_whether_there_is_an_end() {
        let view = later_round(Some(Duration::from_secs(75)));
        assert_eq!(
            view.line(80),
            "pre-copy  8.79 GiB moved  round 12  180 MiB left  412 MiB/s  about 2 min to go"
        );
        assert_eq!(view.line(69), "pre-copy  round 12  180 MiB left  412 MiB/s  about 2 min to go");
        assert_eq!(view.line(49), "pre-copy  180 MiB left  about 2 min to go");
        let endless = later_round(None);
        assert_eq!(endless.line(69), "pre-copy  180 MiB left  412 MiB/s  will not converge at this rate");
        assert_eq!(endless.line(49), "pre-copy  will not converge at this rate");
    }

    #[test]
    fn no_line_is_longer_than_its_terminal() {
        for view in [View::default(), first_round(), later_round(None), later_round(Some(Duration::MAX))] {
            for columns in 0..120 {
                let line = view.line(columns);
                assert!(line.chars().count() <= columns, "{columns}: {line}");
            }
        }
    }

    #[test]
    fn a_total_that_was_too_small_is_not_exceeded() {
        let view = View { moved_bytes: 9000 * MIB, ..first_round() };
        assert_eq!(view.line(69), "pre-copy  8.79 GiB moved  412 MiB/s");
        assert_eq!(View { phase: "stop", ..View::default() }.line(69), "stop  0 B moved");
    }

    #[test]
    fn amounts_have_three_digits() {
        assert_eq!([0, 999, 1000, 1024].map(amount), ["0 B", "999 B", "0.98 KiB", "1.00 KiB"]);
        assert_eq!([99_900 * 1024, 5 << 30].map(amount), ["97.6 MiB", "5.00 GiB"]);
        assert_eq!(amount(u64::MAX), "16777216 TiB");
    }
}
