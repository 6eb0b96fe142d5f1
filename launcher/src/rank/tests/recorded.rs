//! Environments as real launchers made them, less what nobody reads: Slurm 22.05.8, Open MPI 4.1.4, MPICH 4.0.2.

use super::*;

const PMIX_OF_SLURM: &str =
    "PMIX_SERVER_URI4=pmix-server.3174;tcp4://127.0.0.1:55339 PMIX_SERVER_TMPDIR=/spool/pmix.13.0/";

/// `srun -N2 -n3 --mpi=pmix`, the third task.
const SRUN_PMIX: &str = "PMIX_HOSTNAME=node2 PMIX_NAMESPACE=slurm.pmix.13.0 PMIX_RANK=2 SLURMD_NODENAME=node2 \
    SLURM_CPUS_ON_NODE=1 SLURM_GTIDS=2 SLURM_JOBID=13 SLURM_JOB_ID=13 SLURM_JOB_NODELIST=node[1-2] \
    SLURM_LAUNCH_NODE_IPADDR=10.77.0.1 SLURM_LOCALID=0 SLURM_MPI_TYPE=pmix SLURM_NODEID=1 SLURM_NODELIST=node[1-2] \
    SLURM_NPROCS=3 SLURM_NTASKS=3 SLURM_PMIX_MAPPING_SERV=(vector,(0,1,2),(1,1,1)) SLURM_PROCID=2 SLURM_STEPID=0 \
    SLURM_STEP_ID=0 SLURM_STEP_NODELIST=node[1-2] SLURM_STEP_NUM_NODES=2 SLURM_STEP_NUM_TASKS=3 \
    SLURM_STEP_TASKS_PER_NODE=2,1 SLURM_TASKS_PER_NODE=2,1";

#[test]
fn srun_with_pmix() {
    let facts = facts(&format!("{SRUN_PMIX} {PMIX_OF_SLURM}"));
    assert_eq!(
        (facts.rank, facts.size, facts.starter),
        (2, Some(3), Starter::Srun)
    );
    assert_eq!((facts.local_rank, facts.local_size), (Some(0), Some(1)));
    assert_eq!(facts.node_index, Some(1));
    assert_eq!(facts.hosts, ["node1", "node2"]);
    assert_eq!(facts.tasks_per_node, [2, 1]);
    assert_eq!(facts.this_host.as_deref(), Some("node2"));
    assert_eq!(facts.job.as_deref(), Some("13"));
    assert_eq!(facts.step.as_deref(), Some("0"));
    assert_eq!(facts.namespace.as_deref(), Some("slurm.pmix.13.0"));
    assert_eq!(facts.launch_address.as_deref(), Some("10.77.0.1"));
    assert!(facts.pmix && !facts.in_batch_script);
    assert_eq!(hosts_of(&facts), ["node1", "node1", "node2"]);
}

/// `srun -N2 -n4 -m cyclic --mpi=none`, the third task, on the first node.
const SRUN_CYCLIC: &str = "SLURMD_NODENAME=node1 SLURM_DISTRIBUTION=cyclic SLURM_GTIDS=0,2,3 SLURM_JOB_ID=14 \
    SLURM_JOB_NODELIST=node[1-2] SLURM_LAUNCH_NODE_IPADDR=10.77.0.1 SLURM_LOCALID=1 SLURM_NODEID=0 SLURM_NPROCS=4 \
    SLURM_NTASKS=4 SLURM_PROCID=2 SLURM_STEP_ID=0 SLURM_STEP_NODELIST=node[1-2] SLURM_STEP_NUM_TASKS=4 \
    SLURM_STEP_TASKS_PER_NODE=3,1 SLURM_TASKS_PER_NODE=3,1";

#[test]
fn srun_cyclic_without_pmix() {
    let facts = facts(SRUN_CYCLIC);
    assert_eq!((facts.rank, facts.size), (2, Some(4)));
    assert_eq!((facts.local_rank, facts.local_size), (Some(1), Some(3)));
    assert_eq!(hosts_of(&facts), ["node1", "node2", "node1", "node1"]);
    assert!(!facts.pmix);
}

#[test]
fn srun_plane() {
    // `srun -N2 -n4 -m plane=2`: the nodes hold 3 and 1.
    let facts = facts(
        "SLURM_JOB_ID=15 SLURM_STEP_ID=0 SLURM_PROCID=3 SLURM_STEP_NUM_TASKS=4 SLURM_NODEID=0 SLURM_LOCALID=2 \
         SLURM_DISTRIBUTION=plane SLURM_DIST_PLANESIZE=2 SLURM_GTIDS=0,1,3 SLURM_STEP_NODELIST=node[1-2] \
         SLURM_STEP_TASKS_PER_NODE=3,1",
    );
    assert_eq!(hosts_of(&facts), ["node1", "node1", "node2", "node1"]);
}

