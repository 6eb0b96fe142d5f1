//! What is wrong with a list, and where.

use super::{ENTRIES_MAX, HOST_BYTES_MAX};

/// What is wrong with a list, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} at position {position} of `{excerpt}`")]
pub struct ListError {
    /// What is wrong.
    pub kind: ListErrorKind,
    /// Byte offset in the text; for a list of names, index of the name.
    pub position: usize,
    /// The text, or what of it is near the position.
    pub excerpt: String,
}

/// What is wrong with a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ListErrorKind {
    /// Nothing where an entry should be.
    #[error("empty entry")]
    Empty,
    /// A `[` that is never closed.
    #[error("`[` without `]`")]
    Unclosed,
    /// A `]` that was never opened.
    #[error("`]` without `[`")]
    Unopened,
    /// Brackets within brackets, which Slurm does not have.
    #[error("`[` inside brackets")]
    Nested,
    /// Something else than a number where one should be.
    #[error("expected a number")]
    NotANumber,
    /// A number that is too large.
    #[error("number that is too large")]
    LongNumber,
    /// A range whose end is before its start.
    #[error("range that runs backwards")]
    Backwards,
    /// A character that host names do not have.
    #[error("character that no host name has")]
    Character,
    /// A name longer than any host has.
    #[error("host name of more than {HOST_BYTES_MAX} bytes")]
    LongName,
    /// More entries than any job has.
    #[error("more than {ENTRIES_MAX} entries")]
    TooMany,
}

/// Bytes shown on either side of the position.
const EXCERPT_BYTES: usize = 32;

impl ListError {
    pub(super) fn new(kind: ListErrorKind, text: &str, position: usize) -> Self {
        let mut start = position.saturating_sub(EXCERPT_BYTES);
        let mut end = position.saturating_add(EXCERPT_BYTES).min(text.len());
        while !text.is_char_boundary(start) {
            start -= 1;
        }
        while !text.is_char_boundary(end) {
            end += 1;
        }
        let before = if start > 0 { "…" } else { "" };
        let after = if end < text.len() { "…" } else { "" };
        let shown = text[start..end].escape_debug();
        Self {
            kind,
            position,
            excerpt: format!("{before}{shown}{after}"),
        }
    }
}
