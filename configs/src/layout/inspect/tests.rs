//! Tests of layouts that are looked at further, and of the mistakes in their part for clusters.

use super::*;

fn inspected(text: &str) -> Inspection {
    inspect(
        &Document::parse("layout.yaml", text).expect("valid YAML"),
        Some("m"),
    )
}

fn errors(text: &str) -> String {
    let finished = inspected(text).finish(Vec::new());
    finished.expect_err("refused").to_string()
}

#[test]
fn origins_are_where_values_were_written() {
    let inspection = inspected(
        "engine: {tensor_parallel_size: 2}\ncontext:\n  environment: {A: '1'}\ngpus_per_node: 4\n\
         container:\n  image: i\n  mounts:\n    - /a:/a\n    - /b:/b\n",
    );
    let origin = |key: &str| inspection.origin_of(key).map(|origin| origin.to_string());
    assert_eq!(
        origin("context.engine.tensor_parallel_size").as_deref(),
        Some("layout.yaml:1 engine.tensor_parallel_size")
    );
    assert_eq!(
        origin("context.environment.A").as_deref(),
        Some("layout.yaml:3 context.environment.A")
    );
    assert_eq!(
        origin("container.mounts[1]").as_deref(),
        Some("layout.yaml:9 container.mounts[1]")
    );
    assert_eq!(origin("context.engine.dtype"), None);
}

#[test]
fn mistakes_of_others_stand_with_ours() {
    let inspection =
        inspected("gpus_per_node: 4\nslurm: {time: soon}\nengine:\n  tensor_parallel_size: 5\n");
    assert!(inspection.spoils(&["time"]) && !inspection.spoils(&["tensor_parallel_size"]));
    assert!(!inspection.spoils(&["me"]));
    let fault = Fault::new(
        "generation.engine.tensor_parallel_size",
        "does not divide 8 heads".to_owned(),
        "possible: 1, 2, 4, 8",
    );
    let error = inspection
        .finish(vec![fault])
        .expect_err("refused")
        .to_string();
    let lines: Vec<&str> = error.lines().collect();
    assert!(
        lines[0].starts_with("layout.yaml:2:15: slurm.time: found \"soon\""),
        "{error}"
    );
    assert_eq!(
        lines[2],
        "layout.yaml:4:25: engine.tensor_parallel_size: does not divide 8 heads"
    );
    assert_eq!(lines[3], "  hint: possible: 1, 2, 4, 8");
}

/// A value and what is said about it.
const MISTAKES: &[(&str, &str)] = &[
    ("slurm: {nodes: 2}", "gpus_per_node: missing"),
    (
        "start: world",
        "start: found text \"world\", expected one of `one_world`, `steps`, `jobs`",
    ),
    (
        "gpus_per_node: 4\nports: 9000",
        "ports: found 9000, expected text",
    ),
    (
        "gpus_per_node: 4\nports: 9100-9000",
        "ports: found \"9100-9000\"",
    ),
    ("gpus_per_node: 4\nports: 80-90", "ports: found \"80-90\""),
    (
        "gpus_per_node: 4\nports: 7990-8010",
        "ports: the proxy's port 8000 is one of",
    ),
    (
        "gpus_per_node: 4\nslurm: {time: '1:2:3:4'}",
        "slurm.time: found",
    ),
    (
        "gpus_per_node: 4\nslurm: {signal: 'B:HUP@60'}",
        "slurm.signal: found",
    ),
    (
        "gpus_per_node: 4\nslurm: {signal: 'B:TERM@60'}",
        "reaches srun, which ends its tasks at once",
    ),
    (
        "gpus_per_node: 4\nslurm: {sbatch_args: [gres]}",
        "slurm.sbatch_args[0]: found \"gres\", expected an option",
    ),
    (
        "gpus_per_node: 4\nslurm: {sbatch_args: ['-N4']}",
        "slurm.sbatch_args[0]: \"-N4\" is decided by the plan",
    ),
    (
        "gpus_per_node: 4\nslurm: {srun_args: ['--mpi=none']}",
        "slurm.srun_args[0]: \"--mpi=none\" is decided",
    ),
    (
        "gpus_per_node: 4\nslurm: {job_name: \"a\\nb\"}",
        "slurm.job_name: found \"a\\nb\"",
    ),
    (
        "gpus_per_node: 4\ncontainer: {mounts: []}",
        "container.image: missing",
    ),
    (
        "gpus_per_node: 4\ncontainer: {image: i, mounts: ['a:b']}",
        "container.mounts[0]: found \"a:b\"",
    ),
    (
        "gpus_per_node: 4\ncontainer: {image: i, mounts: ['/a:/x', '/b:/x']}",
        "/x is mounted twice, first from /a",
    ),
    (
        "gpus_per_node: 4\ncontainer: {image: i, workdir: w}",
        "container.workdir: found \"w\", expected an absolute path",
    ),
    (
        "gpus_per_node: 4\nfabric: mpi\nmpi: none",
        "mpi: is none, but `fabric: mpi` needs",
    ),
    (
        "gpus_per_node: 4\ndiscovery_uri: http://h:8000",
        "discovery_uri: is for `start: jobs`",
    ),
    (
        "gpus_per_node: 4\nstart: jobs\ndiscovery_uri: h:8000",
        "discovery_uri: found \"h:8000\"",
    ),
    (
        "gpus_per_node: 4\nstart: jobs\ndiscovery_uri: http://h:9",
        "discovery_uri: the store is in the proxy, which binds port 8000",
    ),
    (
        "gpus_per_node: 4\ncontext: {environment: {A-B: x}}",
        "context.environment: found \"A-B\"",
    ),
    (
        "gpus_per_node: 4\nproxy: {environment: {A: x}}",
        "proxy.environment: the proxy of `start: one_world`",
    ),
];

#[test]
fn values_of_the_cluster_part_are_checked() {
    for (text, expected) in MISTAKES {
        let found = errors(text);
        assert!(found.contains(*expected), "{text}\n{found}");
    }
}

#[test]
fn times_and_signals_are_those_of_slurm() {
    for time in [
        "30",
        "30:00",
        "2:00:00",
        "1-12",
        "1-12:30",
        "1-12:30:00",
        "UNLIMITED",
    ] {
        let text = format!("gpus_per_node: 1\nslurm: {{time: '{time}'}}");
        assert!(inspected(&text).finish(Vec::new()).is_ok(), "{time}");
    }
    for (signal, start) in [
        ("B:USR1@90", "jobs"),
        ("USR1", "one_world"),
        ("B:SIGUSR1@0", "steps"),
        ("10@5", "steps"),
        ("TERM@60", "one_world"),
        ("B:TERM@60", "steps"),
    ] {
        let text = format!("gpus_per_node: 1\nstart: {start}\nslurm: {{signal: '{signal}'}}");
        assert!(inspected(&text).finish(Vec::new()).is_ok(), "{signal}");
    }
}

#[test]
fn files_of_a_container_are_found_outside() {
    let (layout, _) = inspected(
        "gpus_per_node: 1\ncontainer: {image: i, mounts: ['/data/models:/models:ro', '/home', '/x/y:/models/special']}",
    )
    .finish(Vec::new())
    .expect("good");
    let container = layout
        .job
        .and_then(|job| job.container)
        .expect("a container");
    let outside = |inside: &str| container.outside(inside);
    assert_eq!(outside("/models/a/b").as_deref(), Some("/data/models/a/b"));
    assert_eq!(outside("/models/special/c").as_deref(), Some("/x/y/c"));
    assert_eq!(outside("/home/me").as_deref(), Some("/home/me"));
    assert_eq!(outside("/modelsx"), None);
}
