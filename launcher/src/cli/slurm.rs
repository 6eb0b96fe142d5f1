//! The arguments of `baton slurm`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Subcommand};

/// What `baton slurm` does.
#[derive(Debug, Subcommand)]
pub(crate) enum SlurmCommand {
    /// Write the plan, the configurations and the batch scripts of a layout; submit nothing.
    Render(RenderArgs),
    /// Write them and submit the scripts; print the job numbers.
    Submit(SubmitArgs),
    /// Say what the queue knows about a deployment's jobs, and where its proxy is.
    Status(TargetArgs),
    /// Print the last lines of a deployment's log files.
    Logs(LogsArgs),
    /// Drain a deployment and end its jobs.
    Cancel(CancelArgs),
    /// Inside a job: start and supervise a step for each instance, and the proxy.
    #[command(hide = true)]
    Steps(RunArgs),
    /// Inside a job: start the ranks on the nodes that the plan lists.
    #[command(hide = true)]
    World(LaunchArgs),
    /// Inside a task: set what is the rank's own, then become the command.
    #[command(hide = true)]
    Task(TaskArgs),
}

#[derive(Debug, Args)]
pub(crate) struct RenderArgs {
    /// Layout file, or an existing benchmark config.yaml.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) config: PathBuf,
    /// Model, where the file names none.
    #[arg(short, long)]
    pub(crate) model: Option<String>,
    /// Run folder, which every node must see under this path [default: ./NAME.run for NAME.yaml].
    #[arg(short, long, value_name = "DIR")]
    pub(crate) output: Option<PathBuf>,
    /// Do not look at the model: its files are on the nodes only.
    #[arg(long)]
    pub(crate) skip_model_check: bool,
}

#[derive(Debug, Args)]
pub(crate) struct SubmitArgs {
    #[command(flatten)]
    pub(crate) render: RenderArgs,
    /// Print plan, scripts, environment and mounts, each with its source; write and submit nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct TargetArgs {
    /// Run folder, or job numbers.
    #[arg(required = true, value_name = "DIR|JOB")]
    pub(crate) targets: Vec<String>,
    /// Print it as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// Run folder.
    #[arg(value_name = "DIR")]
    pub(crate) folder: PathBuf,
    /// Only log files whose names start like one of these, such as ctx0.
    #[arg(value_name = "NAME")]
    pub(crate) names: Vec<String>,
    /// Lines of each file.
    #[arg(short = 'n', long, default_value_t = 20)]
    pub(crate) lines: usize,
}

#[derive(Debug, Args)]
pub(crate) struct CancelArgs {
    /// Run folder, or job numbers.
    #[arg(required = true, value_name = "DIR|JOB")]
    pub(crate) targets: Vec<String>,
    /// How long the jobs may take to drain and end, in seconds; 0 ends them at once.
    #[arg(long, default_value_t = 40, value_name = "SECONDS")]
    pub(crate) drain_timeout: u64,
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// The run.json that was written with the plan.
    #[arg(long, value_name = "FILE")]
    pub(crate) run: PathBuf,
    /// How long running requests may take to finish, in seconds; less than the cluster's KillWait.
    #[arg(long, default_value_t = 25, value_name = "SECONDS")]
    pub(crate) drain_timeout: u64,
}

#[derive(Debug, Args)]
pub(crate) struct LaunchArgs {
    /// The run.json that was written with the plan.
    #[arg(long, value_name = "FILE")]
    pub(crate) run: PathBuf,
    /// Which of its launches.
    #[arg(long, value_name = "NAME")]
    pub(crate) launch: String,
}

#[derive(Debug, Args)]
pub(crate) struct TaskArgs {
    #[command(flatten)]
    pub(crate) launch: LaunchArgs,
    /// What to become.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}
