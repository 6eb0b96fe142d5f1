//! The safetensors files of a Hugging Face directory, mapped: one file, or shards named by an index.
//!
//! The crate `safetensors` parses and validates a header; that its tensors lie within the file is checked here,
//! with a message that says which tensor a truncated download lacks.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::Deserialize;

use crate::backend::{WeightBytes, WeightDtype, WeightFile};
use crate::model::checkpoint::{FilePlace, RawTensor};
use crate::model::error::{ModelError, ModelErrorKind};
use crate::model::mmap;

const INDEX_FILE: &str = "model.safetensors.index.json";
const SINGLE_FILE: &str = "model.safetensors";
const LENGTH_BYTES: usize = 8;
/// Real headers stay below 1 MB; a parsed one takes a multiple of its text.
const HEADER_BYTES_MAX: u64 = 32 << 20;

/// One opened file.
#[derive(Debug)]
struct Shard {
    file: Arc<WeightFile>,
    map: Arc<Mmap>,
    /// Where tensors' offsets count from.
    data_start: usize,
    header: Metadata,
}

/// All weights of a directory.
#[derive(Debug)]
pub(crate) struct Shards {
    directory: PathBuf,
    shards: Vec<Shard>,
    /// Which shard holds a tensor.
    owners: HashMap<String, usize>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Shards {
    /// Maps the directory's files and reads their headers.
    pub(crate) fn open(directory: &Path) -> Result<Self, ModelError> {
        let mut opened = Self {
            directory: directory.to_owned(),
            shards: Vec::new(),
            owners: HashMap::new(),
        };
        for path in weight_files(directory)? {
            let shard = Shard::open(&path)?;
            let index = opened.shards.len();
            for name in shard.header.tensors().into_keys() {
                opened.owners.insert(name, index);
            }
            opened.shards.push(shard);
        }
        Ok(opened)
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// The files, in a fixed order.
    pub(crate) fn files(&self) -> impl Iterator<Item = &WeightFile> {
        self.shards.iter().map(|shard| shard.file.as_ref())
    }

    /// Whether there is such a tensor.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.owners.contains_key(name)
    }

    /// A tensor's shape, type and bytes.
    pub(crate) fn tensor(&self, name: &str) -> Result<RawTensor, ModelError> {
        match self.owners.get(name) {
            Some(&owner) => {
                let shard = &self.shards[owner];
                shard
                    .tensor(name)
                    .map_err(|kind| kind.at(shard.file.path()))
            }
            None => Err(ModelErrorKind::MissingTensor(name.to_owned()).at(&self.directory)),
        }
    }
}

/// What stands beside the weights of a checkpoint in 8 bits.
impl Shards {
    /// The scales of a weight: one, or one for each of its rows.
    pub(crate) fn scales(&self, weight: &str, rows: usize) -> Result<Arc<[f32]>, ModelError> {
        let name = format!("{weight}_scale");
        let tensor = self.tensor(&name)?;
        let bytes = &read(&tensor).map_err(|kind| kind.at(&self.directory))?;
        let scales: Arc<[f32]> = match tensor.dtype {
            WeightDtype::F32 => bytes
                .as_chunks()
                .0
                .iter()
                .map(|&bytes| f32::from_le_bytes(bytes))
                .collect(),
            WeightDtype::Bf16 => bytes
                .as_chunks()
                .0
                .iter()
                .map(|&bytes| half::bf16::from_le_bytes(bytes).to_f32())
                .collect(),
            other => {
                let kind = ModelErrorKind::Dtype {
                    tensor: name,
                    dtype: format!("{other:?}"),
                    served: &["F32", "BF16"],
                };
                return Err(kind.at(&self.directory));
            }
        };
        let fits = scales.len() == 1 || scales.len() == rows;
        let positive = scales.iter().all(|scale| scale.is_finite() && *scale > 0.0);
        if !fits {
            let kind = ModelErrorKind::Shape {
                tensor: name,
                found: tensor.dims,
                expected: vec![rows],
            };
            return Err(kind.at(&self.directory));
        }
        if !positive {
            let reason = format!("tensor `{name}` has a scale that is no positive number");
            let format = "safetensors";
            return Err(ModelErrorKind::Header { format, reason }.at(&self.directory));
        }
        Ok(scales)
    }
}

impl Shard {
    fn open(path: &Path) -> Result<Self, ModelError> {
        let failed = |error| ModelErrorKind::Io(error).at(path);
        let file = WeightFile::open(path).map_err(failed)?;
        let map = mmap::map(&file).map_err(failed)?;
        let (data_start, header) = read_header(&map).map_err(|reason| {
            let format = "safetensors";
            ModelErrorKind::Header { format, reason }.at(path)
        })?;
        Ok(Self {
            file: Arc::new(file),
            map: Arc::new(map),
            data_start,
            header,
        })
    }

