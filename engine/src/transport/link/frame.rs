//! The frame that everything on a link begins with. Pure: bytes to values and back, no I/O.
//!
//! 48 bytes, little-endian: magic, kind, version, note length, payload length, transfer, region, key, length of the
//! extra. The kind's highest bit says that another frame comes at once, so that what both mean can be handled together. Note, extra and payload follow, in this order; what they are depends on the kind. Lengths are checked here
//! against what each kind may have, so that no later step trusts a peer's number.

use smallvec::SmallVec;

use super::super::fabric::{ADDRESS_BYTES_MAX, KEY_BYTES_MAX};
use super::super::{ROW_PAGES_MAX, TransferId, runs};

/// `BKVT`, so that a connection from anything else is told apart by its first bytes.
const MAGIC: [u8; 4] = *b"BKVT";

/// Of the frames and of what they mean; both sides must have the same.
pub(super) const VERSION: u8 = 8;

/// Bytes of a header.
pub(super) const HEADER_BYTES: usize = 48;

/// Longest greeting.
const HELLO_BYTES_MAX: u64 = 1024;

/// Longest name of a transport.
const NAME_BYTES_MAX: usize = 64;

/// Longest message. Requests name their pages in rows and are far shorter.
pub(super) const MESSAGE_BYTES_MAX: usize = 8 << 20;

/// Longest note of a write.
pub(super) const NOTE_BYTES_MAX: usize = 640;

/// Descriptors that one [`Kind::Pulled`] names at most.
pub(super) const PULLED_AT_ONCE_MAX: usize = 256;

/// Where a header has its kind.
const KIND_AT: usize = 4;

/// The bit of it that says that more comes.
const MORE: u8 = 0x80;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The first frame in each direction. Note: the transport's name. Extra: the fabric's address, if there is one.
    /// Payload: the sender's address for people.
    Hello,
    /// A message for the transceiver.
    Message,
    /// Bytes for a row of regions. Extra: the runs. Payload: their stretches, once for each region.
    Write,
    /// Nothing: the sender lives.
    Ping,
    /// An arena that descriptors will name by the number in `region`. Payload: the fabric's key.
    Arena,
    /// Bytes for a row of regions that the receiver is to read by itself. Extra: the runs. Payload: a [`Descriptor`].
    Pull,
    /// As [`Kind::Write`], with a [`Trailer`] behind the payload.
    Summed,
    /// Some descriptors are not needed any more. Payload: their sequence numbers, of eight bytes each.
    Pulled,
    /// Nothing yet: what comes soon is better awaited awake. Answered with a [`Kind::Ping`], at leisure.
    Rouse,
}

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    /// Whether another frame comes at once. Nothing depends on it but how soon this one is noticed.
    pub(super) more: bool,
    pub(super) note_bytes: u16,
    pub(super) payload_bytes: u64,
    pub(super) transfer: TransferId,
    pub(super) region: u64,
    pub(super) key: u64,
    pub(super) extra_bytes: u64,
}

/// What is wrong with a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum FrameError {
    #[error("not a kv transport frame: begins with {0:02x?}")]
    Magic([u8; 4]),
    #[error("frame version {0} here {VERSION}")]
    Version(u8),
    #[error("unknown frame kind {0}")]
    Kind(u8),
    #[error("{kind:?} frame of {bytes} bytes, at most {limit} allowed")]
    Length { kind: Kind, bytes: u64, limit: u64 },
    #[error("{kind:?} frame with an extra of {bytes} bytes, at most {limit} allowed")]
    Extra { kind: Kind, bytes: u64, limit: u64 },
    #[error("{kind:?} frame with a note of {bytes} bytes, at most {limit} allowed")]
    Note {
        kind: Kind,
        bytes: u16,
        limit: usize,
    },
}

impl Header {
    /// A header that names something by number, and nothing else.
    pub(super) const fn numbered(kind: Kind, number: u64, payload_bytes: u64) -> Self {
        Self {
            region: number,
            ..Self::plain(kind, payload_bytes)
        }
    }

