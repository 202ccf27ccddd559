//! The picture of a move in two panels, the complete move and a close-up of the downtime. Both have the same lanes: phases,
//! rounds, the downtime with its prediction and goal, and a lane for each device and each link.

use super::svg::{Anchor, Area, Svg, fitting, fitting_end, text_width};
use crate::report::text::{Bytes, Rate, Time};
use crate::report::{Act, DeviceReport, LinkReport, Phase, Report};

/// The width of the picture.
pub(super) const WIDTH: f64 = 1200.0;
/// Where the names of the lanes end and the first panel begins.
const NAMES: f64 = 196.0;
const MARGIN: f64 = 12.0;
/// Where the names begin: in line with the page.
const LEFT: f64 = 1.0;
/// Between the panels.
const GAP: f64 = 36.0;
/// The share of the complete move in the width of both panels.
const WHOLE: f64 = 0.56;
/// The panels' titles and their axes.
const HEAD: f64 = 58.0;
/// The minimum width of a band: a narrower one would be invisible.
const SEEN: f64 = 1.5;
const NAME_SIZE: f64 = 12.0;
const SMALL_SIZE: f64 = 10.0;

/// A window on the time of the move.
struct Panel {
    x: f64,
    width: f64,
    from: f64,
    to: f64,
    /// The origin of the axis.
    zero: f64,
    /// Whether bands have labels.
    is_zoom: bool,
}

impl Panel {
    fn at(&self, ns: f64) -> f64 {
        self.x + ((ns - self.from) / (self.to - self.from)).clamp(0.0, 1.0) * self.width
    }

    /// The position of a band of this duration, if any of it is in the window.
    fn band(&self, start: u64, duration: u64) -> Option<(f64, f64)> {
        let (start, end) = (start as f64, start as f64 + duration as f64);
        if end < self.from || start > self.to {
            return None;
        }
        let x = self.at(start).min(self.x + self.width - SEEN);
        Some((x, (self.at(end) - x).max(SEEN)))
    }
}

/// A part of the picture from left to right.
struct Lane {
    y: f64,
    height: f64,
}

/// Draws the picture.
pub(super) fn draw(report: &Report) -> String {
    let panels = panels(report);
    let mut y = HEAD;
    let mut lane = |height: f64| {
        let lane = Lane { y, height };
        y += height + 6.0;
        lane
    };
    let phases = lane(24.0);
    let rounds = (!report.rounds.is_empty()).then(|| lane(16.0));
    let stops: Vec<_> = stops(report).into_iter().map(|stop| (lane(14.0), stop)).collect();
    let devices: Vec<_> = report.devices.iter().map(|device| (lane(26.0), device)).collect();
    let links: Vec<_> = report.links.iter().enumerate().map(|link| (lane(34.0), link)).collect();
    let height = y + MARGIN;

    let mut svg = Svg::new(WIDTH, height, "Timeline of the move");
    for panel in &panels {
        head(&mut svg, panel, report, height - MARGIN);
    }
    name(&mut svg, &phases, "phases", "");
    for panel in &panels {
        self::phases(&mut svg, panel, &phases, report);
    }
    if let Some(lane) = rounds {
        name(&mut svg, &lane, "rounds of pre-copy", "");
        panels.iter().for_each(|panel| self::rounds(&mut svg, panel, &lane, report));
    }
    for (lane, stop) in &stops {
        let text = format!("{} {}", stop.name, Time(stop.duration_ns));
        name(&mut svg, lane, &text, "");
        panels.iter().for_each(|panel| self::stop(&mut svg, panel, lane, stop, &text));
    }
    for (lane, device) in &devices {
        let after = device.bytes.saturating_sub(device.precopy_bytes);
        let what = format!("{}, {} of it final", Bytes(device.bytes), Bytes(after));
        let short = fitting_end(&device.name, NAME_SIZE, NAMES - MARGIN);
        titled_name(&mut svg, lane, &short, &device.name, &what);
        panels.iter().for_each(|panel| self::device(&mut svg, panel, lane, device));
    }
    let top = links.iter().map(|(_, (_, link))| peak(link)).fold(0.0, f64::max);
    for (lane, (number, link)) in &links {
        let bytes = link.sent_bytes.saturating_add(link.received_bytes);
        let what = format!("{}, up to {}", Bytes(bytes), Rate(peak(link)));
        let number = format!("{number}: ");
        let room = NAMES - MARGIN - text_width(&number, NAME_SIZE);
        let peer = fitting_end(&link.peer, NAME_SIZE, room);
        titled_name(&mut svg, lane, &format!("{number}{peer}"), &link.peer, &what);
        panels.iter().for_each(|panel| self::link(&mut svg, panel, lane, link, top));
    }
    svg.finish()
}