    fn tensor(&self, name: &str) -> Result<RawTensor, ModelErrorKind> {
        let info = self
            .header
            .info(name)
            .ok_or_else(|| ModelErrorKind::MissingTensor(name.to_owned()))?;
        let dtype = match info.dtype {
            Dtype::F32 => WeightDtype::F32,
            Dtype::F16 => WeightDtype::F16,
            Dtype::BF16 => WeightDtype::Bf16,
            Dtype::F8_E4M3 => WeightDtype::F8E4m3,
            other => {
                return Err(ModelErrorKind::Dtype {
                    tensor: name.to_owned(),
                    dtype: format!("{other:?}"),
                    served: &["F32", "F16", "BF16", "F8_E4M3"],
                });
            }
        };
        let (start, end) = info.data_offsets;
        let data_len = self.map.len() - self.data_start;
        if end > data_len {
            return Err(ModelErrorKind::Truncated {
                tensor: name.to_owned(),
                offset: (self.data_start as u64).saturating_add(start as u64),
                needed: end.saturating_sub(start) as u64,
                there: data_len.saturating_sub(start) as u64,
            });
        }
        Ok(RawTensor {
            dims: info.shape.clone(),
            dtype,
            bytes: WeightBytes::Shared {
                buffer: Arc::<Mmap>::clone(&self.map),
                range: self.data_start + start..self.data_start + end,
            },
            place: Some(FilePlace {
                file: Arc::clone(&self.file),
                offset: (self.data_start + start) as u64,
            }),
            scales: None,
        })
    }
}

/// A small tensor's bytes, read from its file.
fn read(tensor: &RawTensor) -> Result<Vec<u8>, ModelErrorKind> {
    let mut bytes = vec![0; tensor.bytes.len()];
    match &tensor.place {
        Some(place) => place.file.read(place.offset, &mut bytes)?,
        None => bytes.copy_from_slice(tensor.bytes.as_slice()),
    }
    Ok(bytes)
}

/// The start of the data and the validated header, or what is wrong with it.
fn read_header(file: &[u8]) -> Result<(usize, Metadata), String> {
    let (prefix, rest) = file
        .split_first_chunk::<LENGTH_BYTES>()
        .ok_or_else(|| format!("the file has only {} bytes", file.len()))?;
    let declared = u64::from_le_bytes(*prefix);
    if declared > HEADER_BYTES_MAX {
        return Err(format!(
            "it claims a header of {declared} bytes; {HEADER_BYTES_MAX} are allowed"
        ));
    }
    let header = usize::try_from(declared)
        .ok()
        .and_then(|len| rest.get(..len))
        .ok_or_else(|| {
            format!(
                "it claims a header of {declared} bytes, {} are there",
                rest.len()
            )
        })?;
    // Deserialising validates: offsets without gap or overlap, sizes that match shapes, no overflow.
    let metadata = serde_json::from_slice(header).map_err(|error| error.to_string())?;
    Ok((LENGTH_BYTES + header.len(), metadata))
}

/// The files that hold the directory's weights, in a fixed order.
fn weight_files(directory: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let index = directory.join(INDEX_FILE);
    if index.is_file() {
        return indexed_files(directory, &index);
    }
    let single = directory.join(SINGLE_FILE);
    if single.is_file() {
        return Ok(vec![single]);
    }
    // Mistral's repositories hold the same weights once more under its own names.
    let mut found = files_with_extension(directory, "safetensors")
        .map_err(|error| ModelErrorKind::Io(error).at(directory))?;
    found.retain(|path| !file_name(path).starts_with("consolidated"));
    Ok(found)
}

fn indexed_files(directory: &Path, index: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let text =
        std::fs::read_to_string(index).map_err(|error| ModelErrorKind::Io(error).at(index))?;
    let parsed: Index = serde_json::from_str(&text).map_err(|error| {
        let (format, reason) = ("safetensors index", error.to_string());
        ModelErrorKind::Header { format, reason }.at(index)
    })?;
    let names: BTreeSet<String> = parsed.weight_map.into_values().collect();
    let mut paths = Vec::with_capacity(names.len());
    for name in names {
        // An index must not reach out of its directory.
        if name.contains(['/', '\\']) {
            let reason = format!("names `{name}`, which is not a file name");
            return Err(ModelErrorKind::config("weight_map", reason).at(index));
        }
        let path = directory.join(&name);
        if !path.is_file() {
            let reason = format!("names {name}, which is not there: the download is incomplete");
            return Err(ModelErrorKind::config("weight_map", reason).at(index));
        }
        paths.push(path);
    }
    Ok(paths)
}

/// The directory's files with an extension, sorted by name.
pub(crate) fn files_with_extension(
    directory: &Path,
    extension: &str,
) -> std::io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_some_and(|found| found == extension) && path.is_file() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// A path's last part, for messages and comparisons.
pub(crate) fn file_name(path: &Path) -> String {
    path.file_name()
        .map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}
