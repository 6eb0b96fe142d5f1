//! The local cluster itself: what the other tests on it rely on.

use std::time::Duration;

use baton_tests::cluster::Cluster;

const SOON: Duration = Duration::from_secs(30);

#[tokio::test]
async fn a_step_runs_on_every_node_and_ends_with_its_handle() {
    let Some(cluster) = Cluster::get().await else {
        return;
    };
    let nodes = cluster.nodes().await;
    assert!(nodes.len() >= 3, "{nodes:?}");
    let mark = format!("31{}", std::process::id());
    let script = format!("echo here is $(hostname); sleep {mark}");
    let mut step = cluster.srun(&["-N3", "-n3", "--mpi=pmix", "bash", "-c", &script], &[]);
    for (node, _) in nodes.iter().take(3) {
        step.line(&format!("here is {node}"), SOON).await;
        let running = cluster.processes(node).await;
        assert!(
            running
                .iter()
                .any(|process| process.command.contains(&mark)),
            "{running:?}"
        );
    }
    drop(step);
    cluster.nothing_left(&mark, SOON).await;
}

#[tokio::test]
async fn a_batch_job_runs_mpi_inside_its_allocation() {
    let Some(cluster) = Cluster::get().await else {
        return;
    };
    let wrap =
        "mpirun --allow-run-as-root bash -c 'echo rank $OMPI_COMM_WORLD_RANK on $(hostname)'";
    let job = cluster
        .sbatch(&["-N2", "--ntasks-per-node=2", "--wrap", wrap], &[])
        .await;
    job.ended(&cluster, SOON).await;
    for line in ["rank 0 on node", "rank 3 on node"] {
        job.line(line, SOON).await;
    }
}

#[tokio::test]
async fn a_node_that_is_cut_off_is_not_reached_and_comes_back() {
    let Some(cluster) = Cluster::alone().await else {
        return;
    };
    let nodes = cluster.nodes().await;
    let ((first, _), (second, address)) = (&nodes[0], &nodes[1]);
    let knock = format!("timeout 2 bash -c '</dev/tcp/{address}/16818'");
    let reach = async || {
        let answer = cluster.exec(first, &["bash", "-c", &knock]).await;
        answer.status.success()
    };
    assert!(reach().await);
    let cut = cluster.cut(second).await;
    assert!(!reach().await);
    drop(cut);
    baton_tests::process::eventually("the node to be reached again", SOON, async || {
        reach().await.then_some(())
    })
    .await;
}
