//! From a MODEL argument to a running [`Model`], with what a server must know besides: where the tokenizer is, which
//! tokens end an answer, which sampling the model's makers recommend. The header comes first, and alone: what it rules out
//! is refused before a weight is read.

use std::cell::Cell;
use std::collections::HashMap;
use std::fmt::{self, Debug};
use std::path::{Path, PathBuf};
use std::time::Duration;

use baton_configs::llm::{ComputeDtype, KvCacheDtype, LlmOptions, LoadFormat};
use candle_core::quantized::gguf_file::Value;

use crate::backend::{ActivationDtype, Backend, WeightDtype};
use crate::model::checkpoint::{Checkpoint, WeightsIdentity};
use crate::model::config::{DecoderConfig, HuggingFaceConfig, from_gguf};
use crate::model::decoder::Decoder;
use crate::model::error::{ModelError, ModelErrorKind};
use crate::model::gguf::GgufFile;
use crate::model::quantization;
use crate::model::safetensors::Shards;
use crate::model::shard::{self, Grid, Place, Shard};
use crate::model::source::{self, HubCache, ModelFiles};
use crate::model::special_tokens::{self, GenerationDefaults, SpecialTokens};
use crate::model::{Model, ModelShape};
use crate::page::{KvDtype, PageShape};

