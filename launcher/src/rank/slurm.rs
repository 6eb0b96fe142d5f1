//! What Slurm's variables say: to a task of a step everything, to a batch script nothing about ranks.
//!
//! Evidence (22.05): the `SLURM_STEP_*` variables describe the step that runs, also where one step spans the components
//! of a heterogeneous job; `SLURM_JOB_*` and `SLURM_TASKS_PER_NODE` may be left over from the allocation.

use baton_slurm::hostlist;

use super::environment::{Environment, Named};
use super::placement::{Deal, Placement};
use super::{RankError, RankFacts, Starter};

const SIZE: &[&str] = &["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"];
const STEP: &[&str] = &["SLURM_STEP_ID", "SLURM_STEPID"];
const JOB: &[&str] = &["SLURM_JOB_ID", "SLURM_JOBID"];

/// Step numbers from here on are Slurm's own: batch script, interactive shell, extern and pending steps.
const SPECIAL_STEPS: u32 = 0xffff_fff0;

const ONE_LAUNCH: &str =
    "both are the launcher's to set; start all ranks with one srun and set neither by hand";

/// The allocation's number.
pub(super) fn job(environment: &Environment) -> Option<String> {
    environment.first(JOB).map(|(_, value)| value.to_owned())
}

/// Inside an allocation, but no task of a step.
pub(super) fn is_batch_script(environment: &Environment) -> bool {
    environment.first(JOB).is_some()
        && !is_step(environment.number(STEP).ok().flatten())
        && environment
            .number(&["SLURM_PROCID"])
            .is_ok_and(|rank| rank.is_none_or(|rank| rank.value == 0))
}

fn is_step(step: Option<Named>) -> bool {
    step.is_some_and(|step| step.value < SPECIAL_STEPS)
}

/// The namespace that Slurm's PMIx plugin gives to a step.
pub(super) fn owns_namespace(namespace: &str) -> bool {
    namespace.starts_with("slurm.pmix.")
}

/// Nodes of the allocation, every component of a heterogeneous job included.
pub(super) fn allocation(environment: &Environment) -> Result<Vec<String>, RankError> {
    let components = component_lists(environment);
    if !components.is_empty() {
        let mut hosts = Vec::new();
        for list in components {
            hosts.extend(expand("SLURM_JOB_NODELIST_HET_GROUP_*", list)?);
        }
        return Ok(hosts);
    }
    host_list(environment, &["SLURM_JOB_NODELIST", "SLURM_NODELIST"])
}

fn component_lists(environment: &Environment) -> Vec<&str> {
    let list = |component: u32, word: &str| {
        environment.get(&format!("SLURM_JOB_NODELIST_{word}_GROUP_{component}"))
    };
    // PACK is what versions before 20.02 call it. Lists end at the first that is missing.
    (0..)
        .map_while(|component| list(component, "HET").or_else(|| list(component, "PACK")))
        .collect()
}

