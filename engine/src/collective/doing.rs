//! What a call of a group does, for its errors.

use std::fmt::{self, Display};

/// What a call does, for messages.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Doing {
    /// So many values.
    Summing(usize),
    /// So many bytes.
    Sending(usize),
    Receiving,
    /// Giving so many bytes to all.
    Telling(usize),
    /// Waiting for rank 0's message to all.
    Listening,
    /// All ranks of an MPI world form their groups.
    Splitting,
    /// All ranks of an MPI world learn which world it is.
    Meeting,
}

impl Display for Doing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Summing(values) => write!(f, "summing {values} values"),
            Self::Sending(bytes) => write!(f, "sending it {bytes} bytes"),
            Self::Receiving => f.write_str("waiting for its message"),
            Self::Telling(bytes) => write!(f, "telling all ranks {bytes} bytes"),
            Self::Splitting => f.write_str("splitting the world into groups"),
            Self::Meeting => f.write_str("waiting for rank 0 to name the world"),
            Self::Listening => f.write_str("waiting for the leader's next word"),
        }
    }
}
