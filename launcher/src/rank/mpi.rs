//! What the launchers of the MPI implementations, PMIx and PMI say.
//!
//! An `mpirun` inside a Slurm allocation leaves the variables of its daemon in place: `SLURM_PROCID` is then the same for
//! all ranks of a node, `SLURM_NTASKS` the number of daemons. Hence these come first where they are certain, and
//! plain PMI, which Slurm's own plugin sets too, after Slurm.

use super::environment::{Environment, Named};
use super::{RankError, RankFacts, Starter, slurm};

/// The variables of one launcher.
#[derive(Debug)]
struct Names {
    starter: Starter,
    rank: &'static [&'static str],
    size: &'static [&'static str],
    local_rank: &'static [&'static str],
    local_size: &'static [&'static str],
}

const OPEN_MPI: Names = Names {
    starter: Starter::OpenMpi,
    rank: &["OMPI_COMM_WORLD_RANK"],
    size: &["OMPI_COMM_WORLD_SIZE"],
    local_rank: &["OMPI_COMM_WORLD_LOCAL_RANK"],
    local_size: &["OMPI_COMM_WORLD_LOCAL_SIZE"],
};

const MVAPICH: Names = Names {
    starter: Starter::Mvapich,
    rank: &["MV2_COMM_WORLD_RANK"],
    size: &["MV2_COMM_WORLD_SIZE"],
    local_rank: &["MV2_COMM_WORLD_LOCAL_RANK"],
    local_size: &["MV2_COMM_WORLD_LOCAL_SIZE"],
};

const PMI: Names = Names {
    starter: Starter::Pmi,
    rank: &["PMI_RANK", "PMI_ID"],
    size: &["PMI_SIZE"],
    local_rank: &["MPI_LOCALRANKID", "PMI_LOCAL_RANK"],
    local_size: &["MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"],
};

/// Set by Hydra for each process, and by nobody else.
const HYDRA: &[&str] = &["HYDI_CONTROL_FD", "MPI_LOCALRANKID"];

const ONE_LAUNCHER: &str = "one of them is left over from another launcher; start the ranks with one launcher and unset the other's variables";

/// A server that the launcher keeps for this process.
pub(super) fn has_pmix_server(environment: &Environment) -> bool {
    environment.get("PMIX_NAMESPACE").is_some() && environment.has_prefix("PMIX_SERVER_URI")
}

fn namespace_of_srun(environment: &Environment) -> bool {
    environment
        .get("PMIX_NAMESPACE")
        .is_some_and(slurm::owns_namespace)
}

/// The facts where the variables are certainly those of the launcher next to this process.
pub(super) fn launched_by_mpirun(
    environment: &Environment,
) -> Result<Option<RankFacts>, RankError> {
    if namespace_of_srun(environment) {
        return Ok(None);
    }
    for names in [&OPEN_MPI, &MVAPICH] {
        if let Some(rank) = environment.number(names.rank)? {
            return facts(environment, names, rank).map(Some);
        }
    }
    let hydra = environment.first(HYDRA).is_some();
    match environment.number(PMI.rank)? {
        Some(rank) if hydra => facts(environment, &PMI, rank).map(Some),
        _ => pmix_alone(environment),
    }
}

/// The facts where PMI or PMIx is all there is.
pub(super) fn launched_by_pmi(environment: &Environment) -> Result<Option<RankFacts>, RankError> {
    match environment.number(PMI.rank)? {
        Some(rank) => facts(environment, &PMI, rank).map(Some),
        // A step whose SLURM_* variables were filtered away still has its PMIx server.
        None => pmix_alone(environment),
    }
}

/// PRRTE sets `PMIX_RANK` and no size.
fn pmix_alone(environment: &Environment) -> Result<Option<RankFacts>, RankError> {
    let Some(rank) = environment.number(&["PMIX_RANK"])? else {
        return Ok(None);
    };
    if environment.get("PMIX_NAMESPACE").is_none() {
        return Err(RankError::NoSize {
            rank_name: rank.name,
            rank: rank.value,
            wanted: &["PMIX_NAMESPACE"],
            hint: "a PMIx launcher sets both; unset PMIX_RANK to run alone",
        });
    }
    Ok(Some(RankFacts {
        rank: rank.value,
        size: None,
        local_rank: None,
        local_size: None,
        starter: if namespace_of_srun(environment) {
            Starter::Srun
        } else {
            Starter::Prrte
        },
        ..in_allocation(environment)?
    }))
}

fn facts(environment: &Environment, names: &Names, rank: Named) -> Result<RankFacts, RankError> {
    let size = match environment.number(names.size)? {
        Some(size) => size,
        None => rank.world_of_one(
            names.size,
            "start all ranks with one launcher; unset the rank to run alone",
        )?,
    };
    if rank.value >= size.value {
        return Err(RankError::outside(rank, size));
    }
    if let Some(pmix) = environment.number(&["PMIX_RANK"])? {
        slurm::differ("rank", rank, pmix, ONE_LAUNCHER)?;
    }
    let local_rank = environment.number(names.local_rank)?;
    let local_size = environment.number(names.local_size)?;
    if let (Some(local_rank), Some(local_size)) = (local_rank, local_size)
        && local_rank.value >= local_size.value
    {
        return Err(RankError::outside(local_rank, local_size));
    }
    let alone = size.value == 1;
    let local = |number: Option<Named>, one: u32| {
        number.map(|number| number.value).or(alone.then_some(one))
    };
    Ok(RankFacts {
        rank: rank.value,
        size: Some(size.value),
        local_rank: local(local_rank, 0),
        local_size: local(local_size, 1),
        starter: starter(environment, names.starter),
        ..in_allocation(environment)?
    })
}

fn starter(environment: &Environment, starter: Starter) -> Starter {
    if starter != Starter::Pmi || environment.first(HYDRA).is_none() {
        starter
    } else if environment.has_prefix("I_MPI_") {
        Starter::IntelMpi
    } else {
        Starter::Hydra
    }
}

/// What is known of nodes when Slurm gave them but another launcher uses them. Its step is the daemon's, not ours.
fn in_allocation(environment: &Environment) -> Result<RankFacts, RankError> {
    let hosts = slurm::allocation(environment)?;
    let this_host = environment
        .text("SLURMD_NODENAME")
        .or_else(|| environment.text("PMIX_HOSTNAME"));
    let node_index = this_host
        .as_ref()
        .and_then(|own| hosts.iter().position(|host| host == own))
        .and_then(|index| u32::try_from(index).ok());
    Ok(RankFacts {
        hosts,
        this_host,
        node_index,
        namespace: environment.text("PMIX_NAMESPACE"),
        pmix: has_pmix_server(environment),
        ..RankFacts::alone(environment)
    })
}
