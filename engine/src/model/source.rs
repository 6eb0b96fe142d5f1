//! What a MODEL argument means: a `.gguf` file, a directory that holds one, a Hugging Face directory, or a hub id
//! (`org/name`) that is already in the local hub cache. Nothing is ever fetched from a network here.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use baton_configs::llm::LoadFormat;

use crate::model::error::{ModelError, ModelErrorKind};
use crate::model::safetensors::{file_name, files_with_extension};

/// The files of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ModelFiles {
    /// One GGUF file.
    Gguf(PathBuf),
    /// A directory with `config.json` and, unless weights are dummies, safetensors.
    HuggingFace(PathBuf),
}

/// A model that is on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ModelSource {
    /// What `/v1/models` calls it unless told otherwise: the hub id, or the directory's or file's name.
    pub(crate) name: String,
    pub(crate) files: ModelFiles,
}

/// The directories that hold `models--org--name`, most specific first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct HubCache {
    pub(crate) roots: Vec<PathBuf>,
}

impl HubCache {
    /// The places that Hugging Face's own tools use, by their variables.
    pub(crate) fn from_environment() -> Self {
        Self::from_variables(|name| std::env::var_os(name).filter(|value| !value.is_empty()))
    }

    fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Self {
        let below = |name: &str, rest: &str| Some(PathBuf::from(variable(name)?).join(rest));
        let candidates = [
            variable("HF_HUB_CACHE").map(PathBuf::from),
            below("HF_HOME", "hub"),
            below("XDG_CACHE_HOME", "huggingface/hub"),
            below("HOME", ".cache/huggingface/hub"),
        ];
        let mut roots: Vec<PathBuf> = Vec::new();
        for root in candidates.into_iter().flatten() {
            if !roots.contains(&root) {
                roots.push(root);
            }
        }
        Self { roots }
    }
}

/// Finds the model that an argument means.
pub(crate) fn find(
    spec: &str,
    revision: Option<&str>,
    load_format: LoadFormat,
    cache: &HubCache,
) -> Result<ModelSource, ModelError> {
    let path = Path::new(spec);
    if path.exists() {
        if let Some(revision) = revision {
            return Err(ModelErrorKind::Ambiguous {
                reason: format!("a path has no revision, but `{revision}` was asked for"),
                hint: "leave the revision out, or give a hub id",
            }
            .of(spec));
        }
        return at_path(path, load_format);
    }
    let Some(folder) = hub_folder(spec) else {
        return Err(ModelErrorKind::NotFound {
            looked: vec![path.to_owned()],
            hint: "give a .gguf file, a Hugging Face directory, or a hub id such as org/name"
                .to_owned(),
        }
        .of(spec));
    };
    let mut looked = vec![path.to_owned()];
    for root in &cache.roots {
        let repository = root.join(&folder);
        if let Some(snapshot) = snapshot(&repository, revision) {
            let mut source = at_path(&snapshot, load_format)?;
            spec.clone_into(&mut source.name);
            return Ok(source);
        }
        looked.push(match revision {
            Some(revision) => repository.join("snapshots").join(revision),
            None => repository,
        });
    }
    let version = revision.map_or_else(String::new, |revision| format!(" --revision {revision}"));
    Err(ModelErrorKind::NotFound {
        looked,
        hint: format!("fetch it with `hf download {spec}{version}`, or give the path of its files"),
    }
    .of(spec))
}

/// `models--org--name` for `org/name`; `None` for what can be no hub id.
fn hub_folder(spec: &str) -> Option<String> {
    let (owner, name) = spec.split_once('/')?;
    let is_part = |part: &str| {
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        !part.is_empty() && !part.starts_with('.') && part.chars().all(good)
    };
    let is_file = Path::new(name).extension().is_some_and(|end| end == "gguf");
    (is_part(owner) && is_part(name) && !is_file).then(|| format!("models--{owner}--{name}"))
}

/// The snapshot directory of a revision (a branch, a tag or a commit), or of `main`, or the newest one.
fn snapshot(repository: &Path, revision: Option<&str>) -> Option<PathBuf> {
    let wanted = revision.unwrap_or("main");
    // A revision must not reach out of the cache.
    if Path::new(wanted).is_absolute() || wanted.split('/').any(|part| part == "..") {
        return None;
    }
    let snapshots = repository.join("snapshots");
    let commit = std::fs::read_to_string(repository.join("refs").join(wanted)).ok();
    let named = commit.as_deref().map(str::trim).unwrap_or(wanted);
    let directory = snapshots.join(named);
    if !named.is_empty() && !named.contains("..") && directory.is_dir() {
        return Some(directory);
    }
    if revision.is_some() {
        return None;
    }
    let modified = |path: &PathBuf| {
        let time = path.metadata().and_then(|metadata| metadata.modified());
        time.unwrap_or(SystemTime::UNIX_EPOCH)
    };
    std::fs::read_dir(snapshots)
        .ok()?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.is_dir())
        .max_by_key(modified)
}

fn at_path(path: &Path, load_format: LoadFormat) -> Result<ModelSource, ModelError> {
    if path.is_dir() {
        let files = in_directory(path, load_format).map_err(|kind| kind.at(path))?;
        // `.` and `..` have no name of their own.
        let full = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        return Ok(ModelSource {
            name: file_name(&full),
            files,
        });
    }
    let stem = path.file_stem().unwrap_or_default();
    Ok(ModelSource {
        name: stem.to_string_lossy().into_owned(),
        files: ModelFiles::Gguf(path.to_owned()),
    })
}

fn in_directory(directory: &Path, load_format: LoadFormat) -> Result<ModelFiles, ModelErrorKind> {
    let has_config = directory.join("config.json").is_file();
    let tensors = files_with_extension(directory, "safetensors")?;
    if has_config && (!tensors.is_empty() || load_format == LoadFormat::Dummy) {
        return Ok(ModelFiles::HuggingFace(directory.to_owned()));
    }
    let gguf = files_with_extension(directory, "gguf")?;
    match gguf.as_slice() {
        [only] => Ok(ModelFiles::Gguf(only.clone())),
        [] => Err(nothing_here(directory, has_config, !tensors.is_empty())),
        several => {
            let names: Vec<_> = several.iter().map(|path| file_name(path)).collect();
            Err(ModelErrorKind::Ambiguous {
                reason: format!("holds {} GGUF files: {}", names.len(), names.join(", ")),
                hint: "give the path of one of them",
            })
        }
    }
}

fn nothing_here(directory: &Path, has_config: bool, has_tensors: bool) -> ModelErrorKind {
    let pickled = files_with_extension(directory, "bin").is_ok_and(|found| !found.is_empty());
    let (missing, hint) = match (has_config, has_tensors) {
        (false, true) => (
            "safetensors but no config.json",
            "fetch the model's config.json into the directory",
        ),
        (true, false) if pickled => (
            "config.json and pickled weights (*.bin) but no *.safetensors",
            "convert the weights to safetensors",
        ),
        (true, _) => (
            "config.json but no *.safetensors",
            "fetch the weights, or set `load_format: dummy` for random ones",
        ),
        (false, false) => (
            "neither a .gguf file nor config.json with *.safetensors",
            "give a .gguf file, a Hugging Face directory, or a hub id such as org/name",
        ),
    };
    ModelErrorKind::Ambiguous {
        reason: format!("holds {missing}"),
        hint,
    }
}

#[cfg(test)]
mod tests;
