//! Repeated counts: tasks or CPUs per node.

use super::{ENTRIES_MAX, ListError, ListErrorKind};

/// The count of each node, in order: `4(x2),3` is 4, 4, 3.
///
/// # Errors
/// When the text is not such a list, or has more than [`ENTRIES_MAX`](super::ENTRIES_MAX) counts.
pub fn expand_counts(text: &str) -> Result<Vec<u32>, ListError> {
    let mut counts = Vec::new();
    let mut at = 0;
    for entry in text.split(',') {
        let (digits, repeat) = match entry.find("(x") {
            Some(open) => {
                let times = &entry[open + 2..];
                let end = times
                    .strip_suffix(')')
                    .ok_or_else(|| ListError::new(ListErrorKind::NotANumber, text, at + open))?;
                (&entry[..open], number(end, text, at + open + 2)?)
            }
            None => (entry, 1),
        };
        let count = number(digits, text, at)?;
        let repeat = usize::try_from(repeat).unwrap_or(usize::MAX);
        if repeat == 0 {
            return Err(ListError::new(ListErrorKind::Empty, text, at));
        }
        if repeat > ENTRIES_MAX - counts.len() {
            return Err(ListError::new(ListErrorKind::TooMany, text, at));
        }
        counts.extend(std::iter::repeat_n(count, repeat));
        at += entry.len() + 1;
    }
    Ok(counts)
}

/// The shortest such list.
#[must_use]
pub fn compress_counts(counts: &[u32]) -> String {
    let runs: Vec<String> = counts
        .chunk_by(|one, next| one == next)
        .map(|run| match run {
            [count] => count.to_string(),
            _ => format!("{}(x{})", run[0], run.len()),
        })
        .collect();
    runs.join(",")
}

fn number(digits: &str, text: &str, at: usize) -> Result<u32, ListError> {
    let kind = if digits.is_empty() {
        ListErrorKind::Empty
    } else if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        ListErrorKind::NotANumber
    } else if let Ok(number) = digits.parse() {
        return Ok(number);
    } else {
        ListErrorKind::LongNumber
    };
    Err(ListError::new(kind, text, at))
}
