//! What transformers' Jinja has beyond Jinja, and where Python prints values differently.

use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Output, State, Value};

/// Marks the errors that a template raised itself.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Raised(pub(super) String);

/// `raise_exception(message)`.
pub(super) fn raise_exception(message: String) -> Result<Value, Error> {
    let error = Error::new(ErrorKind::InvalidOperation, "raised by the template");
    Err(error.with_source(Raised(message)))
}

/// Prints as Python does: `True`, `None`, `['a', 1]`; text and numbers as they are.
pub(super) fn format_as_python(
    out: &mut Output<'_>,
    state: &State<'_, '_>,
    value: &Value,
) -> Result<(), Error> {
    let python = match value.kind() {
        ValueKind::Bool | ValueKind::None | ValueKind::Seq | ValueKind::Map => {
            let mut text = String::new();
            write_repr(&mut text, value)?;
            text
        }
        _ => return minijinja::escape_formatter(out, state, value),
    };
    out.write_str(&python).map_err(Error::from)
}

fn write_repr(out: &mut String, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::String => write_quoted(out, value.as_str().unwrap_or_default()),
        ValueKind::Seq => {
            out.push('[');
            for (index, item) in value.try_iter()?.enumerate() {
                out.push_str(if index == 0 { "" } else { ", " });
                write_repr(out, &item)?;
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (index, key) in value.try_iter()?.enumerate() {
                out.push_str(if index == 0 { "" } else { ", " });
                write_repr(out, &key)?;
                out.push_str(": ");
                write_repr(out, &value.get_item(&key)?)?;
            }
            out.push('}');
        }
        _ => write!(out, "{value}")?,
    }
    Ok(())
}

fn write_quoted(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    out.push(quote);
    for character in text.chars() {
        match character {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            _ if character == quote => {
                out.push('\\');
                out.push(character);
            }
            _ => out.push(character),
        }
    }
    out.push(quote);
}

/// Transformers marks the assistant's words with `{% generation %}` tags, for training only: they print nothing.
pub(super) fn without_generation_tags(template: &str) -> String {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start + 2);
        out.push_str(before);
        let Some(length) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let (inside, after) = tag.split_at(length);
        let word = inside.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        match word {
            "generation" => out.push_str(&inside.replacen(word, "if true", 1)),
            "endgeneration" => out.push_str(&inside.replacen(word, "endif", 1)),
            _ => out.push_str(inside),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

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
const DAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];

/// A point in time, in UTC.
#[derive(Debug)]
struct Moment {
    year: i64,
    month: usize,
    day: usize,
    day_of_year: usize,
    weekday: usize,
    hour: usize,
    minute: usize,
    second: usize,
}

/// `strftime_now(format)`, in UTC.
pub(super) fn strftime(format: &str, now: SystemTime) -> Result<String, Error> {
    let moment = Moment::new(now);
    let mut out = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        let mut code = characters.next();
        let padded = code != Some('-');
        if !padded {
            code = characters.next();
        }
        moment.write(&mut out, code, padded)?;
    }
    Ok(out)
}

impl Moment {
    fn new(now: SystemTime) -> Self {
        let seconds = now
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        let part = |value: u64| usize::try_from(value).expect("a part of a day fits");
        let mut left = seconds / 86_400;
        let weekday = part((left + 4) % 7);
        let mut year = 1970;
        while left >= days_of_year(year) {
            left -= days_of_year(year);
            year += 1;
        }
        let day_of_year = part(left) + 1;
        let mut month = 0;
        while left >= days_of_month(year, month) {
            left -= days_of_month(year, month);
            month += 1;
        }
        Self {
            year,
            month,
            day: part(left) + 1,
            day_of_year,
            weekday,
            hour: part(seconds / 3600 % 24),
            minute: part(seconds / 60 % 60),
            second: part(seconds % 60),
        }
    }

