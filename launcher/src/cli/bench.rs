//! The arguments of `baton bench` and `baton doctor`.

mod serve;

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

pub(crate) use self::serve::{
    BenchServeArgs, EndpointArg, FindingArg, LoadArgs, ObjectiveArg, PresetArg, PromptArgs,
    PromptFormatArg, SamplingArgs,
};
use super::LogLevel;

/// What `baton bench` measures.
#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Move KV of a model's shape between two processes over each transport; verify every byte, then time it.
    Kv(Box<BenchKvArgs>),
    /// The holding side of `bench kv`, on standard input and output; `bench kv` starts it.
    #[command(hide = true)]
    KvHold,
    /// Measure a server, a deployment or the engine alone under load, and judge whether the figures mean something.
    ///
    /// Names of vLLM's `bench serve` and TensorRT-LLM's `benchmark_serving` are understood where they differ, as
    /// `--random-input-len` or `--max-concurrency`. Percentiles, TTFT, ITL and TPOT are defined as vLLM's.
    #[command(mut_args(serve::without_engine_options))]
    Serve(Box<BenchServeArgs>),
}

#[derive(Debug, Args)]
pub(crate) struct BenchKvArgs {
    /// Transports, comma-separated. `all` takes those that are there and lists the others.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "all")]
    pub(crate) transport: Vec<TransportArg>,
    /// Transfer a request of so many tokens; a comma-separated list runs each.
    #[arg(long, value_delimiter = ',', default_value = "512,2048,8192")]
    pub(crate) tokens: Vec<usize>,
    /// Tokens of one block, the unit of transfer; a list runs each.
    #[arg(long, value_delimiter = ',', default_value = "32")]
    pub(crate) tokens_per_block: Vec<usize>,
    /// Scatter the KV over pieces of this size instead of whole blocks: 65536 is one layer's keys of a block of
    /// Llama-3.1-8B, as an engine has them that keeps its pool layer by layer.
    #[arg(long, value_name = "BYTES", conflicts_with = "tokens_per_block")]
    pub(crate) piece_bytes: Option<usize>,
    /// Requests in flight at once; a list runs each.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    pub(crate) concurrency: Vec<usize>,
    /// With checksums, as always when serving, or without, which tells what they cost.
    #[arg(long, value_enum, default_value = "on")]
    pub(crate) checksum: ChecksumArg,
    /// Timed rounds.
    #[arg(long, default_value_t = 5, value_parser = at_least_one)]
    pub(crate) repeat: usize,
    /// Rounds before them, verified but not timed.
    #[arg(long, default_value_t = 1)]
    pub(crate) warmup: usize,
    /// Where the KV lies on both sides. `cuda` is a GPU's memory: of the first GPU that the holding side sees, and of the
    /// last that the fetching side does.
    #[arg(long, value_enum, default_value = "cpu")]
    pub(crate) device: KvDeviceArg,
    /// End with exit code 79 when a pair moves fewer gigabytes (10⁹ bytes) a second.
    #[arg(long, value_name = "GB/S", value_parser = rate)]
    pub(crate) floor: Option<f64>,
    /// Longest time for one round, in seconds.
    #[arg(long, default_value_t = 60, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) timeout: u64,
    /// Print the report as JSON.
    #[arg(long)]
    pub(crate) json: bool,
    /// Write the report as JSON here too.
    #[arg(long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    #[arg(short, long, value_enum, default_value = "warning")]
    pub(crate) log_level: LogLevel,
    #[command(flatten)]
    pub(crate) shape: ShapeArgs,
    #[command(flatten)]
    pub(crate) peer: PeerArgs,
}

