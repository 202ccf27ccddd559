//! [`Document::html`]: a run as a page in the style of reports, with a histogram for each measure.

use std::fmt::Write as _;

use limosa_migrate::html::{self, Escaped};

use crate::document::{Document, Measure, Skipped};

/// A histogram's picture, in the page's units.
const WIDTH: f64 = 220.0;
const HEIGHT: f64 = 30.0;
/// Bars of it.
const BARS: usize = 44;

impl Document {
    /// The run as one HTML file, which is XML too and loads nothing.
    pub fn html(&self) -> String {
        let mut page = String::new();
        // Writing to a string does not fail.
        let _ = self.write_html(&mut page);
        page
    }

    fn write_html(&self, page: &mut String) -> std::fmt::Result {
        html::begin(page, &format!("Bench of {}", self.device))?;
        writeln!(
            page,
            "<p class=\"id\">limosa {}, kernel {}, {} processors, {} s for each measure; left in {}</p>",
            Escaped(&self.limosa),
            Escaped(&self.kernel),
            self.processors,
            self.seconds,
            Escaped(&self.left_in)
        )?;
        if let Some(why) = &self.ended_early {
            writeln!(page, "<p class=\"over\">Ended early: {}</p>", Escaped(why))?;
        }
        writeln!(page, "<table>\n<thead><tr><th>measure</th><th>median</th><th>90 %</th><th>99 %</th>")?;
        writeln!(
            page,
            "<th>samples</th><th>rate</th><th>x floor</th><th>from the fastest to the slowest</th></tr></thead>"
        )?;
        writeln!(page, "<tbody>")?;
        self.measures.iter().try_for_each(|measure| row(page, measure))?;
        writeln!(page, "</tbody>\n</table>")?;
        let skipped = self.skipped.iter().map(|Skipped { id, why }| vec![id.clone(), why.clone()]);
        html::table(page, "Not measured", &["measure", "why"], skipped)?;
        page.push_str(html::END);
        Ok(())
    }
}

fn row(page: &mut String, measure: &Measure) -> std::fmt::Result {
    let micros = |ns: u64| format!("{:.2} us", ns as f64 / 1e3);
    let rate = measure.rate().map_or(String::new(), |rate| format!("{:.2} GiB/s", rate / f64::from(1 << 30)));
    let floor = measure.beside.as_ref().map(|floor| measure.p50_ns as f64 / floor.p50_ns.max(1) as f64);
    // An arc may be broken between its states.
    let id = Escaped(&measure.id).to_string().replace("&gt;", "&gt;<wbr/>");
    write!(page, "<tr><td>{id}")?;
    if let Some(note) = &measure.note {
        write!(page, " <small>{}</small>", Escaped(note))?;
    }
    write!(page, "</td>")?;
    for cell in [
        micros(measure.p50_ns),
        micros(measure.p90_ns),
        micros(measure.p99_ns),
        measure.samples.to_string(),
        rate,
        floor.map_or(String::new(), |ratio| format!("{ratio:.2}")),
    ] {
        write!(page, "<td>{cell}</td>")?;
    }
    writeln!(page, "<td>{}</td></tr>", picture(measure))
}

/// Bars of equal width in the logarithm of the time, so that a tail is visible.
fn picture(measure: &Measure) -> String {
    let log = |ns: u64| (ns.max(1) as f64).ln();
    let (low, high) = (log(measure.best_ns), log(measure.max_ns));
    let mut bars = [0_u64; BARS];
    for (ns, count) in &measure.histogram {
        let at = if high > low { (log(*ns) - low) / (high - low) * (BARS as f64 - 1.0) } else { 0.0 };
        bars[(at.max(0.0) as usize).min(BARS - 1)] += count;
    }
    let most = bars.iter().copied().max().unwrap_or(0).max(1) as f64;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" viewBox=\"0 0 {WIDTH} {HEIGHT}\">"
    );
    let width = WIDTH / BARS as f64;
    for (at, count) in bars.iter().enumerate().filter(|(_, count)| **count > 0) {
        // A bar of one sample among thousands stays visible.
        let height = (*count as f64 / most * HEIGHT).max(1.0);
        let (x, y) = (at as f64 * width, HEIGHT - height);
        let _ = write!(
            svg,
            "<rect class=\"precopy\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{height:.1}\"/>",
            width - 0.5
        );
    }
    svg + "</svg>"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::document::VERSION;
    use crate::samples::measure;

    #[test]
    fn a_page_is_xml_and_no_name_leaves_its_element() {
        let hostile = "</td><script>x</script>\u{1b}";
        let document = Document {
            bench: VERSION,
            limosa: hostile.into(),
            device: hostile.into(),
            kernel: hostile.into(),
            processors: 1,
            seconds: 0.5,
            measures: vec![
                measure(hostile.into(), 4096, (1..1000).collect()),
                measure("one".into(), 0, vec![0]),
            ],
            skipped: vec![Skipped { id: hostile.into(), why: hostile.into() }],
            ended_early: Some(hostile.into()),
            left_in: hostile.into(),
        };
        let page = document.html();
        let xml = page.strip_prefix("<!DOCTYPE html>\n").unwrap();
        let tree = roxmltree::Document::parse(xml).unwrap();
        assert!(tree.descendants().all(|node| !node.has_tag_name("script")));
        let bars = tree.descendants().filter(|node| node.tag_name().name() == "rect").count();
        assert!(bars > 10, "{bars}");
        assert!(tree.descendants().filter(|node| node.tag_name().name() == "td").count() > 12);
    }
}
