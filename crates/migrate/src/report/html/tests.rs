//! Pages of moves of many shapes: they are well-formed, nothing is missing, nothing lies outside or on top of each other.

use limosa_protocol::State;
use roxmltree::{Document, Node, ParsingOptions};

use super::svg::text_width;
use crate::report::{
    Act, DeviceReport, End, LimitsReport, LinkReport, Made, Phase, PhaseReport, Report, RoundReport, Side,
    SpanReport, Throughput, Work,
};
use limosa_stream::Totals;

const MS: u64 = 1_000_000;
const HOSTILE: &str = "</text><script>alert(1)</script>&\"'\u{0}\u{1b}[31m\u{202e}\u{ffff}";

fn span(act: Act, start_ns: u64, duration_ns: u64, bytes: u64) -> SpanReport {
    SpanReport { act, start_ns, duration_ns, busy_ns: duration_ns / 2, bytes }
}

fn enter(state: State, start_ns: u64, duration_ns: u64) -> SpanReport {
    span(Act::Enter { state }, start_ns, duration_ns, 0)
}

/// A move of several seconds with a stop of this many ms, as its source saw it.
fn moved(devices: u64, links: u64, rounds: u32, downtime_ms: u64) -> Report {
    let (stop, downtime) = (4000 * MS, downtime_ms * MS);
    let phase = |phase, start_ns, duration_ns, device_bytes, memory_bytes| {
        let bytes = Totals { device_bytes, memory_bytes, zero_bytes: memory_bytes / 3 };
        PhaseReport { phase, start_ns, duration_ns, bytes }
    };
    let part = |of_ten: u64| downtime * of_ten / 10;
    let phases = vec![
        phase(Phase::Handshake, 0, 40 * MS, 0, 0),
        phase(Phase::PreCopy, 40 * MS, stop - 40 * MS, devices << 20, 4 << 30),
        phase(Phase::Stop, stop, part(2), 0, 0),
        phase(Phase::StopCopy, stop + part(2), part(5), devices << 16, 12 << 20),
        phase(Phase::Load, stop + part(7), part(2), 0, 0),
        phase(Phase::Commit, stop + part(9), part(1), 0, 0),
        phase(Phase::Finish, stop + downtime, 9 * MS, 0, 0),
    ];
    let dirty =
        |round: u32| ((3u64 << 30) >> (u64::from(round) * 20 / u64::from(rounds.max(1)))).max(40 << 12);
    let end = |round: u32| 40 * MS + (stop - 40 * MS) * (u64::from(round) + 10) / (u64::from(rounds) + 10);
    let rounds = (1..=rounds)
        .map(|round| RoundReport {
            round,
            end_ns: end(round),
            bytes: Totals { device_bytes: 1 << 16, memory_bytes: dirty(round - 1), zero_bytes: 0 },
            dirty_bytes: dirty(round),
            left_bytes: dirty(round),
            bytes_per_second: 1 << 30,
            predicted_downtime_ns: dirty(round) + 2 * MS,
            throttle_step: round / 40,
        })
        .collect();
    let device = |at: u64| DeviceReport {
        waiting_bytes_max: 0,
        name: format!("0000:{at:02x}:00.0 nvme"),
        bytes: (1 << 20) + (1 << 16),
        precopy_bytes: 1 << 20,
        spans: vec![
            enter(State::PreCopy, 41 * MS, 2 * MS + at * MS / 2),
            span(Act::PrecopyData, 50 * MS, (200 + at * 90) * MS, 1 << 20),
            span(Act::PrecopyData, 3000 * MS, (100 + at * 9) * MS, 1 << 20),
            enter(State::PreCopyP2p, stop, part(1) * (at + 4) / (devices + 4)),
            enter(State::StopCopy, stop + part(1), part(1) * (devices + 2 - at) / (devices + 4)),
            span(Act::FinalData, stop + part(2), part(4) * (at + 1) / devices, 1 << 16),
            enter(State::Stop, stop + downtime + MS, MS),
        ],
    };
    let link = |at: u64| LinkReport {
        peer: format!("10.0.0.{at}:7000"),
        sent_bytes: 1 << 30,
        received_bytes: 4000,
        start_ns: MS,
        duration_ns: stop + downtime,
        waited_ns: stop / 3,
        throughput: Throughput {
            step_ns: 16 * MS,
            bytes: (0..(stop + downtime) / 16 / MS + 1)
                .map(|step| (1 << 22) + (step * (at + 7) % 13) * (1 << 17))
                .collect(),
        },
    };
    let sum = |of: fn(&PhaseReport) -> u64| phases.iter().map(of).sum::<u64>();
    let bytes = Totals {
        device_bytes: sum(|phase| phase.bytes.device_bytes),
        memory_bytes: sum(|phase| phase.bytes.memory_bytes),
        zero_bytes: sum(|phase| phase.bytes.zero_bytes),
    };
    Report {
        id: "8d1f6f0e-33b6-4b0c-9f3e-4f1f0f4b6a55".into(),
        outcome: End::Moved,
        phases,
        rounds,
        devices: (0..devices).map(device).collect(),
        links: (0..links).map(link).collect(),
        bytes,
        downtime_ns: Some(downtime),
        stopped_ns: Some(stop),
        predicted_downtime_ns: Some(downtime * 9 / 10),
        total_ns: stop + downtime + 9 * MS,
        ..Report::nothing(Side::Source, limits(300))
    }
}

