//! The command line: typed flags, no I/O.
//!
//! Option names are declared with dashes; [`normalise`] maps TensorRT-LLM's underscore spellings onto them and
//! puts `serve` in front when the first word is a model, as `trtllm-serve` does (COMPAT.md §3).

mod bench;
pub(crate) mod slurm;
mod world;

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub(crate) use self::bench::{
    BenchCommand, BenchKvArgs, BenchServeArgs, ChecksumArg, DoctorArgs, DtypeArg, EndpointArg,
    FindingArg, KvDeviceArg, LoadArgs, ObjectiveArg, PresetArg, PromptArgs, PromptFormatArg,
    SamplingArgs, ShapeArgs, TransportArg,
};
pub(crate) use self::world::{FabricArg, LaunchArgs, LlmapiLaunchArgs, MpiWorkerArgs, WorldArgs};
use crate::cli::slurm::SlurmCommand;
use crate::exit;

/// Disaggregated LLM serving: context servers read, generation servers write, the KV cache travels between them.
#[derive(Debug, Parser)]
#[command(name = "baton", version, after_long_help = exit::help_text(), propagate_version = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a whole layout on this machine: instances, proxy, health, one log view.
    Up(UpArgs),
    /// Run one instance: an OpenAI-compatible server of one model (the default when the first word is a model).
    Serve(Box<ServeArgs>),
    /// Run the proxy in front of context and generation servers.
    Disaggregated(DisaggregatedArgs),
    /// Run a deployment, or a command, on the ranks that srun or mpirun started: every task runs this.
    Launch(LaunchArgs),
    /// Run a command on rank 0 of the ranks that srun or mpirun started; the other ranks serve it.
    LlmapiLaunch(LlmapiLaunchArgs),
    /// Run a disagg_config.yaml on the ranks that mpirun or srun started (as `launch -c`).
    #[command(name = "disaggregated_mpi_worker", alias = "disaggregated-mpi-worker")]
    DisaggregatedMpiWorker(MpiWorkerArgs),
    /// One follower rank of an instance; launchers start it.
    #[command(hide = true)]
    Rank,
    /// Send prompts to a deployment and write the answers.
    Client(ClientArgs),
    /// Check, explain and describe configuration files.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Plan, render, submit and end deployments on a Slurm cluster.
    #[command(subcommand)]
    Slurm(SlurmCommand),
    /// Measure: a server or a deployment under load, the engine alone, the KV hand-off between two processes.
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Say what this machine or allocation can do, what is missing, and how fast its KV transports are.
    Doctor(DoctorArgs),
}

/// Every sub-command's name, in the order of `--help`.
pub(crate) const COMMANDS: &[&str] = &[
    "up",
    "serve",
    "disaggregated",
    "launch",
    "llmapi-launch",
    "disaggregated_mpi_worker",
    "rank",
    "client",
    "config",
    "slurm",
    "bench",
    "doctor",
    "help",
];