    /// A header that names nothing.
    pub(super) const fn plain(kind: Kind, payload_bytes: u64) -> Self {
        Self {
            kind,
            more: false,
            note_bytes: 0,
            payload_bytes,
            transfer: TransferId(0),
            region: 0,
            key: 0,
            extra_bytes: 0,
        }
    }

    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[..4].copy_from_slice(&MAGIC);
        out[KIND_AT] = match self.kind {
            Kind::Hello => 1,
            Kind::Message => 2,
            Kind::Write => 3,
            Kind::Ping => 4,
            Kind::Arena => 5,
            Kind::Pull => 6,
            Kind::Pulled => 7,
            Kind::Rouse => 8,
            Kind::Summed => 9,
        };
        if self.more {
            out[KIND_AT] |= MORE;
        }
        out[5] = VERSION;
        out[6..8].copy_from_slice(&self.note_bytes.to_le_bytes());
        let words = [
            self.payload_bytes,
            self.transfer.0,
            self.region,
            self.key,
            self.extra_bytes,
        ];
        for (slot, word) in out[8..].chunks_exact_mut(8).zip(words) {
            slot.copy_from_slice(&word.to_le_bytes());
        }
        out
    }

    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let magic = [bytes[0], bytes[1], bytes[2], bytes[3]];
        if magic != MAGIC {
            return Err(FrameError::Magic(magic));
        }
        if bytes[5] != VERSION {
            return Err(FrameError::Version(bytes[5]));
        }
        let runs = runs::ENCODED_BYTES_MAX as u64;
        let (kind, payload_limit, note_limit, extra_limit) = match bytes[KIND_AT] & !MORE {
            1 => (
                Kind::Hello,
                HELLO_BYTES_MAX,
                NAME_BYTES_MAX,
                ADDRESS_BYTES_MAX as u64,
            ),
            2 => (Kind::Message, MESSAGE_BYTES_MAX as u64, 0, 0),
            3 => (Kind::Write, u64::MAX, NOTE_BYTES_MAX, runs),
            4 => (Kind::Ping, 0, 0, 0),
            5 => (Kind::Arena, KEY_BYTES_MAX as u64, 0, 0),
            6 => (
                Kind::Pull,
                DESCRIPTOR_BYTES_MAX as u64,
                NOTE_BYTES_MAX,
                runs,
            ),
            9 => (Kind::Summed, u64::MAX, NOTE_BYTES_MAX, runs),
            7 => (Kind::Pulled, (8 * PULLED_AT_ONCE_MAX) as u64, 0, 0),
            8 => (Kind::Rouse, 0, 0, 0),
            other => return Err(FrameError::Kind(other)),
        };
        let word = |index: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[8 + index * 8..16 + index * 8]);
            u64::from_le_bytes(word)
        };
        let header = Self {
            kind,
            more: bytes[KIND_AT] & MORE != 0,
            note_bytes: u16::from_le_bytes([bytes[6], bytes[7]]),
            payload_bytes: word(0),
            transfer: TransferId(word(1)),
            region: word(2),
            key: word(3),
            extra_bytes: word(4),
        };
        if header.payload_bytes > payload_limit {
            return Err(FrameError::Length {
                kind,
                bytes: header.payload_bytes,
                limit: payload_limit,
            });
        }
        if header.extra_bytes > extra_limit {
            return Err(FrameError::Extra {
                kind,
                bytes: header.extra_bytes,
                limit: extra_limit,
            });
        }
        if usize::from(header.note_bytes) > note_limit {
            return Err(FrameError::Note {
                kind,
                bytes: header.note_bytes,
                limit: note_limit,
            });
        }
        Ok(header)
    }
}

/// Takes back that more comes after the encoded header at the beginning of these bytes.
pub(super) fn make_last(header: &mut [u8]) {
    header[KIND_AT] &= !MORE;
}

/// What a sender has made of a payload on the way, and where in the note it belongs: so it need not read all of it before the
/// first byte leaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Trailer {
    pub(super) sum_at: u16,
    /// One for each region.
    pub(super) sums: SmallVec<[u64; 1]>,
}

