//! `contrib/syzkaller`, read: its constants, and the layouts of its structures.

use std::collections::BTreeMap;

pub const TEXT: &str = include_str!("../../../../../contrib/syzkaller/dev_vfio_migration.txt");
const CONSTANTS: &str = include_str!("../../../../../contrib/syzkaller/dev_vfio_migration.txt.const");

/// The constants with their values.
pub fn constants() -> BTreeMap<&'static str, u64> {
    let mut lines = CONSTANTS.lines();
    assert_eq!(lines.next(), Some("arches = amd64, arm64"));
    lines
        .map(|line| {
            let (name, value) = line.split_once(" = ").unwrap_or_else(|| panic!("{line}"));
            (name, value.parse().unwrap_or_else(|error| panic!("{line}: {error}")))
        })
        .collect()
}

/// The constants that the description defines itself, each by an expression of others.
pub fn defines() -> Vec<(&'static str, &'static str)> {
    let lines = TEXT.lines().filter_map(|line| line.strip_prefix("define "));
    lines.map(|line| line.split_once('\t').unwrap_or_else(|| panic!("{line}"))).collect()
}

/// The fields of a structure with their offsets, and its size.
pub type Layout = (Vec<(&'static str, usize)>, usize);

/// The structures of the description.
pub fn structures() -> BTreeMap<&'static str, Layout> {
    let mut found = BTreeMap::new();
    let mut lines = TEXT.lines();
    while let Some(line) = lines.next() {
        let Some(name) = line.strip_suffix(" {").filter(|name| !name.starts_with("type ")) else { continue };
        let (mut fields, mut at, mut largest) = (Vec::new(), 0usize, 1);
        for line in lines.by_ref().take_while(|line| *line != "}") {
            let (field, kind) = line.trim().split_once('\t').unwrap_or_else(|| panic!("{line}"));
            let kind = kind.trim().trim_end_matches("(out)").trim();
            let bytes = match kind {
                kind if kind.ends_with("int32]") || kind == "int32" || kind.starts_with("fd_") => 4,
                kind if kind == "int64" || kind.starts_with("ptr64[") => 8,
                kind if kind.starts_with("array[int8") => 0,
                other => panic!("{line}: a type `{other}`"),
            };
            let align = bytes.max(1);
            at = at.next_multiple_of(align);
            fields.push((field, at));
            at += bytes;
            largest = largest.max(align);
        }
        found.insert(name, (fields, at.next_multiple_of(largest)));
    }
    found
}
