//! The LLM options file (`--config`): what one instance is told about its engine (COMPAT.md §3.1, §12).

use crate::transceiver::TransceiverConfig;

/// How weights and KV are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ComputeDtype {
    /// The fastest that is faithful to the file: weights as stored, KV in 16 bits.
    #[default]
    Auto,
    /// 32-bit activations and KV: reproduces an independent float32 implementation.
    Float32,
    /// KV in IEEE half precision.
    Float16,
    /// KV in bfloat16.
    Bfloat16,
}

/// Where weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LoadFormat {
    /// GGUF file or Hugging Face directory, by what is there.
    #[default]
    Auto,
    /// Random weights of the configured shape, for benchmarks.
    Dummy,
}

/// `kv_cache_config` (COMPAT.md §12.2), resolved.
#[derive(Debug, Clone, PartialEq)]
pub struct KvCacheConfig {
    /// Reuse KV of equal prefixes.
    pub enable_block_reuse: bool,
    /// Pool size in tokens; `None` lets the engine size it from memory.
    pub max_tokens: Option<u64>,
    /// Share of free memory the pool may take when `max_tokens` is not given, 0 to 1.
    pub free_memory_fraction: f64,
    /// Type of the cached values; `Auto` follows [`LlmOptions::dtype`].
    pub dtype: ComputeDtype,
    /// Tokens per block; a power of two.
    pub tokens_per_block: u32,
    /// Ring size of KV cache events; 0 keeps none.
    pub event_buffer_max_size: u32,
}

impl Default for KvCacheConfig {
    fn default() -> Self {
        Self {
            enable_block_reuse: true,
            max_tokens: None,
            free_memory_fraction: 0.9,
            dtype: ComputeDtype::Auto,
            tokens_per_block: 32,
            event_buffer_max_size: 0,
        }
    }
}

/// One instance's engine options after defaults, command line and file are merged.
#[derive(Debug, Clone, PartialEq)]
pub struct LlmOptions {
    /// Weight and KV arithmetic.
    pub dtype: ComputeDtype,
    /// Where weights come from.
    pub load_format: LoadFormat,
    /// Most sequences in one step.
    pub max_batch_size: u32,
    /// Most tokens in one step.
    pub max_num_tokens: u32,
    /// Longest sequence, prompt and answer together; `None` takes the model's.
    pub max_seq_len: Option<u32>,
    /// Split long prompts over steps.
    pub enable_chunked_prefill: bool,
    /// Tensor-parallel ranks.
    pub tensor_parallel_size: u32,
    /// Pipeline-parallel ranks.
    pub pipeline_parallel_size: u32,
    /// KV pool.
    pub kv_cache: KvCacheConfig,
    /// KV hand-off; `None` means that this instance hands nothing off.
    pub transceiver: Option<TransceiverConfig>,
    /// Keep per-request metrics for `/perf_metrics`.
    pub return_perf_metrics: bool,
    /// Size of that ring.
    pub perf_metrics_max_requests: u32,
    /// Compute threads of the CPU backend; `None` takes every core the process may use.
    pub num_threads: Option<u32>,
    /// Name that `/v1/models` reports; `None` takes the model's directory or file name.
    pub served_model_name: Option<String>,
    /// Chat template text that replaces the model's own.
    pub chat_template: Option<String>,
    /// Tokenizer path that replaces the model's own.
    pub tokenizer: Option<String>,
}

impl Default for LlmOptions {
    fn default() -> Self {
        Self {
            dtype: ComputeDtype::Auto,
            load_format: LoadFormat::Auto,
            max_batch_size: 2048,
            max_num_tokens: 8192,
            max_seq_len: None,
            enable_chunked_prefill: false,
            tensor_parallel_size: 1,
            pipeline_parallel_size: 1,
            kv_cache: KvCacheConfig::default(),
            transceiver: None,
            return_perf_metrics: false,
            perf_metrics_max_requests: 0,
            num_threads: None,
            served_model_name: None,
            chat_template: None,
            tokenizer: None,
        }
    }
}
