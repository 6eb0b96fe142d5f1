//! The kernels: their sources, which are part of this binary, and their compiled forms, which are kept on disk.
//!
//! A cubin is keyed by source, definitions, compiler version and architecture, and written whole or not at all, so that any
//! number of processes share the folder. A damaged or missing one is compiled again; without a folder all of them are.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use baton_configs::small_file::write_whole;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use super::compiler::Compiler;
use super::driver::{Function, Gpu, Module};
use super::error::CudaError;
use crate::backend::ActivationDtype;
use crate::page::{KvDtype, PageShape};

const PRELUDE: &str = include_str!("../../../kernels/prelude.cuh");
const ATTENTION: &str = include_str!("../../../kernels/attention.cuh");
const ROUNDING: &str = include_str!("../../../kernels/rounding.cuh");

/// One `.cu` file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Source {
    Choose,
    Carry,
    Embed,
    SelectRows,
    Convert,
    Pattern,
    RmsNorm,
    Elementwise,
    Linear,
    LinearE4m3,
    LinearRowsE4m3,
    Quantize,
    Rope,
    AttentionAny,
    AttentionPrefill,
    AttentionPrefillHopper,
    AttentionDecode,
    Handoff,
    SumOverRanks,
}

impl Source {
    #[cfg(test)]
    pub(super) const ALL: [Self; 19] = [
        Self::Choose,
        Self::Carry,
        Self::Embed,
        Self::SelectRows,
        Self::Convert,
        Self::Pattern,
        Self::RmsNorm,
        Self::Elementwise,
        Self::Linear,
        Self::LinearE4m3,
        Self::LinearRowsE4m3,
        Self::Quantize,
        Self::Rope,
        Self::AttentionAny,
        Self::AttentionPrefill,
        Self::AttentionPrefillHopper,
        Self::AttentionDecode,
        Self::Handoff,
        Self::SumOverRanks,
    ];

    /// File name and text.
    const fn file(self) -> (&'static str, &'static str) {
        macro_rules! kernel {
            ($name:literal) => {
                ($name, include_str!(concat!("../../../kernels/", $name)))
            };
        }
        match self {
            Self::Choose => kernel!("choose.cu"),
            Self::Carry => kernel!("carry.cu"),
            Self::Embed => kernel!("embed.cu"),
            Self::SelectRows => kernel!("select_rows.cu"),
            Self::Convert => kernel!("convert.cu"),
            Self::Pattern => kernel!("pattern.cu"),
            Self::RmsNorm => kernel!("rms_norm.cu"),
            Self::Elementwise => kernel!("elementwise.cu"),
            Self::Linear => kernel!("linear.cu"),
            Self::LinearE4m3 => kernel!("linear_e4m3.cu"),
            Self::LinearRowsE4m3 => kernel!("linear_rows_e4m3.cu"),
            Self::Quantize => kernel!("quantize.cu"),
            Self::Rope => kernel!("rope.cu"),
            Self::AttentionAny => kernel!("attention_any.cu"),
            Self::AttentionPrefill => kernel!("attention_prefill.cu"),
            Self::AttentionPrefillHopper => kernel!("attention_prefill_hopper.cu"),
            Self::AttentionDecode => kernel!("attention_decode.cu"),
            Self::Handoff => kernel!("handoff.cu"),
            Self::SumOverRanks => kernel!("sum_over_ranks.cu"),
        }
    }

    /// The whole text that is compiled.
    fn text(self) -> String {
        let (_, text) = self.file();
        let shared = match self {
            Self::AttentionAny
            | Self::AttentionPrefill
            | Self::AttentionPrefillHopper
            | Self::AttentionDecode => ATTENTION,
            Self::RmsNorm | Self::Elementwise | Self::Quantize => ROUNDING,
            _ => "",
        };
        [PRELUDE, shared, text].concat()
    }

    /// What it is compiled for where the device is of this kind. `sm_90a` has what only Hopper has, and runs nowhere else.
    fn target(self, device: &str) -> String {
        match self {
            Self::AttentionPrefillHopper => format!("{device}a"),
            _ => device.to_owned(),
        }
    }
}

/// What a source is compiled for, besides the architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(super) struct Variant {
    /// `D`; 0 where the source does not depend on it.
    pub(super) head_dim: usize,
    /// `P` and the pages' element type, where the source depends on them.
    pub(super) pages: Option<(usize, KvDtype)>,
}

impl Variant {
    /// For a pool's pages.
    pub(super) const fn of_pages(shape: &PageShape) -> Self {
        Self {
            head_dim: shape.head_dim,
            pages: Some((shape.tokens_per_block, shape.dtype)),
        }
    }

    /// For heads outside the pages.
    pub(super) const fn of_heads(head_dim: usize) -> Self {
        Self {
            head_dim,
            pages: None,
        }
    }

