//! Maps whose keys are numbers that this process has given out itself, one after the other or at random: regions, peers,
//! descriptors. A hand-off looks thousands of them up, and nobody else can choose them so that they collide, so they need
//! no hash that withstands an enemy. Not for keys that a peer chooses.
//!
//! Invariant: numbers in a row come to lie in different buckets, and mostly in neighbouring ones: a hand-off goes through
//! thousands of them in a row while it streams gigabytes through the caches.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

/// A map by such numbers.
pub(crate) type NumberedMap<K, V> = HashMap<K, V, BuildHasherDefault<NumberHasher>>;

/// A set of such numbers.
pub(crate) type NumberedSet<K> = HashSet<K, BuildHasherDefault<NumberHasher>>;

/// Of the golden ratio: multiples of it are far from each other.
const FACTOR: u64 = 0x9E37_79B9_7F4A_7C15;

/// Numbers in a row that come to lie side by side: as many as fill some pages of memory with what they stand for.
const ROW_BITS: u32 = 6;

/// The bits of a number that say where in its row it is.
const IN_ROW: u64 = (1 << ROW_BITS) - 1;

/// Of a hash, the bits that a map compares before it looks at a key; the others say where it begins to look.
const TAG: u64 = 0x7F << 57;

/// See the module.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = self.0.wrapping_mul(FACTOR) ^ number;
    }

    fn finish(&self) -> u64 {
        let row = (self.0 >> ROW_BITS).wrapping_mul(FACTOR);
        // A map looks at the lowest bits; a product mixes upwards only.
        let row = (row ^ (row >> 32)).rotate_left(ROW_BITS);
        let place = row ^ (self.0 & IN_ROW);
        (place & !TAG) | (self.0.wrapping_mul(FACTOR) & TAG)
    }
}

#[cfg(test)]
mod tests {
    use std::hash::{BuildHasher, Hash};

    use super::*;
    use crate::transport::RegionId;

    fn hash(key: impl Hash) -> u64 {
        BuildHasherDefault::<NumberHasher>::default().hash_one(key)
    }

    #[test]
    fn numbers_in_a_row_are_neighbours_that_a_map_tells_apart() {
        let hashes = (0..=IN_ROW).map(|index| hash(RegionId((1 << 20) + index)));
        let (mut rows, mut places, mut tags) = (HashSet::new(), HashSet::new(), HashSet::new());
        for hash in hashes {
            rows.insert(hash & !TAG & !IN_ROW);
            places.insert(hash & IN_ROW);
            tags.insert(hash & TAG);
        }
        assert_eq!((rows.len(), places.len()), (1, 64));
        assert!(tags.len() > 48, "{} of 64", tags.len());
    }

    #[test]
    fn numbers_in_a_row_share_few_buckets() {
        const BUCKETS: u64 = 1 << 14;
        for stride in [1, 2, 64, 4096] {
            let buckets: HashSet<_> = (0..BUCKETS)
                .map(|index| hash(RegionId(1000 + index * stride)) % BUCKETS)
                .collect();
            // At random it would be 63 of 100.
            assert!(buckets.len() as u64 > BUCKETS / 2, "{stride}");
        }
    }

    #[test]
    fn all_of_a_key_counts() {
        assert_ne!(hash((1_u64, 2_u64)), hash((2_u64, 1_u64)));
        assert_ne!(hash("ab"), hash("ba"));
        let mut map = NumberedMap::default();
        for number in 0..1000_u64 {
            map.insert(number, number + 1);
        }
        assert!((0..1000).all(|number| map[&number] == number + 1));
    }
}
