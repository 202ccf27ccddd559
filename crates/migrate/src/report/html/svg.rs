//! The few shapes of the pictures. All coordinates are absolute, so that positions can be read in the file. Every text is
//! escaped.

use std::fmt::{self, Write as _};

use limosa_stream::is_printable;

/// The average width of a character of the page's font at most, as a fraction of the font's size.
const CHARACTER_WIDTH: f64 = 0.6;

/// A text in XML: without markup, and without characters that XML forbids, that are invisible, or that change the direction
/// of other text.
#[derive(Clone, Copy, Debug)]
pub struct Escaped<'a>(pub &'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            match c {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&#39;")?,
                '\n' => f.write_char('\n')?,
                c if is_printable(c) => f.write_char(c)?,
                _ => f.write_char(char::REPLACEMENT_CHARACTER)?,
            }
        }
        Ok(())
    }
}

/// The maximum width of a text of this size.
pub(super) fn text_width(text: &str, size: f64) -> f64 {
    let wide = |c: char| if c.is_ascii() { CHARACTER_WIDTH } else { 2.0 * CHARACTER_WIDTH };
    text.chars().map(wide).sum::<f64>() * size
}

/// As much of a text as fits, with an ellipsis if some is missing.
pub(super) fn fitting(text: &str, size: f64, room: f64) -> String {
    let one_line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text_width(&one_line, size) <= room {
        return one_line;
    }
    let mut cut = String::new();
    for c in one_line.chars() {
        if text_width(&cut, size)
            + text_width(c.encode_utf8(&mut [0; 4]), size)
            + 2.0 * CHARACTER_WIDTH * size
            > room
        {
            break;
        }
        cut.push(c);
    }
    cut.push('…');
    cut
}

/// The same, but with the end of the text: an address or a path differs from others there.
pub(super) fn fitting_end(text: &str, size: f64, room: f64) -> String {
    let backwards: String = text.chars().rev().collect();
    fitting(&backwards, size, room).chars().rev().collect()
}

/// A rectangle.
#[derive(Clone, Copy, Debug)]
pub(super) struct Area {
    pub(super) x: f64,
    pub(super) y: f64,
    pub(super) width: f64,
    pub(super) height: f64,
}

/// Where a text is anchored.
#[derive(Clone, Copy, Debug)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

/// A picture that is being drawn.
pub(super) struct Svg {
    body: String,
    width: f64,
    height: f64,
}

impl Svg {
    pub(super) fn new(width: f64, height: f64, name: &str) -> Svg {
        let mut body = String::new();
        let size = format_args!(
            "viewBox=\"0 0 {width:.0} {height:.0}\" width=\"{width:.0}\" height=\"{height:.0}\""
        );
        let _ = writeln!(
            body,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" {size} role=\"img\" aria-label=\"{}\">",
            Escaped(name)
        );
        Svg { body, width, height }
    }

    /// A rectangle, clipped to the picture, with a tooltip.
    pub(super) fn area(&mut self, area: Area, class: &str, title: &str) {
        let (x, y) = (area.x.clamp(0.0, self.width), area.y.clamp(0.0, self.height));
        let width = area.width.clamp(0.0, self.width - x);
        let height = area.height.clamp(0.0, self.height - y);
        let _ = write!(
            self.body,
            "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\"",
        );
        self.close("rect", title);
    }

    pub(super) fn line(&mut self, from: (f64, f64), to: (f64, f64), class: &str) {
        let ((x1, y1), (x2, y2)) = (from, to);
        let _ = writeln!(
            self.body,
            "<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>"
        );
    }

    pub(super) fn dot(&mut self, at: (f64, f64), class: &str, title: &str) {
        let (x, y) = at;
        let _ = write!(self.body, "<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.5\"");
        self.close("circle", title);
    }

    /// A line through points, or with `filled` the area that it encloses.
    pub(super) fn points(&mut self, points: &[(f64, f64)], class: &str, filled: bool, title: &str) {
        let kind = if filled { "polygon" } else { "polyline" };
        let _ = write!(self.body, "<{kind} class=\"{class}\" points=\"");
        for (at, (x, y)) in points.iter().enumerate() {
            let space = if at == 0 { "" } else { " " };
            let _ = write!(self.body, "{space}{x:.1},{y:.1}");
        }
        let _ = write!(self.body, "\"");
        self.close(kind, title);
    }

    /// A text whose baseline is at `at`. The caller has made sure that it fits.
    pub(super) fn text(&mut self, at: (f64, f64), size: f64, anchor: Anchor, class: &str, text: &str) {
        self.titled_text(at, size, anchor, class, text, "");
    }

    /// A text with a tooltip.
    pub(super) fn titled_text(
        &mut self,
        (x, y): (f64, f64),
        size: f64,
        anchor: Anchor,
        class: &str,
        text: &str,
        title: &str,
    ) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let _ = write!(
            self.body,
            "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size}\" text-anchor=\"{anchor}\">{}",
            Escaped(text)
        );
        self.title(title);
        let _ = writeln!(self.body, "</text>");
    }

    fn close(&mut self, element: &str, title: &str) {
        if title.is_empty() {
            let _ = writeln!(self.body, "/>");
        } else {
            let _ = write!(self.body, ">");
            self.title(title);
            let _ = writeln!(self.body, "</{element}>");
        }
    }

    fn title(&mut self, title: &str) {
        if !title.is_empty() {
            let _ = write!(self.body, "<title>{}</title>", Escaped(title));
        }
    }

    pub(super) fn finish(mut self) -> String {
        self.body.push_str("</svg>\n");
        self.body
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_leaves_its_element() {
        let hostile = "a<b>&\"'\u{0}\u{1b}\u{202e}\u{ffff}\u{feff}c\nd";
        let escaped = Escaped(hostile).to_string();
        assert_eq!(escaped, "a&lt;b&gt;&amp;&quot;&#39;\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}c\nd");
    }

    #[test]
    fn a_text_that_is_too_long_is_cut() {
        assert_eq!(fitting("uart0", 10.0, 30.0), "uart0");
        assert_eq!(fitting("a-long-name", 10.0, 60.0), "a-long-n…");
        assert!(text_width(&fitting(&"\u{6771}".repeat(50), 10.0, 100.0), 10.0) <= 100.0);
        assert_eq!(fitting("", 10.0, 0.0), "");
        assert_eq!(fitting_end("/run/vm/net.sock", 10.0, 66.0), "…/net.sock");
        assert_eq!(fitting_end("net.sock", 10.0, 66.0), "net.sock");
    }
}
