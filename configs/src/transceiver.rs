//! `cache_transceiver_config`: how KV leaves and enters an instance (COMPAT.md §12.1).

use std::time::Duration;

/// Which transport moves the KV.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TransportChoice {
    /// The best that is there.
    #[default]
    Default,
    /// TCP streams.
    Tcp,
}

/// `cache_transceiver_config`, resolved.
#[derive(Debug, Clone, PartialEq)]
pub struct TransceiverConfig {
    /// Which transport moves the KV.
    pub backend: TransportChoice,
    /// Staging size per transfer in tokens; `None` means as long as the longest sequence.
    pub max_tokens_in_buffer: Option<u32>,
    /// How long KV is held for a generation server, and how long a transfer may take.
    pub kv_transfer_timeout: Duration,
    /// How long to wait for a sender when nothing is scheduled.
    pub sender_future_timeout: Duration,
}

impl Default for TransceiverConfig {
    fn default() -> Self {
        Self {
            backend: TransportChoice::Default,
            max_tokens_in_buffer: None,
            kv_transfer_timeout: Duration::from_secs(60),
            sender_future_timeout: Duration::from_secs(1),
        }
    }
}
