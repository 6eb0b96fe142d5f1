//! How many blocks the KV pool gets.
//!
//! Pages are made of zeroed memory that becomes resident only when it is written, so a large pool costs nothing until
//! it is used. Yet a prefix cache uses all of it in time, hence the bound by what is really there.

use baton_configs::llm::KvCacheConfig;

use crate::parallel::Room;

/// Most blocks of a pool that was not sized by hand: each may be a memory mapping of its own, and Linux gives a
/// process 65,530 of them.
const BLOCKS_MAX: u64 = 32_768;

/// What a pool is sized by.
#[derive(Debug, Clone, Copy)]
pub(super) struct PoolDemand {
    /// Most sequences at once.
    pub(super) max_batch_size: u32,
    /// Longest sequence.
    pub(super) max_seq_len: u32,
}

/// Blocks of the pool; 0 when there is no room for one. What the tightest machine can afford is what all get.
pub(super) fn block_count(config: &KvCacheConfig, demand: PoolDemand, rooms: &[Room]) -> u64 {
    let per_block = u64::from(config.tokens_per_block);
    if let Some(tokens) = config.max_tokens {
        return tokens.div_ceil(per_block);
    }
    let blocks_of_sequence = u64::from(demand.max_seq_len).div_ceil(per_block);
    let useful = blocks_of_sequence.saturating_mul(u64::from(demand.max_batch_size));
    let affordable = rooms.iter().map(|room| affordable(config, room));
    useful.min(affordable.min().unwrap_or(0)).min(BLOCKS_MAX)
}

/// The machine that can afford the fewest blocks.
pub(super) fn tightest<'a>(config: &KvCacheConfig, rooms: &'a [Room]) -> Option<&'a Room> {
    rooms.iter().min_by_key(|room| affordable(config, room))
}

fn affordable(config: &KvCacheConfig, room: &Room) -> u64 {
    granted_bytes(config, room) / room.page_bytes.max(1)
}

/// The share of a machine's memory that the pool may take. Mapped weights count as available memory, yet taking theirs
/// would mean reading them again at each step.
pub(super) fn granted_bytes(config: &KvCacheConfig, room: &Room) -> u64 {
    let left_bytes = room.available_bytes.saturating_sub(room.weight_bytes);
    // A share in thousandths is exact enough for a guess about memory.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the fraction is clamped to 0..=1 before"
    )]
    let thousandths = (config.free_memory_fraction.clamp(0.0, 1.0) * 1000.0) as u64;
    left_bytes / 1000 * thousandths
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEMAND: PoolDemand = PoolDemand {
        max_batch_size: 4,
        max_seq_len: 100,
    };

    fn room(available_bytes: u64) -> Room {
        Room {
            available_bytes,
            weight_bytes: 0,
            page_bytes: 4096,
        }
    }

    #[test]
    fn a_pool_sized_by_hand_is_rounded_up() {
        let config = KvCacheConfig {
            max_tokens: Some(65),
            ..KvCacheConfig::default()
        };
        assert_eq!(block_count(&config, DEMAND, &[room(0)]), 3);
    }

    #[test]
    fn no_more_than_could_ever_be_used() {
        let config = KvCacheConfig::default();
        assert_eq!(block_count(&config, DEMAND, &[room(1 << 40)]), 4 * 4);
        let endless = PoolDemand {
            max_batch_size: 2048,
            max_seq_len: 1 << 20,
        };
        assert_eq!(block_count(&config, endless, &[room(1 << 50)]), BLOCKS_MAX);
    }

    #[test]
    fn no_more_than_the_share_of_the_tightest_memory() {
        let config = KvCacheConfig {
            free_memory_fraction: 0.5,
            ..KvCacheConfig::default()
        };
        let tight = Room {
            weight_bytes: 1 << 20,
            ..room((1 << 20) + 10 * 2 * 4096 + 1000)
        };
        assert_eq!(block_count(&config, DEMAND, &[tight]), 10);
        assert_eq!(block_count(&config, DEMAND, &[room(1 << 30), tight]), 10);
        assert_eq!(tightest(&config, &[room(1 << 30), tight]), Some(&tight));
        assert_eq!(block_count(&config, DEMAND, &[room(0)]), 0);
    }
}
