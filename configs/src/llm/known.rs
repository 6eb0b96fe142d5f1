//! Options of existing TensorRT-LLM engine files that this engine does not act on.
//!
//! Two lists, one rule: an option that changes answers or asks for a feature is refused by name; an option
//! that tunes how the original computes the same answers is accepted and listed in one warning. A name in
//! neither list is a mistake. `false` and `null` are what this engine does anyway and pass in both.

use crate::section::{OptionGroup, Treatment};

/// Every name, grouped by what becomes of it.
pub(super) const TENSORRT_LLM_OPTIONS: &[OptionGroup] = &[
    OptionGroup {
        names: &["speculative_config", "decoding_config"],
        treatment: Treatment::Refused("speculative and guided decoding modes"),
    },
    OptionGroup {
        names: &[
            "enable_lora",
            "lora_config",
            "peft_cache_config",
            "enable_prompt_adapter",
            "max_prompt_adapter_token",
            "prompt_adapter_config",
        ],
        treatment: Treatment::Refused("adapters"),
    },
    OptionGroup {
        names: &["quant_config", "calib_config", "force_dynamic_quantization"],
        treatment: Treatment::Refused(
            "quantising weights while loading; use a file that is quantised already",
        ),
    },
    OptionGroup {
        names: &["sparse_attention_config", "model_kwargs", "cp_config"],
        treatment: Treatment::Refused("changing the model's computation by options"),
    },
    OptionGroup {
        names: &[
            "batched_logits_processor",
            "normalize_log_probs",
            "skip_tokenizer_init",
        ],
        treatment: Treatment::Refused("other sampling outputs than the API's own"),
    },
    OptionGroup {
        names: &["reasoning_parser", "tool_parser"],
        treatment: Treatment::Refused("splitting answers into reasoning and tool calls"),
    },
    OptionGroup {
        names: &[
            "custom_tokenizer",
            "checkpoint_loader",
            "checkpoint_format",
            "build_config",
            "embedding_parallel_mode",
        ],
        treatment: Treatment::Refused(
            "other loaders than those for GGUF files and Hugging Face directories",
        ),
    },
    OptionGroup {
        names: &["revision", "tokenizer_revision"],
        treatment: Treatment::Refused("choosing a revision; name a directory or file"),
    },
    OptionGroup {
        names: &[
            "mm_encoder_only",
            "encode_only",
            "multimodal_config",
            "video_pruning_rate",
        ],
        treatment: Treatment::Refused("inputs other than text"),
    },
    OptionGroup {
        names: &["kv_connector_config"],
        treatment: Treatment::Refused("external KV stores"),
    },
    OptionGroup {
        names: &["env_overrides"],
        treatment: Treatment::Refused("changing the environment from this file"),
    },
    OptionGroup {
        names: &["otlp_traces_endpoint"],
        treatment: Treatment::Refused("exporting traces"),
    },
    OptionGroup {
        names: &[
            "cuda_graph_config",
            "use_cuda_graph",
            "cuda_graph_batch_sizes",
            "cuda_graph_max_batch_size",
            "cuda_graph_padding_enabled",
            "torch_compile_config",
            "torch_compile_enabled",
            "torch_compile_fullgraph",
            "torch_compile_inductor_enabled",
            "torch_compile_piecewise_cuda_graph",
            "torch_compile_piecewise_cuda_graph_capture_num_tokens",
            "torch_compile_enable_userbuffers",
            "torch_compile_max_num_streams",
            "enable_autotuner",
            "autotuner_enabled",
            "enable_min_latency",
            "attn_backend",
            "allreduce_strategy",
            "nvfp4_gemm_config",
            "use_cute_dsl_blockscaling_mm",
            "use_cute_dsl_blockscaling_bmm",
            "extended_runtime_perf_knob_config",
            "pytorch_backend_config",
            "garbage_collection_gen0_threshold",
        ],
        treatment: Treatment::Ignored("tunes the original's kernels and graphs"),
    },
    OptionGroup {
        names: &[
            "enable_attention_dp",
            "enable_lm_head_tp_in_adp",
            "attention_dp_config",
            "moe_config",
            "moe_backend",
            "moe_max_num_tokens",
            "moe_load_balancer",
            "moe_disable_finalize_fusion",
            "moe_cluster_parallel_size",
            "moe_tensor_parallel_size",
            "moe_expert_parallel_size",
            "perfect_router",
            "pp_partition",
            "gpus_per_node",
            "orchestrator_type",
            "mpi_session",
            "ray_placement_config",
            "ray_worker_extension_cls",
        ],
        treatment: Treatment::Ignored("places the original's work on GPUs"),
    },
    OptionGroup {
        names: &[
            "scheduler_config",
            "batch_wait_timeout_ms",
            "batch_wait_timeout_iters",
            "batch_wait_max_tokens_ratio",
            "stream_interval",
            "max_input_len",
            "num_postprocess_workers",
            "postprocess_tokenizer_dir",
            "tokenizer_mode",
            "enable_sleep",
        ],
        treatment: Treatment::Ignored("tunes the original's scheduler and its helper processes"),
    },
    OptionGroup {
        names: &[
            "sampler_type",
            "sampler_force_async_worker",
            "use_torch_sampler",
            "enable_trtllm_sampler",
            "mixed_sampler",
            "disable_flashinfer_sampling",
            "guided_decoding_backend",
            "gather_generation_logits",
        ],
        treatment: Treatment::Ignored(
            "chooses among the original's samplers; requests that need what is not served are refused one by one",
        ),
    },
    OptionGroup {
        names: &[
            "print_iter_log",
            "enable_iter_perf_stats",
            "enable_iter_req_stats",
            "iter_stats_max_iterations",
            "request_stats_max_iterations",
            "max_stats_len",
            "enable_layerwise_nvtx_marker",
            "layer_wise_benchmarks_config",
            "enable_tqdm",
        ],
        treatment: Treatment::Ignored("reports on the original's iterations"),
    },
    OptionGroup {
        names: &[
            "workspace",
            "fast_build",
            "enable_build_cache",
            "fail_fast_on_attention_window_too_large",
            "trust_remote_code",
        ],
        treatment: Treatment::Ignored(
            "concerns building engines or running code from a model directory",
        ),
    },
];
