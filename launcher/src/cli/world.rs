//! Options of the commands that run inside a world of ranks: `launch`, `llmapi-launch`, `disaggregated_mpi_worker`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::LogLevel;
use crate::world::plan::Only;

#[derive(Debug, Args)]
pub(crate) struct LaunchArgs {
    /// disagg_config.yaml: its instances share the world's ranks, contexts first; the proxy runs on rank 0's host.
    #[arg(
        short,
        long,
        visible_alias = "config-file",
        value_name = "FILE",
        required_unless_present = "command",
        conflicts_with = "command"
    )]
    pub(crate) config: Option<PathBuf>,
    /// Run only these: ctx, gen, proxy, ctx0, gen1, …; the world has just their ranks.
    #[arg(long, value_name = "LIST", requires = "config")]
    pub(crate) only: Option<Only>,
    /// Write <label>.addr with host:port here for each instance and the proxy, once it listens.
    #[arg(long, value_name = "DIR")]
    pub(crate) address_dir: Option<PathBuf>,
    /// Write the proxy's host:port here once the deployment can serve.
    #[arg(long, value_name = "FILE")]
    pub(crate) ready_file: Option<PathBuf>,
    /// Print the ranks' roles, and stop.
    #[arg(long, requires = "config")]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) world: WorldArgs,
    /// Run this on rank 0, and let the other ranks serve it.
    #[arg(last = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,
}

/// What every world can be told.
#[derive(Debug, Clone, Args)]
pub(crate) struct WorldArgs {
    /// One log file per process here, besides the terminal.
    #[arg(long, value_name = "DIR")]
    pub(crate) log_dir: Option<PathBuf>,
    /// How long all ranks may take to come, and the deployment to serve, in seconds.
    #[arg(short = 't', long, default_value_t = Self::default().server_start_timeout, value_name = "SECONDS")]
    pub(crate) server_start_timeout: u64,
    /// Longest call of the proxy to an instance, in seconds.
    #[arg(long, default_value_t = Self::default().request_timeout, value_name = "SECONDS")]
    pub(crate) request_timeout: u64,
    /// How long a rank may be silent before it counts as lost, in seconds.
    #[arg(long, default_value_t = Self::default().peer_timeout, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(2..))]
    pub(crate) peer_timeout: u64,
    /// How long running requests may take to finish after SIGTERM or SIGUSR1, in seconds.
    #[arg(long, default_value_t = Self::default().drain_timeout, value_name = "SECONDS")]
    pub(crate) drain_timeout: u64,
    /// How often a broken instance is started again without a minute of good life in between.
    #[arg(long, default_value_t = Self::default().max_restarts, value_name = "N")]
    pub(crate) max_restarts: u32,
    /// What moves sums between the ranks of an instance.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) fabric: FabricArg,
    #[arg(short, long, value_enum, default_value_t)]
    pub(crate) log_level: LogLevel,
}

impl Default for WorldArgs {
    fn default() -> Self {
        Self {
            log_dir: None,
            server_start_timeout: 180,
            request_timeout: 180,
            peer_timeout: 60,
            drain_timeout: 25,
            max_restarts: 6,
            fabric: FabricArg::default(),
            log_level: LogLevel::default(),
        }
    }
}

/// `--fabric`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum FabricArg {
    /// Our own connections: a rank that dies ends its instance only.
    #[default]
    Tcp,
    /// MPI, through the plug-in libbaton_mpi.so: the world is one fate.
    Mpi,
}

#[derive(Debug, Args)]
pub(crate) struct LlmapiLaunchArgs {
    /// The command and its arguments, passed on as they are.
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "CMD"
    )]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct MpiWorkerArgs {
    /// disagg_config.yaml: its instances share the world's ranks, contexts first.
    #[arg(short, long, visible_alias = "config-file", value_name = "FILE")]
    pub(crate) config: PathBuf,
    #[command(flatten)]
    pub(crate) world: WorldArgs,
}
