//! Text that leaves the command. Much of it comes from others: a peer, a server, a store, another user of this host. It is
//! made safe to print: without characters that control a terminal, and without passwords.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io;

use limosa_stream::{escaped, is_printable, without_passwords};
use serde::Serialize;
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::fmt::FormatFields;
use tracing_subscriber::fmt::format::debug_fn;

/// One line.
pub fn line(text: &str) -> String {
    escaped(&without_passwords(text)).into_owned()
}

/// Lines, which keep their ends and their tabs.
pub fn lines(text: &str) -> String {
    let clean = without_passwords(text);
    let mut out = String::with_capacity(clean.len());
    for piece in clean.split_inclusive(['\n', '\t']) {
        let (inside, end) = match piece.strip_suffix(['\n', '\t']) {
            Some(inside) => (inside, &piece[inside.len()..]),
            None => (piece, ""),
        };
        out.push_str(&escaped(inside));
        out.push_str(end);
    }
    out
}

/// A JSON document in lines, or in one line. Characters that are not printable are escaped by JSON's rules, so that a
/// parser gets them back.
pub fn json<T: Serialize>(value: &T, in_one_line: bool) -> io::Result<String> {
    let text = match in_one_line {
        true => serde_json::to_string(value)?,
        false => rows_in_lines(&serde_json::to_string_pretty(value)?),
    };
    // Outside of strings there are only line ends that are not printable.
    let is_plain = |c: char| c == '\n' || is_printable(c);
    let text = match without_passwords(&text) {
        Cow::Borrowed(_) => text,
        Cow::Owned(clean) => clean,
    };
    if text.chars().all(is_plain) {
        return Ok(text);
    }
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match is_plain(c) {
            true => out.push(c),
            false => c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| {
                // Writing to a string does not fail.
                let _ = write!(out, "\\u{unit:04x}");
            }),
        }
    }
    Ok(out)
}

/// Puts each array of plain numbers of a document into one line.
fn rows_in_lines(pretty: &str) -> String {
    let mut out = String::with_capacity(pretty.len());
    let (mut rest, mut in_text) = (pretty, false);
    while let Some(at) = rest.find(['"', '\\', '[']) {
        let (before, found) = rest.split_at(at);
        out.push_str(before);
        // A character after a backslash, which occurs only in strings, has no meaning of its own.
        let length = match found.as_bytes()[0] {
            b'\\' => 1 + found[1..].chars().next().map_or(0, char::len_utf8),
            b'"' => {
                in_text = !in_text;
                1
            }
            _ => match found.find(']').filter(|_| !in_text) {
                Some(end) if !found[1..end].contains(['"', '[', '{']) => {
                    let row: Vec<&str> = found[1..end].split_whitespace().collect();
                    out.push_str(&format!("[{}]", row.join(" ")));
                    rest = &found[end + 1..];
                    continue;
                }
                _ => 1,
            },
        };
        out.push_str(&found[..length]);
        rest = &found[length..];
    }
    out + rest
}

