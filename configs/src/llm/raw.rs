//! The keys of the LLM options file and of its `kv_cache_config`.

use crate::cluster::RawCluster;
use crate::llm::{ComputeDtype, Device, KvCacheDtype, LoadFormat};
use crate::section::kind::{
    Anything, Choice, Choices, Count, Flag, Later, OneOf, Share, Size, Sub, Text, Whole,
};
use crate::section::section;
use crate::transceiver::RawTransceiver;

/// The original's engines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EngineBackend {
    Pytorch,
}

impl Choices for EngineBackend {
    const TABLE: &'static [(&'static str, Choice<Self>)] = &[
        ("pytorch", Choice::Is(Self::Pytorch)),
        (
            "tensorrt",
            Choice::NotServed("built TensorRT engine directories"),
        ),
        (
            "trt",
            Choice::NotServed("built TensorRT engine directories"),
        ),
        ("_autodeploy", Choice::NotServed("the auto-deploy engine")),
    ];
}

/// How event hashes are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EventHash {
    V1,
}

impl Choices for EventHash {
    const TABLE: &'static [(&'static str, Choice<Self>)] = &[
        ("auto", Choice::Is(Self::V1)),
        ("v1_block_key", Choice::Is(Self::V1)),
        (
            "v2_sha256",
            Choice::NotServed("SHA-256 hashes in KV cache events"),
        ),
        (
            "v2_sha256_64",
            Choice::NotServed("SHA-256 hashes in KV cache events"),
        ),
    ];
}

section! {
    /// The pool of KV blocks and what may be reused from it.
    RawKvCache "kv_cache_config" {
        /// Reuse the KV of prompts that begin alike.
        enable_block_reuse: Flag = "true";
        /// Size of the pool in tokens. `null` sizes it by `free_gpu_memory_fraction`.
        max_tokens: Whole<u64, 1, { u64::MAX }> = "null";
        /// Share of free memory that the pool may take when `max_tokens` is not given: of the GPU, or of
        /// the machine where there is none.
        free_gpu_memory_fraction: Share = "0.9";
        /// Type of the cached values: `auto`, `float32`, `float16`, `bfloat16` or `fp8`. `auto` follows the
        /// engine's `dtype`. Context and generation instances must agree.
        dtype: OneOf<KvCacheDtype> = "auto";
        /// Tokens per block, a power of two.
        tokens_per_block: Whole<u32, 1, 1024> = "32";
        /// How many KV cache events are kept for `/kv_cache_events`; 0 keeps none.
        event_buffer_max_size: Size = "0";
    }
    unserved {
        /// Attention window per layer, in tokens.
        max_attention_window: Anything = "null", Refused "attention windows other than the model's own";
        /// Tokens at the start that a window always keeps.
        sink_token_length: Anything = "null", Refused "attention windows other than the model's own";
        /// Bytes of host memory for blocks that leave the GPU.
        host_cache_size: Anything = "null", Ignored "blocks are not moved to host memory";
        /// Bring blocks back from host memory before use.
        onboard_blocks: Flag = "true", Ignored "blocks are not moved to host memory";
        /// Share of the pool for cross attention.
        cross_kv_cache_fraction: Anything = "null", Ignored "there are no encoder-decoder models";
        /// Least priority of blocks that move to host memory.
        secondary_offload_min_priority: Anything = "null", Ignored "blocks are not moved to host memory";
        /// Period at which events of data-parallel ranks are gathered, in milliseconds.
        attention_dp_events_gather_period_ms: Count = "5", Ignored "there are no data-parallel ranks";
        /// Reuse blocks of which only the first tokens match.
        enable_partial_reuse: Flag = "true", Ignored "whole blocks are reused";
        /// Copy such blocks before use.
        copy_on_partial_reuse: Flag = "true", Ignored "whole blocks are reused";
        /// Use unified memory for the pool.
        use_uvm: Flag = "false", Ignored "the pool is in one memory";
        /// Most bytes that the pool may take; 0 sets no limit.
        max_gpu_total_bytes: Whole<u64, 0, { u64::MAX }> = "0",
            Refused "a limit in bytes; give `max_tokens`";
        /// Type of state-space model caches.
        mamba_ssm_cache_dtype: Anything = "auto", Ignored "there are no state-space models";
        /// Use the original's second cache manager.
        use_kv_cache_manager_v2: Flag = "false", Ignored "there is one cache manager";
        /// How full the pool may be when a paused request goes on.
        max_util_for_resume: Share = "0.95", Ignored "paused requests go on when their blocks fit";
        /// Hash of the blocks in events.
        kv_cache_event_hash_algo: OneOf<EventHash> = "auto", Quiet "events carry v1 hashes";
    }
    groups &[];
}

