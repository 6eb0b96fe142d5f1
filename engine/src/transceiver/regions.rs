//! The regions of a request's pages, in few words: a long request has thousands, registered together, so each is told by the
//! first one and their count.
//!
//! Invariant: what a peer sends is never spread out; it takes the room that it took on the wire.

use serde::{Deserialize, Serialize};

use super::rows::Rows;
use crate::transport::{Registration, RemoteRegion};

/// Regions of one size and key whose numbers follow each other, as they are sent.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    bytes: u64,
    key: u64,
    /// The first one's number.
    first: u64,
    count: u64,
}

/// See the module. In order, each row told by its first one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<Row>", into = "Vec<Row>")]
pub(super) struct RemoteRegions(Rows<RemoteRegion>);

impl From<Vec<Row>> for RemoteRegions {
    fn from(sent: Vec<Row>) -> Self {
        let mut rows = Rows::default();
        for row in sent {
            let (bytes, id, key) = (row.bytes, row.first, row.key);
            let count = usize::try_from(row.count).unwrap_or(usize::MAX);
            rows.push(RemoteRegion { bytes, id, key }, count);
        }
        Self(rows)
    }
}

impl From<RemoteRegions> for Vec<Row> {
    fn from(regions: RemoteRegions) -> Self {
        let rows = regions.0.iter().map(|(_, first, count)| Row {
            bytes: first.bytes,
            key: first.key,
            first: first.id,
            count: count as u64,
        });
        rows.collect()
    }
}

impl From<Registration> for RemoteRegions {
    fn from(Registration { first, count }: Registration) -> Self {
        Self::default().joined(first, count)
    }
}

impl FromIterator<RemoteRegion> for RemoteRegions {
    fn from_iter<I: IntoIterator<Item = RemoteRegion>>(each: I) -> Self {
        let each = each.into_iter();
        each.fold(Self::default(), |before, region| before.joined(region, 1))
    }
}

impl RemoteRegions {
    /// These, and so many more from this one on.
    fn joined(mut self, first: RemoteRegion, count: usize) -> Self {
        self.0.join(first, count, |last, len, next| {
            (last.bytes, last.key) == (next.bytes, next.key)
                && last.id.checked_add(len as u64) == Some(next.id)
        });
        self
    }

    /// How many there are, as far as that can be counted.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// The one with this index.
    #[cfg(test)]
    pub(super) fn get(&self, index: usize) -> Option<RemoteRegion> {
        self.alike(index).map(|(region, _)| region)
    }

    /// The one with this index, and how many there are from it on whose numbers follow each other, as far as that can be counted.
    pub(super) fn alike(&self, index: usize) -> Option<(RemoteRegion, usize)> {
        let found = self.0.find(index)?;
        // A peer that counts beyond the last number there is has no such region.
        let id = found.row.id.wrapping_add(found.before as u64);
        Some((RemoteRegion { id, ..*found.row }, found.alike))
    }

    /// The size of the first one that is not of so many bytes.
    pub(super) fn other_than(&self, bytes: u64) -> Option<u64> {
        let mut sizes = self.0.iter().map(|(_, first, _)| first.bytes);
        sizes.find(|size| *size != bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region((bytes, id, key): (u64, u64, u64)) -> RemoteRegion {
        RemoteRegion { bytes, id, key }
    }

    #[test]
    fn they_survive_in_few_words() {
        let mixed = [
            (64, 5, 1),
            (64, 6, 1),
            (64, 7, 2),
            (32, 8, 2),
            (32, 10, 2),
            (32, u64::MAX, 2),
            (32, 0, 2),
        ];
        for count in 0..=mixed.len() {
            let some = mixed[..count].iter().copied().map(region);
            let regions: RemoteRegions = some.clone().collect();
            let text = serde_json::to_string(&regions).unwrap();
            let read: RemoteRegions = serde_json::from_str(&text).unwrap();
            assert_eq!((read.len(), &read), (count, &regions));
            assert!((0..count).filter_map(|index| read.get(index)).eq(some));
            let alike = (0..count).filter_map(|index| Some(read.alike(index)?.1));
            let mut expected = vec![1; count];
            if count > 1 {
                // The first two follow each other.
                expected[0] = 2;
            }
            assert_eq!(alike.collect::<Vec<_>>(), expected);
            assert_eq!(read.get(count), None);
        }
        let many = (0..100_000).map(|index| region((1 << 16, 7 + index, 9)));
        let many: RemoteRegions = many.collect();
        assert!(serde_json::to_string(&many).unwrap().len() < 100);
        assert_eq!(many.get(99_999), Some(region((1 << 16, 100_006, 9))));
        assert_eq!(many.alike(40), Some((region((1 << 16, 47, 9)), 99_960)));
        assert_eq!(
            (many.other_than(1 << 16), many.other_than(1)),
            (None, Some(1 << 16))
        );
    }

    #[test]
    fn what_cannot_be_counted_takes_no_room() {
        let row = |first: u64, count: u64| {
            format!(r#"{{"bytes":1,"key":2,"first":{first},"count":{count}}}"#)
        };
        let text = format!("[{},{},{}]", row(3, 0), row(u64::MAX, 2), row(0, u64::MAX));
        let regions: RemoteRegions = serde_json::from_str(&text).unwrap();
        assert_eq!(regions.len(), usize::MAX);
        assert_eq!(regions.get(0), Some(region((1, u64::MAX, 2))));
        assert_eq!(regions.get(1), Some(region((1, 0, 2))));
        assert_eq!(regions.get(2), Some(region((1, 0, 2))));
    }
}