#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    /// Layout file, or a disagg_config.yaml that names its model. Without one: two context servers, one generation
    /// server and the proxy for --model.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Model: GGUF file, Hugging Face directory, or the id of a model in the local hub cache. Overrides the file's.
    #[arg(short, long)]
    pub(crate) model: Option<String>,
    /// Where configs and one log file per process go [default: ./baton-logs].
    #[arg(long, value_name = "DIR")]
    pub(crate) log_dir: Option<PathBuf>,
    /// Proxy port; 0 lets the kernel choose. Overrides the file's.
    #[arg(short, long)]
    pub(crate) port: Option<u16>,
    /// Write the proxy's host:port here once it is bound.
    #[arg(long, value_name = "FILE")]
    pub(crate) report_addr: Option<PathBuf>,
    /// Write the proxy's host:port here once the deployment can serve.
    #[arg(long, value_name = "FILE")]
    pub(crate) ready_file: Option<PathBuf>,
    /// Longest time from start to ready, in seconds.
    #[arg(short = 't', long, default_value_t = 180, value_name = "SECONDS")]
    pub(crate) server_start_timeout: u64,
    /// How long running requests may take to finish after Ctrl-C, in seconds.
    #[arg(long, default_value_t = 30, value_name = "SECONDS")]
    pub(crate) drain_timeout: u64,
    /// Print what would be started, and stop.
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[arg(short, long, value_enum, default_value_t)]
    pub(crate) log_level: LogLevel,
}

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// GGUF file, Hugging Face directory, or the id of a model in the local hub cache.
    pub(crate) model: String,
    /// Bind address.
    #[arg(long, default_value = "localhost")]
    pub(crate) host: String,
    /// Bind port; 0 lets the kernel choose and needs --report-addr.
    #[arg(long, default_value_t = 8000)]
    pub(crate) port: u16,
    /// Write host:port here once the socket is bound.
    #[arg(long, value_name = "FILE")]
    pub(crate) report_addr: Option<PathBuf>,
    /// LLM options file (YAML). Wins over the command line.
    #[arg(long, visible_alias = "extra-llm-api-options", value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// CONTEXT or GENERATION; a worker serves both kinds of request, so this only says as what it registers.
    #[arg(long, value_parser = parse_role)]
    pub(crate) server_role: Option<ServerRole>,
    /// Register with the proxy at http://HOST:PORT, so that it finds this server. Needs --server-role.
    #[arg(long, value_name = "URI")]
    pub(crate) disagg_cluster_uri: Option<String>,
    /// Name of this instance in logs and hand-off messages [default: its role].
    #[arg(long, value_name = "NAME")]
    pub(crate) instance: Option<String>,
    /// Engine kind; `pytorch`, `tensorrt` and `_autodeploy` are accepted for scripts and mean Baton's engine.
    #[arg(long, value_parser = ["pytorch", "tensorrt", "trt", "_autodeploy"], hide_possible_values = true)]
    pub(crate) backend: Option<String>,
    /// Tokenizer directory or file that replaces the model's own.
    #[arg(long)]
    pub(crate) tokenizer: Option<String>,
    /// Chat template (file or inline text) that replaces the model's own.
    #[arg(long)]
    pub(crate) chat_template: Option<String>,
    /// Revision of a model in the hub cache.
    #[arg(long)]
    pub(crate) revision: Option<String>,
    #[arg(short, long, value_enum, default_value_t)]
    pub(crate) log_level: LogLevel,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

/// Engine options that the options file may override.
#[derive(Debug, Clone, PartialEq, Default, Args)]
#[command(next_help_heading = "Engine")]
pub(crate) struct EngineArgs {
    /// What computes; `auto` takes a GPU that can be used, else the CPU.
    #[arg(long, value_enum)]
    pub(crate) device: Option<EngineDeviceArg>,
    /// Where weights come from; `dummy` makes random ones of the model's shape, for measurements.
    #[arg(long, value_enum)]
    pub(crate) load_format: Option<LoadFormatArg>,
    /// Most sequences in one step.
    #[arg(long)]
    pub(crate) max_batch_size: Option<u32>,
    /// Most tokens in one step.
    #[arg(long)]
    pub(crate) max_num_tokens: Option<u32>,
    /// Longest sequence, prompt and answer together [default: the model's].
    #[arg(long)]
    pub(crate) max_seq_len: Option<u32>,
    /// Beam width; only 1 is served.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1))]
    pub(crate) max_beam_width: Option<u32>,
    /// Tensor-parallel ranks.
    #[arg(long, visible_alias = "tp-size")]
    pub(crate) tensor_parallel_size: Option<u32>,
    /// Pipeline-parallel ranks.
    #[arg(long, visible_alias = "pp-size")]
    pub(crate) pipeline_parallel_size: Option<u32>,
    /// Share of free memory that the KV pool may take.
    #[arg(
        long,
        visible_alias = "kv-cache-free-gpu-memory-fraction",
        value_name = "0..1"
    )]
    pub(crate) free_gpu_memory_fraction: Option<f64>,
    /// Split long prompts over steps.
    #[arg(long)]
    pub(crate) enable_chunked_prefill: bool,
    /// Accepted for scripts; Baton runs no code from model directories.
    #[arg(long)]
    pub(crate) trust_remote_code: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DisaggregatedArgs {
    /// disagg_config.yaml.
    #[arg(short, long, visible_alias = "config-file", value_name = "FILE")]
    pub(crate) config: PathBuf,
    /// How long to wait for all workers, in seconds.
    #[arg(short = 't', long, default_value_t = 180, value_name = "SECONDS")]
    pub(crate) server_start_timeout: u64,
    /// Bind port, in place of the file's; 0 lets the kernel choose.
    #[arg(long)]
    pub(crate) port: Option<u16>,
    /// Longest upstream call, in seconds.
    #[arg(short, long, default_value_t = 180, value_name = "SECONDS")]
    pub(crate) request_timeout: u64,
    /// Log request counters every so many seconds; 0 never.
    #[arg(long, default_value_t = 0, value_name = "SECONDS")]
    pub(crate) metrics_log_interval: u64,
    /// Write host:port here once the socket is bound.
    #[arg(long, value_name = "FILE")]
    pub(crate) report_addr: Option<PathBuf>,
    #[arg(short, long, value_enum, default_value_t)]
    pub(crate) log_level: LogLevel,
}

