//! Hosts to host lists.

use std::fmt::Write as _;

use super::{DIGITS_MAX, ENTRIES_MAX, HOST_BYTES_MAX, ListError, ListErrorKind, is_host_byte};

/// A piece of a name. Two names that differ in one number part only may become one entry.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Part<'a> {
    Text(&'a str),
    Numbers(Vec<Range>),
}

/// `first..=last`, written with at least `width` digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    first: u64,
    last: u64,
    width: usize,
}

impl Range {
    /// Whether `next` is written the way this range would go on.
    fn continues_with(self, next: Self) -> bool {
        let digits = |range: Self, number: u64| format!("{number:0width$}", width = range.width);
        next.first == self.last + 1
            && [next.first, next.last]
                .into_iter()
                .all(|number| digits(self, number) == digits(next, number))
    }
}

/// The shortest list this finds for the hosts, in their order.
///
/// # Errors
/// When there is no host, a name is not one, or there are more than [`ENTRIES_MAX`](super::ENTRIES_MAX).
pub fn compress<S: AsRef<str>>(hosts: &[S]) -> Result<String, ListError> {
    if hosts.is_empty() {
        return Err(ListError::new(ListErrorKind::Empty, "", 0));
    }
    let mut entries: Vec<Vec<Part<'_>>> = Vec::new();
    for (index, host) in hosts.iter().enumerate() {
        let host = host.as_ref();
        check(host, index)?;
        entries.push(parts_of(host));
        while let [.., before, last] = entries.as_mut_slice() {
            if !merge(before, last) {
                break;
            }
            entries.pop();
        }
    }
    let texts: Vec<String> = entries.iter().map(|entry| written(entry)).collect();
    Ok(texts.join(","))
}

fn check(host: &str, index: usize) -> Result<(), ListError> {
    let kind = if index >= ENTRIES_MAX {
        ListErrorKind::TooMany
    } else if host.is_empty() {
        ListErrorKind::Empty
    } else if host.len() > HOST_BYTES_MAX {
        ListErrorKind::LongName
    } else if !host.bytes().all(is_host_byte) {
        ListErrorKind::Character
    } else {
        return Ok(());
    };
    let mut error = ListError::new(kind, host, 0);
    error.position = index;
    Err(error)
}

/// Digits are numbers, the rest is text; so are more digits than are counted with.
fn parts_of(host: &str) -> Vec<Part<'_>> {
    let mut parts = Vec::new();
    let mut rest = host;
    while let Some(first) = rest.bytes().next() {
        let digits = first.is_ascii_digit();
        let length = rest
            .bytes()
            .position(|byte| byte.is_ascii_digit() != digits)
            .unwrap_or(rest.len());
        let (piece, after) = rest.split_at(length);
        parts.push(match piece.parse() {
            Ok(number) if digits && length <= DIGITS_MAX => Part::Numbers(vec![Range {
                first: number,
                last: number,
                width: length,
            }]),
            _ => Part::Text(piece),
        });
        rest = after;
    }
    parts
}

/// Puts `last` into `before` where expanding the result gives the two in a row: they differ in one number part,
/// and no part but that and the last (which varies fastest) has more than one number.
///
/// Slurm reads nothing after the last bracket and orders three brackets in a way of its own, so names end with their
/// last bracket and have two at most.
fn merge(before: &mut [Part<'_>], last: &[Part<'_>]) -> bool {
    if before.len() != last.len() || !matches!(last.last(), Some(Part::Numbers(_))) {
        return false;
    }
    let mut different = (0..last.len()).filter(|&at| before[at] != last[at]);
    let (Some(at), None) = (different.next(), different.next()) else {
        return false;
    };
    let mut fixed = (0..last.len() - 1).filter(|&part| part != at);
    if !fixed.all(|part| is_single(&before[part])) {
        return false;
    }
    let (Part::Numbers(ranges), Part::Numbers(more)) = (&mut before[at], &last[at]) else {
        return false;
    };
    for range in more {
        match ranges.last_mut() {
            Some(end) if end.continues_with(*range) => end.last = range.last,
            _ => ranges.push(*range),
        }
    }
    true
}

/// Whether a part is the same in all names.
fn is_single(part: &Part<'_>) -> bool {
    match part {
        Part::Text(_) => true,
        Part::Numbers(ranges) => matches!(ranges[..], [range] if range.first == range.last),
    }
}

fn written(entry: &[Part<'_>]) -> String {
    let mut text = String::new();
    let several = !entry.iter().all(is_single);
    for (index, part) in entry.iter().enumerate() {
        match part {
            Part::Text(fixed) => text.push_str(fixed),
            Part::Numbers(ranges) => {
                let ends_name = index + 1 == entry.len();
                write_numbers(&mut text, ranges, !is_single(part) || several && ends_name);
            }
        }
    }
    text
}

fn write_numbers(text: &mut String, ranges: &[Range], brackets: bool) {
    text.push_str(if brackets { "[" } else { "" });
    for (index, range) in ranges.iter().enumerate() {
        let Range { first, last, width } = *range;
        let comma = if index > 0 { "," } else { "" };
        write!(text, "{comma}{first:0width$}").expect("writing to a String cannot fail");
        if last > first {
            write!(text, "-{last:0width$}").expect("writing to a String cannot fail");
        }
    }
    text.push_str(if brackets { "]" } else { "" });
}
