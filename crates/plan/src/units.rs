//! Numbers as people write them: `175B`, `300e9`, `1.5T`, `$4.6M`, `80GB`, `3e23`, `30min`.
//!
//! Everything is an `f64` in base units (parameters, tokens, FLOP, bytes, dollars, seconds). Reading is strict:
//! zero, negative, infinite and absurd values are errors, because every quantity here is a positive amount.

use crate::Error;

/// Amounts beyond this are refused: a hundred million times the FLOP that all machines on Earth do in a year.
const LARGEST: f64 = 1e38;

const COUNT: &[(&str, f64)] = &[
    ("", 1.0),
    ("k", 1e3),
    ("M", 1e6),
    ("B", 1e9),
    ("G", 1e9),
    ("bn", 1e9),
    ("T", 1e12),
    ("Q", 1e15),
    ("P", 1e15),
];
const FLOP: &[(&str, f64)] = &[
    ("", 1.0),
    ("k", 1e3),
    ("M", 1e6),
    ("G", 1e9),
    ("T", 1e12),
    ("P", 1e15),
    ("E", 1e18),
    ("Z", 1e21),
    ("Y", 1e24),
];
const BYTES: &[(&str, f64)] = &[
    ("", 1.0),
    ("B", 1.0),
    ("kB", 1e3),
    ("MB", 1e6),
    ("GB", 1e9),
    ("TB", 1e12),
    ("PB", 1e15),
    ("KiB", 1024.0),
    ("MiB", 1048576.0),
    ("GiB", 1073741824.0),
    ("TiB", 1099511627776.0),
    ("M", 1e6),
    ("G", 1e9),
    ("T", 1e12),
];
const SECONDS: &[(&str, f64)] = &[
    ("", 1.0),
    ("s", 1.0),
    ("sec", 1.0),
    ("m", 60.0),
    ("min", 60.0),
    ("h", 3600.0),
    ("hours", 3600.0),
    ("d", 86400.0),
    ("days", 86400.0),
    ("y", 31557600.0),
];

/// A count of parameters, tokens, queries: `175B`, `300e9`, `1.5T`, `1_000_000`.
pub fn count(what: &'static str, input: &str) -> Result<f64, Error> {
    read(what, input, COUNT, "a positive number such as 7B, 300e9 or 1.5T")
}

/// An amount of arithmetic: `3e23`, `3.14e23 FLOP`, `500 EFLOP`.
pub fn flop(what: &'static str, input: &str) -> Result<f64, Error> {
    let lower = input.trim().to_lowercase();
    let cut = ["flops", "flop"].iter().find(|s| lower.ends_with(**s)).map_or(0, |s| s.len());
    let text = input.trim();
    match text.get(..text.len() - cut) {
        Some(number) => read(what, number, FLOP, "a positive amount such as 3e23 or 500EFLOP"),
        None => read(what, input, FLOP, "a positive amount such as 3e23 or 500EFLOP"),
    }
}

/// An amount of memory in bytes: `80GB`, `24GiB`, `512 MB`. A bare number is bytes.
pub fn bytes(what: &'static str, input: &str) -> Result<f64, Error> {
    read(what, input, BYTES, "an amount such as 80GB or 24GiB")
}

/// An amount of money in dollars: `$4.6M`, `100`, `$2.50`.
pub fn usd(what: &'static str, input: &str) -> Result<f64, Error> {
    let text = input.trim();
    read(what, text.strip_prefix('$').unwrap_or(text), COUNT, "an amount such as $4.6M, $100 or 2.5k")
}

/// A length of time in seconds: `30min`, `2h`, `3d`, `90`.
pub fn seconds(what: &'static str, input: &str) -> Result<f64, Error> {
    read(what, input, SECONDS, "a length of time such as 30min, 2h or 3d")
}

