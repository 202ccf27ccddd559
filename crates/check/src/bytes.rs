//! Bytes compared: where they begin to differ, what was expected there, and what came.

use crate::check::{Verdict, fail};

/// The number of bytes that are shown of each side.
const SHOWN: usize = 8;

/// A failure unless `found` is `expected`. `what` names the two.
pub(crate) fn same_bytes(found: &[u8], expected: &[u8], what: impl FnOnce() -> String) -> Verdict {
    match difference(found, expected) {
        None => Ok(()),
        Some(where_and_how) => fail(format!("{}: {where_and_how}", what())),
    }
}

/// Where and how two strings of bytes differ, offsets in bytes from their beginning.
fn difference(found: &[u8], expected: &[u8]) -> Option<String> {
    let differs = |at: &usize| found.get(*at) != expected.get(*at);
    let both = found.len().max(expected.len());
    let first = (0..both).find(differs)?;
    let lengths = match found.len() == expected.len() {
        true => format!("of {:#x} bytes", both),
        false => format!("({:#x} bytes came, {:#x} were expected)", found.len(), expected.len()),
    };
    let count = (first..both).filter(differs).count();
    let last = (first..both).rfind(differs).unwrap_or(first);
    let range = match last == first {
        true => format!("byte {first:#x} {lengths} differs"),
        false => format!("bytes {first:#x} to {last:#x} {lengths} differ in {count} places"),
    };
    Some(format!("{range}: expected {} there, came {}", shown(expected, first), shown(found, first)))
}

/// The bytes from this offset on.
fn shown(bytes: &[u8], from: usize) -> String {
    let rest = bytes.get(from..).unwrap_or_default();
    let some: Vec<_> = rest.iter().take(SHOWN).map(|byte| format!("{byte:02x}")).collect();
    match (some.is_empty(), rest.len() > SHOWN) {
        (true, _) => "nothing".into(),
        (false, true) => format!("{} ...", some.join(" ")),
        (false, false) => some.join(" "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_has_its_place_and_both_sides() {
        let (whole, mut other) = ([7; 32], [7; 32]);
        assert_eq!(difference(&whole, &other), None);
        other[20] = 0;
        let one = difference(&other, &whole).unwrap();
        assert_eq!(
            one,
            "byte 0x14 of 0x20 bytes differs: expected 07 07 07 07 07 07 07 07 ... there, came 00 07 07 07 07 07 07 07 ..."
        );
        other[30] = 1;
        let two = difference(&other, &whole).unwrap();
        assert!(two.starts_with("bytes 0x14 to 0x1e of 0x20 bytes differ in 2 places: expected 07"), "{two}");
        let short = difference(&whole[..30], &whole).unwrap();
        assert_eq!(
            short,
            "bytes 0x1e to 0x1f (0x1e bytes came, 0x20 were expected) differ in 2 places: expected 07 07 there, came nothing"
        );
    }
}
