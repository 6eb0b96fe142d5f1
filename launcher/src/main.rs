//! `baton`: one binary, every role. This file is the table of contents; each command has its module.
//!
//! stdout is data, stderr is talk. Errors travel up to here, are printed once, and become an exit code.

mod bench;
mod bind;
mod child;
mod cli;
mod client;
mod config;
mod doctor;
mod environment;
mod exit;
mod files;
mod http;
mod launch;
mod logging;
mod marks;
mod os;
mod output;
mod pmix;
mod rank;
mod reach;
mod servers;
mod signals;
mod slurm;
mod supervisor;
mod timeline;
mod up;
mod world;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use crate::cli::{BenchCommand, Cli, Command, LogLevel};
use crate::exit::{Outcome, WithOutcome};

/// What a request needs comes in lists of megabytes, which one thread makes and another drops. The system's allocator gives their
/// memory back to the kernel each time, and takes it again page by page.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = match Cli::try_parse_from(cli::normalise(std::env::args_os())) {
        Ok(cli) => cli,
        Err(answer) => return usage(&answer),
    };
    logging::start(log_level(&cli.command));
    let done = environment::complete()
        .outcome(Outcome::Unavailable)
        .and_then(|()| run(cli.command));
    match done {
        Ok(outcome) => outcome.into(),
        Err(error) => {
            // When stderr is gone there is nobody to tell.
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            exit::of(&error).into()
        }
    }
}

/// Help and version are answers; everything else clap has to say is a wrong command line.
fn usage(answer: &clap::Error) -> ExitCode {
    let _ = answer.print();
    if answer.use_stderr() {
        Outcome::Usage.into()
    } else {
        Outcome::Success.into()
    }
}

fn log_level(command: &Command) -> LogLevel {
    match command {
        Command::Up(args) => args.log_level,
        Command::Serve(args) => args.log_level,
        Command::Disaggregated(args) => args.log_level,
        Command::Launch(args) => args.world.log_level,
        Command::DisaggregatedMpiWorker(args) => args.world.log_level,
        // The launched command's own words are the ones to be seen.
        Command::LlmapiLaunch(_) => LogLevel::Warning,
        Command::Rank => LogLevel::Info,
        Command::Client(_) | Command::Config(_) => LogLevel::Warning,
        Command::Slurm(_) => LogLevel::Info,
        Command::Bench(BenchCommand::Kv(args)) => args.log_level,
        Command::Bench(BenchCommand::KvHold) => LogLevel::Warning,
        Command::Bench(BenchCommand::Serve(args)) => args.log_level,
        Command::Doctor(args) => args.log_level,
    }
}

fn run(command: Command) -> anyhow::Result<Outcome> {
    match command {
        // Children are tied to the life of the thread that forks them, so the supervisor has just this one.
        Command::Up(args) => on_this_thread()?.block_on(up::run(args)),
        Command::Launch(args) => launch::launch(args),
        Command::LlmapiLaunch(args) => launch::llmapi_launch(args),
        Command::DisaggregatedMpiWorker(args) => launch::mpi_worker(args),
        Command::Rank => servers::rank(),
        Command::Client(args) => on_this_thread()?.block_on(client::run(args)),
        Command::Serve(args) => servers::serve(&args),
        Command::Disaggregated(args) => on_all_cores()?.block_on(servers::disaggregated(args)),
        Command::Config(command) => config::run(&command),
        Command::Slurm(command) => slurm::run(command),
        Command::Bench(command) => bench::run(command),
        Command::Doctor(args) => doctor::run(&args),
    }
}

fn on_this_thread() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .outcome(Outcome::Unavailable)
}

fn on_all_cores() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .outcome(Outcome::Unavailable)
}
