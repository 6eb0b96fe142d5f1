//! From a MODEL argument to a running [`Model`], with what a server must know besides: where the tokenizer is, which
//! tokens end an answer, which sampling the model's makers recommend.

use std::collections::HashMap;
use std::fmt::{self, Debug};
use std::path::{Path, PathBuf};

use baton_configs::llm::{ComputeDtype, LlmOptions, LoadFormat};
use candle_core::quantized::gguf_file::Value;

use crate::backend::{Backend, WeightDtype};
use crate::model::checkpoint::Checkpoint;
use crate::model::config::{HuggingFaceConfig, from_gguf};
use crate::model::decoder::Decoder;
use crate::model::error::{ModelError, ModelErrorKind};
use crate::model::gguf::GgufFile;
use crate::model::safetensors::Shards;
use crate::model::source::{self, HubCache, ModelFiles};
use crate::model::special_tokens::{self, GenerationDefaults, SpecialTokens};
use crate::model::{Model, ModelShape};
use crate::page::{KvDtype, PageShape};

/// How far loading is, after each tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress<'a> {
    /// The tensor just taken over.
    pub tensor: &'a str,
    /// Bytes taken over so far.
    pub bytes_done: u64,
    /// Bytes in all.
    pub bytes_total: u64,
}

/// Where the tokenizer and the chat template are.
#[derive(Clone)]
pub enum TokenizerFiles {
    /// In the GGUF file's metadata (`tokenizer.*`).
    Gguf(HashMap<String, Value>),
    /// In a directory: `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`.
    HuggingFace(PathBuf),
}

impl Debug for TokenizerFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // The whole vocabulary would follow.
            Self::Gguf(metadata) => write!(f, "Gguf({} keys)", metadata.len()),
            Self::HuggingFace(directory) => write!(f, "HuggingFace({})", directory.display()),
        }
    }
}

/// A model that can answer, and what its files say about it.
#[derive(Debug)]
pub struct LoadedModel {
    /// The model on its backend; its page pool is not made yet.
    pub model: Box<dyn Model>,
    /// Where its tokenizer is.
    pub files: TokenizerFiles,
    /// Its special tokens.
    pub tokens: SpecialTokens,
    /// The sampling that its makers recommend.
    pub generation: GenerationDefaults,
    /// `served_model_name`, else the hub id, else the directory's or file's name.
    pub name: String,
}

/// Finds a model on this machine and loads it onto a backend. `progress` is called after each tensor.
///
/// # Errors
/// When it is not there, is damaged, or is of a kind that is not served.
pub fn load<B: Backend>(
    spec: &str,
    options: &LlmOptions,
    revision: Option<&str>,
    backend: B,
    progress: &dyn Fn(LoadProgress<'_>),
) -> Result<LoadedModel, ModelError> {
    refuse_parallelism(options).map_err(|kind| kind.of(spec))?;
    let cache = HubCache::from_environment();
    let source = source::find(spec, revision, options.load_format, &cache)?;
    let name = options.served_model_name.clone().unwrap_or(source.name);
    match source.files {
        ModelFiles::Gguf(path) => load_gguf(&path, name, options.load_format, backend, progress),
        ModelFiles::HuggingFace(directory) => {
            load_hugging_face(directory, name, options.load_format, backend, progress)
        }
    }
}

/// The element type of the KV cache: what the options say, else 16 bits.
#[must_use]
pub fn kv_dtype(options: &LlmOptions) -> KvDtype {
    let chosen = match options.kv_cache.dtype {
        ComputeDtype::Auto => options.dtype,
        explicit => explicit,
    };
    match chosen {
        ComputeDtype::Auto | ComputeDtype::Float16 => KvDtype::F16,
        ComputeDtype::Float32 => KvDtype::F32,
        ComputeDtype::Bfloat16 => KvDtype::Bf16,
    }
}

/// The shape of one page of a model's KV cache under these options.
#[must_use]
pub fn page_shape(model: &ModelShape, options: &LlmOptions) -> PageShape {
    PageShape {
        layers: model.layers,
        kv_heads: model.kv_heads,
        tokens_per_block: options.kv_cache.tokens_per_block as usize,
        head_dim: model.head_dim,
        dtype: kv_dtype(options),
    }
}

fn refuse_parallelism(options: &LlmOptions) -> Result<(), ModelErrorKind> {
    let sizes = [
        ("tensor_parallel_size", options.tensor_parallel_size),
        ("pipeline_parallel_size", options.pipeline_parallel_size),
    ];
    for (key, size) in sizes {
        if size > 1 {
            return Err(ModelErrorKind::Unsupported {
                what: format!("`{key}` {size}"),
                hint: "this version runs an instance as one rank; use more instances",
            });
        }
    }
    Ok(())
}

fn load_gguf<B: Backend>(
    path: &Path,
    name: String,
    load_format: LoadFormat,
    backend: B,
    progress: &dyn Fn(LoadProgress<'_>),
) -> Result<LoadedModel, ModelError> {
    let file = GgufFile::open(path)?;
    let config = from_gguf(&file).map_err(|kind| kind.at(path))?;
    let checkpoint = match load_format {
        LoadFormat::Auto => Checkpoint::Gguf(&file),
        // Random blocks of a quantised format would mean random scales; half precision says what it is.
        LoadFormat::Dummy => Checkpoint::Dummy(WeightDtype::F16),
    };
    let model = Decoder::load(config, &checkpoint, backend, progress)?;
    Ok(LoadedModel {
        model: Box::new(model),
        tokens: special_tokens::from_gguf(file.metadata()),
        generation: GenerationDefaults::default(),
        files: TokenizerFiles::Gguf(file.into_metadata()),
        name,
    })
}

fn load_hugging_face<B: Backend>(
    directory: PathBuf,
    name: String,
    load_format: LoadFormat,
    backend: B,
    progress: &dyn Fn(LoadProgress<'_>),
) -> Result<LoadedModel, ModelError> {
    let path = directory.join("config.json");
    let text =
        std::fs::read_to_string(&path).map_err(|error| ModelErrorKind::Io(error).at(&path))?;
    let raw = HuggingFaceConfig::parse(&text).map_err(|kind| kind.at(&path))?;
    let config = raw.decoder().map_err(|kind| kind.at(&path))?;
    let (tokens, generation) = special_tokens::from_directory(&directory)?;
    let checkpoint = match load_format {
        LoadFormat::Auto => Checkpoint::Safetensors(Shards::open(&directory)?),
        LoadFormat::Dummy => Checkpoint::Dummy(raw.weight_dtype()),
    };
    let model = Decoder::load(config, &checkpoint, backend, progress)?;
    Ok(LoadedModel {
        model: Box::new(model),
        tokens,
        generation,
        files: TokenizerFiles::HuggingFace(directory),
        name,
    })
}