section! {
    /// What one instance is told about its engine. The file wins over the command line.
    RawLlm "llm options" {
        /// Model: a GGUF file, a Hugging Face directory, or a model id that is in the local cache.
        model: Text = "null";
        /// Arithmetic: `auto` keeps weights as stored and KV in 16 bits; `float32` reproduces a float32
        /// implementation, on the CPU; `float16` and `bfloat16` set the type of the KV, and of a GPU's activations,
        /// which is the checkpoint's otherwise.
        dtype: OneOf<ComputeDtype> = "auto";
        /// Where weights come from: `auto` reads them; `dummy` makes random ones, for benchmarks.
        load_format: OneOf<LoadFormat> = "auto";
        /// What computes: `cuda`, `cpu`, or `auto` for a GPU that can be used and else the CPU.
        device: OneOf<Device> = "auto";
        /// Most sequences in one step.
        max_batch_size: Count = "2048";
        /// Most tokens in one step.
        max_num_tokens: Count = "8192";
        /// Longest sequence in tokens, prompt and answer together. `null` takes the model's.
        max_seq_len: Count = "null";
        /// Spread prompts that are longer than `max_num_tokens` over several steps.
        enable_chunked_prefill: Flag = "false";
        /// Ranks among which each layer is split.
        tensor_parallel_size: Whole<u32, 1, 4096> = "1";
        /// Ranks among which the layers are dealt.
        pipeline_parallel_size: Whole<u32, 1, 4096> = "1";
        /// The pool of KV blocks.
        kv_cache_config: Sub<RawKvCache> = "{}";
        /// Short form of `kv_cache_config.free_gpu_memory_fraction`, as the command line has it.
        free_gpu_memory_fraction["kv_cache_free_gpu_memory_fraction"]: Share = "null";
        /// The hand-off of KV. `null` hands nothing off.
        cache_transceiver_config: Sub<RawTransceiver> = "null";
        /// Older spelling of a `cache_transceiver_config` with `backend: DEFAULT`.
        enable_cache_transceiver: Flag = "null";
        /// Read a step's results before the next step begins. Otherwise a GPU computes one while the next is scheduled; on
        /// the CPU they never overlap, and context servers need no setting.
        disable_overlap_scheduler: Flag = "false";
        /// Keep timings of each request for `/perf_metrics`.
        return_perf_metrics: Flag = "false";
        /// For how many requests those timings are kept; 0 keeps none.
        perf_metrics_max_requests: Size = "0";
        /// Compute threads of the CPU backend. `null` takes every core the process may use.
        num_threads: Whole<u32, 1, 4096> = "null";
        /// Name that `/v1/models` reports. `null` takes the model's directory or file name.
        served_model_name: Text = "null";
        /// Chat template that replaces the model's own: a file, or the template itself.
        chat_template: Text = "null";
        /// Tokenizer directory or file that replaces the model's own.
        tokenizer: Text = "null";
        /// Where this server registers, so that a proxy finds it. Needs `--server_role`.
        disagg_cluster: Later<RawCluster> = "null";
    }
    unserved {
        /// Which of the original's engines runs: only `pytorch` is known here, and means this engine.
        backend: OneOf<EngineBackend> = "pytorch", Quiet "there is one engine";
        /// Ranks among which one sequence is split.
        context_parallel_size: Count = "1", Refused "splitting one sequence over ranks";
        /// Beams of a search.
        max_beam_width: Count = "1", Refused "beam search";
    }
    groups crate::llm::known::TENSORRT_LLM_OPTIONS;
}
