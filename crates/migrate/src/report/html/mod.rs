//! [`Report::html`]: a report as one self-contained HTML file with numbers, pictures and tables; and what other pages in the
//! same style take of it. The file is also XML, so that any tool can extract the pictures.

mod rounds;
mod svg;
#[cfg(test)]
mod tests;
mod timeline;

use std::fmt::Write as _;

use super::text::{Bytes, Rate, Time};
use super::{Act, End, Report, Work};
pub use svg::Escaped;

const STYLE: &str = include_str!("style.css");

/// The beginning of a page in the style of reports, up to its heading. What follows is XML too.
pub fn begin(page: &mut String, title: &str) -> std::fmt::Result {
    writeln!(page, "<!DOCTYPE html>")?;
    writeln!(page, "<html xmlns=\"http://www.w3.org/1999/xhtml\" lang=\"en\">")?;
    writeln!(page, "<head>\n<meta charset=\"utf-8\"/>")?;
    writeln!(page, "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>")?;
    writeln!(page, "<title>{}</title>\n<style>\n{STYLE}</style>\n</head>", Escaped(title))?;
    writeln!(page, "<body>\n<main>\n<h1>{}</h1>", Escaped(title))
}

/// The end of a page that [`begin`] began.
pub const END: &str = "</main>\n</body>\n</html>\n";

impl Report {
    /// The report as an HTML file: a timeline with phases, rounds, devices and links, a close-up of the downtime, charts of the
    /// rounds, and tables of all numbers. The file loads nothing, runs no script, follows the reader's choice of light or
    /// dark, and prints on paper in landscape. All text, such as names of devices and peers, is escaped.
    #[must_use]
    pub fn html(&self) -> String {
        let mut page = String::new();
        let _ = self.write(&mut page);
        page
    }

    fn write(&self, page: &mut String) -> std::fmt::Result {
        begin(page, &self.title())?;
        let (class, badge) = self.badge();
        writeln!(page, "<p class=\"badge {class}\">{badge}</p>")?;
        if let Some(why) = &self.why {
            writeln!(page, "<p class=\"over\">{}</p>", Escaped(why))?;
        }
        self.origin(page)?;
        self.facts(page)?;
        writeln!(page, "<figure>\n{}</figure>", timeline::draw(self))?;
        self.key(page)?;
        if let Some(rounds) = rounds::draw(self) {
            writeln!(page, "<h2>Rounds of pre-copy</h2>\n<figure>\n{rounds}</figure>")?;
        }
        self.list_notes(page)?;
        self.tables(page)?;
        page.push_str(END);
        Ok(())
    }

    fn title(&self) -> String {
        let what = match &self.devices[..] {
            [] => "a machine".into(),
            [only] => only.name.clone(),
            several => format!("{} devices", several.len()),
        };
        let memory = if self.bytes.memory_bytes + self.bytes.zero_bytes > 0 { " with memory" } else { "" };
        let work = match self.work {
            Work::Move => "Move",
            Work::Save => "Save",
            Work::Load => "Load",
        };
        format!("{work} of {what}{memory}")
    }

    /// What is seen first: the class of its colour, and how it ended.
    fn badge(&self) -> (&'static str, &'static str) {
        match (self.outcome, self.work) {
            (End::Moved, _) => ("good", "moved: the guest is at the destination"),
            (End::Saved, _) => ("good", "saved"),
            (End::Runs, Work::Load) => ("good", "loaded: the guest runs here"),
            (End::Runs, _) => ("good", "moved: the guest runs here"),
            (End::Stopped, _) => ("good", "everything is here, and stands still"),
            (End::Undone, Work::Save) => ("bad", "not saved: the guest is as it was before"),
            (End::Undone, _) => ("bad", "not moved: the guest is at the source, as it was before"),
            (End::Discarded, Work::Load) => ("bad", "not loaded"),
            (End::Discarded, _) => ("bad", "not moved: nothing is here"),
            (End::InDoubt, Work::Save) => {
                ("open", "in doubt: the guest stands still, and the snapshot may be there")
            }
            (End::InDoubt, _) => {
                ("open", "in doubt: the guest stands still here, and may run at the destination")
            }
            (End::Broken, _) => ("bad", "broken: the guest may run only here, and does not"),
        }
    }

