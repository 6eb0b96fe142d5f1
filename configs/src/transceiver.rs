//! `cache_transceiver_config`: how KV leaves and enters an instance (COMPAT.md §12.1).

use std::time::Duration;

use crate::section::kind::{Anything, Choice, Choices, Count, Flag, Millis, OneOf, Size};
use crate::section::read::Findings;
use crate::section::{Located, section};

/// Which transport moves the KV.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TransportChoice {
    /// The best that is there.
    #[default]
    Default,
    /// TCP streams.
    Tcp,
    /// This one where it is there, else the best that is: the engine says once which one was asked for
    /// and which one is used.
    Preferred(PreferredTransport),
}

/// A transport that a file may wish for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PreferredTransport {
    /// UCX.
    Ucx,
    /// NIXL.
    Nixl,
    /// MPI, two-sided.
    Mpi,
    /// Mooncake.
    Mooncake,
    /// Shared memory of one host.
    Shm,
    /// Memory of GPUs of one host.
    CudaIpc,
}

impl TransportChoice {
    /// The name as files spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        crate::section::kind::name_of(self)
    }
}

impl Choices for TransportChoice {
    const TABLE: &'static [(&'static str, Choice<Self>)] = &[
        ("DEFAULT", Choice::Is(Self::Default)),
        ("TCP", Choice::Is(Self::Tcp)),
        ("UCX", Choice::Is(Self::Preferred(PreferredTransport::Ucx))),
        (
            "NIXL",
            Choice::Is(Self::Preferred(PreferredTransport::Nixl)),
        ),
        ("MPI", Choice::Is(Self::Preferred(PreferredTransport::Mpi))),
        (
            "MOONCAKE",
            Choice::Is(Self::Preferred(PreferredTransport::Mooncake)),
        ),
        ("SHM", Choice::Is(Self::Preferred(PreferredTransport::Shm))),
        (
            "CUDA_IPC",
            Choice::Is(Self::Preferred(PreferredTransport::CudaIpc)),
        ),
    ];
}

/// The transceiver implementations of the original.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TransceiverRuntime {
    Auto,
    Cpp,
    Python,
}

impl Choices for TransceiverRuntime {
    const TABLE: &'static [(&'static str, Choice<Self>)] = &[
        ("auto", Choice::Is(Self::Auto)),
        ("CPP", Choice::Is(Self::Cpp)),
        ("PYTHON", Choice::Is(Self::Python)),
    ];
}

section! {
    /// How an instance hands KV to other instances and takes it from them. Without a `backend` the
    /// instance hands nothing off.
    RawTransceiver "cache_transceiver_config" {
        /// Which transport moves the KV: `DEFAULT` takes the best that is there; `TCP` takes TCP streams;
        /// `UCX`, `NIXL`, `MPI`, `MOONCAKE`, `SHM` (shared memory of one host) and `CUDA_IPC` (GPUs of one
        /// host) are wishes, and where the transport is not there another takes its place, with one warning
        /// that names both. `null` hands nothing off.
        /// Upper and lower case are the same.
        backend: OneOf<TransportChoice> = "null";
        /// Older spelling of `backend: DEFAULT` (true) or no hand-off (false).
        enable_cache_transceiver: Flag = "null";
        /// Staging size of one transfer, in tokens. `null` takes the longest sequence. Should be at least
        /// the longest prompt.
        max_tokens_in_buffer["max_num_tokens"]: Count = "null";
        /// How long a context instance holds KV for a generation instance, and how long a transfer may
        /// take, in milliseconds. `null` takes the default: KV is never held for ever.
        kv_transfer_timeout_ms: Millis = "60000";
        /// How long to wait for a sender while nothing else is scheduled, in milliseconds.
        kv_transfer_sender_future_timeout_ms: Millis = "1000";
    }
    unserved {
        /// Which implementation of the original's transceiver runs.
        transceiver_runtime: OneOf<TransceiverRuntime> = "null",
            Quiet "there is one transceiver";
        /// How often transfers in flight are polled while idle, in milliseconds.
        kv_transfer_poll_interval_ms: Millis = "5000",
            Ignored "transfers are driven by events";
        /// Size of the original's bounce buffers, in megabytes.
        kv_cache_bounce_size_mb: Size = "0",
            Ignored "the transport sizes its own staging";
        /// Send each prefill chunk as soon as it is computed.
        enable_pipelined_transfer: Flag = "false",
            Ignored "the KV is sent when the prompt has been read";
        /// Use the transfer agent's bounce buffer.
        agent_bounce_buffer_enable: Flag = "false",
            Ignored "the transport sizes its own staging";
        /// Parameters of that buffer.
        agent_bounce_params: Anything = "null",
            Ignored "the transport sizes its own staging";
    }
    groups &[];
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

/// The section as a transceiver, or `None` where it asks for none.
///
/// `legacy` is `enable_cache_transceiver` written beside the section, as the oldest files have it.
pub(crate) fn resolve(
    section: Option<RawTransceiver>,
    legacy: Option<Located<bool>>,
    findings: &mut Findings,
) -> Option<TransceiverConfig> {
    let raw = section.unwrap_or_default();
    let enabled = raw.enable_cache_transceiver.or(legacy);
    let backend = match (raw.backend, enabled) {
        (Some(backend), Some(enabled)) if !enabled.value => {
            let what = format!("is false, but `backend` is `{}`", backend.value.name());
            findings.conflict(enabled.place, &enabled.path, what);
            return None;
        }
        (Some(backend), _) => backend.value,
        (None, Some(enabled)) if enabled.value => TransportChoice::Default,
        (None, _) => return None,
    };
    let defaults = TransceiverConfig::default();
    Some(TransceiverConfig {
        backend,
        max_tokens_in_buffer: raw.max_tokens_in_buffer.map(|given| given.value),
        kv_transfer_timeout: raw
            .kv_transfer_timeout_ms
            .map_or(defaults.kv_transfer_timeout, |given| given.value),
        sender_future_timeout: raw
            .kv_transfer_sender_future_timeout_ms
            .map_or(defaults.sender_future_timeout, |given| given.value),
    })
}
