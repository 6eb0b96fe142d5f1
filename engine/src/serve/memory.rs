//! How many blocks the KV pool gets.
//!
//! Pages are made of zeroed memory that becomes resident only when it is written, so a large pool costs nothing until
//! it is used. Yet a prefix cache uses all of it in time, hence the bound by what is really there.

use std::fs;
use std::path::Path;

use baton_configs::llm::KvCacheConfig;

use crate::page::PageShape;

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
    /// Bytes that this process could still take.
    pub(super) available_bytes: u64,
}

/// Blocks of the pool; 0 when there is no room for one.
pub(super) fn block_count(config: &KvCacheConfig, page: &PageShape, demand: PoolDemand) -> u64 {
    let per_block = u64::from(config.tokens_per_block);
    if let Some(tokens) = config.max_tokens {
        return tokens.div_ceil(per_block);
    }
    let blocks_of_sequence = u64::from(demand.max_seq_len).div_ceil(per_block);
    let useful = blocks_of_sequence.saturating_mul(u64::from(demand.max_batch_size));
    let page_bytes = (page.bytes() as u64).max(1);
    let affordable = granted_bytes(config, demand.available_bytes) / page_bytes;
    useful.min(affordable).min(BLOCKS_MAX)
}

/// The share of the memory that the pool may take.
pub(super) fn granted_bytes(config: &KvCacheConfig, available_bytes: u64) -> u64 {
    // A share in thousandths is exact enough for a guess about memory.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the fraction is clamped to 0..=1 before"
    )]
    let thousandths = (config.free_memory_fraction.clamp(0.0, 1.0) * 1000.0) as u64;
    available_bytes / 1000 * thousandths
}

/// Bytes that this process could still take: what the machine has left, and what its control group leaves it.
pub(super) fn available_bytes() -> u64 {
    let machine = fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| mem_available(&text));
    let group = group_left(Path::new("/sys/fs/cgroup"));
    // Without any of the two there is no way to know; a small pool works everywhere.
    machine.into_iter().chain(group).min().unwrap_or(1 << 30)
}

fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

/// The control group's limit less what it uses; `None` without a limit. Version 2 first, then version 1.
fn group_left(root: &Path) -> Option<u64> {
    let number = |name: &str| -> Option<u64> {
        fs::read_to_string(root.join(name))
            .ok()?
            .trim()
            .parse()
            .ok()
    };
    let two = number("memory.max").zip(number("memory.current"));
    let one = || number("memory/memory.limit_in_bytes").zip(number("memory/memory.usage_in_bytes"));
    let (limit, used) = two.or_else(one)?;
    Some(limit.saturating_sub(used))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::KvDtype;

    const PAGE: PageShape = PageShape {
        layers: 2,
        kv_heads: 2,
        tokens_per_block: 32,
        head_dim: 16,
        dtype: KvDtype::F16,
    };

    fn demand(available_bytes: u64) -> PoolDemand {
        PoolDemand {
            max_batch_size: 4,
            max_seq_len: 100,
            available_bytes,
        }
    }

    #[test]
    fn a_pool_sized_by_hand_is_rounded_up() {
        let config = KvCacheConfig {
            max_tokens: Some(65),
            ..KvCacheConfig::default()
        };
        assert_eq!(block_count(&config, &PAGE, demand(0)), 3);
    }

    #[test]
    fn no_more_than_could_ever_be_used() {
        let config = KvCacheConfig::default();
        assert_eq!(block_count(&config, &PAGE, demand(1 << 40)), 4 * 4);
        let endless = PoolDemand {
            max_batch_size: 2048,
            max_seq_len: 1 << 20,
            available_bytes: 1 << 50,
        };
        assert_eq!(block_count(&config, &PAGE, endless), BLOCKS_MAX);
    }

    #[test]
    fn no_more_than_the_share_of_the_memory() {
        let config = KvCacheConfig {
            free_memory_fraction: 0.5,
            ..KvCacheConfig::default()
        };
        let pages = 10 * 2 * PAGE.bytes() as u64;
        assert_eq!(block_count(&config, &PAGE, demand(pages + 1000)), 10);
        assert_eq!(block_count(&config, &PAGE, demand(0)), 0);
    }

    #[test]
    fn numbers_of_the_system_are_read() {
        let meminfo = "MemTotal:       100 kB\nMemAvailable:    20 kB\n";
        assert_eq!(mem_available(meminfo), Some(20 * 1024));
        assert_eq!(mem_available("MemAvailable: many kB"), None);
        let group = tempfile::tempdir().unwrap();
        fs::write(group.path().join("memory.max"), "max\n").unwrap();
        fs::write(group.path().join("memory.current"), "5\n").unwrap();
        assert_eq!(group_left(group.path()), None);
        fs::write(group.path().join("memory.max"), "105\n").unwrap();
        assert_eq!(group_left(group.path()), Some(100));
        assert!(available_bytes() > 0);
    }
}