    /// Which move it was, seen from where, when, and by what.
    fn origin(&self, page: &mut String) -> std::fmt::Result {
        writeln!(page, "<dl class=\"id\">")?;
        let mut line = |name: &str, value: &str| {
            let value = limosa_stream::without_passwords(value);
            writeln!(page, "<dt>{name}</dt><dd>{}</dd>", Escaped(&value))
        };
        if let Some(made) = &self.made {
            line("when", &made.at)?;
            line("host", &format!("{}, the {}", made.host, self.side.name()))?;
        } else {
            line("seen by", &format!("the {}", self.side.name()))?;
        }
        if let Some(link) = self.links.first() {
            line("other side", &link.peer)?;
        }
        if let Some(made) = &self.made {
            line("made by", &made.version)?;
            line("command", &made.command)?;
        }
        if !self.id.is_empty() {
            line("id", &self.id)?;
        }
        writeln!(page, "</dl>")
    }

    /// The most important numbers.
    fn facts(&self, page: &mut String) -> std::fmt::Result {
        writeln!(page, "<dl class=\"facts\">")?;
        if let Some(downtime) = self.downtime_ns {
            let limit = self.limits.downtime_goal_ns;
            let class = if limit.is_some_and(|limit| downtime > limit) { " class=\"over\"" } else { "" };
            write!(page, "<div{class}><dt>nothing ran for</dt><dd>{}<small>", Time(downtime))?;
            if let Some(predicted) = self.predicted_downtime_ns {
                write!(page, "predicted {}", Time(predicted))?;
            }
            if let Some(limit) = limit {
                let comma = if self.predicted_downtime_ns.is_some() { ", " } else { "" };
                write!(page, "{comma}limit {}", Time(limit))?;
            }
            writeln!(page, "</small></dd></div>")?;
        }
        let mut fact = |name: &str, value: String, small: String| {
            writeln!(page, "<div><dt>{name}</dt><dd>{value}<small>{small}</small></dd></div>")
        };
        let moved = self.bytes.memory_bytes.saturating_add(self.bytes.device_bytes);
        let rate = moved as f64 * 1e9 / self.total_ns.max(1) as f64;
        fact(
            &format!("the whole {}", self.work.name()),
            Time(self.total_ns).to_string(),
            format!("{} on average", Rate(rate)),
        )?;
        if self.bytes.memory_bytes > 0 || self.bytes.zero_bytes > 0 {
            let zeroes = format!("and {} of zeroes", Bytes(self.bytes.zero_bytes));
            fact("memory", Bytes(self.bytes.memory_bytes).to_string(), zeroes)?;
        }
        let before: u64 = self.devices.iter().map(|device| device.precopy_bytes).sum();
        fact(
            "devices",
            Bytes(self.bytes.device_bytes).to_string(),
            format!("{} before the stop", Bytes(before)),
        )?;
        if let Some(last) = self.rounds.last() {
            let slowed = match last.throttle_step {
                0 => format!("{} left behind the last", Bytes(last.left_bytes)),
                steps => format!("guest slowed down, step {steps}"),
            };
            fact("rounds", last.round.to_string(), slowed)?;
        }
        if self.buffer_bytes_max > 0 {
            fact(
                "buffers",
                Bytes(self.buffer_bytes_max).to_string(),
                "the most at once, on this side".into(),
            )?;
        }
        writeln!(page, "</dl>")
    }

