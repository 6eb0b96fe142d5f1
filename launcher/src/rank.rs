//! Which rank this process is, of how many, where, and who started it: read from the environment alone.
//!
//! Pure: no file, no socket, no library. A starter nearer to the process wins (an `mpirun` inside an allocation
//! leaves its daemon's Slurm variables in place), and variables that contradict each other are an error that names
//! both, never a guess. Deliberately absent: asking libpmix for a size ([`crate::pmix`]).

mod environment;
mod error;
mod mpi;
mod placement;
mod slurm;
#[cfg(test)]
mod tests;

pub(crate) use environment::Environment;
pub(crate) use error::RankError;

use self::placement::Placement;

/// Who started this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Starter {
    /// A task of a Slurm step.
    Srun,
    /// Open MPI's `mpirun`.
    OpenMpi,
    /// PRRTE or another PMIx launcher that sets nothing but `PMIX_*`.
    Prrte,
    /// MPICH's Hydra.
    Hydra,
    /// Intel MPI's Hydra.
    IntelMpi,
    /// MVAPICH's `mpirun_rsh`.
    Mvapich,
    /// A launcher that sets `PMI_RANK` or `PMI_ID`.
    Pmi,
    /// Nobody: a world of one.
    Alone,
}

impl Starter {
    /// The command, for messages.
    pub(crate) fn command(self) -> &'static str {
        match self {
            Self::Srun => "srun",
            Self::OpenMpi => "mpirun (Open MPI)",
            Self::Prrte => "prun (PMIx)",
            Self::Hydra => "mpiexec (Hydra)",
            Self::IntelMpi => "mpirun (Intel MPI)",
            Self::Mvapich => "mpirun_rsh (MVAPICH)",
            Self::Pmi => "a PMI launcher",
            Self::Alone => "no launcher",
        }
    }
}

/// What the environment says about this process's place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RankFacts {
    /// This process, `0..size`.
    pub(crate) rank: u32,
    /// Processes in the world. `None`: only the PMIx server knows.
    pub(crate) size: Option<u32>,
    /// This process among those of the world on its node.
    pub(crate) local_rank: Option<u32>,
    /// Processes of the world on this node.
    pub(crate) local_size: Option<u32>,
    /// Index of this node in `hosts`.
    pub(crate) node_index: Option<u32>,
    /// Nodes of the world, in their order: those of the step, or of the allocation where another launcher runs in it.
    /// Empty when they are not known.
    pub(crate) hosts: Vec<String>,
    /// Processes on each of `hosts`. Empty when that is not known.
    pub(crate) tasks_per_node: Vec<u32>,
    /// This node, as its launcher calls it.
    pub(crate) this_host: Option<String>,
    /// Slurm's job.
    pub(crate) job: Option<String>,
    /// The step within the job; only for tasks of that step.
    pub(crate) step: Option<String>,
    /// PMIx's name of the world; unique among the worlds of its server.
    pub(crate) namespace: Option<String>,
    /// Address of the node that ran `srun`.
    pub(crate) launch_address: Option<String>,
    /// Who started this process.
    pub(crate) starter: Starter,
    /// Whether a PMIx server waits for this process.
    pub(crate) pmix: bool,
    /// Whether this is the batch script (or an interactive shell) of an allocation, and no task of a step.
    pub(crate) in_batch_script: bool,
    placement: Placement,
}

impl RankFacts {
    /// The host that runs a rank, where the environment tells.
    pub(crate) fn host_of(&self, rank: u32) -> Option<&str> {
        let node = self.placement.node_of(rank)?;
        self.hosts.get(node).map(String::as_str)
    }

    fn alone(environment: &Environment) -> Self {
        Self {
            rank: 0,
            size: Some(1),
            local_rank: Some(0),
            local_size: Some(1),
            node_index: None,
            hosts: Vec::new(),
            tasks_per_node: Vec::new(),
            this_host: environment.text("SLURMD_NODENAME"),
            job: slurm::job(environment),
            step: None,
            namespace: None,
            launch_address: None,
            starter: Starter::Alone,
            pmix: false,
            in_batch_script: false,
            placement: Placement::default(),
        }
    }
}

/// One kind of starter: nothing when it is another.
type Source = fn(&Environment) -> Result<Option<RankFacts>, RankError>;

/// Reads the facts, from the most specific starter to the least.
///
/// # Errors
/// When a variable is not what it should be, or two of them contradict each other.
pub(crate) fn discover(environment: &Environment) -> Result<RankFacts, RankError> {
    let sources: [Source; 3] = [
        mpi::launched_by_mpirun,
        slurm::task_of_a_step,
        mpi::launched_by_pmi,
    ];
    for source in sources {
        if let Some(facts) = source(environment)? {
            return Ok(facts);
        }
    }
    Ok(RankFacts {
        in_batch_script: slurm::is_batch_script(environment),
        ..RankFacts::alone(environment)
    })
}
