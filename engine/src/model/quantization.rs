//! What ModelOpt says of a checkpoint that it quantised: `hf_quant_config.json`. Served are its FP8 exports, with one scale a
//! matrix or one a row. Activations are scaled by what they hold, token by token, so its scales for them are not needed; a KV
//! pool in 8 bits is asked for by `kv_cache_config.dtype`, whatever the file says, because both sides of a hand-off must agree.

use std::io::ErrorKind;
use std::path::Path;

use serde::Deserialize;

use crate::model::error::{ModelError, ModelErrorKind};

const FILE: &str = "hf_quant_config.json";

#[derive(Deserialize)]
struct File {
    quantization: Quantization,
}

#[derive(Deserialize)]
struct Quantization {
    quant_algo: Option<String>,
}

/// Whether a directory's projections are in 8 bits.
pub(super) fn of_directory(directory: &Path) -> Result<bool, ModelError> {
    let path = directory.join(FILE);
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(ModelErrorKind::Io(error).at(&path)),
    };
    let file: File = serde_json::from_str(&text).map_err(|error| {
        let (format, reason) = (FILE, error.to_string());
        ModelErrorKind::Header { format, reason }.at(&path)
    })?;
    is_8_bit(file.quantization.quant_algo.as_deref()).map_err(|kind| kind.at(&path))
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