    /// The legend: the colours that the lanes use.
    fn key(&self, page: &mut String) -> std::fmt::Result {
        writeln!(page, "<ul class=\"key\">")?;
        let mut entry = |class: &str, name: &str| writeln!(page, "<li><i class=\"{class}\"></i>{name}</li>");
        for phase in &self.phases {
            entry(timeline::phase_class(phase.phase), phase.phase.name())?;
        }
        let acts = || self.devices.iter().flat_map(|device| device.spans.iter().map(|span| span.act));
        if acts().any(|act| matches!(act, Act::Enter { .. })) {
            entry("arc", "a device enters a state")?;
        }
        for (act, name) in [
            (Act::PrecopyData, "its data before the stop"),
            (Act::FinalData, "its data after the stop"),
            (Act::Load, "its data is loaded"),
            (Act::Reset, "it is reset"),
        ] {
            if acts().any(|other| other == act) {
                entry(timeline::act_class(act), name)?;
            }
        }
        if !self.links.is_empty() {
            entry("carried", "bytes a second on a link")?;
        }
        writeln!(page, "</ul>")
    }

    fn list_notes(&self, page: &mut String) -> std::fmt::Result {
        if self.notes.is_empty() && self.peer_told {
            return Ok(());
        }
        writeln!(page, "<h2>Notes</h2>\n<ul class=\"notes\">")?;
        for note in &self.notes {
            writeln!(page, "<li>{}</li>", Escaped(note))?;
        }
        if !self.peer_told {
            writeln!(page, "<li>the other side may not know how the move ended, and may ask</li>")?;
        }
        writeln!(page, "</ul>")
    }

    fn tables(&self, page: &mut String) -> std::fmt::Result {
        let phases = self.phases.iter().map(|phase| {
            vec![
                phase.phase.name().to_string(),
                Time(phase.start_ns).to_string(),
                Time(phase.duration_ns).to_string(),
                Bytes(phase.bytes.device_bytes).to_string(),
                Bytes(phase.bytes.memory_bytes).to_string(),
                Bytes(phase.bytes.zero_bytes).to_string(),
            ]
        });
        table(page, "Phases", &["phase", "at", "took", "devices", "memory", "zeroes"], phases)?;
        let devices = self.devices.iter().map(|device| {
            let arcs = device.spans.iter().filter(|span| matches!(span.act, Act::Enter { .. }));
            let longest = arcs.max_by_key(|span| span.duration_ns);
            let longest =
                longest.map_or("".into(), |span| format!("{} {}", span.act.name(), Time(span.duration_ns)));
            let busy = device.spans.iter().map(|span| span.busy_ns).fold(0, u64::saturating_add);
            let after = device.bytes.saturating_sub(device.precopy_bytes);
            let (before, after) = (Bytes(device.precopy_bytes).to_string(), Bytes(after).to_string());
            vec![device.name.clone(), before, after, Time(busy).to_string(), longest]
        });
        let names = ["device", "before the stop", "after the stop", "busy", "longest arc"];
        table(page, "Devices", &names, devices)?;
        let links = self.links.iter().map(|link| {
            let bytes = link.sent_bytes.saturating_add(link.received_bytes);
            let rate = bytes as f64 * 1e9 / link.duration_ns.max(1) as f64;
            vec![
                link.peer.clone(),
                Bytes(link.sent_bytes).to_string(),
                Bytes(link.received_bytes).to_string(),
                Rate(rate).to_string(),
                Time(link.waited_ns).to_string(),
            ]
        });
        table(page, "Links", &["link to", "sent", "received", "on average", "in reads and writes"], links)
    }
}

/// A table under a heading, unless it is empty. Cells are texts, which are escaped; the heading and the names are markup.
pub fn table(
    page: &mut String,
    title: &str,
    names: &[&str],
    rows: impl Iterator<Item = Vec<String>>,
) -> std::fmt::Result {
    let mut rows = rows.peekable();
    if rows.peek().is_none() {
        return Ok(());
    }
    writeln!(page, "<h2>{title}</h2>\n<table>\n<thead><tr>")?;
    names.iter().try_for_each(|name| write!(page, "<th>{name}</th>"))?;
    writeln!(page, "</tr></thead>\n<tbody>")?;
    for row in rows {
        write!(page, "<tr>")?;
        row.iter().try_for_each(|cell| write!(page, "<td>{}</td>", Escaped(cell)))?;
        writeln!(page, "</tr>")?;
    }
    writeln!(page, "</tbody>\n</table>")
}