/// `SLURM_HOSTFILE=(node3 node1 node3) srun -n3 -m arbitrary`, the third task.
const SRUN_ARBITRARY: &str = "SLURM_DISTRIBUTION=arbitrary SLURM_GTIDS=0,2 SLURM_JOB_ID=17 SLURM_STEP_ID=0 \
    SLURM_PROCID=2 SLURM_LOCALID=1 SLURM_NODEID=1 SLURM_STEP_NUM_TASKS=3 SLURM_STEP_NODELIST=node[1,3] \
    SLURM_STEP_TASKS_PER_NODE=1,2";

#[test]
fn srun_arbitrary() {
    assert_eq!(hosts_of(&facts(SRUN_ARBITRARY)), ["?", "?", "?"]);
    // With --mpi=pmix there is the exact mapping.
    let mapped = facts(&format!(
        "{SRUN_ARBITRARY} SLURM_PMIX_MAPPING_SERV=(vector,(1,1,1),(0,2,1))"
    ));
    assert_eq!(hosts_of(&mapped), ["node3", "node1", "node3"]);
}

#[test]
fn srun_with_pmi2() {
    let facts = facts(
        "PMI_FD=13 PMI_JOBID=18.0 PMI_RANK=1 PMI_SIZE=2 SLURMD_NODENAME=node1 SLURM_GTIDS=0,1 SLURM_JOB_ID=18 \
         SLURM_LOCALID=1 SLURM_MPI_TYPE=pmi2 SLURM_NODEID=0 SLURM_NTASKS=2 SLURM_PROCID=1 SLURM_STEP_ID=0 \
         SLURM_STEP_NODELIST=node1 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2",
    );
    assert_eq!(
        (facts.rank, facts.size, facts.starter),
        (1, Some(2), Starter::Srun)
    );
    assert!(!facts.pmix);
}

/// `sbatch -N2 -n4 --ntasks-per-node=2`, in the script itself.
const BATCH: &str = "SLURMD_NODENAME=node1 SLURM_GTIDS=0 SLURM_JOBID=7 SLURM_JOB_ID=7 SLURM_JOB_NODELIST=node[1-2] \
    SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_NODELIST=node[1-2] SLURM_NPROCS=4 SLURM_NTASKS=4 SLURM_NTASKS_PER_NODE=2 \
    SLURM_PROCID=0 SLURM_TASKS_PER_NODE=2(x2)";

#[test]
fn a_batch_script_is_alone() {
    let facts = facts(BATCH);
    assert_eq!(
        (facts.rank, facts.size, facts.starter),
        (0, Some(1), Starter::Alone)
    );
    assert!(facts.in_batch_script);
    assert_eq!(facts.job.as_deref(), Some("7"));
    assert_eq!(facts.step, None);
    // So is a shell of salloc, which has no SLURM_PROCID.
    let shell = super::facts("SLURM_JOB_ID=3 SLURM_JOB_NODELIST=node1 SLURM_NTASKS=2");
    assert!(shell.in_batch_script && shell.size == Some(1));
}

#[test]
fn a_smaller_step_in_a_larger_allocation() {
    // `srun -N1 -n2` in that script: SLURM_NODELIST is still the allocation's.
    let facts = facts(
        "SLURMD_NODENAME=node1 SLURM_DISTRIBUTION=block SLURM_GTIDS=0,1 SLURM_JOB_ID=7 SLURM_JOB_NODELIST=node[1-2] \
         SLURM_LOCALID=1 SLURM_NODEID=0 SLURM_NODELIST=node[1-2] SLURM_NPROCS=2 SLURM_NTASKS=2 \
         SLURM_NTASKS_PER_NODE=2 SLURM_PROCID=1 SLURM_STEPID=0 SLURM_STEP_ID=0 SLURM_STEP_NODELIST=node1 \
         SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2 SLURM_TASKS_PER_NODE=2",
    );
    assert_eq!((facts.rank, facts.size), (1, Some(2)));
    assert_eq!(hosts_of(&facts), ["node1", "node1"]);
}