#[derive(Debug, Args)]
pub(crate) struct ClientArgs {
    /// disagg_config.yaml: hostname, port and model of the deployment.
    #[arg(
        short = 'c',
        long,
        visible_alias = "config",
        value_name = "FILE",
        required_unless_present = "url"
    )]
    pub(crate) disagg_config_file: Option<PathBuf>,
    /// Address of the deployment, in place of the file.
    #[arg(long, conflicts_with = "disagg_config_file")]
    pub(crate) url: Option<String>,
    /// JSON array of prompts.
    #[arg(short, long, value_name = "FILE", required_unless_present = "prompt")]
    pub(crate) prompts_file: Option<PathBuf>,
    /// A prompt, in place of the file; its answer is printed as it comes.
    #[arg(long, conflicts_with = "prompts_file")]
    pub(crate) prompt: Option<String>,
    /// Tokens to write at most.
    #[arg(long, default_value_t = 100)]
    pub(crate) max_tokens: u32,
    /// 0 is greedy.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) temperature: f64,
    /// Wait this long for the deployment's /health, in seconds.
    #[arg(long, value_name = "SECONDS")]
    pub(crate) server_start_timeout: Option<u64>,
    /// Longest time for one answer, in seconds.
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    pub(crate) request_timeout: u64,
    /// Which endpoint to ask.
    #[arg(short, long, value_enum, default_value_t)]
    pub(crate) endpoint: ClientEndpoint,
    /// Where the answers go, as a JSON array in the order of the prompts.
    #[arg(short, long, default_value = "output.json", value_name = "FILE")]
    pub(crate) output_file: PathBuf,
    /// Ask for streams.
    #[arg(long)]
    pub(crate) streaming: bool,
    /// Do not stop at end-of-sequence tokens.
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    /// Print where each request's time went.
    #[arg(long)]
    pub(crate) timeline: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Check files and print every error at once, with line, path, value and expectation.
    Check(ConfigCheckArgs),
    /// Show every value that a file resolves to, and where it came from.
    Explain(ConfigExplainArgs),
    /// Print the JSON schema of a kind of file; without a kind, their list.
    Schema {
        /// Kind of document.
        kind: Option<String>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct ConfigCheckArgs {
    /// Files to check.
    #[arg(required = true)]
    pub(crate) files: Vec<PathBuf>,
    /// Kind of document [default: guessed from its keys].
    #[arg(long)]
    pub(crate) kind: Option<String>,
    /// Print the reports as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ConfigExplainArgs {
    /// File to explain.
    #[arg(required_unless_present = "key")]
    pub(crate) file: Option<PathBuf>,
    /// Kind of document [default: guessed from its keys].
    #[arg(long)]
    pub(crate) kind: Option<String>,
    /// Describe one key, such as kv_cache_config.tokens_per_block.
    #[arg(long)]
    pub(crate) key: Option<String>,
    /// Print the values as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `--endpoint` of the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum ClientEndpoint {
    /// `/v1/completions`
    #[default]
    Completions,
    /// `/v1/chat/completions`
    Chat,
}

/// `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum EngineDeviceArg {
    Auto,
    Cpu,
    Cuda,
}

/// `--load-format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LoadFormatArg {
    Auto,
    Dummy,
}

/// `--server-role`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ServerRole {
    Context,
    Generation,
}

fn parse_role(text: &str) -> Result<ServerRole, String> {
    match text.to_ascii_lowercase().as_str() {
        "context" | "ctx" => Ok(ServerRole::Context),
        "generation" | "gen" => Ok(ServerRole::Generation),
        _ => Err("expected CONTEXT or GENERATION".to_owned()),
    }
}

/// Severities, by TensorRT-LLM's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum LogLevel {
    #[value(alias = "internal_error", alias = "internal-error", alias = "fatal")]
    Error,
    #[value(alias = "warn")]
    Warning,
    #[default]
    Info,
    #[value(alias = "verbose")]
    Debug,
    Trace,
}

