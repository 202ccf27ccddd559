//! Values on the command line: sizes and times.

use std::num::NonZeroU32;
use std::time::Duration;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use limosa_migrate::Compression;
use limosa_protocol::State;
use limosa_stream::LINKS_MAX;

/// The name of a device.
pub fn device(text: &str) -> Result<String, String> {
    match text.is_empty() {
        true => {
            Err("expected a device: a socket's path, a PCI address, a UUID or a node of /dev/vfio".into())
        }
        false => Ok(text.to_owned()),
    }
}

/// A positive number of milliseconds, fractions allowed.
pub fn milliseconds(text: &str) -> Result<Duration, String> {
    let milliseconds: f64 =
        text.parse().map_err(|_| "expected a number of milliseconds, such as 300 or 0.5".to_owned())?;
    if !(milliseconds > 0.0 && milliseconds <= 3_600_000.0) {
        return Err("expected more than 0 and at most 3600000 milliseconds".into());
    }
    Ok(Duration::from_secs_f64(milliseconds / 1000.0))
}

/// A positive number of seconds, fractions allowed.
pub fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 =
        text.parse().map_err(|_| "expected a number of seconds, such as 10 or 0.5".to_owned())?;
    // Not a number is in no range.
    if !(seconds > 0.0 && seconds <= 86_400.0) {
        return Err("expected more than 0 and at most 86400 seconds".into());
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// A number of bytes with an optional K, M, G or T (powers of 1024).
pub fn bytes(text: &str) -> Result<u64, String> {
    let expected = || format!("`{text}` is not a size: expected a number with K, M, G or T, such as 64M");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift =
        match text[digits.len()..].trim_end_matches("iB").trim_end_matches('B').to_ascii_uppercase().as_str()
        {
            "" => 0,
            "K" => 10,
            "M" => 20,
            "G" => 30,
            "T" => 40,
            _ => return Err(expected()),
        };
    let number: u64 = digits.parse().map_err(|_| expected())?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("`{text}` is more than 2^64 bytes"))
}

/// The speed of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    pub bytes_per_second: u64,
}

impl Rate {
    /// This many Gbit per second.
    pub const fn gbit(gbit: u64) -> Rate {
        Rate { bytes_per_second: gbit * 125_000_000 }
    }
}

/// Bytes per second as in [`bytes`], or bits: Mbit and Gbit, powers of 1000.
pub fn rate(text: &str) -> Result<Rate, String> {
    let bits = |digits: &str, unit: u64| {
        let number: f64 =
            digits.parse().map_err(|_| format!("`{text}` is not a rate: expected 10Gbit or 1250M"))?;
        Ok::<u64, String>((number * unit as f64 / 8.0) as u64)
    };
    let bytes_per_second = match (text.strip_suffix("Gbit"), text.strip_suffix("Mbit")) {
        (Some(digits), _) => bits(digits, 1_000_000_000)?,
        (None, Some(digits)) => bits(digits, 1_000_000)?,
        (None, None) => bytes(text).map_err(|error| format!("{error}, or bits such as 10Gbit"))?,
    };
    match bytes_per_second {
        0 => Err(format!("`{text}` is not a rate: expected more than 0")),
        bytes_per_second => Ok(Rate { bytes_per_second }),
    }
}

/// The mode of a socket, in octal digits. Its owner may read and write it.
pub fn mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| mode & !0o777 == 0 && mode & 0o600 == 0o600);
    mode.ok_or_else(|| {
        format!("`{text}` is not a mode for a socket: expected octal digits with read and write for the owner, such as 660")
    })
}

/// A number of links.
pub fn links(text: &str) -> Result<NonZeroU32, String> {
    let links = text.parse().ok().filter(|links: &NonZeroU32| links.get() <= LINKS_MAX);
    links.ok_or_else(|| format!("expected 1 to {LINKS_MAX} links"))
}

/// The number of links to send over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkCount {
    pub most: NonZeroU32,
    /// Use only as many of them as make the move faster.
    pub measured: bool,
}

