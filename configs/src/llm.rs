//! The LLM options file (`--config`): what one instance is told about its engine (COMPAT.md §3.1, §12).
//!
//! Defaults give way to the command line, and the command line to the file: the file wins, as scripts expect.
//! Engine options of existing TensorRT-LLM files are known by name; `known.rs` says what becomes of each.

mod known;
mod overrides;
mod raw;
mod render;

use std::path::Path;

use crate::cluster::{self, ClusterConfig};
use crate::error::{ConfigErrorKind, ConfigErrors, Warning};
use crate::section::kind::{Choice, Choices};
use crate::section::read::{Findings, read_open_section, report_unknown};
use crate::section::{Located, Section};
use crate::transceiver::TransceiverConfig;
use crate::yaml::{Document, Node, quoted, read_bounded};

pub use overrides::LlmOverrides;
use raw::RawKvCache;
pub(crate) use raw::RawLlm;
pub use render::to_yaml;

/// How weights and KV are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ComputeDtype {
    /// The fastest that is faithful to the file: weights as stored, KV in 16 bits. On a GPU, activations in the 16 bits that the
    /// checkpoint names, else in bfloat16.
    #[default]
    Auto,
    /// 32-bit activations and KV: reproduces an independent float32 implementation. On the CPU only.
    Float32,
    /// KV in IEEE half precision, and on a GPU activations too.
    Float16,
    /// KV in bfloat16, and on a GPU activations too.
    Bfloat16,
}

impl Choices for ComputeDtype {
    const TABLE: &'static [(&'static str, Choice<Self>)] = &[
        ("auto", Choice::Is(Self::Auto)),
        ("float32", Choice::Is(Self::Float32)),
        ("float16", Choice::Is(Self::Float16)),
        ("bfloat16", Choice::Is(Self::Bfloat16)),
        ("half", Choice::Is(Self::Float16)),
        (
            "fp8",
            Choice::NotServed("arithmetic in 8 bits beyond what the checkpoint has so"),
        ),
        ("nvfp4", Choice::NotServed("arithmetic in 4 bits")),
        ("int8", Choice::NotServed("arithmetic in whole numbers")),
    ];
}

/// Type of the cached keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvCacheDtype {
    /// That of the computation, in 16 bits where that is not said.
    #[default]
    Auto,
    /// 32-bit float.
    Float32,
    /// IEEE half precision.
    Float16,
    /// bfloat16.
    Bfloat16,
    /// Floats of 8 bits (e4m3).
    Fp8,
}

impl Choices for KvCacheDtype {
    const TABLE: &'static [(&'static str, Choice<Self>)] = &[
        ("auto", Choice::Is(Self::Auto)),
        ("float32", Choice::Is(Self::Float32)),
        ("float16", Choice::Is(Self::Float16)),
        ("bfloat16", Choice::Is(Self::Bfloat16)),
        ("half", Choice::Is(Self::Float16)),
        ("fp8", Choice::Is(Self::Fp8)),
        ("nvfp4", Choice::NotServed("KV in 4 bits")),
        ("int8", Choice::NotServed("KV in whole numbers of 8 bits")),
    ];
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

impl Choices for LoadFormat {
    const TABLE: &'static [(&'static str, Choice<Self>)] = &[
        ("auto", Choice::Is(Self::Auto)),
        ("dummy", Choice::Is(Self::Dummy)),
        ("vision_only", Choice::NotServed("inputs other than text")),
    ];
}

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// A GPU that can be used, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU; without one the instance does not start.
    Cuda,
}

impl Choices for Device {
    const TABLE: &'static [(&'static str, Choice<Self>)] = &[
        ("auto", Choice::Is(Self::Auto)),
        ("cpu", Choice::Is(Self::Cpu)),
        ("cuda", Choice::Is(Self::Cuda)),
    ];
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
    pub dtype: KvCacheDtype,
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
            dtype: KvCacheDtype::Auto,
            tokens_per_block: 32,
            event_buffer_max_size: 0,
        }
    }
}

