//! Recorded environments of real launchers, and made ones that contradict themselves.

mod recorded;

use proptest::prelude::*;

use super::placement::{Deal, Placement};
use super::*;

fn environment(text: &str) -> Environment {
    Environment::from_pairs(
        text.split_whitespace()
            .map(|pair| pair.split_once('=').expect("NAME=VALUE")),
    )
}

#[track_caller]
fn facts(text: &str) -> RankFacts {
    discover(&environment(text)).expect("facts")
}

/// The error in one line and its hint in another.
#[track_caller]
fn refused(text: &str) -> String {
    let error = discover(&environment(text))
        .expect_err("no facts")
        .to_string();
    let (line, hint) = error.split_once("\nhint: ").expect("a hint");
    assert!(!line.contains('\n') && !hint.is_empty(), "{error}");
    line.to_owned()
}

#[track_caller]
fn hosts_of(facts: &RankFacts) -> Vec<&str> {
    let size = facts.size.expect("a size");
    (0..size)
        .map(|rank| facts.host_of(rank).unwrap_or("?"))
        .collect()
}

#[test]
fn nobody_started_it() {
    let alone = facts("HOME=/root");
    assert_eq!(
        (alone.rank, alone.size, alone.starter),
        (0, Some(1), Starter::Alone)
    );
    assert!(!alone.in_batch_script && !alone.pmix);
    assert_eq!(alone.starter.command(), "no launcher");
    // Left over from a login shell, or exported by hand: no rank, no world.
    assert_eq!(facts("SLURM_NTASKS=4").size, Some(1));
}

#[test]
fn existing_launch_contract() {
    // COMPAT: rank is the first of these; a rank 0 without a size is rank 0 of 1.
    let zero = facts("PMI_RANK=0");
    assert_eq!(
        (zero.rank, zero.size, zero.starter),
        (0, Some(1), Starter::Pmi)
    );
    assert_eq!(facts("PMI_ID=0").size, Some(1));
    assert_eq!(facts("OMPI_COMM_WORLD_RANK=0").size, Some(1));
    assert_eq!(facts("SLURM_PROCID=0").size, Some(1));
    let task = facts("SLURM_PROCID=1 SLURM_NTASKS=2");
    assert_eq!(
        (task.rank, task.size, task.starter),
        (1, Some(2), Starter::Srun)
    );
    let pmi = facts("PMI_ID=3 PMI_SIZE=8");
    assert_eq!((pmi.rank, pmi.size), (3, Some(8)));
}

#[test]
fn an_empty_variable_is_none() {
    assert_eq!(
        facts("OMPI_COMM_WORLD_RANK= SLURM_PROCID=").starter,
        Starter::Alone
    );
}

#[test]
fn ranks_outside_their_world() {
    assert_eq!(
        refused("OMPI_COMM_WORLD_RANK=4 OMPI_COMM_WORLD_SIZE=4"),
        "OMPI_COMM_WORLD_RANK=4 does not fit OMPI_COMM_WORLD_SIZE=4: ranks count from 0 to one below the size"
    );
    assert!(
        refused("SLURM_PROCID=2 SLURM_NTASKS=2")
            .starts_with("SLURM_PROCID=2 does not fit SLURM_NTASKS=2")
    );
    assert!(refused("PMI_RANK=0 PMI_SIZE=0").starts_with("PMI_RANK=0 does not fit PMI_SIZE=0"));
    assert!(
        refused("PMI_RANK=1 PMI_SIZE=2 MPI_LOCALRANKID=2 MPI_LOCALNRANKS=2")
            .starts_with("MPI_LOCALRANKID=2 does not fit MPI_LOCALNRANKS=2")
    );
}

