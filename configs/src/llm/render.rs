//! Engine options as the text of an options file, for the instances that `baton up` starts.
//!
//! Every option is written, whether default or not, so that the file says all that the instance was told.

use std::fmt::Write as _;

use crate::cluster;
use crate::llm::{KvCacheConfig, LlmOptions};
use crate::section::kind::name_of;
use crate::transceiver::TransceiverConfig;
use crate::yaml::{number_text, quoted};

/// The options as YAML that resolves to the same options; the same options give the same text.
#[must_use]
pub fn to_yaml(options: &LlmOptions) -> String {
    let text = |value: &Option<String>| value.as_deref().map_or("null".to_owned(), quoted);
    let mut out = String::from("# Written by baton.\n");
    let lines = [
        ("model", text(&options.model)),
        ("dtype", quoted(name_of(options.dtype))),
        ("load_format", quoted(name_of(options.load_format))),
        ("device", quoted(name_of(options.device))),
        ("max_batch_size", options.max_batch_size.to_string()),
        ("max_num_tokens", options.max_num_tokens.to_string()),
        ("max_seq_len", or_null(options.max_seq_len)),
        (
            "enable_chunked_prefill",
            options.enable_chunked_prefill.to_string(),
        ),
        (
            "disable_overlap_scheduler",
            options.disable_overlap_scheduler.to_string(),
        ),
        (
            "tensor_parallel_size",
            options.tensor_parallel_size.to_string(),
        ),
        (
            "pipeline_parallel_size",
            options.pipeline_parallel_size.to_string(),
        ),
        (
            "return_perf_metrics",
            options.return_perf_metrics.to_string(),
        ),
        (
            "perf_metrics_max_requests",
            options.perf_metrics_max_requests.to_string(),
        ),
        ("num_threads", or_null(options.num_threads)),
        ("served_model_name", text(&options.served_model_name)),
        ("chat_template", text(&options.chat_template)),
        ("tokenizer", text(&options.tokenizer)),
    ];
    write_lines(&mut out, "", &lines);
    write_kv_cache(&mut out, &options.kv_cache);
    match &options.transceiver {
        Some(transceiver) => write_transceiver(&mut out, transceiver),
        None => out.push_str("cache_transceiver_config: null\n"),
    }
    cluster::render(&mut out, options.cluster.as_ref());
    out
}

fn write_kv_cache(out: &mut String, kv_cache: &KvCacheConfig) {
    out.push_str("kv_cache_config:\n");
    let lines = [
        (
            "enable_block_reuse",
            kv_cache.enable_block_reuse.to_string(),
        ),
        ("max_tokens", or_null(kv_cache.max_tokens)),
        (
            "free_gpu_memory_fraction",
            number_text(kv_cache.free_memory_fraction),
        ),
        ("dtype", quoted(name_of(kv_cache.dtype))),
        ("tokens_per_block", kv_cache.tokens_per_block.to_string()),
        (
            "event_buffer_max_size",
            kv_cache.event_buffer_max_size.to_string(),
        ),
    ];
    write_lines(out, "  ", &lines);
}

fn write_transceiver(out: &mut String, transceiver: &TransceiverConfig) {
    out.push_str("cache_transceiver_config:\n");
    let sender_timeout_ms = transceiver.sender_future_timeout.as_millis();
    let lines = [
        ("backend", quoted(transceiver.backend.name())),
        (
            "max_tokens_in_buffer",
            or_null(transceiver.max_tokens_in_buffer),
        ),
        (
            "kv_transfer_timeout_ms",
            transceiver.kv_transfer_timeout.as_millis().to_string(),
        ),
        (
            "kv_transfer_sender_future_timeout_ms",
            sender_timeout_ms.to_string(),
        ),
    ];
    write_lines(out, "  ", &lines);
}

fn write_lines(out: &mut String, indent: &str, lines: &[(&str, String)]) {
    for (key, value) in lines {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{indent}{key}: {value}");
    }
}

fn or_null(number: Option<impl ToString>) -> String {
    number.map_or("null".to_owned(), |number| number.to_string())
}
