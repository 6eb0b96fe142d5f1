//! Addresses, keys and requests as bytes. Pure; what comes from a peer ends in a value or in `None`.

use std::ops::Range;

/// Ranges of one request at most, which bounds its message.
pub(super) const RANGES_MAX: usize = 16 << 10;

const HEADER_BYTES: usize = 24;
const RANGE_BYTES: usize = 16;

/// Longest request.
pub(super) const REQUEST_BYTES_MAX: usize = HEADER_BYTES + RANGES_MAX * RANGE_BYTES;

/// Ranges of an arena, to be answered under a tag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Request {
    /// [`super::Shared::exported`]'s index.
    pub(super) arena: u64,
    pub(super) tag: i32,
    pub(super) ranges: Vec<Range<u64>>,
}

impl Request {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_BYTES + self.ranges.len() * RANGE_BYTES);
        out.extend_from_slice(&self.arena.to_le_bytes());
        out.extend_from_slice(&i64::from(self.tag).to_le_bytes());
        out.extend_from_slice(&(self.ranges.len() as u64).to_le_bytes());
        for range in &self.ranges {
            out.extend_from_slice(&range.start.to_le_bytes());
            out.extend_from_slice(&range.end.to_le_bytes());
        }
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let arena = word(bytes, 0)?;
        let tag = i32::try_from(word(bytes, 8)?).ok()?;
        let count = usize::try_from(word(bytes, 16)?).ok()?;
        if count > RANGES_MAX || bytes.len() != HEADER_BYTES + count * RANGE_BYTES {
            return None;
        }
        let ranges = (0..count).map(|index| {
            let at = HEADER_BYTES + index * RANGE_BYTES;
            Some(word(bytes, at)?..word(bytes, at + 8)?)
        });
        Some(Self {
            arena,
            tag,
            ranges: ranges.collect::<Option<_>>()?,
        })
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    let word = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_le_bytes(word.try_into().ok()?))
}

/// World and rank.
pub(super) fn address(world: &[u8; 16], rank: usize) -> Vec<u8> {
    [&world[..], &(rank as u64).to_le_bytes()].concat()
}

pub(super) fn read_address(bytes: &[u8]) -> Option<([u8; 16], usize)> {
    if bytes.len() != 24 {
        return None;
    }
    let world = bytes.get(..16)?.try_into().ok()?;
    Some((world, usize::try_from(word(bytes, 16)?).ok()?))
}

/// Index and length of an arena.
pub(super) fn key(index: usize, bytes: usize) -> Vec<u8> {
    [(index as u64).to_le_bytes(), (bytes as u64).to_le_bytes()].concat()
}

pub(super) fn read_key(bytes: &[u8]) -> Option<(u64, u64)> {
    if bytes.len() != 16 {
        return None;
    }
    Some((word(bytes, 0)?, word(bytes, 8)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_written_is_read() {
        let request = Request {
            arena: 3,
            tag: 32_767,
            ranges: vec![0..1, 4096..70_000, u64::MAX..u64::MAX],
        };
        let bytes = request.encode();
        assert_eq!(Request::decode(&bytes), Some(request));
        for length in 0..bytes.len() {
            assert_eq!(Request::decode(&bytes[..length]), None);
        }
        let world = *b"0123456789abcdef";
        assert_eq!(read_address(&address(&world, 7)), Some((world, 7)));
        assert_eq!(read_address(b"short"), None);
        assert_eq!(read_key(&key(2, 9)), Some((2, 9)));
        assert_eq!(read_key(b"short"), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            if let Some(request) = Request::decode(&bytes) {
                prop_assert_eq!(request.encode(), bytes);
            }
        }
    }
}
