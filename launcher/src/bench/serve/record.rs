//! What is known of one request: when it was to go, when it went, when tokens came, and how it ended. Pure.

use serde::{Deserialize, Serialize};

/// Why a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum FailureKind {
    /// No connection.
    Connect,
    /// An answer with this status.
    Status(u16),
    /// The answer broke off.
    Cut,
    /// The server ended the stream with an error.
    ErrorEvent,
    /// It is no answer of the OpenAI API.
    NotUnderstood,
    /// Not complete in time.
    Timeout,
    /// The engine did not take it.
    Refused,
    /// The engine failed.
    Engine,
}

impl FailureKind {
    /// Its name in tables and JSON.
    pub(super) fn name(self) -> String {
        match self {
            Self::Connect => "connect".to_owned(),
            Self::Status(status) => format!("status {status}"),
            Self::Cut => "stream cut".to_owned(),
            Self::ErrorEvent => "error event".to_owned(),
            Self::NotUnderstood => "not understood".to_owned(),
            Self::Timeout => "timeout".to_owned(),
            Self::Refused => "refused".to_owned(),
            Self::Engine => "engine".to_owned(),
        }
    }
}

/// Why a request failed, with what was seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Failure {
    pub(super) kind: FailureKind,
    /// One line.
    pub(super) text: String,
}

impl Failure {
    /// Longest text that is kept: a server may answer with anything.
    const CHARS_MAX: usize = 300;

    /// A failure; the text becomes one bounded line.
    pub(super) fn new(kind: FailureKind, text: &str) -> Self {
        let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
        Self {
            kind,
            text: line.chars().take(Self::CHARS_MAX).collect(),
        }
    }
}

/// A part of an answer that carried tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Arrival {
    /// Microseconds after the request was sent.
    pub(super) at_us: u32,
    /// Tokens in it, as far as the server tells.
    pub(super) tokens: u32,
}

/// What a target saw of one request.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(super) struct Answer {
    /// In the order of their coming.
    pub(super) arrivals: Vec<Arrival>,
    /// Prompt tokens that the server counted.
    pub(super) prompt_tokens: Option<u32>,
    /// Of these, found in its cache.
    pub(super) cached_tokens: Option<u32>,
    /// Tokens that the server says it wrote.
    pub(super) counted_tokens: Option<u32>,
    /// `None` when it is complete.
    pub(super) failure: Option<Failure>,
}

impl Answer {
    /// Tokens of the answer: the server's count, else those that came.
    pub(super) fn output_tokens(&self) -> u32 {
        let came = || self.arrivals.iter().map(|arrival| arrival.tokens).sum();
        self.counted_tokens.unwrap_or_else(came)
    }

    /// When tokens first came.
    pub(super) fn first_us(&self) -> Option<u32> {
        self.arrivals.first().map(|arrival| arrival.at_us)
    }

    /// When they came last.
    pub(super) fn last_us(&self) -> Option<u32> {
        self.arrivals.last().map(|arrival| arrival.at_us)
    }
}

/// One request of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    /// Its number.
    pub(super) index: usize,
    /// When it was to go, in microseconds since the run began.
    pub(super) due_us: u64,
    /// When it went.
    pub(super) sent_us: u64,
    /// When it was over.
    pub(super) end_us: u64,
    /// Tokens of its prompt, where it was sent as ids.
    pub(super) input_tokens: Option<u32>,
    /// Tokens that were asked for.
    pub(super) output_asked: u32,
    #[serde(flatten)]
    pub(super) answer: Answer,
}

impl Record {
    /// Whether it is complete.
    pub(super) fn is_complete(&self) -> bool {
        self.answer.failure.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_one_bounded_line() {
        let failure = Failure::new(FailureKind::Status(503), &"a\n b".repeat(500));
        assert!(failure.text.starts_with("a ba ba b"), "{}", failure.text);
        assert_eq!(failure.text.chars().count(), 300);
        assert_eq!(failure.kind.name(), "status 503");
    }

    #[test]
    fn the_servers_count_goes_before_ours() {
        let arrival = |at_us| Arrival { at_us, tokens: 1 };
        let mut answer = Answer {
            arrivals: vec![arrival(5), arrival(9)],
            ..Answer::default()
        };
        assert_eq!(answer.output_tokens(), 2);
        assert_eq!((answer.first_us(), answer.last_us()), (Some(5), Some(9)));
        answer.counted_tokens = Some(3);
        assert_eq!(answer.output_tokens(), 3);
    }
}
