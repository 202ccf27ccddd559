//! Text that another process or machine wrote, made safe to print: on a terminal, in a log, in a report.

use std::borrow::Cow;
use std::fmt::{self, Write as _};

use crate::REASON_BYTES_MAX;

/// Whether a character shows as itself and changes nothing else. Control characters do not, nor do those of Unicode's
/// category Cf, which are invisible or turn the direction of the text around them.
pub fn is_printable(c: char) -> bool {
    if c.is_ascii() {
        return matches!(c, ' '..='~');
    }
    // The standard library has the categories, but tells them only by what it escapes in the middle of a text.
    let mut text = [b'.'; 5];
    let bytes = c.encode_utf8(&mut text[1..]).len();
    std::str::from_utf8(&text[..=bytes]).is_ok_and(|text| text.escape_debug().nth(1) == Some(c))
}

/// A text in which characters that are not printable are escaped, such as `\n`, `\u{1b}` and `\u{202e}`.
pub fn escaped(text: &str) -> Cow<'_, str> {
    match text.chars().all(is_printable) {
        true => Cow::Borrowed(text),
        false => Cow::Owned(Escaped(text).to_string()),
    }
}

/// A peer's text, escaped and cut to [`REASON_BYTES_MAX`] characters.
pub fn printable(text: &str) -> String {
    let end = text.char_indices().nth(REASON_BYTES_MAX).map_or(text.len(), |(at, _)| at);
    escaped(&text[..end]).into_owned()
}

struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|c| match c {
            c if is_printable(c) => f.write_char(c),
            '\n' | '\r' | '\t' => write!(f, "{}", c.escape_default()),
            c => write!(f, "{}", c.escape_unicode()),
        })
    }
}

/// A text without the users and passwords of addresses: `http://user:password@host` becomes `http://***@host`.
pub fn without_passwords(text: &str) -> Cow<'_, str> {
    let mut clean = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("://") {
        clean.push_str(before);
        clean.push_str("://");
        rest = after;
        if let Some(at) = end_of_user(rest) {
            clean.push_str("***");
            rest = &rest[at..];
        }
    }
    if clean.is_empty() {
        return Cow::Borrowed(text);
    }
    clean.push_str(rest);
    Cow::Owned(clean)
}

/// Where the `@` behind a user and a password is in what follows the scheme of an address.
fn end_of_user(address: &str) -> Option<usize> {
    let word = address.split(|c: char| c.is_whitespace() || matches!(c, '"' | '`' | '<' | '>')).next()?;
    let authority = word.split(['/', '?', '#', '\\']).next()?;
    if let Some(at) = authority.rfind('@') {
        return Some(at);
    }
    // A password with such a character in it, which should have been encoded: what comes before is no port then.
    let (_, port) = authority.rsplit_once(':')?;
    let is_port = port.ends_with(']') || port.bytes().all(|digit| digit.is_ascii_digit());
    if is_port { None } else { word.rfind('@') }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_that_do_something_are_escaped_and_others_are_not() {
        for plain in ["", "net0: eth\u{e9}, 日本語 \u{1f426} \\ \"quoted\" 'it' e\u{301}", "~ /dev/shm/a@0"]
        {
            assert!(matches!(escaped(plain), Cow::Borrowed(same) if same == plain), "{plain}");
        }
        for (wild, tame) in [
            ("\x1b[2Jup\x07", "\\u{1b}[2Jup\\u{7}"),
            ("a\nb\r\tc\0", "a\\nb\\r\\tc\\u{0}"),
            ("\x7f\u{9b}2J\u{85}", "\\u{7f}\\u{9b}2J\\u{85}"),
            ("\u{202e}txt.exe\u{2066}", "\\u{202e}txt.exe\\u{2066}"),
            ("\u{ad}\u{200b}\u{200f}\u{61c}\u{feff}", "\\u{ad}\\u{200b}\\u{200f}\\u{61c}\\u{feff}"),
            ("\u{2028}\u{2029}\u{e0041}\u{180e}", "\\u{2028}\\u{2029}\\u{e0041}\\u{180e}"),
        ] {
            assert_eq!(escaped(wild), tame);
            assert_eq!(escaped(tame), tame, "once is enough");
        }
    }

    #[test]
    fn a_peers_text_is_cut_between_characters() {
        assert_eq!(printable(&"é".repeat(REASON_BYTES_MAX + 1)), "é".repeat(REASON_BYTES_MAX));
        assert_eq!(printable("short\u{1b}"), "short\\u{1b}");
    }

    #[test]
    fn passwords_in_addresses_are_left_out() {
        for (said, clean) in [
            ("http://user:secret@store:9000/b is down", "http://***@store:9000/b is down"),
            (
                "\"https://secret@[::1]:9000\", socks5://u:p@proxy",
                "\"https://***@[::1]:9000\", socks5://***@proxy",
            ),
            ("http://u:a@b@host/x@y", "http://***@host/x@y"),
            ("http://u:se/cr#et@host/x", "http://***@host/x"),
            ("`http://u:p\u{1b}@h`", "`http://***@h`"),
        ] {
            assert_eq!(without_passwords(said), clean);
        }
        for same in [
            "s3://bucket/key@v2",
            "http://host:9000/x@y",
            "http://[::1]/a@b",
            "https://host, and a@b",
            "tcp:host:7000",
            "/dev/shm/guest@0",
            "://",
        ] {
            assert_eq!(without_passwords(same), same);
        }
    }
}