#[test]
fn mpirun_outside_slurm() {
    let facts = facts(
        "OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2 OMPI_COMM_WORLD_NODE_RANK=1 \
         OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_UNIVERSE_SIZE=2 PMIX_HOSTNAME=host \
         PMIX_NAMESPACE=33423361 PMIX_RANK=1 PMIX_SERVER_URI41=33423360.0;tcp4://127.0.0.1:47601",
    );
    assert_eq!(
        (facts.rank, facts.size, facts.starter),
        (1, Some(2), Starter::OpenMpi)
    );
    assert_eq!((facts.local_rank, facts.local_size), (Some(1), Some(2)));
    assert_eq!(facts.namespace.as_deref(), Some("33423361"));
    assert!(facts.pmix && facts.hosts.is_empty());
    assert_eq!((facts.job, facts.step), (None, None));
}

#[test]
fn mpirun_inside_an_allocation() {
    // `mpirun -n 4` in the script above. On the first node the script's variables are still there …
    let rank1 = facts(&format!(
        "{BATCH} OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2 OMPI_COMM_WORLD_RANK=1 \
         OMPI_COMM_WORLD_SIZE=4 PMIX_HOSTNAME=node1 PMIX_NAMESPACE=1549664257 PMIX_RANK=1"
    ));
    assert_eq!(
        (rank1.rank, rank1.size, rank1.starter),
        (1, Some(4), Starter::OpenMpi)
    );
    assert!(!rank1.in_batch_script);
    // … on the second those of the step that runs mpirun's daemon.
    let rank3 = facts(
        "OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2 OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 \
         PMIX_HOSTNAME=node2 PMIX_NAMESPACE=1549664257 PMIX_RANK=3 SLURMD_NODENAME=node2 SLURM_DISTRIBUTION=cyclic \
         SLURM_GTIDS=0 SLURM_JOB_ID=7 SLURM_JOB_NODELIST=node[1-2] SLURM_LAUNCH_NODE_IPADDR=10.77.0.11 \
         SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_NPROCS=1 SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_STEP_ID=1 \
         SLURM_STEP_NODELIST=node2 SLURM_STEP_NUM_TASKS=1 SLURM_STEP_TASKS_PER_NODE=1",
    );
    assert_eq!((rank3.rank, rank3.size), (3, Some(4)));
    assert_eq!((rank3.local_rank, rank3.local_size), (Some(1), Some(2)));
    assert_eq!(rank3.hosts, ["node1", "node2"]);
    // The daemon's step is not ours, nor is its SLURM_NODEID.
    assert_eq!((rank3.step, rank3.node_index), (None, Some(1)));
    assert_eq!(rank3.this_host.as_deref(), Some("node2"));
}

#[test]
fn mpirun_inside_a_step() {
    // `srun -n1 --mpi=pmix mpirun -n 2`.
    let facts = facts(
        "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2 \
         PMIX_NAMESPACE=1558773761 PMIX_RANK=1 SLURMD_NODENAME=node1 SLURM_JOB_ID=7 SLURM_JOB_NODELIST=node[1-2] \
         SLURM_MPI_TYPE=pmix SLURM_NTASKS=1 SLURM_PMIX_MAPPING_SERV=(vector,(0,1,1)) SLURM_PROCID=0 SLURM_STEP_ID=2 \
         SLURM_STEP_NODELIST=node1 SLURM_STEP_NUM_TASKS=1",
    );
    assert_eq!(
        (facts.rank, facts.size, facts.starter),
        (1, Some(2), Starter::OpenMpi)
    );
}

/// What every process of `sbatch -n1 : -N2 -n3` has of the whole job.
const HETEROGENEOUS: &str = "SLURM_HET_SIZE=2 SLURM_JOB_ID=1 SLURM_JOB_ID_HET_GROUP_0=1 SLURM_JOB_ID_HET_GROUP_1=2 \
    SLURM_JOB_NODELIST_HET_GROUP_0=node1 SLURM_JOB_NODELIST_HET_GROUP_1=node[2-3] SLURM_NTASKS_HET_GROUP_0=1 \
    SLURM_NTASKS_HET_GROUP_1=3 SLURM_TASKS_PER_NODE_HET_GROUP_0=1 SLURM_TASKS_PER_NODE_HET_GROUP_1=2,1";