#[test]
fn ranks_without_a_size() {
    assert_eq!(
        refused("PMI_RANK=3"),
        "PMI_RANK=3 has none of PMI_SIZE beside it"
    );
    assert_eq!(
        refused("SLURM_PROCID=1 SLURM_STEP_ID=0 SLURM_JOB_ID=7"),
        "SLURM_PROCID=1 has none of SLURM_STEP_NUM_TASKS, SLURM_NTASKS, SLURM_NPROCS beside it"
    );
    assert_eq!(
        refused("PMIX_RANK=1"),
        "PMIX_RANK=1 has none of PMIX_NAMESPACE beside it"
    );
    // A filter took the step away: rank 0 would think itself a batch script, so the others must not wait for it.
    assert_eq!(
        refused("SLURM_PROCID=1 SLURM_NTASKS=2 SLURM_JOB_ID=7"),
        "SLURM_PROCID=1 has none of SLURM_STEP_ID, SLURM_STEPID beside it"
    );
}

#[test]
fn numbers_that_are_none() {
    assert_eq!(
        refused("OMPI_COMM_WORLD_RANK=first"),
        "OMPI_COMM_WORLD_RANK=`first` is not a number"
    );
    assert_eq!(
        refused("SLURM_PROCID=-1 SLURM_STEP_ID=0"),
        "SLURM_PROCID=`-1` is not a number"
    );
    assert_eq!(
        refused("SLURM_PROCID=0 SLURM_JOB_ID=1 SLURM_STEP_ID=x"),
        "SLURM_STEP_ID=`x` is not a number"
    );
    assert_eq!(
        refused("PMI_RANK=0 PMI_SIZE=4294967296"),
        "PMI_SIZE=`4294967296` is not a number"
    );
}

const STEP: &str = "SLURM_JOB_ID=7 SLURM_STEP_ID=0 SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=4 SLURM_NODEID=0 \
                    SLURM_STEP_NODELIST=n[1-2] SLURM_STEP_TASKS_PER_NODE=2(x2)";

#[track_caller]
fn step_refused(more: &str) -> String {
    refused(&format!("{STEP} {more}"))
}

#[test]
fn variables_of_one_step_that_differ() {
    assert_eq!(
        step_refused("SLURM_NTASKS=8"),
        "SLURM_STEP_NUM_TASKS=4 and SLURM_NTASKS=8 speak of the same world's size and differ"
    );
    assert_eq!(
        step_refused("PMI_RANK=3 PMI_SIZE=4"),
        "SLURM_PROCID=1 and PMI_RANK=3 speak of the same rank and differ"
    );
    assert_eq!(
        step_refused("PMIX_NAMESPACE=slurm.pmix.7.0 PMIX_RANK=0"),
        "SLURM_PROCID=1 and PMIX_RANK=0 speak of the same rank and differ"
    );
    // Slurm's own PMIx says that srun is nearest; an mpirun's leftovers then have to agree with it.
    assert_eq!(
        step_refused("PMIX_NAMESPACE=slurm.pmix.7.0 OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2"),
        "SLURM_STEP_NUM_TASKS=4 and OMPI_COMM_WORLD_SIZE=2 speak of the same world's size and differ"
    );
    assert_eq!(
        step_refused("SLURM_STEP_TASKS_PER_NODE=2,1"),
        "SLURM_STEP_TASKS_PER_NODE=2,1 and SLURM_STEP_NUM_TASKS=4 (on 2 nodes) speak of the same step and differ"
    );
    assert_eq!(
        step_refused("SLURM_NODEID=2"),
        "SLURM_NODEID=2 and SLURM_STEP_NODELIST=2 nodes speak of the same nodes and differ"
    );
    assert!(
        step_refused("SLURM_STEP_NODELIST=n[1-")
            .starts_with("SLURM_STEP_NODELIST=`n[1-`: `[` without `]` at position 1")
    );
    assert_eq!(
        refused("OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 PMIX_RANK=0 PMIX_NAMESPACE=1"),
        "OMPI_COMM_WORLD_RANK=1 and PMIX_RANK=0 speak of the same rank and differ"
    );
}

#[test]
fn leftovers_that_agree_do_no_harm() {
    let facts = facts(&format!(
        "{STEP} PMIX_NAMESPACE=slurm.pmix.7.0 OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=4"
    ));
    assert_eq!(facts.starter, Starter::Srun);
}

