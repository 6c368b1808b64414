//! Sizes as people write and read them. Units are binary; JSON has plain bytes.

use std::str::FromStr;

const UNITS: &[(char, u32)] = &[('K', 10), ('M', 20), ('G', 30), ('T', 40), ('P', 50), ('E', 60)];

/// A size given on the command line: `1048576`, `1M`, `1MiB`, `1.5G`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Size, String> {
        let bad = || {
            format!(
                "'{text}' is not a size: use a number of bytes or one with K, M, G, T, P or E (1024-based)"
            )
        };
        let upper = text.trim().to_ascii_uppercase();
        let number_end = upper.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(upper.len());
        let (number, unit) = upper.split_at(number_end);
        let shift = match unit.trim().strip_suffix("IB").unwrap_or(unit.trim()) {
            "" if unit.is_empty() => 0,
            "B" if unit.trim() == "B" => 0,
            one => {
                let mut chars = one.chars();
                let letter = chars.next().ok_or_else(bad)?;
                if chars.next().is_some() {
                    return Err(bad());
                }
                UNITS.iter().find(|(l, _)| *l == letter).ok_or_else(bad)?.1
            }
        };
        scaled(number, shift).map(Size).ok_or_else(|| match number.parse::<f64>() {
            Ok(_) if !number.is_empty() => format!("'{text}' is not a whole number of bytes below 2^64"),
            _ => bad(),
        })
    }
}

/// `number`, perhaps with a decimal point, times 2^shift; exact or nothing.
fn scaled(number: &str, shift: u32) -> Option<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || !fraction.bytes().all(|b| b.is_ascii_digit()) || fraction.len() > 18 {
        return None;
    }
    let whole = whole.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    if fraction.is_empty() {
        return if number.ends_with('.') { None } else { Some(whole) };
    }
    let part = fraction.parse::<u128>().ok()? << shift;
    let scale = 10u128.pow(fraction.len() as u32);
    if !part.is_multiple_of(scale) {
        return None;
    }
    whole.checked_add(u64::try_from(part / scale).ok()?)
}

/// A size for people: `1.5 GiB`, `512 B`; exact multiples without a fraction.
pub fn human(bytes: u64) -> String {
    let Some((letter, shift)) = UNITS.iter().rev().find(|(_, shift)| bytes >> shift > 0) else {
        return format!("{bytes} B");
    };
    let unit = 1u64 << shift;
    if bytes.is_multiple_of(unit) {
        format!("{} {letter}iB", bytes / unit)
    } else {
        format!("{:.1} {letter}iB", bytes as f64 / unit as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("512B", 512),
            ("1k", 1 << 10),
            ("1K", 1 << 10),
            ("3M", 3 << 20),
            ("10 GiB", 10 << 30),
            ("1.5G", 3 << 29),
            ("0.25m", 1 << 18),
            ("2T", 2 << 40),
            ("1P", 1 << 50),
            ("15E", 15 << 60),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "",
            " ",
            "G",
            "-1",
            "1X",
            "1GG",
            "1 G B",
            "iB",
            "1iB",
            "1.2.3",
            ".5G",
            "1.",
            "1.G",
            "0x10",
            "16E",
            "1e3",
            "1.3",
            "0.1K",
            "18446744073709551616",
            "1G1",
            "NaN",
            "inf",
        ] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (1 << 30, "1 GiB"),
            (15 << 60, "15 EiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_a_size_or_refused(text in proptest::prelude::prop_oneof!["[0-9]{0,24} ?[kKmMgGtTpPeE]?(iB|B)?", ".*"]) {
            let _ = text.parse::<Size>();
        }
    }
}
