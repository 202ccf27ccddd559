//! `--report FILE.html` in a real browser, on screens of several widths. It needs Chromium, which `lab/browser/run` installs.

use std::path::PathBuf;
use std::process::Command;

use crate::support::{Folder, Running, limosa};
use serde::Deserialize;

/// A telephone, a tablet, a window and a wide screen, in CSS pixels.
const WIDTHS: [u32; 4] = [360, 768, 1100, 1920];

/// What the browser measured of a page at one width.
#[derive(Debug, Deserialize)]
struct Seen {
    width: u32,
    /// The page is wider than the screen, and scrolls sideways.
    overflow: bool,
    /// Text that lies outside of its drawing.
    cut: Vec<String>,
    /// Pairs of texts of a drawing that lie on one another.
    overlaps: Vec<String>,
    /// The height of the smallest text of a drawing.
    smallest: f64,
    /// Where the outcome is, from the top; none of a page without one.
    badge: Option<f64>,
    /// Words that were broken between two letters.
    broken: Vec<String>,
}

/// Opens a report in frames of all widths, and measures it.
fn look_at(folder: &Folder, report: &str) -> Vec<Seen> {
    let page = std::fs::read_to_string(report).unwrap();
    let page = page.replace('&', "&amp;").replace('"', "&quot;");
    let frames: String = WIDTHS
        .iter()
        .map(|width| {
            format!(
                "<iframe width=\"{width}\" height=\"900\" style=\"border:0\" srcdoc=\"{page}\"></iframe>\n"
            )
        })
        .collect();
    let looked_at = folder.text("looked_at.html");
    let script = include_str!("browser/measure.js");
    let html = format!("<!DOCTYPE html>\n{frames}<pre id=\"seen\"></pre>\n<script>\n{script}</script>\n");
    std::fs::write(&looked_at, html).unwrap();
    let dom = chromium(folder, &["--dump-dom", &format!("file://{looked_at}")]);
    let (_, seen) =
        dom.split_once("<pre id=\"seen\">").unwrap_or_else(|| panic!("nothing was measured: {dom}"));
    let (seen, _) = seen.split_once("</pre>").unwrap();
    let seen = seen.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&");
    serde_json::from_str(&seen).unwrap_or_else(|error| panic!("{error}: {seen}"))
}

/// What Chromium prints. It gets no network.
fn chromium(folder: &Folder, options: &[&str]) -> String {
    let mut command = Command::new("chromium");
    command
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"])
        .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
        .arg(format!("--user-data-dir={}", folder.text("profile")))
        .args(options)
        .env("HOME", folder.path(""));
    Running::start(&mut command).end().ok()
}

/// The report is readable at every width, and its outcome is what is seen first.
fn is_readable(folder: &Folder, report: &str, name: &str, has_badge: bool) {
    if let Some(pictures) = std::env::var_os("LIMOSA_SCREENSHOTS") {
        let picture = PathBuf::from(pictures).join(format!("{name}.png"));
        let shot = format!("--screenshot={}", picture.display());
        chromium(folder, &[&shot, "--window-size=1100,1400", &format!("file://{report}")]);
    }
    let all = look_at(folder, report);
    assert_eq!(all.iter().map(|seen| seen.width).collect::<Vec<_>>(), WIDTHS, "{name}");
    for seen in all {
        assert!(!seen.overflow, "{name} is wider than a screen of {}", seen.width);
        let empty: &[String] = &[];
        let found = (&*seen.cut, &*seen.overlaps, &*seen.broken);
        assert_eq!(found, (empty, empty, empty), "{name} at {}: cut, on one another, broken", seen.width);
        assert!(seen.smallest >= 8.0, "{name} at {}: text of {} pixels", seen.width, seen.smallest);
        let badge = seen.badge;
        assert_eq!(badge.is_some(), has_badge, "{name} at {}", seen.width);
        assert!(badge.is_none_or(|top| top < 160.0), "{name} at {}: {badge:?}", seen.width);
    }
}

#[test]
#[ignore = "needs Chromium (lab/browser/run)"]
fn the_report_of_a_move_is_readable_on_every_screen() {
    let folder = Folder::new();
    let name = "a-device-with-a-name-that-is-longer-than-most-labels-have-room-for";
    let (source, destination) =
        (folder.device(name, &["state=8M"]), folder.device("destination", &["state=8M"]));
    let report = folder.text("move.html");
    limosa(&["migrate", &source.socket, &destination.socket, "--report", &report]).ok();
    is_readable(&folder, &report, "move", true);
}

#[test]
#[ignore = "needs Chromium (lab/browser/run)"]
fn the_report_of_many_devices_is_readable_on_every_screen() {
    let folder = Folder::new();
    let ends: Vec<_> = (0..12)
        .map(|at| {
            let device = |end: &str| folder.device(&format!("{end}-{at}"), &["state=1M"]);
            (device("from"), device("to"))
        })
        .collect();
    let (report, link) = (folder.text("many.html"), format!("unix:{}", folder.text("link")));
    let (mut send, mut receive) = (vec!["send"], vec!["receive"]);
    for (at, (from, to)) in ends.iter().enumerate() {
        let further = (at > 0).then_some("--device");
        send.extend(further.into_iter().chain([&*from.socket]));
        receive.extend(further.into_iter().chain([&*to.socket]));
    }
    receive.extend(["--listen", &link]);
    let receiver = crate::support::start(&receive);
    receiver.line("listening on");
    send.extend(["--to", &link, "--links", "3", "--report", &report]);
    limosa(&send).ok();
    receiver.end().ok();
    is_readable(&folder, &report, "many", true);
}

#[test]
#[ignore = "needs Chromium (lab/browser/run)"]
fn the_report_of_a_save_and_of_a_move_that_failed_are_readable_on_every_screen() {
    let folder = Folder::new();
    let source = folder.device("source", &["state=8M"]);
    let destination = folder.device("destination", &["state=8M", "fault=fail:RESUMING>STOP"]);
    let (saved, failed) = (folder.text("save.html"), folder.text("failed.html"));
    limosa(&["save", &source.socket, &folder.text("snapshot"), "--report", &saved]).ok();
    is_readable(&folder, &saved, "save", true);
    let migrate = ["migrate", &source.socket, &destination.socket, "--report", &failed];
    limosa(&migrate).fails(3, &["as it was before"]);
    is_readable(&folder, &failed, "failed", true);
}

#[test]
#[ignore = "needs Chromium (lab/browser/run)"]
fn the_report_of_a_bench_is_readable_on_every_screen() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    let report = folder.text("bench.html");
    limosa(&["bench", &device.socket, "--seconds", "0.05", "--report", &report]).ok();
    is_readable(&folder, &report, "bench", false);
}