fn host_list(environment: &Environment, names: &[&'static str]) -> Result<Vec<String>, RankError> {
    match environment.first(names) {
        Some((name, list)) => expand(name, list),
        None => Ok(Vec::new()),
    }
}

fn expand(name: &'static str, list: &str) -> Result<Vec<String>, RankError> {
    hostlist::expand(list).map_err(|source| RankError::List {
        name,
        value: list.to_owned(),
        source,
    })
}

/// The facts of a task that `srun` started.
pub(super) fn task_of_a_step(environment: &Environment) -> Result<Option<RankFacts>, RankError> {
    let Some(rank) = environment.number(&["SLURM_PROCID"])? else {
        return Ok(None);
    };
    let step = environment.number(STEP)?;
    if is_batch_script(environment) {
        return Ok(None);
    }
    if !is_step(step) && environment.first(JOB).is_some() {
        return Err(RankError::NoSize {
            rank_name: rank.name,
            rank: rank.value,
            wanted: STEP,
            hint: "a task of srun has it; pass the whole environment through whatever runs in between \
                   (a container's or sudo's filter)",
        });
    }
    let size = size_of(environment, rank)?;
    agree_with_pmi(environment, rank, size)?;
    let nodes = nodes_of(environment, rank, size)?;
    let local_rank = environment.number(&["SLURM_LOCALID"])?;
    Ok(Some(RankFacts {
        rank: rank.value,
        size: Some(size.value),
        local_rank: local_rank.map(|local| local.value),
        local_size: nodes.local_size,
        node_index: nodes.index,
        hosts: nodes.hosts,
        tasks_per_node: nodes.tasks,
        step: step.map(|step| step.value.to_string()),
        namespace: environment.text("PMIX_NAMESPACE"),
        launch_address: environment.text("SLURM_LAUNCH_NODE_IPADDR"),
        starter: Starter::Srun,
        pmix: super::mpi::has_pmix_server(environment),
        placement: nodes.placement,
        ..RankFacts::alone(environment)
    }))
}

fn size_of(environment: &Environment, rank: Named) -> Result<Named, RankError> {
    let mut sizes = Vec::new();
    for name in SIZE {
        sizes.extend(environment.number(&[name])?);
    }
    let Some(size) = sizes.first().copied() else {
        return rank.world_of_one(
            SIZE,
            "start all ranks with one srun; unset SLURM_PROCID to run alone",
        );
    };
    for other in &sizes {
        differ("world's size", size, *other, ONE_LAUNCH)?;
    }
    if rank.value >= size.value {
        return Err(RankError::outside(rank, size));
    }
    Ok(size)
}

/// The error of two numbers that should be one.
pub(super) fn differ(
    what: &'static str,
    one: Named,
    other: Named,
    hint: &'static str,
) -> Result<(), RankError> {
    if one.value == other.value {
        return Ok(());
    }
    Err(RankError::Differ {
        what,
        one: one.name,
        one_value: one.value.to_string(),
        other: other.name,
        other_value: other.value.to_string(),
        hint,
    })
}

/// A step's PMI plugins repeat rank and size; what repeats something else was set by another launcher.
fn agree_with_pmi(environment: &Environment, rank: Named, size: Named) -> Result<(), RankError> {
    const HINT: &str = "one of them is left over from another launcher; start the ranks with srun alone or mpirun alone, \
                        and unset the other's variables";
    let own_pmix = environment
        .get("PMIX_NAMESPACE")
        .is_some_and(owns_namespace);
    let mut ranks = vec!["PMI_RANK"];
    let mut sizes = vec!["PMI_SIZE"];
    if own_pmix {
        // mpirun would have put its own namespace in place, so this is srun's task.
        ranks.extend(["PMIX_RANK", "OMPI_COMM_WORLD_RANK"]);
        sizes.push("OMPI_COMM_WORLD_SIZE");
    }
    for name in ranks {
        if let Some(other) = environment.number(&[name])? {
            differ("rank", rank, other, HINT)?;
        }
    }
    for name in sizes {
        if let Some(other) = environment.number(&[name])? {
            differ("world's size", size, other, HINT)?;
        }
    }
    Ok(())
}

#[derive(Debug, Default)]
struct Nodes {
    hosts: Vec<String>,
    tasks: Vec<u32>,
    index: Option<u32>,
    local_size: Option<u32>,
    placement: Placement,
}

fn nodes_of(environment: &Environment, rank: Named, size: Named) -> Result<Nodes, RankError> {
    let hosts = host_list(
        environment,
        &[
            "SLURM_STEP_NODELIST",
            "SLURM_NODELIST",
            "SLURM_JOB_NODELIST",
        ],
    )?;
    let tasks = tasks_per_node(environment, hosts.len(), size)?;
    let index = environment.number(&["SLURM_NODEID"])?;
    if let Some(index) = index
        && !hosts.is_empty()
        && usize::try_from(index.value).is_ok_and(|index| index >= hosts.len())
    {
        return Err(RankError::Differ {
            what: "nodes",
            one: index.name,
            one_value: index.value.to_string(),
            other: "SLURM_STEP_NODELIST",
            other_value: format!("{} nodes", hosts.len()),
            hint: ONE_LAUNCH,
        });
    }
    let own: Option<Vec<u32>> = environment
        .get("SLURM_GTIDS")
        .and_then(|ranks| ranks.split(',').map(|rank| rank.parse().ok()).collect());
    let index = index.map(|index| index.value);
    let here = index.and_then(|index| usize::try_from(index).ok());
    let seen = Seen {
        rank: rank.value,
        node: here,
        own: own.as_deref(),
    };
    let placement = placement_of(environment, &tasks, size.value, &seen)?;
    let local_size = here
        .and_then(|node| tasks.get(node).copied())
        .or_else(|| own.as_ref().and_then(|own| u32::try_from(own.len()).ok()));
    Ok(Nodes {
        hosts,
        tasks,
        index,
        local_size,
        placement,
    })
}

/// The counts of the step's nodes. Older versions give those of one component of a heterogeneous step: dropped.
fn tasks_per_node(
    environment: &Environment,
    hosts: usize,
    size: Named,
) -> Result<Vec<u32>, RankError> {
    let names = ["SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"];
    let Some((name, list)) = environment.first(&names) else {
        return Ok(Vec::new());
    };
    let tasks = hostlist::expand_counts(list).map_err(|source| RankError::List {
        name,
        value: list.to_owned(),
        source,
    })?;
    let sum: u64 = tasks.iter().map(|count| u64::from(*count)).sum();
    if sum == u64::from(size.value) && (hosts == 0 || tasks.len() == hosts) {
        return Ok(tasks);
    }
    // The allocation's counts, without the step's own, say nothing about this step.
    let heterogeneous = environment.get("SLURM_HET_SIZE").is_some();
    if name != names[0] || heterogeneous {
        return Ok(Vec::new());
    }
    Err(RankError::Differ {
        what: "step",
        one: name,
        one_value: list.to_owned(),
        other: size.name,
        other_value: format!("{} (on {hosts} nodes)", size.value),
        hint: ONE_LAUNCH,
    })
}

/// What this task knows of its own place.
#[derive(Debug)]
struct Seen<'a> {
    rank: u32,
    node: Option<usize>,
    own: Option<&'a [u32]>,
}