/// Reads a number followed by one of `suffixes`, exactly as written first, then in any case.
fn read(
    what: &'static str,
    input: &str,
    suffixes: &[(&str, f64)],
    example: &'static str,
) -> Result<f64, Error> {
    let wrong = |why: String| Error::Number { what, input: input.to_string(), why, example };
    let text: String = input.trim().chars().filter(|c| *c != '_' && *c != ',' && *c != ' ').collect();
    if text.is_empty() {
        return Err(wrong("is empty".into()));
    }
    let end = number_end(&text);
    let (number, suffix) = text.split_at(end);
    let number: f64 = number.parse().map_err(|_| wrong("is not a number".into()))?;
    let factor = suffixes
        .iter()
        .find(|(s, _)| *s == suffix)
        .or_else(|| suffixes.iter().find(|(s, _)| s.eq_ignore_ascii_case(suffix)))
        .map(|(_, f)| *f)
        .ok_or_else(|| {
            let known: Vec<&str> = suffixes.iter().map(|(s, _)| *s).filter(|s| !s.is_empty()).collect();
            wrong(format!("ends in the unknown unit `{suffix}` (known: {})", known.join(", ")))
        })?;
    let value = number * factor;
    if value == 0.0 {
        Err(wrong("is zero".into()))
    } else if value < 0.0 {
        Err(wrong("is negative".into()))
    } else if value.is_nan() || value > LARGEST {
        Err(wrong(format!("is too large to mean anything (limit {LARGEST:.0e})")))
    } else {
        Ok(value)
    }
}

/// Where the number at the start of `text` ends; an `e` belongs to it only if digits follow.
fn number_end(text: &str) -> usize {
    let bytes = text.as_bytes();
    let mut i = usize::from(matches!(bytes.first(), Some(b'-' | b'+')));
    while i < bytes.len() && (bytes[i].is_ascii_digit() || bytes[i] == b'.') {
        i += 1;
    }
    if i < bytes.len() && matches!(bytes[i], b'e' | b'E') {
        let sign = usize::from(matches!(bytes.get(i + 1), Some(b'-' | b'+')));
        if bytes.get(i + 1 + sign).is_some_and(u8::is_ascii_digit) {
            i += 2 + sign;
            while i < bytes.len() && bytes[i].is_ascii_digit() {
                i += 1;
            }
        }
    }
    i
}

