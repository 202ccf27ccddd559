//! The rounds of pre-copy as two charts: the bytes that were moved and those that were dirty afterwards, and the predicted
//! downtime with its goal. Both fall by orders of magnitude, so their axes are logarithmic.

use super::svg::{Anchor, Area, Svg, fitting, text_width};
use super::timeline::{WIDTH, nice_step};
use crate::report::text::{Bytes, Time};
use crate::report::{Report, RoundReport};

const HEIGHT: f64 = 250.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 34.0;
/// Room for the numbers of an axis.
const NUMBERS: f64 = 76.0;
const SMALL_SIZE: f64 = 10.0;
/// How far the line of zero lies below the axis.
const ZERO: f64 = 18.0;
/// The most lines of an axis.
const LINES_MAX: usize = 6;

/// One line of a chart.
struct Line<'a> {
    class: &'static str,
    name: &'static str,
    value: &'a dyn Fn(&RoundReport) -> u64,
}

/// A chart over the rounds.
struct Chart<'a> {
    area: Area,
    title: &'static str,
    rounds: &'a [RoundReport],
    /// The base of the axis: it has lines at powers of two for bytes, and of ten for times.
    base: f64,
    print: &'a dyn Fn(u64) -> String,
    limit: Option<u64>,
}

/// Draws both charts; nothing if no round has ended.
pub(super) fn draw(report: &Report) -> Option<String> {
    let rounds = &report.rounds;
    if rounds.is_empty() {
        return None;
    }
    let mut svg = Svg::new(WIDTH, HEIGHT, "Rounds of pre-copy");
    let room = |x: f64, width: f64| Area { x, y: TOP, width, height: HEIGHT - TOP - BOTTOM };
    let knows_cost = rounds.iter().any(|round| round.predicted_downtime_ns > 0);
    let width = if knows_cost { WIDTH / 2.0 - NUMBERS - 24.0 } else { WIDTH - NUMBERS - 24.0 };
    let moved = |round: &RoundReport| round.bytes.memory_bytes.saturating_add(round.bytes.device_bytes);
    Chart {
        area: room(NUMBERS, width),
        title: "Bytes by round",
        rounds,
        base: 2.0,
        print: &|bytes| Bytes(bytes).to_string(),
        limit: None,
    }
    .draw(
        &mut svg,
        &[
            Line { class: "moved", name: "moved", value: &moved },
            Line { class: "dirty", name: "left at its end", value: &|round| round.left_bytes },
        ],
    );
    if knows_cost {
        Chart {
            area: room(WIDTH / 2.0 + NUMBERS, width),
            title: "Downtime, had the stop come after the round",
            rounds,
            base: 10.0,
            print: &|ns| Time(ns).to_string(),
            limit: report.limits.downtime_goal_ns,
        }
        .draw(
            &mut svg,
            &[Line { class: "cost", name: "predicted", value: &|round| round.predicted_downtime_ns }],
        );
    }
    Some(svg.finish())
}

impl Chart<'_> {
    fn draw(&self, svg: &mut Svg, lines: &[Line<'_>]) {
        let Area { x, y, width, height } = self.area;
        let values = lines.iter().flat_map(|line| self.rounds.iter().map(line.value));
        let values = || values.clone().chain(self.limit).filter(|value| *value > 0);
        let (least, most) = (values().min().unwrap_or(1), values().max().unwrap_or(1));
        let log = |value: u64| (value.max(1) as f64).log(self.base);
        let (low, mut high) = ((log(least) - 0.05).floor(), log(most).ceil());
        if high <= low {
            high = low + 1.0;
        }
        // A logarithmic axis has no zero, so that gets a line of its own, away from the lowest power.
        let has_zero = lines.iter().any(|line| self.rounds.iter().any(|round| (line.value)(round) == 0));
        let floor = if has_zero { ZERO } else { 0.0 };
        let place = |value: u64| match value {
            0 => y + height - 4.0,
            value => y + height - floor - (log(value) - low) / (high - low) * (height - floor - 8.0) - 4.0,
        };

        svg.area(Area { x, y, width, height }, "panel", "");
        svg.text((x, 16.0), 14.0, Anchor::Start, "head", self.title);
        let mut at = x;
        for line in lines {
            svg.line((at, 31.0), (at + 16.0, 31.0), &format!("curve {}", line.class));
            svg.text((at + 21.0, 34.5), 11.0, Anchor::Start, "quiet", line.name);
            at += 21.0 + text_width(line.name, 11.0) + 18.0;
        }

        let mark = |svg: &mut Svg, height: f64, value: u64| {
            svg.line((x, height), (x + width, height), "grid");
            let text = fitting(&(self.print)(value), SMALL_SIZE, NUMBERS - 8.0);
            svg.text((x - 6.0, height + 3.5), SMALL_SIZE, Anchor::End, "quiet", &text);
        };
        if has_zero {
            mark(svg, place(0), 0);
        }
        let every = ((high - low) / LINES_MAX as f64).ceil().max(1.0);
        let mut power = low;
        while power <= high {
            // A goal far outside the range of the values is not drawn.
            let value = self.base.powf(power).min(1e18) as u64;
            mark(svg, place(value), value);
            power += every;
        }
        self.columns(svg);

        if let Some(limit) = self.limit {
            let (at, text) = (place(limit), format!("limit {}", (self.print)(limit)));
            svg.line((x, at), (x + width, at), "curve allowed");
            // Above the line, unless the picture ends there.
            let beside = if at - y > 16.0 { at - 5.0 } else { at + 13.0 };
            svg.text((x + width - 6.0, beside), SMALL_SIZE, Anchor::End, "name", &text);
        }
        for line in lines {
            let points: Vec<_> = self
                .rounds
                .iter()
                .enumerate()
                .map(|(at, round)| (self.column(at), place((line.value)(round))))
                .collect();
            svg.points(&points, &format!("curve {}", line.class), false, "");
            for (point, round) in points.iter().zip(self.rounds) {
                let title =
                    format!("round {}: {} {}", round.round, (self.print)((line.value)(round)), line.name);
                svg.dot(*point, &format!("dot {}", line.class), &title);
            }
        }
    }

    /// The numbers of the rounds, and marks where the guest was slowed down.
    fn columns(&self, svg: &mut Svg) {
        let Area { x, y, width, height } = self.area;
        let each = nice_step(self.rounds.len() as f64 / (width / 40.0)) as usize;
        let mut slowed = 0;
        for (at, round) in self.rounds.iter().enumerate() {
            let column = self.column(at);
            if round.throttle_step > slowed {
                slowed = round.throttle_step;
                let area = Area { x: column - 1.0, y, width: 2.0, height };
                svg.area(
                    area,
                    "slowed",
                    &format!("the vCPUs were slowed down before round {}: step {slowed}", round.round),
                );
            }
            if at % each == 0 {
                let text = round.round.to_string();
                svg.text((column, y + height + 14.0), SMALL_SIZE, Anchor::Middle, "quiet", &text);
            }
        }
        svg.text((x + width / 2.0, y + height + 28.0), SMALL_SIZE, Anchor::Middle, "quiet", "round");
    }

    fn column(&self, at: usize) -> f64 {
        let inner = self.area.width - 32.0;
        match self.rounds.len() {
            1 => self.area.x + self.area.width / 2.0,
            rounds => self.area.x + 16.0 + inner * at as f64 / (rounds - 1) as f64,
        }
    }
}