/// The text in lines of at most this many columns, broken at spaces. A longer word has a line of its own.
pub fn wrapped(text: &str, columns: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= columns => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// Lines of at most this many columns. A longer line is continued below its value, which stands behind two spaces or more, or
/// else below its text. A picture of bars is cut, and columns of the table before it that do not fit are left out.
pub fn folded(text: &str, columns: usize) -> String {
    let mut out = String::with_capacity(text.len());
    let mut lines = text.lines().peekable();
    let mut table_columns = None;
    while let Some(line) = lines.next() {
        let is_head = !is_row(line) && lines.peek().is_some_and(|next| is_row(next));
        if is_head {
            table_columns = Some(fitting_columns(line, columns));
        }
        if line.chars().count() <= columns {
            out += line;
        } else if is_head || is_row(line) {
            let cut = table_columns.unwrap_or(columns);
            let cut: String = line.chars().take(cut).collect();
            out += cut.trim_end();
        } else {
            let at = value_of(line).filter(|at| *at <= columns / 2);
            let leading = line.len() - line.trim_start().len();
            let (first, indent) = match at {
                Some(at) => (line[..at].to_owned(), at),
                None => (line[..leading].to_owned(), leading + 2),
            };
            let rest = &line[first.len()..];
            // The first line has what its indentation is shorter by, if any, to spare.
            let lines = wrapped(rest, columns.saturating_sub(indent));
            out += &first;
            out += &lines.join(&format!("\n{}", " ".repeat(indent)));
        }
        out.push('\n');
    }
    out
}

/// Whether a line is the row of a table, with a picture at its end.
fn is_row(line: &str) -> bool {
    line.contains('█')
}

/// The part of a line that shows whole columns of a table, in characters: all that fits, or else as many columns as fit. Their values end
/// where the words of the table's head end, and the first is shown in any case.
fn fitting_columns(head: &str, columns: usize) -> usize {
    if head.chars().count() <= columns {
        return columns;
    }
    let mut ends = Vec::new();
    let mut at = 0;
    for word in head.split(' ') {
        at += word.chars().count();
        if !word.is_empty() {
            ends.push(at);
        }
        at += 1;
    }
    ends.into_iter().skip(1).rfind(|end| *end <= columns).unwrap_or(columns)
}

/// Where the value of a line begins: behind a name and two spaces or more.
fn value_of(line: &str) -> Option<usize> {
    let name = line.len() - line.trim_start().len();
    let gap = name + line[name..].find("  ")?;
    Some(gap + line[gap..].find(|c| c != ' ')?).filter(|at| line[..*at].is_ascii())
}

/// The format of the fields of a log line.
pub fn fields() -> impl for<'writer> FormatFields<'writer> + Send + Sync + 'static {
    let fields = debug_fn(|writer, field, value| {
        let value = line(&format!("{value:?}"));
        match field.name() {
            "message" => writer.write_str(&value),
            name => write!(writer, "{name}={value}"),
        }
    });
    fields.delimited(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const WILD: &str = "a\x1b[2J\u{9b}b\u{202e}c\u{e0041}";

    #[test]
    fn lines_keep_their_ends_and_nothing_else_that_does_something() {
        assert_eq!(lines("a\tb\r\n\n\x1bc"), "a\tb\\r\n\n\\u{1b}c");
        assert_eq!(lines(&format!("{WILD}\n")), format!("{}\n", line(WILD)));
        assert_eq!(line("a\nb"), "a\\nb");
        assert_eq!(lines("at http://u:p@h/\n"), "at http://***@h/\n");
    }

    #[test]
    fn json_is_the_same_to_a_parser_and_does_nothing_to_a_terminal() {
        let value = serde_json::json!({ WILD: [WILD, "plain \u{1f426} é", 7], "b\n": "http://u:p@h" });
        for in_one_line in [true, false] {
            let text = json(&value, in_one_line).unwrap();
            assert!(text.chars().all(|c| c == '\n' || is_printable(c)), "{text}");
            assert!(
                text.contains("\\u202e") && text.contains("\\udb40\\udc41") && !text.contains("u:p"),
                "{text}"
            );
            let mut expected = value.clone();
            expected["b\n"] = "http://***@h".into();
            assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), expected);
        }
    }

    #[test]
    fn lines_are_broken_at_spaces() {
        assert_eq!(wrapped("a bb ccc dddddddd e", 5), ["a bb", "ccc", "dddddddd", "e"]);
        assert_eq!(wrapped("", 5), Vec::<String>::new());
    }

    #[test]
    fn long_lines_go_on_below_their_value() {
        let text = folded("  name   a bb ccc dddd\nshort\n  to do: aaaa bbbb cccc dddd\n", 18);
        assert_eq!(text, "  name   a bb ccc\n         dddd\nshort\n  to do: aaaa\n    bbbb cccc dddd\n");
        assert_eq!(folded("handshake 1 ms      █████\n", 22), "handshake 1 ms      ██\n");
        assert_eq!(folded("handshake 1 ms      █████\n", 20), "handshake 1 ms\n");
    }

    #[test]
    fn values_of_a_table_were_cut_in_a_narrow_terminal() {
        let text = "phase             at      took    devices     memory\n\
                    handshake     0.0 us    400 us        0 B   64.0 MiB  ███\n\
                    pre-copy      400 us   12.0 ms    1.0 MiB   64.0 MiB     ██████\n\
                    total 12.4 ms\n";
        let rows = |columns| folded(text, columns).lines().map(str::to_owned).collect::<Vec<_>>();
        assert!(rows(58)[2].ends_with("64.0 MiB     █") && rows(52)[1].ends_with("64.0 MiB"));
        assert_eq!(
            rows(51)[..3],
            [
                "phase             at      took    devices",
                "handshake     0.0 us    400 us        0 B",
                "pre-copy      400 us   12.0 ms    1.0 MiB"
            ]
        );
        assert_eq!(
            rows(40)[1..],
            ["handshake     0.0 us    400 us", "pre-copy      400 us   12.0 ms", "total 12.4 ms"]
        );
    }

    #[test]
    fn a_row_of_numbers_was_a_line_for_each() {
        let value = serde_json::json!({
            "bytes": [1, -2, 3.5, null],
            "none": [],
            "rows": [[1, 2], [3, 4]],
            "text": "[\n 1,\n 2]\"[3, 4]\\",
            "texts": ["a", "[1,  2]"],
        });
        let text = json(&value, false).unwrap();
        assert!(text.contains("\"bytes\": [1, -2, 3.5, null]"), "{text}");
        assert!(text.contains("[1, 2],\n") && text.contains("\"none\": []"), "{text}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
    }

    #[test]
    fn a_line_of_the_log_is_one_line() {
        let written = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
        struct To(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);
        impl io::Write for To {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.lock().unwrap().extend_from_slice(bytes);
                Ok(bytes.len())
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let into = std::sync::Arc::clone(&written);
        let log = tracing_subscriber::fmt().with_writer(move || To(std::sync::Arc::clone(&into)));
        let log = log.with_ansi(false).without_time().with_target(false).fmt_fields(fields()).finish();
        tracing::subscriber::with_default(log, || {
            tracing::warn!(path = %WILD, name = WILD, "{WILD}\nINFO forged, http://u:p@h");
        });
        let text = String::from_utf8(written.lock().unwrap().clone()).unwrap();
        let clean = line(WILD);
        assert!(text.contains(&format!("{clean}\\nINFO forged, http://***@h path={clean}")), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.trim_end().chars().all(is_printable), "{text}");
    }
}