fn limits(downtime_ms: u64) -> LimitsReport {
    LimitsReport {
        downtime_goal_ns: Some(downtime_ms * MS),
        rounds_max: Some(100),
        ..LimitsReport::default()
    }
}

/// As a destination sees it: no prediction, no limit, devices that load.
fn received() -> Report {
    let mut report = moved(3, 2, 9, 40);
    let stop = report.stopped_ns.unwrap();
    report.side = Side::Destination;
    report.outcome = End::Runs;
    report.limits = LimitsReport::default();
    report.predicted_downtime_ns = None;
    report.rounds.iter_mut().for_each(|round| round.predicted_downtime_ns = 0);
    for device in &mut report.devices {
        device.spans = vec![
            enter(State::Resuming, 3 * MS, 8 * MS),
            span(Act::Load, 60 * MS, 900 * MS, 1 << 20),
            span(Act::Load, stop + 9 * MS, 20 * MS, 1 << 16),
            enter(State::Stop, stop + 30 * MS, 6 * MS),
            enter(State::RunningP2p, stop + 38 * MS, MS),
            enter(State::Running, stop + 39 * MS, MS),
        ];
    }
    report
}

/// Called off before anything was stopped.
fn undone() -> Report {
    let mut report = moved(2, 1, 3, 10);
    report.phases.truncate(2);
    (report.outcome, report.why) = (End::Undone, Some("somebody <else>".into()));
    report.phases.push(PhaseReport {
        phase: Phase::Undo,
        start_ns: 4000 * MS,
        duration_ns: 19 * MS,
        bytes: Totals::default(),
    });
    report.devices.iter_mut().for_each(|device| device.spans.truncate(3));
    (report.downtime_ns, report.stopped_ns, report.predicted_downtime_ns) = (None, None, None);
    report.notes = vec!["no log sees the DMA of uart0: all memory moves after the stop".into()];
    report.peer_told = false;
    report
}

fn hostile() -> Report {
    let mut report = moved(2, 2, 2, 700);
    report.id = HOSTILE.into();
    report.why = Some(HOSTILE.into());
    report.devices[0].name = HOSTILE.repeat(40);
    report.devices[1].name = "\u{6771}\u{4eac}".repeat(99);
    report.links[1].peer = HOSTILE.repeat(9);
    report.notes = vec![HOSTILE.into()];
    // Numbers of a damaged report, which must not lead a picture out of its bounds either.
    report.rounds[0].end_ns = u64::MAX;
    report.rounds[0].dirty_bytes = u64::MAX;
    report.rounds[1].predicted_downtime_ns = u64::MAX;
    report.phases[2].duration_ns = u64::MAX;
    report.devices[1].spans[0].start_ns = u64::MAX;
    report.links[0].throughput.bytes.push(u64::MAX);
    report
}