/// Three significant digits without trailing zeros: `72.4`, `8`, `0.0123`.
pub fn three(x: f64) -> String {
    if x == 0.0 || !x.is_finite() {
        return if x == 0.0 { "0".into() } else { x.to_string() };
    }
    let decimals = (2 - x.abs().log10().floor() as i32).clamp(0, 12) as usize;
    let text = format!("{x:.decimals$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_string() } else { text }
}

/// `x` with the largest of `units` (size, suffix; ascending) that leaves at least one whole.
fn scaled(x: f64, units: &[(f64, &str)]) -> String {
    // 999.6 would print as `1000`: compare what will be shown, not what is.
    let (size, suffix) =
        units.iter().rev().find(|(size, _)| x.abs() / size >= 0.9995).copied().unwrap_or(units[0]);
    format!("{}{suffix}", three(x / size))
}

/// A count for people: `72.4B`, `1.33T`, `940`.
///
/// ```
/// assert_eq!(sparsam_plan::units::show_count(72.41e9), "72.4B");
/// ```
pub fn show_count(x: f64) -> String {
    scaled(x, &[(1.0, ""), (1e3, "k"), (1e6, "M"), (1e9, "B"), (1e12, "T"), (1e15, "Q")])
}

/// A number of things that are counted out, digits and all up to a million: `2048`, `96`; beyond as [`show_count`].
pub fn show_whole(x: f64) -> String {
    if x < 1e6 && x.fract() == 0.0 { format!("{x}") } else { show_count(x) }
}

/// An amount of arithmetic for people: `5.76e23`.
pub fn show_flop(x: f64) -> String {
    format!("{x:.2e}")
}

/// Bytes for people, in powers of ten as memory is sold: `80 GB`.
pub fn show_bytes(x: f64) -> String {
    scaled(x, &[(1.0, " B"), (1e3, " kB"), (1e6, " MB"), (1e9, " GB"), (1e12, " TB"), (1e15, " PB")])
}

/// Money for people: `$4.67M`, `$0.0031`.
pub fn show_usd(x: f64) -> String {
    format!("${}", scaled(x, &[(1.0, ""), (1e3, "k"), (1e6, "M"), (1e9, "B"), (1e12, "T")]))
}

/// A length of time for people: `29.4 days`, `1.3 s`.
pub fn show_seconds(x: f64) -> String {
    let units = [
        (1e-6, " us"),
        (1e-3, " ms"),
        (1.0, " s"),
        (60.0, " min"),
        (3600.0, " h"),
        (86400.0, " days"),
        (31557600.0, " years"),
    ];
    scaled(x, &units)
}

/// Energy for people, from joules: `1.3 GWh`, `52 kWh`, `36 kJ`.
pub fn show_joules(x: f64) -> String {
    if x < 3.6e5 {
        return scaled(x, &[(1e-3, " mJ"), (1.0, " J"), (1e3, " kJ")]);
    }
    scaled(x / 3600.0, &[(1.0, " Wh"), (1e3, " kWh"), (1e6, " MWh"), (1e9, " GWh"), (1e12, " TWh")])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_write() {
        let same = |got: Result<f64, Error>, want: f64| {
            let got = got.unwrap();
            assert!((got / want - 1.0).abs() < 1e-12, "{got} is not {want}");
        };
        same(count("n", "175B"), 175e9);
        same(count("n", "300e9"), 300e9);
        same(count("n", "1.5T"), 1.5e12);
        same(count("n", "1.5t"), 1.5e12);
        same(count("n", "1_000_000"), 1e6);
        same(count("n", " 12 500 "), 12500.0);
        same(count("n", "2.5e-1M"), 250e3);
        same(usd("m", "$4.6M"), 4.6e6);
        same(usd("m", "1,250.50"), 1250.5);
        same(bytes("b", "80GB"), 80e9);
        same(bytes("b", "24 GiB"), 24.0 * 1073741824.0);
        same(bytes("b", "512mb"), 512e6);
        same(flop("c", "3e23"), 3e23);
        same(flop("c", "3.14E23"), 3.14e23);
        same(flop("c", "500EFLOP"), 5e20);
        same(flop("c", "2 zflops"), 2e21);
        same(seconds("t", "30min"), 1800.0);
        same(seconds("t", "1.5d"), 129600.0);
    }

    #[test]
    fn refuses_nonsense_and_says_why() {
        let check = |got: Result<f64, Error>, part: &str| {
            let message = got.unwrap_err().to_string();
            assert!(message.contains(part), "`{message}` does not say `{part}`");
        };
        check(count("parameters", "-3B"), "parameters: `-3B` is negative; give");
        check(count("parameters", "0"), "is zero");
        check(count("parameters", "1e39"), "too large");
        check(count("parameters", "1e999"), "too large");
        check(count("parameters", "many"), "is not a number");
        check(count("parameters", ""), "is empty");
        check(count("parameters", "NaN"), "is not a number");
        check(count("parameters", "inf"), "is not a number");
        check(count("parameters", "1.2.3B"), "is not a number");
        check(count("parameters", "7X"), "unknown unit `X`");
        check(bytes("memory", "80Gb/s"), "unknown unit `Gb/s`");
        check(flop("budget", "flop"), "is empty");
        check(flop("budget", "ﬂop"), "is not a number");
        check(usd("money", "€5"), "is not a number");
    }

    #[test]
    fn shows_what_people_read() {
        assert_eq!((show_whole(2048.0), show_whole(2.5e6)), ("2048".into(), "2.5M".into()));
        assert_eq!(show_count(67.04e9), "67B");
        assert_eq!(show_count(1.0), "1");
        assert_eq!(show_count(999.96e6), "1B");
        assert_eq!(show_count(0.5), "0.5");
        assert_eq!(show_bytes(350e9), "350 GB");
        assert_eq!(show_usd(4.672e6), "$4.67M");
        assert_eq!(show_usd(0.00313), "$0.00313");
        assert_eq!(show_seconds(90.0), "1.5 min");
        assert_eq!(show_joules(3.6e6), "1 kWh");
        assert_eq!(show_joules(36e3), "36 kJ");
        assert_eq!(show_flop(5.76e23), "5.76e23");
    }
}
