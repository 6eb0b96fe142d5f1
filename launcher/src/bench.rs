//! `baton bench`: measurements that people run on their own machines, with a verdict in the exit code.
//!
//! Absent: sweeps over layouts.

pub(crate) mod kv;
mod serve;

use crate::cli::BenchCommand;
use crate::exit::Outcome;

/// Runs one benchmark.
pub(crate) fn run(command: BenchCommand) -> anyhow::Result<Outcome> {
    match command {
        BenchCommand::Kv(args) => kv::run(&args),
        BenchCommand::KvHold => kv::hold(),
        BenchCommand::Serve(args) => serve::run(&args),
    }
}