impl Seen<'_> {
    fn fits(&self, placement: &Placement) -> bool {
        let Some(node) = self.node else { return false };
        placement.node_of(self.rank) == Some(node)
            && self
                .own
                .is_none_or(|own| placement.ranks_on(node).eq(own.iter().copied()))
    }
}

/// The first guess that agrees with where this task finds itself and its neighbours; else none.
fn placement_of(
    environment: &Environment,
    tasks: &[u32],
    size: u32,
    seen: &Seen<'_>,
) -> Result<Placement, RankError> {
    let mapped = environment
        .get("SLURM_PMIX_MAPPING_SERV")
        .and_then(Placement::mapped);
    let plane = environment.number(&["SLURM_DIST_PLANESIZE"])?;
    let named = environment
        .get("SLURM_DISTRIBUTION")
        .map(|text| Deal::of(text, plane.map(|plane| plane.value)));
    let deals = match named {
        Some(None) => Vec::new(),
        Some(Some(deal)) => vec![deal, Deal::Block],
        None => vec![Deal::Block, Deal::Cyclic],
    };
    let dealt = deals.into_iter().map(|deal| Placement::dealt(tasks, deal));
    let complete =
        |placement: &Placement| usize::try_from(size).is_ok_and(|size| placement.len() == size);
    Ok(mapped
        .into_iter()
        .chain(dealt)
        .find(|placement| complete(placement) && seen.fits(placement))
        .unwrap_or_default())
}
