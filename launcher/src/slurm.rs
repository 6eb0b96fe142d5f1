//! `baton slurm`: a layout becomes jobs of a cluster.
//!
//! Planning and rendering are pure and in `baton-slurm`; here is what looks at files, talks to the queue, and runs inside
//! a job.

mod bind;
mod folder;
mod jobs;
mod model;
mod preflight;
mod prepare;
mod report;
mod steps;

use crate::cli::slurm::SlurmCommand;
use crate::exit::Outcome;

/// Runs a `baton slurm` sub-command.
pub(crate) fn run(command: SlurmCommand) -> anyhow::Result<Outcome> {
    match command {
        SlurmCommand::Render(args) => jobs::render(&args),
        SlurmCommand::Submit(args) => crate::on_this_thread()?.block_on(jobs::submit(&args)),
        SlurmCommand::Status(args) => crate::on_this_thread()?.block_on(jobs::status(&args)),
        SlurmCommand::Logs(args) => jobs::logs(&args),
        SlurmCommand::Cancel(args) => crate::on_this_thread()?.block_on(jobs::cancel(&args)),
        // Children are tied to the life of the thread that forks them, so the supervisor has just this one.
        SlurmCommand::Steps(args) => crate::on_this_thread()?.block_on(steps::run(&args)),
        SlurmCommand::World(args) => bind::world(&args),
        SlurmCommand::Task(args) => bind::task(&args),
    }
}
