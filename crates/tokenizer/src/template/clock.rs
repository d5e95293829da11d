//! `strftime_now`: the date for templates that tell the model what day it is.

use std::time::{SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// 1970-01-01 was a Thursday.
const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// Year, month (1 to 12), day (1 to 31) of a day counted from 1970-01-01 in the Gregorian
/// calendar, by counting from 0000-03-01 so that leap days end a year.
fn civil(days: i64) -> (i64, usize, i64) {
    let days = days + 719_468;
    // 146,097 days are 400 years.
    let era = days.div_euclid(146_097);
    let day = days.rem_euclid(146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    // Months from March: 31, 30, 31, 30, 31 days and again: 153 days are five months.
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year + era * 400 + i64::from(month <= 2), month as usize, day)
}

/// `now` in UTC by C's `strftime` codes (those that make sense in a prompt).
pub(super) fn format(now: SystemTime, format: &str) -> Result<String, String> {
    let seconds = match now.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_secs()).unwrap_or(i64::MAX / 2),
        Err(before) => -i64::try_from(before.duration().as_secs()).unwrap_or(i64::MAX / 2),
    };
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let weekday = DAYS[days.rem_euclid(7) as usize];
    let january = (0..).find(|&n| civil(days - n).1 == 1 && civil(days - n).2 == 1).unwrap_or(0);
    let mut out = String::with_capacity(2 * format.len());
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut code = chars.next().ok_or("strftime_now: the format ends in %")?;
        // `%-d` leaves the zero in front out.
        let short = code == '-';
        if short {
            code = chars.next().ok_or("strftime_now: the format ends in %-")?;
        }
        let twelve = (hour + 11) % 12 + 1;
        let two = |n: i64| if short { n.to_string() } else { format!("{n:02}") };
        let text = match code {
            'Y' => year.to_string(),
            'y' => two(year.rem_euclid(100)),
            'm' => two(month as i64),
            'd' => two(day),
            'e' => format!("{day:2}"),
            'H' => two(hour),
            'I' => two(twelve),
            'M' => two(minute),
            'S' => two(second),
            'j' if short => (january + 1).to_string(),
            'j' => format!("{:03}", january + 1),
            'p' => if hour < 12 { "AM" } else { "PM" }.to_string(),
            'B' => MONTHS[month - 1].to_string(),
            'b' | 'h' => MONTHS[month - 1][..3].to_string(),
            'A' => weekday.to_string(),
            'a' => weekday[..3].to_string(),
            'F' => format!("{year}-{month:02}-{day:02}"),
            'T' => format!("{hour:02}:{minute:02}:{second:02}"),
            'Z' => "UTC".to_string(),
            'z' => "+0000".to_string(),
            '%' => "%".to_string(),
            other => return Err(format!("strftime_now: %{other} is not supported")),
        };
        out.push_str(&text);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn known_dates() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        // `date -u -d @951827696 ...` and the like.
        let all = "%Y-%m-%d %e %H:%M:%S %I%p %j %a %A %b %B %-d %y %F %T %Z%z %%";
        assert_eq!(
            format(at(951_827_696), all).unwrap(),
            "2000-02-29 29 12:34:56 12PM 060 Tue Tuesday Feb February 29 00 2000-02-29 12:34:56 UTC+0000 %"
        );
        assert_eq!(format(at(1_764_547_200), "%d %b %Y").unwrap(), "01 Dec 2025");
        assert_eq!(format(at(0), "%A %-d %B %Y %j").unwrap(), "Thursday 1 January 1970 001");
        assert_eq!(format(at(4_107_542_400), "%F %j %a").unwrap(), "2100-03-01 060 Mon");
        let before = UNIX_EPOCH - Duration::from_secs(1);
        assert_eq!(format(before, "%F %T").unwrap(), "1969-12-31 23:59:59");
        assert!(format(at(0), "%Q").is_err());
        assert!(format(at(0), "%").is_err());
    }
}