/// A number of links, or `auto`: as many as make the move faster, but at most four, since each keeps a processor
/// busy.
pub fn link_count(text: &str) -> Result<LinkCount, String> {
    if text == "auto" {
        return Ok(LinkCount { most: NonZeroU32::MIN.saturating_add(3), measured: true });
    }
    let most = links(text).map_err(|expected| format!("{expected}, or auto"))?;
    Ok(LinkCount { most, measured: false })
}

/// The states that a device can be driven to. ERROR cannot be set (`vfio.h: enum vfio_device_mig_state`).
pub fn state() -> impl TypedValueParser<Value = State> {
    let words = State::ALL.into_iter().filter(|state| *state != State::Error).map(|state| {
        let word = PossibleValue::new(state.name());
        match state {
            State::StopCopy => word.alias("STOP-COPY"),
            State::RunningP2p => word.alias("RUNNING-P2P"),
            State::PreCopy => word.alias("PRE-COPY"),
            State::PreCopyP2p => word.alias("PRE-COPY-P2P"),
            _ => word,
        }
    });
    PossibleValuesParser::new(words).try_map(|name| name.parse::<State>())
}

/// The methods of compression.
pub fn compression() -> impl TypedValueParser<Value = Compression> {
    PossibleValuesParser::new(Compression::ALL.map(Compression::name))
        .try_map(|name| name.parse::<Compression>())
}

/// A BLAKE3 hash in hexadecimal digits.
pub fn blake3(text: &str) -> Result<String, String> {
    match text.len() == 64 && text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        true => Ok(text.to_ascii_lowercase()),
        false => Err(format!(
            "expected the 64 hexadecimal digits that `limosa verify` prints, found {}",
            text.len()
        )),
    }
}

/// The number of a process.
pub fn pid(text: &str) -> Result<i32, String> {
    let number = text.parse().ok().filter(|number| *number > 0);
    number.ok_or_else(|| "expected the number of a process, such as 1234".into())
}

/// How many, at least one.
pub fn count(text: &str) -> Result<u64, String> {
    let number = text.parse().ok().filter(|number| *number > 0);
    number.ok_or_else(|| "expected a number from 1 on".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_counted_or_chosen() {
        assert_eq!(links("3").map(NonZeroU32::get), Ok(3));
        assert!(link_count("auto").unwrap().measured);
        assert_eq!(link_count("3").map(|count| (count.most.get(), count.measured)), Ok((3, false)));
        assert!(link_count("17").unwrap_err().ends_with("or auto"));
        for wrong in ["0", "17", "-1", "x", "", "1.5"] {
            assert!(links(wrong).unwrap_err().contains("1 to 16"), "{wrong}");
        }
    }

    #[test]
    fn rates_are_bytes_or_bits() {
        let of = |text| rate(text).map(|rate| rate.bytes_per_second);
        assert_eq!(
            (of("10Gbit"), of("2.5Gbit"), of("100M")),
            (Ok(1_250_000_000), Ok(312_500_000), Ok(100 << 20))
        );
        assert_eq!((of("8Mbit"), Rate::gbit(1).bytes_per_second), (Ok(1_000_000), 125_000_000));
        for wrong in ["", "0", "0Gbit", "-1Gbit", "xGbit", "NaNGbit", "10Gb", "1e-12Gbit"] {
            assert!(rate(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn modes_are_octal_and_let_the_owner_in() {
        assert_eq!((mode("600"), mode("0660"), mode("666")), (Ok(0o600), Ok(0o660), Ok(0o666)));
        for wrong in ["", "060", "400", "1600", "680", "u+w", "-600"] {
            assert!(mode(wrong).unwrap_err().contains("such as 660"), "{wrong}");
        }
    }

    #[test]
    fn sizes_and_seconds() {
        assert_eq!(bytes("64M"), Ok(64 << 20));
        assert_eq!(bytes("1GiB"), Ok(1 << 30));
        assert_eq!(bytes("17"), Ok(17));
        assert!(bytes("16777216T").unwrap_err().contains("2^64"));
        assert!(bytes("M").is_err() && bytes("-1").is_err() && bytes("5X").is_err());
        assert!(seconds("0").is_err() && seconds("x").is_err() && seconds("NaN").is_err());
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
    }
}