/// How far loading is: told after each tensor, and where a backend reads files by itself, after each piece of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress<'a> {
    /// The tensor just taken over, or a piece of which just came.
    pub tensor: &'a str,
    /// Bytes taken over so far.
    pub bytes_done: u64,
    /// Bytes in all.
    pub bytes_total: u64,
    /// Of those taken over, what was read from files. The others were made, or are mapped and read when they are used.
    pub bytes_read: u64,
    /// Since loading began.
    pub elapsed: Duration,
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
/// When it is not there, is damaged, is of a kind that is not served, or is to be divided over several ranks.
pub fn load<B: Backend>(
    spec: &str,
    options: &LlmOptions,
    revision: Option<&str>,
    backend: B,
    progress: &dyn Fn(LoadProgress<'_>),
) -> Result<LoadedModel, ModelError> {
    let size = Grid::of(options).size();
    if size != 1 {
        return Err(ModelErrorKind::Parallelism {
            reason: format!("{size} ranks are asked for, and this is one alone"),
            hint: "start it through `baton serve` or `llmapi-launch`, which start the ranks"
                .to_owned(),
        }
        .of(spec));
    }
    let header = ModelHeader::read(spec, options, revision)?;
    let loaded = header.load(backend, Place::ALONE, progress)?;
    Ok(header.with_model(Box::new(loaded.decoder)))
}

/// Whether a model is there and can be divided as the options ask, as far as its header tells. Reads no weight.
///
/// # Errors
/// As [`load`], and with the sizes that go where those asked for do not.
pub fn check_sizes(
    spec: &str,
    options: &LlmOptions,
    revision: Option<&str>,
) -> Result<ModelShape, ModelError> {
    let header = ModelHeader::read(spec, options, revision)?;
    header.check(Grid::of(options))?;
    Ok(header.config.shape())
}

/// A model whose header has been read, and none of its weights.
#[derive(Debug)]
pub(crate) struct ModelHeader {
    pub(crate) config: DecoderConfig,
    name: String,
    origin: Origin,
    load_format: LoadFormat,
    dtype: ComputeDtype,
    tokens: SpecialTokens,
    generation: GenerationDefaults,
}

/// Where a header was read.
#[derive(Debug)]
enum Origin {
    Gguf(GgufFile),
    HuggingFace {
        directory: PathBuf,
        weight_dtype: WeightDtype,
        /// Whether its projections are in 8 bits.
        in_8_bits: bool,
    },
}

/// A rank's part of a model.
#[derive(Debug)]
pub(crate) struct LoadedShard<B: Backend> {
    pub(crate) decoder: Decoder<B>,
    pub(crate) identity: WeightsIdentity,
}

impl ModelHeader {
    /// Finds a model on this machine and reads its `config.json` or GGUF header.
    pub(crate) fn read(
        spec: &str,
        options: &LlmOptions,
        revision: Option<&str>,
    ) -> Result<Self, ModelError> {
        let cache = HubCache::from_environment();
        let source = source::find(spec, revision, options.load_format, &cache)?;
        let name = options.served_model_name.clone().unwrap_or(source.name);
        match source.files {
            ModelFiles::Gguf(path) => Self::of_gguf(&path, name, options),
            ModelFiles::HuggingFace(directory) => Self::of_hugging_face(directory, name, options),
        }
    }

    fn of_gguf(path: &Path, name: String, options: &LlmOptions) -> Result<Self, ModelError> {
        let file = GgufFile::open(path)?;
        Ok(Self {
            config: from_gguf(&file).map_err(|kind| kind.at(path))?,
            name,
            load_format: options.load_format,
            dtype: options.dtype,
            tokens: special_tokens::from_gguf(file.metadata()),
            generation: GenerationDefaults::default(),
            origin: Origin::Gguf(file),
        })
    }

    fn of_hugging_face(
        directory: PathBuf,
        name: String,
        options: &LlmOptions,
    ) -> Result<Self, ModelError> {
        let path = directory.join("config.json");
        let text =
            std::fs::read_to_string(&path).map_err(|error| ModelErrorKind::Io(error).at(&path))?;
        let raw = HuggingFaceConfig::parse(&text).map_err(|kind| kind.at(&path))?;
        let in_8_bits = raw.in_8_bits().map_err(|kind| kind.at(&path))?
            | quantization::of_directory(&directory)?;
        let (tokens, generation) = special_tokens::from_directory(&directory)?;
        let mut config = raw.decoder().map_err(|kind| kind.at(&path))?;
        let has_weights = options.load_format == LoadFormat::Auto;
        if kv_dtype(options) == KvDtype::Fp8 && has_weights {
            config.kv_scales = quantization::kv_scales(&directory, config.layers())?;
        }
        Ok(Self {
            config,
            name,
            load_format: options.load_format,
            dtype: options.dtype,
            tokens,
            generation,
            origin: Origin::HuggingFace {
                weight_dtype: raw.weight_dtype(),
                in_8_bits,
                directory,
            },
        })
    }

    /// Whether the model can be divided like this.
    pub(crate) fn check(&self, grid: Grid) -> Result<(), ModelError> {
        shard::check(&self.config, grid).map_err(|kind| kind.of(&self.name))
    }

    /// Loads the part of the rank at `place`, whose grid has passed [`Self::check`].
    pub(crate) fn load<B: Backend>(
        &self,
        mut backend: B,
        place: Place,
        progress: &dyn Fn(LoadProgress<'_>),
    ) -> Result<LoadedShard<B>, ModelError> {
        let ready = backend.compute_in(self.activations());
        ready.map_err(|error| ModelErrorKind::Backend(error).of(&self.name))?;
        let checkpoint = match (&self.origin, self.load_format) {
            (Origin::Gguf(file), LoadFormat::Auto) => Checkpoint::Gguf(file),
            // Random blocks of a quantised format would mean random scales; half precision says what it is.
            (Origin::Gguf(_), LoadFormat::Dummy) => Checkpoint::Dummy {
                dtype: WeightDtype::F16,
                in_8_bits: false,
            },
            (Origin::HuggingFace { directory, .. }, LoadFormat::Auto) => {
                Checkpoint::Safetensors(Shards::open(directory)?)
            }
            (
                Origin::HuggingFace {
                    weight_dtype,
                    in_8_bits,
                    ..
                },
                LoadFormat::Dummy,
            ) => Checkpoint::Dummy {
                dtype: *weight_dtype,
                in_8_bits: *in_8_bits,
            },
        };
        let part = Shard::new(&self.config, place);
        let read = Cell::new((0, Duration::ZERO));
        let progress = |step: LoadProgress<'_>| {
            read.set((step.bytes_read, step.elapsed));
            progress(step);
        };
        let decoder = Decoder::load(&self.config, part, &checkpoint, backend, &progress)?;
        say_loaded(place, decoder.weight_bytes(), read.get());
        Ok(LoadedShard {
            decoder,
            identity: checkpoint.identity()?,
        })
    }

    /// What a GPU computes in: what the options say, else what the checkpoint's makers do. GGUF files say nothing of that; what
    /// bfloat16 was made for overflows half precision.
    pub(crate) fn activations(&self) -> ActivationDtype {
        match (self.dtype, &self.origin) {
            (ComputeDtype::Float32, _) => ActivationDtype::F32,
            (ComputeDtype::Float16, _)
            | (
                ComputeDtype::Auto,
                Origin::HuggingFace {
                    weight_dtype: WeightDtype::F16,
                    ..
                },
            ) => ActivationDtype::F16,
            (ComputeDtype::Auto | ComputeDtype::Bfloat16, _) => ActivationDtype::Bf16,
        }
    }

    /// What a server needs, with the model that was loaded from this.
    pub(crate) fn with_model(self, model: Box<dyn Model>) -> LoadedModel {
        LoadedModel {
            model,
            files: match self.origin {
                Origin::Gguf(file) => TokenizerFiles::Gguf(file.into_metadata()),
                Origin::HuggingFace { directory, .. } => TokenizerFiles::HuggingFace(directory),
            },
            tokens: self.tokens,
            generation: self.generation,
            name: self.name,
        }
    }
}

/// One line for each rank, whatever it loaded. What was not read was made, or is mapped and read when it is used.
fn say_loaded(place: Place, weight_bytes: usize, (bytes_read, elapsed): (u64, Duration)) {
    let gib = |bytes: f64| (bytes / f64::from(1 << 30) * 100.0).round() / 100.0;
    let seconds = elapsed.as_secs_f64();
    let gb_per_s = (bytes_read > 0).then(|| {
        let gb_per_s = bytes_read as f64 / 1e9 / seconds.max(1e-9);
        tracing::field::display(format!("{gb_per_s:.2}"))
    });
    tracing::info!(
        rank = place.rank(),
        weights_gib = gib(weight_bytes as f64),
        read_gib = gib(bytes_read as f64),
        elapsed_s = format_args!("{seconds:.2}"),
        gb_per_s,
        "loaded the weights"
    );
}

/// The element type of the KV cache: what the options say, else 16 bits.
#[must_use]
pub fn kv_dtype(options: &LlmOptions) -> KvDtype {
    match (options.kv_cache.dtype, options.dtype) {
        (KvCacheDtype::Fp8, _) => KvDtype::Fp8,
        (KvCacheDtype::Float16, _)
        | (KvCacheDtype::Auto, ComputeDtype::Auto | ComputeDtype::Float16) => KvDtype::F16,
        (KvCacheDtype::Float32, _) | (KvCacheDtype::Auto, ComputeDtype::Float32) => KvDtype::F32,
        (KvCacheDtype::Bfloat16, _) | (KvCacheDtype::Auto, ComputeDtype::Bfloat16) => KvDtype::Bf16,
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