impl LogLevel {
    /// The directive for the log filter.
    pub(crate) const fn directive(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// Maps `--foo_bar` to `--foo-bar` and `MODEL …` to `serve MODEL …`. Words behind `--` or `llmapi-launch` stay as they
/// are: they are somebody else's.
pub(crate) fn normalise(arguments: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut out: Vec<OsString> = Vec::new();
    let mut literal = false;
    for argument in arguments {
        let word = if literal { argument } else { dashed(&argument) };
        literal |= word == "--" || (out.len() == 1 && word == "llmapi-launch");
        out.push(word);
    }
    let first = out.get(1).and_then(|word| word.to_str());
    if let Some(word) = first
        && !word.starts_with('-')
        && !COMMANDS.contains(&word)
        && looks_like_a_model(word)
    {
        out.insert(1, OsString::from("serve"));
    }
    out
}

/// A word that cannot be a mistyped command: a path, a hub id, or a model file.
fn looks_like_a_model(word: &str) -> bool {
    word.contains('/') || word.contains('.')
}

fn dashed(argument: &OsStr) -> OsString {
    let Some(text) = argument.to_str() else {
        return argument.to_owned();
    };
    let Some(body) = text.strip_prefix("--") else {
        return argument.to_owned();
    };
    let (name, value) = body.split_at(body.find('=').unwrap_or(body.len()));
    OsString::from(format!("--{}{value}", name.replace('_', "-")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn words(line: &str) -> Vec<OsString> {
        line.split(' ').map(OsString::from).collect()
    }

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(normalise(words(line)))
    }

    #[test]
    fn the_definition_is_sound_and_complete() {
        Cli::command().debug_assert();
        let command = Cli::command();
        for sub in command.get_subcommands() {
            assert!(COMMANDS.contains(&sub.get_name()), "{}", sub.get_name());
        }
    }

    #[test]
    fn dashes_and_underscores_are_one() {
        for line in [
            "baton serve m --tp_size 2 --server_role CONTEXT --kv_cache_free_gpu_memory_fraction=0.5",
            "baton serve m --tp-size 2 --server-role=context --free_gpu_memory_fraction 0.5",
        ] {
            let Command::Serve(args) = parse(line).unwrap().command else {
                panic!("{line}")
            };
            assert_eq!(args.engine.tensor_parallel_size, Some(2));
            assert_eq!(args.server_role, Some(ServerRole::Context));
            assert_eq!(args.engine.free_gpu_memory_fraction, Some(0.5));
        }
    }

    #[test]
    fn device_and_load_format_are_options_of_servers_and_benchmarks() {
        let line = "m --device cuda --load_format dummy";
        let Command::Serve(serve) = parse(&format!("baton serve {line}")).unwrap().command else {
            panic!("{line}")
        };
        let bench = parse(&format!("baton bench serve --offline {line}")).unwrap();
        let Command::Bench(BenchCommand::Serve(bench)) = bench.command else {
            panic!("{line}")
        };
        for engine in [&serve.engine, &bench.engine] {
            assert_eq!(engine.device, Some(EngineDeviceArg::Cuda));
            assert_eq!(engine.load_format, Some(LoadFormatArg::Dummy));
        }
    }

    #[test]
    fn a_model_as_first_word_means_serve() {
        let Command::Serve(args) =
            parse("baton TinyLlama/TinyLlama-1.1B --host h_x --extra_llm_api_options a_b.yaml")
                .unwrap()
                .command
        else {
            panic!("not serve")
        };
        assert_eq!(args.model, "TinyLlama/TinyLlama-1.1B");
        assert_eq!(args.host, "h_x");
        assert_eq!(args.config, Some(PathBuf::from("a_b.yaml")));
    }

    #[test]
    fn a_mistyped_command_is_not_a_model() {
        assert!(parse("baton srve m").is_err());
    }

    #[test]
    fn a_launched_command_stays_as_it_is() {
        for line in [
            "baton llmapi-launch x --tp_size 2 --help -- --a_b",
            "baton launch -- x --tp_size 2 --help -- --a_b",
        ] {
            let command = match parse(line).unwrap().command {
                Command::LlmapiLaunch(args) => args.command,
                Command::Launch(args) => args.command,
                _ => panic!("{line}"),
            };
            assert_eq!(command, ["x", "--tp_size", "2", "--help", "--", "--a_b"]);
        }
    }

    #[test]
    fn beams_are_refused_by_name() {
        let error = parse("baton serve m --max_beam_width 4")
            .unwrap_err()
            .to_string();
        assert!(error.contains("--max-beam-width"), "{error}");
    }

    #[test]
    fn short_help_fits_a_screen() {
        let mut command = Cli::command();
        for sub in command.get_subcommands_mut() {
            fits_a_screen(sub);
        }
    }

    fn fits_a_screen(command: &mut clap::Command) {
        let lines = command.render_help().to_string().lines().count();
        assert!(lines <= 60, "{}: {lines} lines", command.get_name());
        for sub in command.get_subcommands_mut() {
            fits_a_screen(sub);
        }
    }
}