/// One instance's engine options after defaults, command line and file are merged.
#[derive(Debug, Clone, PartialEq)]
pub struct LlmOptions {
    /// The model that the file names; `None` where only the command line does.
    pub model: Option<String>,
    /// Weight and KV arithmetic.
    pub dtype: ComputeDtype,
    /// Where weights come from.
    pub load_format: LoadFormat,
    /// What computes.
    pub device: Device,
    /// Most sequences in one step.
    pub max_batch_size: u32,
    /// Most tokens in one step.
    pub max_num_tokens: u32,
    /// Longest sequence, prompt and answer together; `None` takes the model's.
    pub max_seq_len: Option<u32>,
    /// Split long prompts over steps.
    pub enable_chunked_prefill: bool,
    /// Read a step's results before the next step begins, on a device where that would not be needed.
    pub disable_overlap_scheduler: bool,
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
    /// Where this instance registers; `None` registers nowhere.
    pub cluster: Option<ClusterConfig>,
}

impl Default for LlmOptions {
    fn default() -> Self {
        Self {
            model: None,
            dtype: ComputeDtype::Auto,
            load_format: LoadFormat::Auto,
            device: Device::Auto,
            max_batch_size: 2048,
            max_num_tokens: 8192,
            max_seq_len: None,
            enable_chunked_prefill: false,
            disable_overlap_scheduler: false,
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
            cluster: None,
        }
    }
}

/// Options from defaults, then the command line, then the file, which wins.
///
/// # Errors
/// Everything that is wrong with the file and with the command line's values.
pub fn resolve(
    file: Option<&Document>,
    cli: &LlmOverrides,
) -> Result<(LlmOptions, Vec<Warning>), ConfigErrors> {
    let merged = overrides::merge(file, cli);
    let mut findings = Findings::new(&merged);
    let options = read(merged.root(), "", &mut findings);
    let warnings = findings.finish()?;
    Ok((options.unwrap_or_default(), warnings))
}

/// Reads a mapping of engine options; `None` only if it is no mapping.
pub(crate) fn read(node: &Node, path: &str, findings: &mut Findings) -> Option<LlmOptions> {
    read_beside(node, path, &[], findings)
}