#[test]
fn one_step_over_both_components() {
    // `srun --het-group=0,1`: Slurm counts ranks and nodes through.
    let facts = facts(&format!(
        "{HETEROGENEOUS} SLURMD_NODENAME=node2 SLURM_DISTRIBUTION=block SLURM_GTIDS=1,2 \
         SLURM_JOB_NODELIST=node[1-3] SLURM_LOCALID=1 SLURM_NODEID=1 SLURM_NTASKS=4 SLURM_PROCID=2 SLURM_STEP_ID=2 \
         SLURM_STEP_NODELIST=node[1-3] SLURM_STEP_NUM_TASKS=4 SLURM_STEP_TASKS_PER_NODE=1,2,1"
    ));
    assert_eq!((facts.rank, facts.size), (2, Some(4)));
    assert_eq!((facts.local_rank, facts.local_size), (Some(1), Some(2)));
    assert_eq!(hosts_of(&facts), ["node1", "node2", "node2", "node3"]);
}

#[test]
fn a_step_of_one_component() {
    // `srun --het-group=1`: a world of that component alone.
    let facts = facts(&format!(
        "{HETEROGENEOUS} SLURMD_NODENAME=node3 SLURM_DISTRIBUTION=block SLURM_GTIDS=2 SLURM_JOB_NODELIST=node[2-3] \
         SLURM_LOCALID=0 SLURM_NODEID=1 SLURM_NTASKS=3 SLURM_PROCID=2 SLURM_STEP_ID=1 \
         SLURM_STEP_NODELIST=node[2-3] SLURM_STEP_NUM_TASKS=3 SLURM_STEP_TASKS_PER_NODE=2,1"
    ));
    assert_eq!((facts.rank, facts.size), (2, Some(3)));
    assert_eq!(hosts_of(&facts), ["node2", "node2", "node3"]);
}

#[test]
fn mpirun_in_a_heterogeneous_job() {
    // SLURM_JOB_NODELIST is the first component's; the nodes of all are in the groups.
    let facts = facts(&format!(
        "{HETEROGENEOUS} SLURM_JOB_NODELIST=node1 SLURMD_NODENAME=node3 OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4"
    ));
    assert_eq!(facts.hosts, ["node1", "node2", "node3"]);
    assert_eq!(facts.node_index, Some(2));
}

#[test]
fn counts_of_one_component_only() {
    // Versions before 20.02 give each component its own counts in a step over all of them.
    let facts = facts(
        "SLURM_HET_SIZE=2 SLURM_JOB_ID=1 SLURM_STEP_ID=0 SLURM_PROCID=2 SLURM_NTASKS=4 SLURM_NODEID=0 \
         SLURM_STEP_NODELIST=node[2-3] SLURM_STEP_TASKS_PER_NODE=2,1",
    );
    assert_eq!((facts.rank, facts.size), (2, Some(4)));
    assert_eq!(facts.host_of(0), None);
}

/// `mpiexec.hydra -n 3`, the second process.
const HYDRA: &str = "HYDI_CONTROL_FD=7 GFORTRAN_UNBUFFERED_PRECONNECTED=y MPIR_CVAR_CH3_INTERFACE_HOSTNAME=host \
    MPI_LOCALNRANKS=3 MPI_LOCALRANKID=1 PMI_RANK=1 PMI_FD=8 PMI_SIZE=3";

#[test]
fn hydra() {
    let outside = facts(HYDRA);
    assert_eq!(
        (outside.rank, outside.size, outside.starter),
        (1, Some(3), Starter::Hydra)
    );
    assert_eq!((outside.local_rank, outside.local_size), (Some(1), Some(3)));
    let intel = facts(&format!("{HYDRA} I_MPI_ROOT=/opt/intel/mpi"));
    assert_eq!(intel.starter, Starter::IntelMpi);
    // In an allocation its proxies are tasks of a step, one a node.
    let inside = facts(&format!(
        "{HYDRA} SLURM_JOB_ID=7 SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 \
         SLURM_JOB_NODELIST=node[1-2]"
    ));
    assert_eq!(
        (inside.rank, inside.size, inside.starter),
        (1, Some(3), Starter::Hydra)
    );
}

#[test]
fn intel_mpi_under_srun() {
    // I_MPI_* are the user's settings; the ranks are Slurm's.
    let facts = facts(&format!(
        "{SRUN_CYCLIC} I_MPI_PMI_LIBRARY=/usr/lib/libpmi2.so PMI_RANK=2 PMI_SIZE=4"
    ));
    assert_eq!((facts.starter, facts.rank), (Starter::Srun, 2));
}

#[test]
fn prrte_says_a_rank_only() {
    let facts = facts(
        "PMIX_NAMESPACE=prterun-host-77@1 PMIX_RANK=2 PMIX_SERVER_URI41=prterun-host-77@0.0;tcp4://127.0.0.1:41111",
    );
    assert_eq!(
        (facts.rank, facts.size, facts.starter),
        (2, None, Starter::Prrte)
    );
    assert!(facts.pmix);
}