#[test]
fn a_place_that_is_not_certain_is_not_told() {
    // The task sits on node 0, but an unknown distribution says nothing of the others.
    let arbitrary = facts(&format!("{STEP} SLURM_DISTRIBUTION=arbitrary"));
    assert_eq!(arbitrary.host_of(0), None);
    // A distribution that its own neighbours contradict.
    let wrong = facts(&format!("{STEP} SLURM_DISTRIBUTION=block SLURM_GTIDS=1,3"));
    assert_eq!(wrong.host_of(0), None);
    // Not named, but the neighbours tell.
    let told = facts(&format!(
        "{STEP} SLURM_GTIDS=0,2 SLURM_PROCID=2 SLURM_LOCALID=1"
    ));
    assert_eq!(hosts_of(&told), ["n1", "n2", "n1", "n2"]);
    assert_eq!(told.host_of(4), None);
}

#[test]
fn special_steps_are_no_steps() {
    // salloc's interactive step and the batch step, as newer versions number them.
    for step in ["4294967290", "4294967291"] {
        let shell = facts(&format!(
            "SLURM_JOB_ID=7 SLURM_STEP_ID={step} SLURM_PROCID=0 SLURM_NTASKS=4"
        ));
        assert_eq!((shell.starter, shell.size), (Starter::Alone, Some(1)));
        assert!(shell.in_batch_script);
    }
}

#[test]
fn a_step_without_its_slurm_variables() {
    // A container that lets only PMIX_* through.
    let facts = facts("PMIX_NAMESPACE=slurm.pmix.7.0 PMIX_RANK=3 PMIX_SERVER_URI4=x");
    assert_eq!(
        (facts.starter, facts.rank, facts.size),
        (Starter::Srun, 3, None)
    );
    assert!(facts.pmix);
}

#[test]
fn distributions() {
    assert_eq!(Deal::of("block:cyclic", None), Some(Deal::Block));
    assert_eq!(Deal::of("cyclic:block,Pack", None), Some(Deal::Cyclic));
    assert_eq!(Deal::of("plane=3", None), Some(Deal::Plane(3)));
    assert_eq!(Deal::of("plane", Some(2)), Some(Deal::Plane(2)));
    assert_eq!(Deal::of("plane", None), None);
    assert_eq!(Deal::of("arbitrary", None), None);
}

#[test]
fn mappings_that_are_none() {
    for text in [
        "",
        "(vector)",
        "(vector,())",
        "(vector,(0,1))",
        "(vector,(0,1,2,3))",
        "(vector,(0,1,x))",
        "(vector,(0,65536,65536))",
        "(vector,(4294967295,2,1))",
        "(serial,(0,1,2))",
    ] {
        assert_eq!(Placement::mapped(text), None, "{text}");
    }
}

proptest! {
    /// However they are dealt: each node gets its number of ranks, in ascending order, and each rank one node.
    #[test]
    fn every_rank_has_one_place(
        tasks in prop::collection::vec(0..5_u32, 1..8),
        chunk in 0..5_u32,
    ) {
        let sum: u32 = tasks.iter().sum();
        for deal in [Deal::Block, Deal::Cyclic, Deal::Plane(chunk)] {
            let placement = Placement::dealt(&tasks, deal);
            prop_assert_eq!(placement.len(), usize::try_from(sum).expect("small"));
            for (node, count) in tasks.iter().enumerate() {
                let ranks: Vec<u32> = placement.ranks_on(node).collect();
                prop_assert_eq!(ranks.len(), usize::try_from(*count).expect("small"));
                prop_assert!(ranks.is_sorted());
                for rank in ranks {
                    prop_assert_eq!(placement.node_of(rank), Some(node));
                }
            }
        }
    }

    #[test]
    fn no_environment_panics(
        values in prop::collection::vec("[0-9]{0,3}|4294967295|n\\[1-[0-9]\\]|[0-9](\\(x[0-9]\\))?|x", 12),
    ) {
        let names = [
            "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID", "SLURM_JOB_ID", "SLURM_NODEID",
            "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "PMI_RANK", "PMI_SIZE",
            "SLURM_DIST_PLANESIZE", "SLURM_GTIDS", "SLURM_HET_SIZE",
        ];
        let environment = Environment::from_pairs(names.into_iter().zip(values));
        if let Ok(facts) = discover(&environment) {
            prop_assert!(facts.size.is_none_or(|size| facts.rank < size));
        }
    }
}