impl Trailer {
    /// For a note that has room there.
    pub(super) fn of(sum_at: usize, sums: SmallVec<[u64; 1]>) -> Self {
        // What lies outside of every note was refused when it was submitted.
        let sum_at = u16::try_from(sum_at).unwrap_or(u16::MAX);
        Self { sum_at, sums }
    }

    /// Bytes of an encoded one.
    pub(super) const fn bytes(regions: usize) -> usize {
        2 + 8 * regions
    }

    /// Into as many bytes as it has.
    pub(super) fn encode_to(&self, out: &mut [u8]) {
        let (at, sums) = out.split_at_mut(2);
        at.copy_from_slice(&self.sum_at.to_le_bytes());
        for (place, sum) in sums.chunks_exact_mut(8).zip(&self.sums) {
            place.copy_from_slice(&sum.to_le_bytes());
        }
    }

    /// Puts the sums of an encoded one into a note. False when it has no room there.
    pub(super) fn complete(bytes: &[u8], note: &mut [u8]) -> bool {
        let Some((at, sums)) = bytes.split_at_checked(2) else {
            return false;
        };
        let at = usize::from(u16::from_le_bytes([at[0], at[1]]));
        let Some(place) = note.get_mut(at..at + sums.len()) else {
            return false;
        };
        place.copy_from_slice(sums);
        true
    }
}

/// Where the sources of a row begin in an arena, in bytes.
pub(super) type Offsets = SmallVec<[u64; 1]>;

/// Bytes of the longest encoded descriptor.
pub(super) const DESCRIPTOR_BYTES_MAX: usize = Descriptor::bytes(ROW_PAGES_MAX);

/// Where the receiver of a [`Kind::Pull`] finds the bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Descriptor {
    /// Comes back with [`Kind::Pulled`].
    pub(super) sequence: u64,
    /// The number of a [`Kind::Arena`] that came before.
    pub(super) arena: u64,
    /// Where in the arena each of the runs' sources begins: one for each region, at least one.
    pub(super) offsets: Offsets,
    /// Whether the stretches lie one after the other there, instead of where the runs' source offsets say.
    pub(super) gathered: bool,
}

impl Descriptor {
    /// Bytes of an encoded one of so many sources.
    pub(super) const fn bytes(sources: usize) -> usize {
        8 * (3 + sources)
    }

    /// Bytes of this one, encoded.
    pub(super) fn encoded_bytes(&self) -> usize {
        Self::bytes(self.offsets.len())
    }

    /// Behind what is there.
    pub(super) fn encode_to(&self, out: &mut Vec<u8>) {
        let words = [self.sequence, self.arena, u64::from(self.gathered)];
        for word in words.iter().chain(&self.offsets) {
            out.extend_from_slice(&word.to_le_bytes());
        }
    }