fn scenes() -> Vec<(&'static str, Report)> {
    let mut slow = moved(4, 1, 40, 290);
    slow.downtime_ns = Some(330 * MS);
    slow.notes = vec!["nothing ran for 330.0 ms, allowed were 300.0 ms".into()];
    let mut memoryless = moved(1, 1, 0, 1);
    memoryless.bytes.memory_bytes = 0;
    memoryless.bytes.zero_bytes = 0;
    memoryless.predicted_downtime_ns = None;
    let mut cold = moved(2, 1, 0, 3000);
    (cold.total_ns, cold.predicted_downtime_ns) = (7100 * MS, None);
    vec![
        ("one", moved(1, 1, 8, 12)),
        ("many", moved(16, 4, 100, 60)),
        ("over", slow),
        ("received", received()),
        ("undone", undone()),
        ("hostile", hostile()),
        ("memoryless", memoryless),
        ("cold", cold),
        ("nothing", Report::nothing(Side::Destination, LimitsReport::default())),
    ]
}

fn parsed<'p>(name: &str, page: &'p str) -> Document<'p> {
    let options = ParsingOptions { allow_dtd: true, ..ParsingOptions::default() };
    Document::parse_with_options(page, options).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn number(node: Node<'_, '_>, name: &str) -> f64 {
    node.attribute(name).unwrap_or_else(|| panic!("{node:?} has no {name}")).parse().unwrap()
}

/// Left, top, right and bottom of a shape.
fn bounds(node: Node<'_, '_>) -> Option<(f64, f64, f64, f64)> {
    let number = |name| number(node, name);
    Some(match node.tag_name().name() {
        "rect" => (number("x"), number("y"), number("x") + number("width"), number("y") + number("height")),
        "line" => (
            number("x1").min(number("x2")),
            number("y1").min(number("y2")),
            number("x1").max(number("x2")),
            number("y1").max(number("y2")),
        ),
        "circle" => (number("cx") - 2.5, number("cy") - 2.5, number("cx") + 2.5, number("cy") + 2.5),
        "text" => {
            let size = number("font-size");
            let width = text_width(node.text().unwrap_or(""), size);
            let x = match node.attribute("text-anchor").unwrap() {
                "start" => number("x"),
                "middle" => number("x") - width / 2.0,
                _ => number("x") - width,
            };
            (x, number("y") - size * 0.8, x + width, number("y") + size * 0.25)
        }
        "polygon" | "polyline" => {
            let points = node.attribute("points").unwrap().split(' ').map(|point| {
                let (x, y) = point.split_once(',').unwrap();
                (x.parse::<f64>().unwrap(), y.parse::<f64>().unwrap())
            });
            points.fold((f64::MAX, f64::MAX, f64::MIN, f64::MIN), |(left, top, right, bottom), (x, y)| {
                (left.min(x), top.min(y), right.max(x), bottom.max(y))
            })
        }
        _ => return None,
    })
}

#[test]
fn nothing_lies_outside_its_picture_and_no_text_on_another() {
    for (name, report) in scenes() {
        let page = report.html();
        let document = parsed(name, &page);
        let pictures: Vec<_> = document.descendants().filter(|node| node.has_tag_name("svg")).collect();
        assert_eq!(pictures.len(), if report.rounds.is_empty() { 1 } else { 2 }, "{name}");
        for picture in document.descendants().filter(|node| node.tag_name().name() == "svg") {
            let (width, height) = (number(picture, "width"), number(picture, "height"));
            let mut texts: Vec<((f64, f64, f64, f64), String)> = Vec::new();
            for node in picture.descendants() {
                let Some(bounds) = bounds(node) else { continue };
                let (left, top, right, bottom) = bounds;
                let fits = left >= -0.1 && top >= -0.1 && right <= width + 0.1 && bottom <= height + 0.1;
                assert!(fits, "{name}: {node:?} at {bounds:?} in {width} x {height}");
                if !node.has_tag_name("text") && node.tag_name().name() != "text" {
                    continue;
                }
                let text = node.text().unwrap_or("").to_string();
                for (other, on) in &texts {
                    // Phases that contradict each other lie on each other.
                    let apart = name == "hostile"
                        || right <= other.0
                        || other.2 <= left
                        || bottom <= other.1
                        || other.3 <= top;
                    assert!(apart || text.is_empty() || on.is_empty(), "{name}: {text:?} on {on:?}");
                }
                texts.push((bounds, text));
            }
        }
    }
}

