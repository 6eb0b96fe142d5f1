//! The regions of a request's pages, in few words: a long request has thousands, registered together, so each is told by the
//! first one and their count.
//!
//! Invariant: what a peer sends is never spread out; it takes the room that it took on the wire.

use serde::{Deserialize, Serialize};

use crate::transport::{Registration, RemoteRegion};

/// Regions of one size and key whose numbers follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    bytes: u64,
    key: u64,
    /// The first one's number.
    first: u64,
    count: u64,
}

/// See the module. In order.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<Row>", into = "Vec<Row>")]
pub(super) struct RemoteRegions {
    rows: Vec<Row>,
    /// For each row, how many regions there are up to its end.
    ends: Vec<u64>,
}

impl From<Vec<Row>> for RemoteRegions {
    fn from(rows: Vec<Row>) -> Self {
        let ends = rows.iter().scan(0_u64, |end, row| {
            *end = end.saturating_add(row.count);
            Some(*end)
        });
        Self {
            ends: ends.collect(),
            rows,
        }
    }
}

impl From<RemoteRegions> for Vec<Row> {
    fn from(regions: RemoteRegions) -> Self {
        regions.rows
    }
}

impl From<Registration> for RemoteRegions {
    fn from(Registration { first, count }: Registration) -> Self {
        let row = Row {
            bytes: first.bytes,
            key: first.key,
            first: first.id,
            count: count as u64,
        };
        let rows: Vec<Row> = (count > 0).then_some(row).into_iter().collect();
        rows.into()
    }
}

impl FromIterator<RemoteRegion> for RemoteRegions {
    fn from_iter<I: IntoIterator<Item = RemoteRegion>>(regions: I) -> Self {
        let mut rows: Vec<Row> = Vec::new();
        for RemoteRegion { bytes, id, key } in regions {
            match rows.last_mut() {
                Some(row)
                    if (row.bytes, row.key) == (bytes, key)
                        && row.first.checked_add(row.count) == Some(id) =>
                {
                    row.count += 1;
                }
                _ => rows.push(Row {
                    bytes,
                    key,
                    first: id,
                    count: 1,
                }),
            }
        }
        rows.into()
    }
}

impl RemoteRegions {
    /// How many there are, as far as that can be counted.
    pub(super) fn len(&self) -> usize {
        let len = self.ends.last().copied().unwrap_or(0);
        usize::try_from(len).unwrap_or(usize::MAX)
    }

    /// The one with this index.
    #[cfg(test)]
    pub(super) fn get(&self, index: usize) -> Option<RemoteRegion> {
        self.alike(index).map(|(region, _)| region)
    }

    /// The one with this index, and how many there are from it on whose numbers follow each other, as far as that can be counted.
    pub(super) fn alike(&self, index: usize) -> Option<(RemoteRegion, usize)> {
        let index = index as u64;
        let row = self.ends.partition_point(|end| *end <= index);
        let before = row.checked_sub(1).map_or(0, |before| self.ends[before]);
        let Row {
            bytes, key, first, ..
        } = *self.rows.get(row)?;
        let region = RemoteRegion {
            bytes,
            // A peer that counts beyond the last number there is has no such region.
            id: first.wrapping_add(index - before),
            key,
        };
        let alike = usize::try_from(self.ends[row] - index);
        Some((region, alike.unwrap_or(usize::MAX)))
    }

    /// The size of the first one that is not of so many bytes.
    pub(super) fn other_than(&self, bytes: u64) -> Option<u64> {
        let mut sizes = self.rows.iter().map(|row| row.bytes);
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
