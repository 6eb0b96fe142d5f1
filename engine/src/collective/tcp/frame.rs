//! What goes over a link: a header of 12 bytes, then the body.
//!
//! Header: kind (1 byte), three zeros, sequence number and body length (u32 each, little endian). Both directions of a
//! link count their frames, so a frame that is lost, doubled or of another call is seen at once.

/// Bytes of a header.
pub(super) const HEADER_BYTES: usize = 12;

/// A message's bytes at most.
pub(super) const MESSAGE_BYTES_MAX: usize = 1 << 30;

/// A farewell's bytes at most.
pub(super) const FAREWELL_BYTES_MAX: usize = 1000;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Values to sum up, or their sum.
    Sum,
    /// One message to one rank.
    Message,
    /// Rank 0's message to all.
    Broadcast,
    /// Why the sender gave up: its last frame.
    Farewell,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Sum, Self::Message, Self::Broadcast, Self::Farewell];

    /// For messages.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Sum => "part of a sum",
            Self::Message => "message",
            Self::Broadcast => "message to all",
            Self::Farewell => "farewell",
        }
    }

    fn code(self) -> u8 {
        match self {
            Self::Sum => 0x51,
            Self::Message => 0x52,
            Self::Broadcast => 0x53,
            Self::Farewell => 0x54,
        }
    }
}

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    pub(super) sequence: u32,
    pub(super) body_bytes: u32,
}

impl Header {
    pub(super) fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = self.kind.code();
        bytes[4..8].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.body_bytes.to_le_bytes());
        bytes
    }

    /// Reads a header; `None` where the bytes are none of ours.
    pub(super) fn decode(bytes: [u8; HEADER_BYTES]) -> Option<Self> {
        let [kind, 0, 0, 0, s0, s1, s2, s3, b0, b1, b2, b3] = bytes else {
            return None;
        };
        let kind = Kind::ALL.into_iter().find(|known| known.code() == kind)?;
        Some(Self {
            kind,
            sequence: u32::from_le_bytes([s0, s1, s2, s3]),
            body_bytes: u32::from_le_bytes([b0, b1, b2, b3]),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_header_survives_its_bytes(kind in 0_usize..4, sequence: u32, body_bytes: u32) {
            let header = Header { kind: Kind::ALL[kind], sequence, body_bytes };
            prop_assert_eq!(Header::decode(header.encode()), Some(header));
        }

        #[test]
        fn what_is_read_is_written_the_same(bytes: [u8; HEADER_BYTES]) {
            if let Some(header) = Header::decode(bytes) {
                prop_assert_eq!(header.encode(), bytes);
            }
        }
    }

    #[test]
    fn foreign_bytes_are_no_header() {
        assert_eq!(Header::decode(*b"GET / HTTP/1"), None);
        assert_eq!(Header::decode([0; HEADER_BYTES]), None);
    }
}