#[test]
fn what_a_peer_or_a_device_is_called_is_text_and_nothing_else() {
    let page = hostile().html();
    assert!(!page.contains("<script") && !page.contains('\u{202e}') && !page.contains('\u{1b}'));
    let document = parsed("hostile", &page);
    let known = [
        "html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "p", "dl", "div", "dt", "dd",
        "small", "figure", "svg", "rect", "line", "circle", "text", "polygon", "polyline", "ul", "li", "i",
        "table", "thead", "tbody", "tr", "th", "td",
    ];
    for node in document.descendants().filter(Node::is_element) {
        assert!(known.contains(&node.tag_name().name()), "{node:?}");
        for attribute in node.attributes() {
            assert!(!attribute.name().starts_with("on"), "{attribute:?}");
            assert!(!attribute.value().contains("alert"), "{attribute:?}");
        }
    }
}

#[test]
fn a_page_loads_nothing_from_elsewhere() {
    for (name, report) in scenes() {
        let page = report.html();
        let links =
            page.replace("http://www.w3.org/2000/svg", "").replace("http://www.w3.org/1999/xhtml", "");
        for word in ["http:", "https:", "url(", "@import", "src=", "href="] {
            assert!(!links.contains(word), "{name}: {word}");
        }
    }
}

#[test]
fn every_device_link_phase_and_round_is_there() {
    let report = moved(16, 4, 100, 60);
    let page = report.html();
    let document = parsed("many", &page);
    let texts: Vec<_> = document.descendants().filter_map(|node| node.text()).collect();
    let has = |wanted: &str| assert!(texts.iter().any(|text| text.contains(wanted)), "{wanted}");
    report.devices.iter().for_each(|device| has(&device.name));
    report.links.iter().for_each(|link| has(&link.peer));
    report.phases.iter().for_each(|phase| has(phase.phase.name()));
    report.rounds.iter().for_each(|round| has(&format!("round {}:", round.round)));
    has("60.0 ms");
    has("predicted 54.0 ms");
    has("limit 300.0 ms");
    has("step 2");
}

#[test]
fn a_move_that_was_called_off_says_so_and_shows_no_downtime() {
    let page = undone().html();
    assert!(page.contains("not moved: the guest is at the source") && !page.contains("nothing ran for"));
    assert!(page.contains("no log sees the DMA of uart0"));
    assert!(page.contains("the other side may not know"));
}

#[test]
fn a_save_was_called_a_move_and_zero_was_drawn_as_the_least_power() {
    let mut report = moved(1, 0, 3, 10);
    (report.work, report.outcome) = (Work::Save, End::Undone);
    for (round, left) in report.rounds.iter_mut().zip([64 << 20, 32 << 20, 0]) {
        round.left_bytes = left;
        round.bytes.memory_bytes = 32 << 20;
    }
    let page = report.html();
    assert!(page.contains("<h1>Save of") && page.contains("not saved"), "{page}");
    let document = parsed("save", &page);
    let y = |text: &str| {
        let mark = document.descendants().find(|node| {
            node.tag_name().name() == "text"
                && node.text() == Some(text)
                && node.attribute("text-anchor") == Some("end")
        });
        number(mark.unwrap_or_else(|| panic!("no mark {text}")), "y")
    };
    assert!(y("0 B") - y("32.0 MiB") > 10.0, "{} and {}", y("0 B"), y("32.0 MiB"));
}

#[test]
fn a_report_that_knows_its_origin_tells_it_without_passwords() {
    let mut report = moved(1, 1, 1, 10);
    report.made = Some(Made {
        at: "2026-01-02T03:04:05Z".into(),
        host: "<here>".into(),
        version: "limosa 1".into(),
        command: "limosa save x http://user:secret@store".into(),
    });
    let page = report.html();
    for part in ["2026-01-02T03:04:05Z", "&lt;here&gt;, the source", "limosa 1", "http://***@store"] {
        assert!(page.contains(part), "{part}: {page}");
    }
    assert!(!page.contains("secret"));
}

#[test]
#[ignore = "writes the pages into the folder $LIMOSA_PAGES, to look at them"]
fn pages_to_look_at() {
    let folder =
        std::path::PathBuf::from(std::env::var_os("LIMOSA_PAGES").expect("LIMOSA_PAGES names a folder"));
    for (name, report) in scenes() {
        std::fs::write(folder.join(name).with_extension("html"), report.html()).unwrap();
    }
}
