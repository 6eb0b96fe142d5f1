//! The notice board under a real mpirun: this test program starts itself as its ranks.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use super::{CHILD_ENVIRONMENT, Pmix, PmixError};

const SCENE: &str = "BATON_TEST_PMIX_SCENE";
const FOLDER: &str = "BATON_TEST_PMIX_FOLDER";
const KEY: &str = "baton.test";
const LIMIT: Duration = Duration::from_secs(20);

/// Runs a scene as the ranks of an mpirun. `None`, with the reason printed, where there is no mpirun.
fn mpirun(scene: &str, ranks: u32) -> Option<Output> {
    let folder = tempfile::tempdir().expect("a folder");
    let output = Command::new("timeout")
        .args(["60", "mpirun", "--allow-run-as-root", "--oversubscribe"])
        .args(["-n", &ranks.to_string()])
        .arg(std::env::current_exe().expect("a running test has an executable"))
        .args(["--exact", "pmix::tests::a_rank", "--ignored", "--nocapture"])
        .env(SCENE, scene)
        .env(FOLDER, folder.path())
        .output()
        .expect("timeout is there");
    if output.status.code() == Some(127) {
        eprintln!("skipped: there is no mpirun; install openmpi-bin");
        return None;
    }
    Some(output)
}

#[track_caller]
fn succeeds(scene: &str, ranks: u32) {
    let Some(output) = mpirun(scene, ranks) else {
        return;
    };
    assert!(output.status.success(), "{scene}:\n{}", talk(&output));
}