    /// `None` when the length or a value is none of a descriptor's.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (words, []) = bytes.as_chunks::<8>() else {
            return None;
        };
        let (&[sequence, arena, gathered], offsets) = words.split_first_chunk()?;
        let gathered = match u64::from_le_bytes(gathered) {
            0 => false,
            1 => true,
            _ => return None,
        };
        if !(1..=ROW_PAGES_MAX).contains(&offsets.len()) {
            return None;
        }
        Some(Self {
            sequence: u64::from_le_bytes(sequence),
            arena: u64::from_le_bytes(arena),
            offsets: offsets.iter().map(|at| u64::from_le_bytes(*at)).collect(),
            gathered,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn write_header() -> Header {
        Header {
            kind: Kind::Write,
            more: true,
            note_bytes: 32,
            payload_bytes: 737_280,
            transfer: TransferId(0xfeed),
            region: 7,
            key: u64::MAX,
            extra_bytes: 96,
        }
    }

    #[test]
    fn a_header_survives_the_wire() {
        let header = write_header();
        let mut bytes = header.encode();
        assert_eq!(Header::decode(&bytes), Ok(header));
        make_last(&mut bytes);
        let last = Header {
            more: false,
            ..header
        };
        assert_eq!(Header::decode(&bytes), Ok(last));
    }

    #[test]
    fn a_descriptor_survives_the_wire() {
        for count in 1..=ROW_PAGES_MAX as u64 {
            let descriptor = Descriptor {
                sequence: 1,
                arena: u64::MAX,
                offsets: (0..count).map(|index| 4096 * index).collect(),
                gathered: true,
            };
            let mut bytes = Vec::new();
            descriptor.encode_to(&mut bytes);
            assert_eq!(bytes.len(), descriptor.encoded_bytes());
            assert!(bytes.len() <= DESCRIPTOR_BYTES_MAX);
            assert_eq!(Descriptor::decode(&bytes), Some(descriptor));
            assert_eq!(Descriptor::decode(&bytes[..bytes.len() - 1]), None);
            bytes[16] = 2;
            assert_eq!(Descriptor::decode(&bytes), None);
        }
        for regions in [0, ROW_PAGES_MAX + 1] {
            assert_eq!(Descriptor::decode(&vec![0; 24 + 8 * regions]), None);
        }
    }

    #[test]
    fn a_trailer_completes_a_note_or_does_not_fit() {
        let trailer = |sum_at, sums: &[&[u8; 8]]| {
            let sums = sums.iter().map(|sum| u64::from_le_bytes(**sum));
            let mut bytes = vec![0; Trailer::bytes(sums.len())];
            Trailer::of(sum_at, sums.collect()).encode_to(&mut bytes);
            bytes
        };
        let mut note = *b"of ........ bytes";
        let one = |sum_at| trailer(sum_at, &[b"checksum"]);
        assert!(Trailer::complete(&one(3), &mut note));
        assert_eq!(&note, b"of checksum bytes");
        let mut short = *b"........";
        for at in [1, 8, usize::from(u16::MAX)] {
            assert!(!Trailer::complete(&one(at), &mut short));
        }
        let two = trailer(0, &[b"checksum", b"and more"]);
        assert!(!Trailer::complete(&two, &mut short) && !Trailer::complete(&[0], &mut short));
        assert_eq!(&short, b"........");
        assert!(Trailer::complete(&one(0), &mut short));
        let mut both = [0; 16];
        assert!(Trailer::complete(&two, &mut both));
        assert_eq!(&both, b"checksumand more");
    }

    #[test]
    fn what_is_no_frame_is_told_apart() {
        let mut http = [b' '; HEADER_BYTES];
        http[..14].copy_from_slice(b"GET / HTTP/1.1");
        assert_eq!(Header::decode(&http), Err(FrameError::Magic(*b"GET ")));
        let mut newer = write_header().encode();
        newer[5] = VERSION + 1;
        assert_eq!(
            Header::decode(&newer),
            Err(FrameError::Version(VERSION + 1))
        );
        let oversize = Header::plain(Kind::Message, MESSAGE_BYTES_MAX as u64 + 1).encode();
        assert!(matches!(
            Header::decode(&oversize),
            Err(FrameError::Length { .. })
        ));
        let mut long_note = write_header();
        long_note.note_bytes = u16::try_from(NOTE_BYTES_MAX).unwrap() + 1;
        assert!(matches!(
            Header::decode(&long_note.encode()),
            Err(FrameError::Note { .. })
        ));
        let mut long_runs = write_header();
        long_runs.extra_bytes = runs::ENCODED_BYTES_MAX as u64 + 1;
        assert!(matches!(
            Header::decode(&long_runs.encode()),
            Err(FrameError::Extra { .. })
        ));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail(bytes in proptest::array::uniform32(any::<u8>()), magic in any::<bool>()) {
            let mut frame = [0; HEADER_BYTES];
            frame[..32].copy_from_slice(&bytes);
            if magic {
                frame[..4].copy_from_slice(&MAGIC);
                frame[5] = VERSION;
            }
            if let Ok(header) = Header::decode(&frame) {
                prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
            }
        }
    }
}
