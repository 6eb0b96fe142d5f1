//! What the two sides of a benchmark say to each other: one JSON text a line, an answer to each request.
//!
//! Nobody proves who he is: what is moved is a pattern, and the holding side allocates no more than is free.

use anyhow::anyhow;
use serde::{Deserialize, Serialize};

use super::cpu::CpuTime;
use super::pages::Device;
use super::shape::Geometry;
use super::transports::Skipped;
use crate::exit::{Outcome, WithOutcome};

/// Both sides speak the same or not at all.
pub(super) const PROTOCOL: u32 = 3;

/// What the fetching side asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Ask {
    /// First of all.
    Hello {
        /// [`PROTOCOL`].
        protocol: u32,
    },
    /// Start a transceiver and fill pages.
    Prepare(Setting),
    /// Offer the requests of a round.
    Offer {
        /// Counts from 0.
        round: usize,
    },
    /// Wait until no lease of the round is held.
    Settle,
    /// Drop the transceiver and the pages.
    Clear,
    /// Nothing more will come.
    End,
}

/// What both sides set up alike.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Setting {
    /// The engine's name of the transport.
    pub(super) transport: String,
    /// Where the KV lies.
    pub(super) device: Device,
    /// One request's KV.
    pub(super) geometry: Geometry,
    /// Requests in flight at once.
    pub(super) concurrency: usize,
    /// Whether pieces have checksums.
    pub(super) checksums: bool,
    /// Makes the patterns of this run differ from those of others.
    pub(super) run: u64,
    /// Longest time for one round.
    pub(super) timeout_ms: u64,
}

impl Setting {
    /// Bytes that all requests of a round move together.
    pub(super) const fn round_bytes(&self) -> u64 {
        self.geometry.request_bytes() as u64 * self.concurrency as u64
    }

    /// Pages of all requests together.
    ///
    /// # Errors
    /// When there are more than blocks have numbers.
    pub(super) fn page_count(&self) -> anyhow::Result<usize> {
        let count = self.geometry.pages.checked_mul(self.concurrency);
        count
            .filter(|count| u32::try_from(*count).is_ok())
            .ok_or_else(|| anyhow!("more than {} pages", u32::MAX))
            .outcome(Outcome::Usage)
    }
}

/// What the holding side answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Answer {
    /// To [`Ask::Hello`].
    Hello {
        /// [`PROTOCOL`].
        protocol: u32,
        /// Its name.
        host: String,
        /// Transports that it cannot use.
        missing: Vec<Skipped>,
    },
    /// To [`Ask::Prepare`].
    Ready {
        /// Where its transceiver is reached.
        endpoint: String,
    },
    /// To [`Ask::Offer`].
    Offered {
        /// One opaque state a request, hexadecimal.
        states: Vec<String>,
    },
    /// To [`Ask::Settle`].
    Settled {
        /// Leases that ended with verified KV.
        delivered: usize,
        /// Leases that ended otherwise.
        lost: usize,
        /// Spent since the offer.
        cpu: CpuTime,
    },
    /// To [`Ask::Clear`] and [`Ask::End`].
    Done,
    /// To anything: it cannot be done.
    Failed {
        /// Why, in one line.
        reason: String,
    },
}

/// Bytes as hexadecimal digits.
pub(super) fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes again; `None` when it is no such text.
pub(super) fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| {
        let value = char::from(byte).to_digit(16)?;
        u8::try_from(value).ok()
    };
    let byte = |pair: &[u8]| match pair {
        [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
        _ => None,
    };
    text.as_bytes().chunks(2).map(byte).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_stay_on_one_line_and_survive_it() {
        let asks = [
            Ask::Hello { protocol: 1 },
            Ask::Offer { round: 3 },
            Ask::Settle,
            Ask::End,
        ];
        for ask in asks {
            let line = serde_json::to_string(&ask).unwrap();
            assert!(!line.contains('\n'));
            assert_eq!(serde_json::from_str::<Ask>(&line).unwrap(), ask);
        }
        let failed = Answer::Failed {
            reason: "two\nlines".to_owned(),
        };
        let line = serde_json::to_string(&failed).unwrap();
        assert!(!line.contains('\n'), "{line}");
        assert!(serde_json::from_str::<Ask>("{\"offer\":{}}").is_err());
    }

    #[test]
    fn hexadecimal_there_and_back() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(from_hex(&to_hex(&bytes)).unwrap(), bytes);
        for wrong in ["0", "0g", "+1", "é", "00é"] {
            assert_eq!(from_hex(wrong), None, "{wrong}");
        }
    }
}
