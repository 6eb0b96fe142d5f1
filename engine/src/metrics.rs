//! What the engine says about itself: counters and gauges as one snapshot, and one record per iteration.
//!
//! Plain values; the HTTP side decides how they look on the wire. Every `*_total` only ever rises.

use serde::Serialize;

/// The engine at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct EngineStats {
    /// Requests that wait for blocks or for a place in the batch, pre-empted ones included.
    pub requests_waiting: usize,
    /// Requests in the running batch.
    pub requests_running: usize,
    /// Requests whose KV is on its way, or there and waiting for a place in the batch.
    pub requests_fetching: usize,
    /// Requests taken.
    pub requests_total: u64,
    /// Requests that ended well, context-only ones included.
    pub requests_finished_total: u64,
    /// Requests that failed.
    pub requests_failed_total: u64,
    /// Requests given up by the client.
    pub requests_cancelled_total: u64,

    /// Blocks in the pool: free, used, cached and quarantined ones together.
    pub blocks_total: usize,
    /// Blocks that hold nothing.
    pub blocks_free: usize,
    /// Blocks that requests or leases refer to.
    pub blocks_used: usize,
    /// Blocks that nobody refers to and that may be found again by their prefix.
    pub blocks_cached: usize,
    /// Used blocks that wait under a lease for a generation server.
    pub blocks_pinned: usize,
    /// Used blocks whose page a transport is writing.
    pub blocks_lent: usize,
    /// Blocks given up while a transport may still write them.
    pub blocks_quarantined: usize,
    /// Leases held.
    pub leases: usize,

    /// Prompt tokens of taken requests.
    pub prompt_tokens_total: u64,
    /// Of these, found in the cache.
    pub prompt_tokens_cached_total: u64,
    /// Tokens published.
    pub generated_tokens_total: u64,
    /// Steps run.
    pub iterations_total: u64,
    /// Times a request lost its blocks to an older one and was computed again.
    pub preemptions_total: u64,

    /// Leases given.
    pub handoffs_offered_total: u64,
    /// Of these, opened while the prompt was still being read.
    pub handoffs_opened_early_total: u64,
    /// Leases that ended with verified KV at a generation server.
    pub handoffs_delivered_total: u64,
    /// Leases that ran out.
    pub handoffs_expired_total: u64,
    /// Leases given up.
    pub handoffs_cancelled_total: u64,
    /// Fetches that brought verified KV.
    pub handoffs_fetched_total: u64,
    /// Of these, begun before the context server had read the prompt to its end.
    pub handoffs_prefetched_total: u64,
    /// Fetches that failed, and offers and tickets that were refused.
    pub handoffs_failed_total: u64,
    /// Requests whose prompt was read again here because the fetch failed.
    pub handoffs_prefilled_again_total: u64,
    /// Payload bytes fetched.
    pub handoffs_fetched_bytes_total: u64,
}

/// One iteration, with the field names of TensorRT-LLM's `GET /metrics`.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct IterationStats {
    /// Number of the iteration, from 1.
    pub iter: u64,
    /// How long it took.
    #[serde(rename = "iterLatencyMS")]
    pub iter_latency_ms: f64,
    /// Requests in the batch or on their way there.
    pub num_active_requests: usize,
    /// Requests that wait.
    pub num_queued_requests: usize,
    /// Requests that entered the batch in this iteration.
    pub num_new_active_requests: usize,
    /// Requests that ended in this iteration.
    pub num_completed_requests: usize,
    /// Most requests that can be in the batch.
    pub max_num_active_requests: usize,
    /// The pool.
    pub kv_cache_stats: KvCacheStats,
    /// The batch.
    pub inflight_batching_stats: InflightBatchingStats,
}

/// The pool after an iteration.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct KvCacheStats {
    /// Blocks in the pool.
    pub max_num_blocks: usize,
    /// Blocks that could be handed out, cached ones included.
    pub free_num_blocks: usize,
    /// All others.
    pub used_num_blocks: usize,
    /// Tokens per block.
    pub tokens_per_block: usize,
    /// Blocks given to requests since the start.
    pub alloc_total_blocks: u64,
    /// Of these, newly written ones.
    pub alloc_new_blocks: u64,
    /// Of these, found in the cache.
    pub reused_blocks: u64,
    /// Full prompt blocks that were not found.
    pub missed_blocks: u64,
    /// `reused / (reused + missed)`; 0 before the first.
    pub cache_hit_rate: f64,
}

/// The batch of an iteration.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct InflightBatchingStats {
    /// Requests in the batch.
    pub num_scheduled_requests: usize,
    /// Of these, reading their prompt.
    pub num_context_requests: usize,
    /// Of these, writing.
    pub num_gen_requests: usize,
    /// Requests that lost their blocks in this iteration.
    pub num_paused_requests: usize,
    /// Prompt tokens in the batch.
    pub num_ctx_tokens: usize,
    /// Always 0: there is one micro batch.
    pub micro_batch_id: u32,
    /// Tokens written per writing request; 1 without speculation.
    pub avg_num_decoded_tokens_per_iter: f64,
}