/// The complete move, and the time around the stop if there was one.
fn panels(report: &Report) -> Vec<Panel> {
    let x = NAMES + MARGIN;
    let room = WIDTH - MARGIN - x;
    let whole =
        |width| Panel { x, width, from: 0.0, to: (report.total_ns.max(1)) as f64, zero: 0.0, is_zoom: false };
    let (Some(stopped), Some(downtime)) = (report.stopped_ns, report.downtime_ns) else {
        return vec![whole(room)];
    };
    let (stopped, downtime) = (stopped as f64, (downtime as f64).max(1.0));
    let predicted = report.predicted_downtime_ns.unwrap_or(0) as f64;
    // A prediction far beyond the downtime would leave little room for the downtime.
    let mut shown = downtime.max(predicted.min(downtime * 2.0));
    if let Some(limit) = report.limits.downtime_goal_ns.map(|ns| ns as f64)
        && limit <= shown * 1.5
    {
        shown = shown.max(limit);
    }
    let width = (room - GAP) * WHOLE;
    let zoom = Panel {
        x: x + width + GAP,
        width: room - GAP - width,
        from: (stopped - shown * 0.04).max(0.0),
        to: stopped + shown * 1.1,
        zero: stopped,
        is_zoom: true,
    };
    vec![whole(width), zoom]
}

/// The title, the axis, and the downtime behind all lanes.
fn head(svg: &mut Svg, panel: &Panel, report: &Report, bottom: f64) {
    let top = HEAD - 8.0;
    let frame = Area { x: panel.x, y: top, width: panel.width, height: bottom - top };
    svg.area(frame, "panel", "");
    let title = match (panel.is_zoom, report.downtime_ns) {
        (true, Some(downtime)) => {
            let times = report.total_ns as f64 / (panel.to - panel.from) * (panel.width / whole_width());
            let larger = if times >= 2.0 { format!(" (time × {times:.0})") } else { String::new() };
            format!("The stop: nothing ran for {}{larger}", Time(downtime))
        }
        _ => format!("The whole move, {}", Time(report.total_ns)),
    };
    svg.text((panel.x, 18.0), 14.0, Anchor::Start, "head", &fitting(&title, 14.0, panel.width));
    if let (Some(stopped), Some(downtime)) = (report.stopped_ns, report.downtime_ns)
        && let Some((x, width)) = panel.band(stopped, downtime)
    {
        let area = Area { x, y: top, width, height: bottom - top };
        svg.area(area, "downtime", &format!("nothing ran for {}", Time(downtime)));
    }
    let step = nice_step((panel.to - panel.from) / (panel.width / 80.0));
    let mut tick = ((panel.from - panel.zero) / step).ceil() * step;
    let mut free = panel.x;
    while panel.zero + tick <= panel.to {
        let x = panel.at(panel.zero + tick);
        svg.line((x, top), (x, bottom), "grid");
        let text = if tick < 0.0 { String::new() } else { axis_time(tick, step) };
        let half = text_width(&text, SMALL_SIZE) / 2.0;
        let x = x.clamp(panel.x + half, panel.x + panel.width - half);
        if x - half >= free {
            svg.text((x, HEAD - 14.0), SMALL_SIZE, Anchor::Middle, "quiet", &text);
            free = x + half + 6.0;
        }
        tick += step;
    }
    let from = if panel.is_zoom { "since the stop" } else { "since the start" };
    svg.text((panel.x, 31.0), SMALL_SIZE, Anchor::Start, "quiet", from);
}

fn whole_width() -> f64 {
    (WIDTH - 2.0 * MARGIN - NAMES - GAP) * WHOLE
}

/// A name, and below it a summary.
fn name(svg: &mut Svg, lane: &Lane, name: &str, what: &str) {
    titled_name(svg, lane, &fitting(name, NAME_SIZE, NAMES - MARGIN), name, what);
}