    /// What the text is compiled with. That of activations matters to few sources that do without them, and is one more copy there.
    fn defines(self, activations: ActivationDtype) -> Vec<String> {
        let mut defines = Vec::new();
        if activations == ActivationDtype::F16 {
            defines.push("ACT_F16=1".to_owned());
        }
        if self.head_dim > 0 {
            defines.push(format!("D={}", self.head_dim));
        }
        if let Some((tokens_per_block, dtype)) = self.pages {
            let kv = match dtype {
                KvDtype::F32 => 0,
                KvDtype::F16 => 1,
                KvDtype::Bf16 => 2,
                KvDtype::Fp8 => 3,
            };
            defines.push(format!("P={tokens_per_block}"));
            defines.push(format!("KV={kv}"));
        }
        defines
    }
}

/// A kernel of a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Kernel {
    pub(super) source: Source,
    pub(super) variant: Variant,
    pub(super) name: &'static str,
    /// Dynamic shared memory, at most.
    pub(super) shared_bytes: u32,
}

/// Compiled and loaded kernels of one device.
#[derive(Debug)]
pub(super) struct Kernels {
    gpu: Arc<Gpu>,
    compiler: Result<Compiler, CudaError>,
    folder: Option<PathBuf>,
    activations: ActivationDtype,
    modules: HashMap<(Source, Variant), Module>,
    functions: HashMap<Kernel, Function>,
}

impl Kernels {
    /// For what has nothing to do with activations.
    pub(super) fn new(gpu: &Arc<Gpu>) -> Self {
        Self::of(gpu, ActivationDtype::Bf16)
    }

    /// For activations of this type.
    pub(super) fn of(gpu: &Arc<Gpu>, activations: ActivationDtype) -> Self {
        Self {
            gpu: Arc::clone(gpu),
            compiler: Compiler::open(),
            folder: cache_folder(),
            activations,
            modules: HashMap::new(),
            functions: HashMap::new(),
        }
    }

    /// Whether kernels can be compiled.
    pub(super) fn check(&self) -> Result<(), CudaError> {
        self.compiler.clone().map(drop)
    }

    /// The kernel, compiled and loaded where it is not yet.
    pub(super) fn get(&mut self, kernel: &Kernel) -> Result<Function, CudaError> {
        if let Some(&function) = self.functions.get(kernel) {
            return Ok(function);
        }
        let key = (kernel.source, kernel.variant);
        let module = match self.modules.get(&key) {
            Some(&module) => module,
            None => {
                let module = self.load(kernel.source, kernel.variant)?;
                self.modules.insert(key, module);
                module
            }
        };
        let function = module.function(&self.gpu, kernel.name, kernel.shared_bytes)?;
        self.functions.insert(*kernel, function);
        Ok(function)
    }

    fn load(&self, source: Source, variant: Variant) -> Result<Module, CudaError> {
        let compiler = self.compiler.clone()?;
        let (target, defines) = (
            source.target(&self.gpu.target()),
            variant.defines(self.activations),
        );
        let text = source.text();
        let file = self.folder.as_ref().map(|folder| {
            let key = format!("{text}\0{defines:?}\0{:?}\0{target}", compiler.version);
            folder.join(format!("{:032x}.cubin", xxh3_128(key.as_bytes())))
        });
        if let Some(cubin) = file.as_deref().and_then(read_checked)
            && let Ok(module) = Module::load(&self.gpu, &cubin)
        {
            return Ok(module);
        }
        let (name, _) = source.file();
        tracing::debug!(kernel = name, target, ?defines, "compiling");
        let cubin = compiler.cubin((name, &text), &target, &defines)?;
        if let Some(file) = &file {
            keep(file, &cubin);
        }
        Module::load(&self.gpu, &cubin)
    }
}

/// `baton/kernels` in the user's cache folder.
fn cache_folder() -> Option<PathBuf> {
    let absolute = |path: PathBuf| path.is_absolute().then_some(path);
    let base = std::env::var_os("XDG_CACHE_HOME")
        .and_then(|path| absolute(path.into()))
        .or_else(|| Some(absolute(std::env::var_os("HOME")?.into())?.join(".cache")))?;
    Some(base.join("baton/kernels"))
}

/// Writes a cubin with its checksum behind it. That it cannot be kept costs time at the next start, and nothing else.
fn keep(file: &Path, cubin: &[u8]) {
    let sealed = [cubin, &xxh3_64(cubin).to_le_bytes()].concat();
    let made = file.parent().map_or(Ok(()), fs::create_dir_all);
    if let Err(error) = made.and_then(|()| write_whole(file, sealed)) {
        tracing::debug!(file = %file.display(), %error, "a compiled kernel is not kept");
    }
}

/// A cubin that was kept, if it is whole.
fn read_checked(file: &Path) -> Option<Vec<u8>> {
    let mut bytes = fs::read(file).ok()?;
    let (cubin, checksum) = bytes.split_last_chunk::<8>()?;
    let whole = xxh3_64(cubin) == u64::from_le_bytes(*checksum);
    let len = cubin.len();
    bytes.truncate(len);
    whole.then_some(bytes)
}

#[cfg(test)]
mod tests;