fn talk(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!(
        "{}\n{}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    )
}

#[test]
fn ranks_read_each_other() {
    succeeds("exchange", 4);
}

#[test]
fn what_was_published_outlives_its_rank() {
    succeeds("leaves-early", 3);
}

#[test]
fn a_late_rank_is_waited_for() {
    succeeds("comes-late", 3);
}

#[test]
fn a_missing_text_ends_with_its_deadline() {
    succeeds("never", 2);
    succeeds("absent", 2);
}

#[test]
fn a_child_may_connect_after_its_parent() {
    succeeds("child", 2);
}

/// What `fabric: mpi` rests on: the agent has been in and out of PMIx when its child calls MPI_Init as the same rank.
#[test]
fn a_child_may_call_mpi_init() {
    let folder = tempfile::tempdir().expect("a folder");
    let (source, program) = (folder.path().join("sum.c"), folder.path().join("sum"));
    std::fs::write(&source, MPI_PROGRAM).expect("a source");
    match Command::new("mpicc")
        .arg("-o")
        .args([&program, &source])
        .status()
    {
        Err(_) => eprintln!("skipped: there is no mpicc; install libopenmpi-dev"),
        Ok(compiled) => {
            assert!(compiled.success());
            succeeds(&format!("mpi:{}", program.display()), 2);
        }
    }
}

/// Ends with 0 when the ranks' ones add up to their number.
const MPI_PROGRAM: &str = "#include <mpi.h>
int main(int argc, char **argv) {
    int size = 0, one = 1, sum = 0;
    MPI_Init(&argc, &argv);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    MPI_Allreduce(&one, &sum, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
    MPI_Finalize();
    return sum == 2 && size == 2 ? 0 : 1;
}
";

/// The agents' duty to finalize, seen from the other side.
#[test]
fn mpirun_ends_a_world_whose_rank_does_not_finalize() {
    let Some(output) = mpirun("no-finalize", 2) else {
        return;
    };
    assert!(!output.status.success(), "{}", talk(&output));
}

#[test]
fn without_a_launcher_there_is_no_server() {
    assert_eq!(Pmix::open().err(), Some(PmixError::NoServer));
}

#[test]
fn errors_say_what_to_do() {
    let text = PmixError::NoServer.to_string();
    assert!(text.contains("\nhint: "), "{text}");
    let text = PmixError::TimedOut {
        key: "baton.hello".to_owned(),
        rank: 3,
        waited: Duration::from_secs(60),
        reason: "the PMIx server is still waiting for it".to_owned(),
    };
    assert_eq!(
        text.to_string(),
        "no `baton.hello` from rank 3 after 60 s: the PMIx server is still waiting for it"
    );
}

#[test]
#[ignore = "a rank of the tests above, which start it under mpirun"]
fn a_rank() {
    let scene = std::env::var(SCENE).expect("started by a test");
    let folder = PathBuf::from(std::env::var_os(FOLDER).expect("started by a test"));
    let rank: u32 = std::env::var("PMIX_RANK")
        .expect("started by mpirun")
        .parse()
        .expect("a number");
    match scene.as_str() {
        "exchange" => exchange(&folder, "done"),
        "leaves-early" => leaves_early(rank, &folder),
        "comes-late" => comes_late(rank, &folder),
        "never" => never(rank, &folder),
        "absent" => absent(rank, &folder),
        "child" => child(&folder),
        "grandchild" => exchange(&folder, "child-done"),
        "no-finalize" => {
            let pmix = Pmix::open().expect("a server");
            pmix.publish(KEY, "here").expect("a notice");
        }
        other => match other.strip_prefix("mpi:") {
            Some(program) => mpi_child(&folder, program),
            None => panic!("no scene {other}"),
        },
    }
}

fn exchange(folder: &Path, done: &str) {
    let pmix = Pmix::open().expect("a server");
    let (rank, size) = (pmix.rank(), pmix.job_size());
    pmix.publish(KEY, &format!("rank {rank}"))
        .expect("a notice");
    for other in [0, (rank + 1) % size] {
        let text = pmix.fetch(other, KEY, Instant::now() + LIMIT);
        assert_eq!(text.as_deref(), Ok(format!("rank {other}").as_str()));
    }
    pmix.finalize().expect("leave");
    all_stay_until(folder, done, rank, size);
}

/// Under Slurm the notices of a node go with its last process, so nobody ends before all have read.
fn all_stay_until(folder: &Path, what: &str, rank: u32, size: u32) {
    mark(folder, &format!("{what}{rank}"));
    for other in 0..size {
        wait_for(folder, &format!("{what}{other}"));
    }
}

fn leaves_early(rank: u32, folder: &Path) {
    let pmix = Pmix::open().expect("a server");
    let size = pmix.job_size();
    if rank == 0 {
        pmix.publish(KEY, "left").expect("a notice");
        pmix.finalize().expect("leave");
        mark(folder, "left");
    } else {
        wait_for(folder, "left");
        let text = pmix.fetch(0, KEY, Instant::now() + LIMIT);
        assert_eq!(text.as_deref(), Ok("left"));
        pmix.finalize().expect("leave");
    }
    all_stay_until(folder, "read", rank, size);
}

fn comes_late(rank: u32, folder: &Path) {
    if rank == 0 {
        wait_for(folder, "asking1");
        wait_for(folder, "asking2");
    }
    let pmix = Pmix::open().expect("a server");
    if rank == 0 {
        pmix.publish(KEY, "late").expect("a notice");
    } else {
        mark(folder, &format!("asking{rank}"));
        let text = pmix.fetch(0, KEY, Instant::now() + LIMIT);
        assert_eq!(text.as_deref(), Ok("late"));
    }
    pmix.finalize().expect("leave");
}

fn never(rank: u32, folder: &Path) {
    let pmix = Pmix::open().expect("a server");
    if rank == 0 {
        pmix.publish("baton.other", "x").expect("a notice");
        wait_for(folder, "gave-up");
    } else {
        gives_up(&pmix);
        mark(folder, "gave-up");
    }
    pmix.finalize().expect("leave");
}

fn absent(rank: u32, folder: &Path) {
    if rank > 0 {
        let pmix = Pmix::open().expect("a server");
        gives_up(&pmix);
        pmix.finalize().expect("leave");
        mark(folder, "gave-up");
        return;
    }
    wait_for(folder, "gave-up");
    // Once one rank has been in and out, mpirun takes one that never was for a crash.
    let pmix = Pmix::open().expect("a server");
    pmix.finalize().expect("leave");
}

fn gives_up(pmix: &Pmix) {
    let start = Instant::now();
    let error = pmix
        .fetch(0, KEY, start + Duration::from_secs(2))
        .expect_err("nobody publishes it");
    assert!(
        matches!(error, PmixError::TimedOut { rank: 0, .. }),
        "{error}"
    );
    let took = start.elapsed();
    assert!(took < Duration::from_secs(4), "{took:?}: {error}");
    eprintln!("{took:?}: {error}");
}

fn child(folder: &Path) {
    exchange(folder, "done");
    let own = std::env::current_exe().expect("a running test has an executable");
    let output = Command::new(own)
        .args(["--exact", "pmix::tests::a_rank", "--ignored", "--nocapture"])
        .env(SCENE, "grandchild")
        .output()
        .expect("itself");
    assert!(output.status.success(), "{}", talk(&output));
}

fn mpi_child(folder: &Path, program: &str) {
    exchange(folder, "done");
    let status = Command::new(program)
        .envs(CHILD_ENVIRONMENT.iter().copied())
        .status()
        .expect("the program");
    assert!(status.success(), "{status}");
}

fn mark(folder: &Path, name: &str) {
    std::fs::write(folder.join(name), "").expect("a mark");
}

fn wait_for(folder: &Path, name: &str) {
    let deadline = Instant::now() + LIMIT;
    while !folder.join(name).exists() {
        assert!(Instant::now() < deadline, "no {name} after {LIMIT:?}");
        std::thread::park_timeout(Duration::from_millis(10));
    }
}