/// A name as it fits, with the complete one as its tooltip, and below it a summary.
fn titled_name(svg: &mut Svg, lane: &Lane, text: &str, name: &str, what: &str) {
    let room = NAMES - MARGIN;
    let middle = lane.y + lane.height / 2.0;
    let y = if what.is_empty() { middle + 4.0 } else { middle - 2.0 };
    let title = if text == name { "" } else { name };
    svg.titled_text((LEFT, y), NAME_SIZE, Anchor::Start, "name", text, title);
    if !what.is_empty() {
        svg.text((LEFT, middle + 11.0), SMALL_SIZE, Anchor::Start, "quiet", &fitting(what, SMALL_SIZE, room));
    }
}

/// The class of a phase's colour.
pub(super) fn phase_class(phase: Phase) -> &'static str {
    match phase {
        Phase::Handshake => "handshake",
        Phase::PreCopy => "precopy",
        Phase::Stop => "stop",
        Phase::StopCopy => "stopcopy",
        Phase::Load => "load",
        Phase::Commit => "commit",
        Phase::Start => "start",
        Phase::Finish => "finish",
        Phase::Undo => "undo",
    }
}

fn phases(svg: &mut Svg, panel: &Panel, lane: &Lane, report: &Report) {
    for phase in &report.phases {
        let Some((x, width)) = panel.band(phase.start_ns, phase.duration_ns) else { continue };
        let area = Area { x, y: lane.y, width, height: lane.height };
        let (devices, memory) = (Bytes(phase.bytes.device_bytes), Bytes(phase.bytes.memory_bytes));
        let title = format!(
            "{}: {}, from {} on; devices {devices}, memory {memory}",
            phase.phase.name(),
            Time(phase.duration_ns),
            Time(phase.start_ns)
        );
        svg.area(area, &format!("band {}", phase_class(phase.phase)), &title);
        label(svg, area, phase.phase.name(), 11.0);
    }
}

/// A text in the middle of an area, if it fits.
fn label(svg: &mut Svg, area: Area, text: &str, size: f64) {
    if text_width(text, size) + 4.0 <= area.width {
        let at = (area.x + area.width / 2.0, area.y + area.height / 2.0 + size * 0.36);
        svg.text(at, size, Anchor::Middle, "label", text);
    }
}

fn rounds(svg: &mut Svg, panel: &Panel, lane: &Lane, report: &Report) {
    let began =
        report.phases.iter().find(|phase| phase.phase == Phase::PreCopy).map_or(0, |phase| phase.start_ns);
    let mut from = began;
    for (at, round) in report.rounds.iter().enumerate() {
        let start = from;
        from = round.end_ns.max(start);
        let Some((x, width)) = panel.band(start, round.end_ns.saturating_sub(start)) else { continue };
        let area = Area { x, y: lane.y, width, height: lane.height };
        let title = format!(
            "round {}: {} in {}, {} left at its end",
            round.round,
            Bytes(round.bytes.memory_bytes.saturating_add(round.bytes.device_bytes)),
            Time(round.end_ns.saturating_sub(start)),
            Bytes(round.left_bytes)
        );
        svg.area(area, if at % 2 == 0 { "band round" } else { "band round other" }, &title);
        label(svg, area, &round.round.to_string(), 10.0);
    }
}

/// A time in which nothing ran, or was to run.
struct Stop {
    name: &'static str,
    class: &'static str,
    start_ns: u64,
    duration_ns: u64,
}

/// The downtime, its prediction and its goal.
fn stops(report: &Report) -> Vec<Stop> {
    let Some(start_ns) = report.stopped_ns else { return Vec::new() };
    let stop = |name, class, duration_ns: Option<u64>| {
        duration_ns.map(|duration_ns| Stop { name, class, start_ns, duration_ns })
    };
    let all = [
        stop("downtime", "band real", report.downtime_ns),
        stop("predicted", "band predicted", report.predicted_downtime_ns),
        stop("limit", "band limit", report.limits.downtime_goal_ns),
    ];
    // A destination knows neither prediction nor goal.
    if report.downtime_ns.is_some() { all.into_iter().flatten().collect() } else { Vec::new() }
}

