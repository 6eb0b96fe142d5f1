//! Engine options as the text of an options file, for the instances that `baton up` starts.
//!
//! Every option is written, whether default or not, so that the file says all that the instance was told.

use std::fmt::Write as _;

use crate::llm::LlmOptions;
use crate::section::kind::name_of;
use crate::yaml::{number_text, quoted};

/// The options as YAML that resolves to the same options; the same options give the same text.
#[must_use]
pub fn to_yaml(options: &LlmOptions) -> String {
    let mut out = String::from("# Written by baton.\n");
    let mut line = |indent: &str, key: &str, value: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{indent}{key}: {value}");
    };
    let text = |value: &Option<String>| value.as_deref().map_or("null".to_owned(), quoted);
    let kv_cache = &options.kv_cache;
    line("", "model", text(&options.model));
    line("", "dtype", name_of(options.dtype).to_owned());
    line("", "load_format", name_of(options.load_format).to_owned());
    line("", "max_batch_size", options.max_batch_size.to_string());
    line("", "max_num_tokens", options.max_num_tokens.to_string());
    line("", "max_seq_len", or_null(options.max_seq_len));
    line(
        "",
        "enable_chunked_prefill",
        options.enable_chunked_prefill.to_string(),
    );
    line(
        "",
        "tensor_parallel_size",
        options.tensor_parallel_size.to_string(),
    );
    line(
        "",
        "pipeline_parallel_size",
        options.pipeline_parallel_size.to_string(),
    );
    line(
        "",
        "return_perf_metrics",
        options.return_perf_metrics.to_string(),
    );
    line(
        "",
        "perf_metrics_max_requests",
        options.perf_metrics_max_requests.to_string(),
    );
    line("", "num_threads", or_null(options.num_threads));
    line("", "served_model_name", text(&options.served_model_name));
    line("", "chat_template", text(&options.chat_template));
    line("", "tokenizer", text(&options.tokenizer));
    line("", "kv_cache_config", String::new());
    line(
        "  ",
        "enable_block_reuse",
        kv_cache.enable_block_reuse.to_string(),
    );
    line("  ", "max_tokens", or_null(kv_cache.max_tokens));
    line(
        "  ",
        "free_gpu_memory_fraction",
        number_text(kv_cache.free_memory_fraction),
    );
    line("  ", "dtype", name_of(kv_cache.dtype).to_owned());
    line(
        "  ",
        "tokens_per_block",
        kv_cache.tokens_per_block.to_string(),
    );
    line(
        "  ",
        "event_buffer_max_size",
        kv_cache.event_buffer_max_size.to_string(),
    );
    let Some(transceiver) = &options.transceiver else {
        line("", "cache_transceiver_config", "null".to_owned());
        return out;
    };
    line("", "cache_transceiver_config", String::new());
    line("  ", "backend", transceiver.backend.name().to_owned());
    line(
        "  ",
        "max_tokens_in_buffer",
        or_null(transceiver.max_tokens_in_buffer),
    );
    let timeout_ms = transceiver.kv_transfer_timeout.as_millis();
    line("  ", "kv_transfer_timeout_ms", timeout_ms.to_string());
    let sender_ms = transceiver.sender_future_timeout.as_millis();
    line(
        "  ",
        "kv_transfer_sender_future_timeout_ms",
        sender_ms.to_string(),
    );
    out
}

fn or_null(number: Option<impl ToString>) -> String {
    number.map_or("null".to_owned(), |number| number.to_string())
}
