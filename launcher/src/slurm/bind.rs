//! What runs inside a job before the ranks do: hosts for the plan's nodes, variables for a rank. Both end by becoming
//! the command that they prepare, so signals, exit code and process id are the command's own.

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, anyhow};
use baton_slurm::hostlist;
use baton_slurm::srun::{Launch, RunFile};

use crate::cli::slurm::{LaunchArgs, TaskArgs};
use crate::exit::{Outcome, WithOutcome};

/// The variable that lists the GPUs a process may use.
const DEVICES: &str = "CUDA_VISIBLE_DEVICES";

/// Reads a `run.json`.
pub(super) fn run_file(path: &Path) -> anyhow::Result<RunFile> {
    std::fs::read_to_string(path)
        .map_err(anyhow::Error::from)
        .and_then(|text| Ok(RunFile::parse(&text)?))
        .with_context(|| format!("cannot use {}", path.display()))
        .outcome(Outcome::Unavailable)
}

/// The hosts of this allocation, in the order of its node list.
pub(super) fn hosts() -> anyhow::Result<Vec<String>> {
    let list = variable("SLURM_JOB_NODELIST").or_else(|| variable("SLURM_NODELIST"));
    let Some(list) = list else {
        return Err(anyhow!(
            "SLURM_JOB_NODELIST is not set, so this is no job of Slurm\nhint: `baton slurm submit` starts it inside one"
        ))
        .outcome(Outcome::Usage);
    };
    hostlist::expand(&list)
        .with_context(|| format!("SLURM_JOB_NODELIST is `{list}`"))
        .outcome(Outcome::Unavailable)
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn launch_of<'a>(run: &'a RunFile, args: &LaunchArgs) -> anyhow::Result<&'a Launch> {
    run.launch(&args.launch)
        .ok_or_else(|| anyhow!("{} has no launch `{}`", args.run.display(), args.launch))
        .outcome(Outcome::Usage)
}

/// Becomes the `srun` of a world whose ranks are on listed nodes.
pub(super) fn world(args: &LaunchArgs) -> anyhow::Result<Outcome> {
    let run = run_file(&args.run)?;
    let launch = launch_of(&run, args)?;
    let bound = launch.on_hosts(&hosts()?).outcome(Outcome::Unavailable)?;
    let mut command = Command::new(&bound.argv[0]);
    command.args(&bound.argv[1..]);
    if let Some(lines) = &bound.hosts {
        let file = args.run.with_file_name(format!("{}.hosts", launch.label));
        crate::files::write(&file, lines)?;
        command.env("SLURM_HOSTFILE", &file);
    }
    become_of(&mut command)
}

/// Becomes a rank's command with the variables of its role, and the GPUs of its part of the node.
pub(super) fn task(args: &TaskArgs) -> anyhow::Result<Outcome> {
    let run = run_file(&args.launch.run)?;
    let launch = launch_of(&run, &args.launch)?;
    let number = variable("SLURM_PROCID").unwrap_or_default();
    let rank: u32 = number
        .parse()
        .map_err(|_| anyhow!("SLURM_PROCID is `{number}`, so this is no task of srun"))
        .outcome(Outcome::Usage)?;
    let (part, gpus) = launch
        .task(rank)
        .ok_or_else(|| {
            anyhow!(
                "SLURM_PROCID is {rank}, but the plan has {} ranks for {}",
                launch.ranks(),
                launch.label
            )
        })
        .outcome(Outcome::Usage)?;
    let mut command = Command::new(&args.command[0]);
    command.args(&args.command[1..]);
    let nothing = BTreeMap::new();
    let own = run.environment.get(&part.role).unwrap_or(&nothing);
    if launch.own_gpus && !own.contains_key(DEVICES) {
        let visible = variable(DEVICES);
        command.env(DEVICES, devices(gpus, visible.as_deref())?);
    }
    command.envs(own);
    become_of(&mut command)
}

/// The GPUs of a part among those that the node shows, which may have names and need not start at 0.
fn devices(gpus: &[u32], visible: Option<&str>) -> anyhow::Result<String> {
    let Some(visible) = visible else {
        let numbers: Vec<String> = gpus.iter().map(ToString::to_string).collect();
        return Ok(numbers.join(","));
    };
    let names: Vec<&str> = visible.split(',').collect();
    let chosen: Option<Vec<&str>> = gpus
        .iter()
        .map(|gpu| names.get(*gpu as usize).copied())
        .collect();
    chosen
        .map(|chosen| chosen.join(","))
        .ok_or_else(|| {
            let needed = gpus.iter().max().map_or(0, |gpu| gpu + 1);
            anyhow!(
                "the plan uses {needed} GPUs of this node, but {DEVICES} is `{visible}`\nhint: set `request_gpus`, or `gpus_per_node` to what a node gives"
            )
        })
        .outcome(Outcome::Unavailable)
}

/// Replaces this process; comes back only with an error.
fn become_of(command: &mut Command) -> anyhow::Result<Outcome> {
    let cause = command.exec();
    let program = command.get_program().to_string_lossy().into_owned();
    Err(anyhow!("cannot start {program}: {cause}")).outcome(Outcome::Unavailable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_those_that_the_node_shows() {
        assert_eq!(devices(&[4, 5], None).unwrap(), "4,5");
        assert_eq!(devices(&[1, 2], Some("3,5,7")).unwrap(), "5,7");
        assert_eq!(devices(&[0], Some("GPU-1a,GPU-2b")).unwrap(), "GPU-1a");
        let error = devices(&[2, 3], Some("0,1")).unwrap_err().to_string();
        assert!(error.contains("uses 4 GPUs"), "{error}");
    }
}
