//! The exit codes of `baton`: one public table, one exhaustive match.

use std::process::ExitCode;

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// All went as asked.
    Success,
    /// Something outside failed while running: an instance died for good, an answer was an error.
    Failure,
    /// The command line is wrong.
    Usage,
    /// A configuration file is wrong.
    Config,
    /// A model, library or file is missing or unusable.
    Unavailable,
    /// An address is in use or cannot be bound.
    Address,
    /// A wait ran into its deadline.
    TimedOut,
    /// All went well, but slower than was asked for.
    BelowFloor,
    /// Something was measured, and the figures do not mean what they seem to.
    Invalid,
    /// Ended by a signal, after draining.
    Signal(i32),
    /// As the command that was run ended, whatever that means.
    Code(u8),
}

/// Code and meaning, as `baton --help` prints them.
pub(crate) const TABLE: &[(u8, &str)] = &[
    (0, "success"),
    (1, "something failed while running; the last line says what"),
    (64, "wrong command line"),
    (65, "wrong configuration file"),
    (69, "a model, library or file is missing or unusable"),
    (75, "a wait ran into its deadline"),
    (79, "a measured rate is below the floor that was asked for"),
    (80, "a measurement is not valid; its last line says why"),
    (98, "an address is in use or cannot be bound"),
    (130, "ended by Ctrl-C (128 + signal number for others)"),
];

/// What stands below the table.
const NOTE: &str =
    "A launcher ends as the command that it runs; a drain by SIGUSR1 is a success.\n";

impl Outcome {
    /// The number that the shell sees.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::Failure => 1,
            Self::Usage => 64,
            Self::Config => 65,
            Self::Unavailable => 69,
            Self::TimedOut => 75,
            Self::BelowFloor => 79,
            Self::Invalid => 80,
            Self::Address => 98,
            Self::Code(code) => code,
            Self::Signal(number) => 128_u8.saturating_add(u8::try_from(number).unwrap_or(0)),
        }
    }
}

impl From<Outcome> for ExitCode {
    fn from(outcome: Outcome) -> Self {
        Self::from(outcome.code())
    }
}

/// The table as text, for `--help`.
pub(crate) fn help_text() -> String {
    let mut text = String::from("Exit codes:\n");
    for (code, meaning) in TABLE {
        text.push_str(&format!("  {code:>3}  {meaning}\n"));
    }
    text.push_str(NOTE);
    text
}

/// An error that already knows its exit code; any other error ends with [`Outcome::Failure`].
#[derive(Debug)]
pub(crate) struct Coded {
    pub(crate) outcome: Outcome,
    pub(crate) source: anyhow::Error,
}

impl std::fmt::Display for Coded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#}", self.source)
    }
}

impl std::error::Error for Coded {}

/// Attaches an exit code to an error.
pub(crate) trait WithOutcome<T> {
    /// Ends the program with this outcome when it is an error.
    fn outcome(self, outcome: Outcome) -> anyhow::Result<T>;
}

impl<T, E: Into<anyhow::Error>> WithOutcome<T> for Result<T, E> {
    fn outcome(self, outcome: Outcome) -> anyhow::Result<T> {
        self.map_err(|error| coded(outcome, error))
    }
}

/// An error that ends the program with this outcome.
pub(crate) fn coded(outcome: Outcome, error: impl Into<anyhow::Error>) -> anyhow::Error {
    Coded {
        outcome,
        source: error.into(),
    }
    .into()
}

/// The outcome that an error asks for.
pub(crate) fn of(error: &anyhow::Error) -> Outcome {
    error
        .downcast_ref::<Coded>()
        .map_or(Outcome::Failure, |coded| coded.outcome)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_in_the_table() {
        for outcome in [
            Outcome::Success,
            Outcome::Failure,
            Outcome::Usage,
            Outcome::Config,
            Outcome::Unavailable,
            Outcome::Address,
            Outcome::TimedOut,
            Outcome::BelowFloor,
            Outcome::Invalid,
            Outcome::Signal(2),
        ] {
            assert!(
                TABLE.iter().any(|(code, _)| *code == outcome.code()),
                "{outcome:?}"
            );
        }
    }

    #[test]
    fn a_coded_error_keeps_its_outcome_through_context() {
        let result: anyhow::Result<()> = Err(anyhow::anyhow!("no")).outcome(Outcome::Config);
        assert_eq!(of(&result.unwrap_err()), Outcome::Config);
        assert_eq!(of(&anyhow::anyhow!("plain")), Outcome::Failure);
    }
}