/// Reads engine options that stand beside other keys, which are known but not in `node`.
pub(crate) fn read_beside(
    node: &Node,
    path: &str,
    beside: &[&'static str],
    findings: &mut Findings,
) -> Option<LlmOptions> {
    let (raw, unknown) = read_open_section::<RawLlm>(node, path, findings)?;
    let known: Vec<&str> = RawLlm::TABLE
        .names()
        .chain(beside.iter().copied())
        .collect();
    report_unknown(&unknown, path, &known, findings);
    Some(resolve_raw(raw, findings))
}

fn resolve_raw(raw: RawLlm, findings: &mut Findings) -> LlmOptions {
    let defaults = LlmOptions::default();
    let kv_cache = resolve_kv_cache(raw.kv_cache_config, raw.free_gpu_memory_fraction, findings);
    let transceiver = crate::transceiver::resolve(
        raw.cache_transceiver_config.map(|given| given.value),
        raw.enable_cache_transceiver,
        findings,
    );
    LlmOptions {
        model: given(raw.model),
        dtype: given(raw.dtype).unwrap_or(defaults.dtype),
        load_format: given(raw.load_format).unwrap_or(defaults.load_format),
        device: given(raw.device).unwrap_or(defaults.device),
        max_batch_size: given(raw.max_batch_size).unwrap_or(defaults.max_batch_size),
        max_num_tokens: given(raw.max_num_tokens).unwrap_or(defaults.max_num_tokens),
        max_seq_len: given(raw.max_seq_len),
        enable_chunked_prefill: given(raw.enable_chunked_prefill)
            .unwrap_or(defaults.enable_chunked_prefill),
        disable_overlap_scheduler: given(raw.disable_overlap_scheduler)
            .unwrap_or(defaults.disable_overlap_scheduler),
        tensor_parallel_size: given(raw.tensor_parallel_size)
            .unwrap_or(defaults.tensor_parallel_size),
        pipeline_parallel_size: given(raw.pipeline_parallel_size)
            .unwrap_or(defaults.pipeline_parallel_size),
        kv_cache,
        transceiver,
        return_perf_metrics: given(raw.return_perf_metrics).unwrap_or(defaults.return_perf_metrics),
        perf_metrics_max_requests: given(raw.perf_metrics_max_requests)
            .unwrap_or(defaults.perf_metrics_max_requests),
        num_threads: given(raw.num_threads),
        served_model_name: given(raw.served_model_name),
        chat_template: raw
            .chat_template
            .and_then(|value| template_text(value, findings)),
        tokenizer: given(raw.tokenizer),
        cluster: raw
            .disagg_cluster
            .and_then(|section| cluster::read(&section.value, &section.path, findings)),
    }
}

fn given<T>(field: Option<Located<T>>) -> Option<T> {
    field.map(|located| located.value)
}

fn resolve_kv_cache(
    section: Option<Located<RawKvCache>>,
    short_form: Option<Located<f64>>,
    findings: &mut Findings,
) -> KvCacheConfig {
    let raw = given(section).unwrap_or_default();
    let defaults = KvCacheConfig::default();
    if let Some(size) = &raw.tokens_per_block
        && !size.value.is_power_of_two()
    {
        let kind = ConfigErrorKind::WrongValue {
            found: size.value.to_string(),
            expected: "a power of two".to_owned(),
        };
        let hint = format!("{} is the next one", size.value.next_power_of_two());
        findings.error(size.place, &size.path, kind, Some(hint));
    }
    if let (Some(section), Some(short)) = (&raw.free_gpu_memory_fraction, &short_form)
        && short.place.is_some()
        && short.value.to_bits() != section.value.to_bits()
    {
        let what = format!(
            "is {}, but `{}` is {}",
            short.value, section.path, section.value
        );
        findings.conflict(short.place, &short.path, what);
    }
    KvCacheConfig {
        enable_block_reuse: given(raw.enable_block_reuse).unwrap_or(defaults.enable_block_reuse),
        max_tokens: given(raw.max_tokens),
        free_memory_fraction: given(raw.free_gpu_memory_fraction)
            .or(given(short_form))
            .unwrap_or(defaults.free_memory_fraction),
        dtype: given(raw.dtype).unwrap_or(defaults.dtype),
        tokens_per_block: given(raw.tokens_per_block).unwrap_or(defaults.tokens_per_block),
        event_buffer_max_size: given(raw.event_buffer_max_size)
            .unwrap_or(defaults.event_buffer_max_size),
    }
}

/// A template written inline, or the text of the file that is named.
///
/// Only what looks like a template is taken, so that a rendered options file, which holds the text, reads back.
fn template_text(template: Located<String>, findings: &mut Findings) -> Option<String> {
    const TEMPLATE_BYTES_MAX: usize = 256 * 1024;
    let has_tags = |text: &str| text.contains("{{") || text.contains("{%");
    if has_tags(&template.value) {
        return Some(template.value);
    }
    let reason = match read_bounded(Path::new(&template.value)) {
        Err(error) => error.to_string(),
        Ok(bytes) if bytes.len() > TEMPLATE_BYTES_MAX => {
            format!("more than {TEMPLATE_BYTES_MAX} bytes")
        }
        Ok(bytes) => match String::from_utf8(bytes) {
            Err(_) => "not UTF-8 text".to_owned(),
            Ok(text) if has_tags(&text) => return Some(text),
            Ok(_) => "no `{{` or `{%` in it".to_owned(),
        },
    };
    let kind = ConfigErrorKind::WrongValue {
        found: quoted(&template.value),
        expected: format!("a chat template, or a file that holds one ({reason})"),
    };
    let hint = "a template has `{{` or `{%` in it".to_owned();
    findings.error(template.place, &template.path, kind, Some(hint));
    None
}

#[cfg(test)]
mod tests;
