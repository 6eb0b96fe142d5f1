//! `v1_block_key`: the block hash that cache-aware routers compute on their side (COMPAT.md §9.2).
//!
//! It names blocks in events; it never proves that two blocks are equal, because it is easy to collide.

use crate::backend::TokenId;

const GOLDEN: u64 = 0x9E37_79B9;
const MIX_A: u64 = 0xBF58_476D_1CE4_E5B9;
const MIX_B: u64 = 0x94D0_49BB_1331_11EB;

/// Hash of a block from its parent's hash (0 for the first block), its tokens and, for first blocks, its salt.
pub(crate) fn v1_block_key(parent: u64, tokens: &[TokenId], salt: Option<u64>) -> u64 {
    let mut seed = tokens.len() as u64 ^ parent.wrapping_mul(MIX_A);
    if let (0, Some(salt)) = (parent, salt) {
        seed = mix_64(seed, salt);
    }
    for &token in tokens {
        seed = mix_token(seed, token);
    }
    seed
}

/// The number that stands for a `cache_salt` in block hashes. Engines may choose it freely in version 1.
pub(crate) fn salt_id(salt: &str) -> u64 {
    xxhash_rust::xxh3::xxh3_64(salt.as_bytes())
}

fn mix_token(seed: u64, token: TokenId) -> u64 {
    let mut v = token;
    for _ in 0..2 {
        v = ((v >> 16) ^ v).wrapping_mul(0x045D_9F3B);
    }
    v = ((v >> 16) ^ v).wrapping_add(0x9E37_79B9);
    seed ^ shifted(seed).wrapping_add(u64::from(v))
}

fn mix_64(seed: u64, value: u64) -> u64 {
    let mut v = value;
    v = (v ^ (v >> 30)).wrapping_mul(MIX_A);
    v = (v ^ (v >> 27)).wrapping_mul(MIX_B);
    v ^= v >> 31;
    seed ^ shifted(seed).wrapping_add(v).wrapping_add(GOLDEN)
}

fn shifted(seed: u64) -> u64 {
    (seed << 6).wrapping_add(seed >> 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(tokens: &[TokenId], block: usize, salt: Option<u64>) -> Vec<u64> {
        let mut parent = 0;
        tokens
            .chunks(block)
            .map(|chunk| {
                parent = v1_block_key(parent, chunk, salt);
                parent
            })
            .collect()
    }

    #[test]
    fn single_blocks_match_the_published_vectors() {
        assert_eq!(v1_block_key(0, &[1], None), 3_478_951_329);
        assert_eq!(v1_block_key(0, &[1, 2, 3, 4], None), 924_206_229_973_855);
    }

    #[test]
    fn chains_match_the_published_vectors() {
        // Ten tokens of a prompt, of which routers leave the last one out.
        let tokens: Vec<TokenId> = (1..10).collect();
        assert_eq!(
            chain(&tokens, 4, None),
            [
                924_206_229_973_855,
                2_728_178_455_351_807_326,
                5_840_390_857_880_430_736
            ]
        );
        assert_eq!(
            chain(&tokens, 4, Some(123)),
            [
                6_280_297_290_684_427_985,
                10_638_839_244_871_160_162,
                6_966_901_140_503_279_595
            ]
        );
    }

    #[test]
    fn a_long_run_of_one_token_matches_the_published_vector() {
        let hashes = chain(&[1000; 99], 32, None);
        assert_eq!(hashes.len(), 4);
        assert_eq!(hashes[0], 16_685_880_865_262_758_201);
    }
}
