//! A strict parser of OpenMetrics text 1.0, which shares nothing with what writes it: what is not of the specification fails.

use std::collections::{BTreeMap, BTreeSet};

/// A family's metadata.
#[derive(Debug, Default)]
struct Family {
    kind: String,
    unit: String,
    has_help: bool,
}

/// What was exposed: samples by name, and labels in the order of their names.
#[derive(Debug)]
pub struct Exposition(BTreeMap<(String, BTreeMap<String, String>), f64>);

impl Exposition {
    /// The value of a sample.
    #[track_caller]
    pub fn get(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let labels = labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let key = (name.to_owned(), labels);
        *self.0.get(&key).unwrap_or_else(|| panic!("{key:?} is not there: {:#?}", self.0))
    }

    /// The names of all samples.
    pub fn names(&self) -> BTreeSet<&str> {
        self.0.keys().map(|(name, _)| name.as_str()).collect()
    }
}

/// Whether a name may be that of a metric or a label.
fn is_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
    name.chars().all(plain) && name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
}

#[track_caller]
pub fn parse(text: &str) -> Exposition {
    let lines = text.strip_suffix("# EOF\n").unwrap_or_else(|| panic!("no `# EOF` at the end: {text}"));
    assert!(!lines.contains("# EOF"), "{text}");
    let mut samples = BTreeMap::new();
    let mut seen = BTreeSet::new();
    let mut now: Option<(String, Family, bool)> = None;
    for line in lines.lines() {
        assert!(!line.is_empty() && line.trim() == line, "`{line}`");
        if let Some(rest) = line.strip_prefix("# ") {
            let mut words = rest.splitn(3, ' ');
            let (what, name, value) =
                (words.next().unwrap(), words.next().unwrap(), words.next().unwrap_or(""));
            assert!(is_name(name), "{line}");
            if now.as_ref().is_none_or(|(other, ..)| other != name) {
                assert!(seen.insert(name.to_owned()), "{name} comes twice, with others between");
                now = Some((name.into(), Family::default(), false));
            }
            let (_, family, has_samples) = now.as_mut().unwrap();
            assert!(!*has_samples, "metadata behind samples: {line}");
            match what {
                "TYPE" => {
                    let kinds = ["counter", "gauge", "histogram", "info"];
                    assert!(family.kind.is_empty() && kinds.contains(&value), "{line}");
                    family.kind = value.into();
                }
                "UNIT" => {
                    assert!(family.unit.is_empty() && name.ends_with(&format!("_{value}")), "{line}");
                    family.unit = value.into();
                }
                "HELP" => {
                    assert!(!family.has_help && !value.is_empty(), "{line}");
                    family.has_help = true;
                }
                _ => panic!("{line}"),
            }
            continue;
        }
        let (name, labels, value) = sample(line);
        let (family, about, has_samples) = now.as_mut().unwrap_or_else(|| panic!("no TYPE before {line}"));
        assert!(!about.kind.is_empty() && about.has_help, "{line}");
        *has_samples = true;
        let end = name.strip_prefix(family.as_str()).unwrap_or_else(|| panic!("{line} is not of {family}"));
        let ends: &[&str] = match about.kind.as_str() {
            "counter" => &["_total"],
            "gauge" => &[""],
            "histogram" => &["_bucket", "_sum", "_count"],
            _ => &["_info"],
        };
        assert!(ends.contains(&end), "{line}: a {}", about.kind);
        assert_eq!(labels.contains_key("le"), end == "_bucket", "{line}");
        match about.kind.as_str() {
            "counter" | "histogram" => assert!(value >= 0.0, "{line}"),
            "info" => assert_eq!(value, 1.0, "{line}"),
            _ => {}
        }
        assert!(samples.insert((name, labels), value).is_none(), "{line} comes twice");
    }
    Exposition(samples)
}

/// `NAME{LABELS} VALUE`.
fn sample(line: &str) -> (String, BTreeMap<String, String>, f64) {
    let end = line.find(['{', ' ']).unwrap_or_else(|| panic!("{line}"));
    let (name, mut rest) = line.split_at(end);
    assert!(is_name(name), "{line}");
    let mut labels = BTreeMap::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        loop {
            let (name, value) = rest.split_once("=\"").unwrap_or_else(|| panic!("{line}"));
            assert!(is_name(name), "{line}");
            let (mut text, mut chars) = (String::new(), value.char_indices());
            let end = loop {
                match chars.next().unwrap_or_else(|| panic!("{line}")) {
                    (at, '"') => break at,
                    (_, '\\') => match chars.next().map(|(_, c)| c) {
                        Some('n') => text.push('\n'),
                        Some(c @ ('\\' | '"')) => text.push(c),
                        other => panic!("\\{other:?}: {line}"),
                    },
                    (_, c) => text.push(c),
                }
            };
            assert!(labels.insert(name.to_owned(), text).is_none(), "{line}");
            rest = &value[end + 1..];
            match rest.strip_prefix(',') {
                Some(more) => rest = more,
                None => break,
            }
        }
        rest = rest.strip_prefix('}').unwrap_or_else(|| panic!("{line}"));
    }
    let value = rest.strip_prefix(' ').unwrap_or_else(|| panic!("{line}"));
    assert!(!value.contains(' '), "a timestamp: {line}");
    (name.into(), labels, value.parse().unwrap_or_else(|_| panic!("{line}")))
}
