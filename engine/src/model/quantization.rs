//! What ModelOpt says of a checkpoint that it quantised: `hf_quant_config.json`. Served are its FP8 exports, with one scale a
//! matrix or one a row. Activations are scaled by what they hold, token by token, so its scales for them are not needed; a KV
//! pool in 8 bits is asked for by `kv_cache_config.dtype`, whatever the file says, because both sides of a hand-off must agree. If it
//! is, it takes the scales that stand beside the weights, where a checkpoint has them.

use std::io::ErrorKind;
use std::path::Path;

use serde::Deserialize;

use crate::model::error::{ModelError, ModelErrorKind};
use crate::model::safetensors::Shards;
use crate::page::KvScale;

const FILE: &str = "hf_quant_config.json";

/// What a layer's scales may be called, each before `_scale`: by ModelOpt, by the modules of engines that load it, by
/// compressed-tensors.
type Part = [&'static str; 3];
const KEYS: Part = ["k_proj.k", "attn.k", "k"];
const VALUES: Part = ["v_proj.v", "attn.v", "v"];

#[derive(Deserialize)]
struct File {
    quantization: Quantization,
}

#[derive(Deserialize)]
struct Quantization {
    quant_algo: Option<String>,
    kv_cache_quant_algo: Option<String>,
}

/// What the file of a directory says; `None` where there is none.
fn read(directory: &Path) -> Result<Option<Quantization>, ModelError> {
    let path = directory.join(FILE);
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(ModelErrorKind::Io(error).at(&path)),
    };
    let file: File = serde_json::from_str(&text).map_err(|error| {
        let (format, reason) = (FILE, error.to_string());
        ModelErrorKind::Header { format, reason }.at(&path)
    })?;
    Ok(Some(file.quantization))
}

/// Whether a directory's projections are in 8 bits.
pub(super) fn of_directory(directory: &Path) -> Result<bool, ModelError> {
    let Some(found) = read(directory)? else {
        return Ok(false);
    };
    is_8_bit(found.quant_algo.as_deref()).map_err(|kind| kind.at(&directory.join(FILE)))
}

/// How each layer's KV is scaled in 8 bits, by what stands beside a directory's weights; empty where nothing does.
pub(super) fn kv_scales(directory: &Path, layers: usize) -> Result<Vec<KvScale>, ModelError> {
    let algorithm = read(directory)?.and_then(|found| found.kv_cache_quant_algo);
    if algorithm.is_some_and(|algorithm| algorithm != "FP8") {
        // Scales of another format say nothing of this one.
        return Ok(Vec::new());
    }
    let shards = Shards::open(directory)?;
    let scale = |layer: usize, part: &Part| {
        let found = part.iter().find_map(|of_layer| {
            let name = format!("model.layers.{layer}.self_attn.{of_layer}");
            shards.has(&format!("{name}_scale")).then_some(name)
        });
        let scales = found.map(|name| shards.scales(&name, 1)).transpose()?;
        Ok(scales.map(|scales| scales[0]))
    };
    let mut found = Vec::with_capacity(layers);
    for layer in 0..layers {
        found.push((scale(layer, &KEYS)?, scale(layer, &VALUES)?));
    }
    if found.iter().all(|pair| *pair == (None, None)) {
        return Ok(Vec::new());
    }
    let whole = found.into_iter().enumerate().map(|(layer, pair)| {
        let (Some(key), Some(value)) = pair else {
            let (format, reason) = (
                "safetensors",
                format!("layer {layer} lacks a scale for 8-bit KV that others have"),
            );
            return Err(ModelErrorKind::Header { format, reason }.at(directory));
        };
        Ok(KvScale { key, value })
    });
    whole.collect()
}

/// Whether an algorithm of ModelOpt's is one with weights in 8 bits.
pub(super) fn is_8_bit(algorithm: Option<&str>) -> Result<bool, ModelErrorKind> {
    match algorithm {
        None => Ok(false),
        Some("FP8" | "FP8_PER_CHANNEL_PER_TOKEN") => Ok(true),
        Some(other) => Err(ModelErrorKind::Unsupported {
            what: format!("`quant_algo` {other}"),
            hint: "served are FP8 and FP8_PER_CHANNEL_PER_TOKEN, and unquantised models",
        }),
    }
}