/// A model's KV: by name, or number by number.
#[derive(Debug, Args)]
#[command(next_help_heading = "Shape of the KV")]
pub(crate) struct ShapeArgs {
    /// A model: llama-3.1-8b, llama-3.1-70b, qwen3-8b, …; an unknown name lists them.
    #[arg(long, default_value = "llama-3.1-8b", value_name = "NAME")]
    pub(crate) shape: String,
    /// Layers, in place of the model's.
    #[arg(long, value_name = "N")]
    pub(crate) layers: Option<usize>,
    /// KV heads, in place of the model's.
    #[arg(long, value_name = "N")]
    pub(crate) kv_heads: Option<usize>,
    /// Size of a head, in place of the model's.
    #[arg(long, value_name = "N")]
    pub(crate) head_dim: Option<usize>,
    /// Element type, in place of the model's.
    #[arg(long, value_enum)]
    pub(crate) dtype: Option<DtypeArg>,
}

impl ShapeArgs {
    /// A model's own numbers.
    pub(crate) fn named(shape: &str) -> Self {
        Self {
            shape: shape.to_owned(),
            layers: None,
            kv_heads: None,
            head_dim: None,
            dtype: None,
        }
    }
}

/// Where the other process is. Without any of these it is started here, as a child.
#[derive(Debug, Args)]
#[command(next_help_heading = "Between machines")]
pub(crate) struct PeerArgs {
    /// Hold the KV for whoever comes with --peer, and end as it ends; all else is said there.
    #[arg(long, value_name = "HOST:PORT", conflicts_with = "peer")]
    pub(crate) listen: Option<String>,
    /// Fetch the KV from the process that listens there.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) peer: Option<String>,
    /// Write the HOST:PORT that --listen has bound here.
    #[arg(long, value_name = "FILE", requires = "listen")]
    pub(crate) report_addr: Option<PathBuf>,
    /// How long to wait for the other side to come, in seconds.
    #[arg(long, default_value_t = 60, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) wait: u64,
}

#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Print the findings as JSON.
    #[arg(long)]
    pub(crate) json: bool,
    /// End with exit code 79 when a transport moves fewer gigabytes (10⁹ bytes) a second between two processes here.
    #[arg(long, value_name = "GB/S", value_parser = rate)]
    pub(crate) wire_floor: Option<f64>,
    /// Look only: move no bytes.
    #[arg(long, conflicts_with = "wire_floor")]
    pub(crate) no_wire: bool,
    #[arg(short, long, value_enum, default_value = "warning")]
    pub(crate) log_level: LogLevel,
}

/// `--transport`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum TransportArg {
    All,
    #[value(name = "cuda_ipc", alias = "cuda-ipc")]
    CudaIpc,
    Tcp,
    Shm,
    Ucx,
    Nixl,
    Mpi,
}

impl TransportArg {
    /// The engine's name for it; `None` for all of them.
    pub(crate) const fn name(self) -> Option<&'static str> {
        match self {
            Self::All => None,
            Self::CudaIpc => Some("cuda_ipc"),
            Self::Tcp => Some("tcp"),
            Self::Shm => Some("shm"),
            Self::Ucx => Some("ucx"),
            Self::Nixl => Some("nixl"),
            Self::Mpi => Some("mpi"),
        }
    }
}

/// `--checksum`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ChecksumArg {
    /// With.
    On,
    /// Without.
    Off,
    /// Each case with, and then without.
    Both,
}

/// `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum KvDeviceArg {
    /// Ordinary memory.
    Cpu,
    /// Memory of a GPU.
    Cuda,
}

/// `--dtype`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DtypeArg {
    #[value(alias = "f32")]
    Float32,
    #[value(alias = "f16")]
    Float16,
    #[value(alias = "bf16")]
    Bfloat16,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("expected a number from 1".to_owned()),
        Ok(number) => Ok(number),
    }
}

fn seconds(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(seconds @ 1..=86_400) => Ok(seconds),
        Ok(_) | Err(_) => Err("expected seconds from 1 to 86400".to_owned()),
    }
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate.is_finite() && rate > 0.0 => Ok(rate),
        Ok(_) | Err(_) => Err("expected gigabytes a second, more than 0".to_owned()),
    }
}