    fn write(&self, out: &mut String, code: Option<char>, padded: bool) -> Result<(), Error> {
        let twelve = (self.hour + 11) % 12 + 1;
        let (value, width) = match code {
            Some('d') => (self.day, 2),
            Some('m') => (self.month + 1, 2),
            Some('H') => (self.hour, 2),
            Some('I') => (twelve, 2),
            Some('M') => (self.minute, 2),
            Some('S') => (self.second, 2),
            Some('j') => (self.day_of_year, 3),
            _ => return self.write_words(out, code),
        };
        if padded {
            write!(out, "{value:0width$}")?;
        } else {
            write!(out, "{value}")?;
        }
        Ok(())
    }

    fn write_words(&self, out: &mut String, code: Option<char>) -> Result<(), Error> {
        let (month, day) = (MONTHS[self.month], DAYS[self.weekday]);
        let date = (self.year, self.month + 1, self.day);
        match code {
            Some('Y') => write!(out, "{}", self.year)?,
            Some('y') => write!(out, "{:02}", self.year % 100)?,
            Some('B') => out.push_str(month),
            Some('b' | 'h') => out.push_str(&month[..3]),
            Some('A') => out.push_str(day),
            Some('a') => out.push_str(&day[..3]),
            Some('p') => out.push_str(if self.hour < 12 { "AM" } else { "PM" }),
            Some('e') => write!(out, "{:2}", self.day)?,
            Some('F') => write!(out, "{}-{:02}-{:02}", date.0, date.1, date.2)?,
            Some('T') => write!(
                out,
                "{:02}:{:02}:{:02}",
                self.hour, self.minute, self.second
            )?,
            Some('Z') => out.push_str("UTC"),
            Some('z') => out.push_str("+0000"),
            Some('%') => out.push('%'),
            other => {
                let code = other.map_or_else(String::new, String::from);
                let detail = format!("strftime_now: `%{code}` is not supported");
                return Err(Error::new(ErrorKind::InvalidOperation, detail));
            }
        }
        Ok(())
    }
}

fn is_leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

fn days_of_year(year: i64) -> u64 {
    if is_leap(year) { 366 } else { 365 }
}

fn days_of_month(year: i64, month: usize) -> u64 {
    match month {
        1 if is_leap(year) => 29,
        1 => 28,
        3 | 5 | 8 | 10 => 30,
        _ => 31,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn at(seconds: u64, format: &str) -> String {
        strftime(format, UNIX_EPOCH + Duration::from_secs(seconds)).expect("a known format")
    }

    #[test]
    fn dates() {
        assert_eq!(at(0, "%a %d %b %Y %H:%M:%S"), "Thu 01 Jan 1970 00:00:00");
        // 2024-02-29 23:59:59, a leap day.
        assert_eq!(
            at(1_709_251_199, "%F %T %A %B %j %y"),
            "2024-02-29 23:59:59 Thursday February 060 24"
        );
        assert_eq!(at(1_709_251_200, "%d %b %Y"), "01 Mar 2024");
        assert_eq!(at(4_102_444_799, "%-d.%-m. %I %p %e%%"), "31.12. 11 PM 31%");
        assert_eq!(at(43_200, "%I %p %Z %z"), "12 PM UTC +0000");
        assert_eq!(at(0, "%I %e %-j"), "12  1 1");
    }

    #[test]
    fn an_unknown_code_is_named() {
        let error = strftime("%Y %Q", UNIX_EPOCH).expect_err("no such code");
        assert!(error.to_string().contains("`%Q`"), "{error}");
        assert!(strftime("50%", UNIX_EPOCH).is_err());
    }

    #[test]
    fn generation_tags_become_plain_blocks() {
        assert_eq!(
            without_generation_tags("{%- generation -%}x{% endgeneration %}{{ generation }}"),
            "{%- if true -%}x{% endif %}{{ generation }}"
        );
        for same in [
            "",
            "{% if generation %}a{% endif %}",
            "{% unclosed",
            "{%",
            "%}{%%}",
        ] {
            assert_eq!(without_generation_tags(same), same);
        }
    }
}
