//! Slurm's compact lists: host lists such as `rack[0-1]n[01-03,7]-ib0,login1` (`SLURM_JOB_NODELIST`) and counts
//! such as `4(x2),3` (`SLURM_TASKS_PER_NODE`).
//!
//! Order and repetition carry meaning (the position in the list is the node's rank), so both directions keep
//! them: expanding what was compressed gives the same list again. In a name with several brackets the rightmost
//! varies fastest, as Slurm does it. Both sizes are bounded, because the text may come from anywhere.

mod compress;
mod counts;
mod error;
mod expand;
#[cfg(test)]
mod tests;

pub use compress::compress;
pub use counts::{compress_counts, expand_counts};
pub use error::{ListError, ListErrorKind};
pub use expand::expand;

/// Hosts or counts in one list.
pub const ENTRIES_MAX: usize = 65_536;

/// Bytes of one host name (DNS has the same bound).
pub const HOST_BYTES_MAX: usize = 255;

/// Digits of a number that is counted with; longer ones are plain text.
const DIGITS_MAX: usize = 18;

/// What host names are made of.
fn is_host_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.')
}
