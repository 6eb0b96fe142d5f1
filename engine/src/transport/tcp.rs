//! The transport that is always there: the control plane of [`super::link`] with the bytes in its stream, from shared
//! pages straight into registered ones.

use super::link::{self, LinkParams, LinkStartError, LinkTransport};
use super::{Capability, MemoryKind, Reach, Sides, TransportSink};

/// What TCP can do. The estimate is one stream's on a common 25 Gbit/s network.
pub const CAPABILITY: Capability = Capability {
    name: "tcp",
    memory: &[MemoryKind::Host],
    sides: Sides::Two,
    reach: Reach::AnyHost,
    bandwidth_estimate: 2_500_000_000,
    message_bytes_max: link::MESSAGE_BYTES_MAX,
    note_bytes_max: link::NOTE_BYTES_MAX,
};

/// Binds and starts listening.
///
/// # Errors
/// When the address cannot be bound or must not be advertised.
pub fn start(params: LinkParams, sink: TransportSink) -> Result<LinkTransport, LinkStartError> {
    LinkTransport::inline(CAPABILITY, params, sink)
}

#[cfg(test)]
pub(crate) fn start_for_tests(sink: TransportSink) -> std::sync::Arc<dyn super::Transport> {
    std::sync::Arc::new(start(link::on_loopback(), sink).expect("a free port"))
}