fn stop(svg: &mut Svg, panel: &Panel, lane: &Lane, stop: &Stop, text: &str) {
    let Some((x, width)) = panel.band(stop.start_ns, stop.duration_ns) else { return };
    let area = Area { x, y: lane.y + 1.0, width, height: lane.height - 2.0 };
    svg.area(area, stop.class, text);
    let end = stop.start_ns as f64 + stop.duration_ns as f64;
    if panel.is_zoom && end > panel.to {
        let (tip, middle) = (panel.x + panel.width, lane.y + lane.height / 2.0);
        let arrow = [(tip, middle), (tip - 8.0, middle - 5.0), (tip - 8.0, middle + 5.0)];
        svg.points(&arrow, "arrow", true, "it goes on");
    }
}

/// The class of an act's colour.
pub(super) fn act_class(act: Act) -> &'static str {
    match act {
        Act::Enter { .. } => "arc",
        Act::PrecopyData => "precopy",
        Act::FinalData => "stopcopy",
        Act::Load => "load",
        Act::Reset => "undo",
    }
}

fn device(svg: &mut Svg, panel: &Panel, lane: &Lane, device: &DeviceReport) {
    let base = lane.y + lane.height;
    svg.line((panel.x, base), (panel.x + panel.width, base), "grid");
    for span in &device.spans {
        let Some((x, width)) = panel.band(span.start_ns, span.duration_ns) else { continue };
        let area = Area { x, y: lane.y + 4.0, width, height: lane.height - 8.0 };
        let what = match span.act {
            Act::Enter { state } => format!("to {state}"),
            act => act.name().into(),
        };
        let bytes = if span.bytes > 0 { format!(", {}", Bytes(span.bytes)) } else { String::new() };
        let busy = match span.busy_ns < span.duration_ns {
            true => format!(" ({} of it busy)", Time(span.busy_ns)),
            false => String::new(),
        };
        let title = format!("{}: {what} in {}{busy}{bytes}", device.name, Time(span.duration_ns));
        svg.area(area, &format!("band {}", act_class(span.act)), &title);
        label(svg, area, span.act.name(), 10.0);
    }
}

/// The most bytes a second that a link carried in a step.
fn peak(link: &LinkReport) -> f64 {
    let most = link.throughput.bytes.iter().max().copied().unwrap_or(0);
    most as f64 * 1e9 / link.throughput.step_ns.max(1) as f64
}

fn link(svg: &mut Svg, panel: &Panel, lane: &Lane, link: &LinkReport, top: f64) {
    let base = lane.y + lane.height;
    svg.line((panel.x, base), (panel.x + panel.width, base), "grid");
    let step = link.throughput.step_ns.max(1);
    let rate = |bytes: u64| bytes as f64 * 1e9 / step as f64;
    let mut points = Vec::new();
    for (at, bytes) in link.throughput.bytes.iter().enumerate() {
        let start = (at as u64).saturating_mul(step);
        if (start as f64) > panel.to || start as f64 + step as f64 <= panel.from {
            continue;
        }
        let y = base - rate(*bytes) / top.max(1.0) * (lane.height - 2.0);
        points.push((panel.at(start as f64), y));
        points.push((panel.at(start as f64 + step as f64), y));
    }
    if let (Some(first), Some(last)) = (points.first().copied(), points.last().copied()) {
        points.insert(0, (first.0, base));
        points.push((last.0, base));
        let title = format!(
            "{}: {} sent, {} received; waited {}",
            link.peer,
            Bytes(link.sent_bytes),
            Bytes(link.received_bytes),
            Time(link.waited_ns)
        );
        svg.points(&points, "carried", true, &title);
    }
}

/// The smallest 1, 2 or 5 times a power of ten that is at least this value.
pub(super) fn nice_step(least: f64) -> f64 {
    let power = 10f64.powf(least.max(1.0).log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|factor| factor * power)
        .find(|step| *step >= least * 0.999)
        .unwrap_or(power)
}

/// A time on an axis, with as many digits as the step needs.
fn axis_time(ns: f64, step: f64) -> String {
    let (unit, name) = match ns.max(step) {
        most if most >= 1e9 => (1e9, "s"),
        most if most >= 1e6 => (1e6, "ms"),
        _ => (1e3, "us"),
    };
    let digits = (-(step / unit).log10().floor()).clamp(0.0, 3.0) as usize;
    if ns == 0.0 { "0".into() } else { format!("{:.digits$} {name}", ns / unit) }
}
