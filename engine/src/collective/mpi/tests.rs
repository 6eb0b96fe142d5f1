//! The contract under a real mpirun, and the ways in which a world ends.
//!
//! Each test starts mpirun with this very test program, of which every rank runs `as_a_rank`, and that one part of it.
//! Where there is no plug-in or no mpirun the tests say so and pass; scripts/test builds one and names it, and then
//! nothing is passed over.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::channel;
use std::time::Instant;

use super::*;
use crate::collective::conformance::CHECKS;
use crate::collective::{Collective, CollectiveError};
use crate::group::{self, Leader};
use crate::ranks::{Fabric, FollowerSpec, LeaderRanks};
use crate::secret::Secret;

/// Says to a rank which part it plays.
const PART: &str = "BATON_TEST_MPI_PART";

/// Where the leader of the part `instance` tells its address.
const PIPE: &str = "BATON_TEST_MPI_PIPE";

/// Longer than any part takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// For ranks that are silent on purpose.
const SHORT: Duration = Duration::from_millis(500);

/// The plug-in, if it was built.
fn plugin() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os(find::VARIABLE) {
        return Some(named.into());
    }
    let executable = std::env::current_exe().unwrap();
    let built = executable.parent()?.parent()?.join(find::NAME);
    built.is_file().then_some(built)
}

/// What the world said, and whether it ended well.
struct Ended {
    text: String,
    success: bool,
    after: Duration,
}

/// Runs a part on so many ranks. `None` where that cannot be done here.
fn world(part: &str, ranks: usize) -> Option<Ended> {
    world_with(part, ranks, Path::new("none"))
}

fn world_with(part: &str, ranks: usize, pipe: &Path) -> Option<Ended> {
    let Some(plugin) = plugin() else {
        eprintln!("skipped: no {} (scripts/build-mpi makes it)", find::NAME);
        return None;
    };
    let must = std::env::var_os(find::VARIABLE).is_some();
    match start(&plugin, part, ranks, pipe) {
        Ok(child) => Some(wait(child)),
        Err(error) if must => panic!("mpirun does not start: {error}"),
        Err(error) => {
            eprintln!("skipped: mpirun does not start: {error}");
            None
        }
    }
}

fn start(plugin: &Path, part: &str, ranks: usize, pipe: &Path) -> std::io::Result<Child> {
    let own = std::env::current_exe()?;
    let rank = concat!(module_path!(), "::as_a_rank");
    let (_, rank) = rank.split_once("::").expect("a module of a crate");
    Command::new("mpirun")
        .args([
            "--allow-run-as-root",
            "--oversubscribe",
            "--bind-to",
            "none",
        ])
        .args(["-n", &ranks.to_string()])
        .arg(own)
        .args([
            "--exact",
            rank,
            "--ignored",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(PART, part)
        .env(PIPE, pipe)
        .env(find::VARIABLE, plugin)
        .env("BATON_TEST_MPI_SIZE", ranks.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
}

fn wait(child: Child) -> Ended {
    let start = Instant::now();
    let id = child.id();
    let (done, ended) = channel();
    let waiter = std::thread::spawn(move || done.send(child.wait_with_output()));
    let Ok(output) = ended.recv_timeout(PATIENCE) else {
        let id = nix::unistd::Pid::from_raw(i32::try_from(id).unwrap());
        nix::sys::signal::kill(id, nix::sys::signal::Signal::SIGKILL).unwrap();
        panic!("the world did not end within {PATIENCE:?}");
    };
    waiter.join().unwrap().unwrap();
    let output = output.unwrap();
    let text = [output.stdout, output.stderr].concat();
    Ended {
        text: String::from_utf8_lossy(&text).into_owned(),
        success: output.status.success(),
        after: start.elapsed(),
    }
}

/// A rank under mpirun.
#[test]
#[ignore = "the other tests of this file start it, under mpirun"]
fn as_a_rank() {
    let part = std::env::var(PART).expect("mpirun is started by a test, which names the part");
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    let size: usize = std::env::var("BATON_TEST_MPI_SIZE")
        .unwrap()
        .parse()
        .unwrap();
    let peer_timeout = match part.as_str() {
        "conform" | "roles" | "instance" | "kv" | "transport" => PATIENCE,
        _ => SHORT,
    };
    if part == "instance" {
        instance();
        return leave();
    }
    let opened = MpiWorld::open(MpiOptions {
        size_min: if part == "size" { size + 1 } else { size },
        join_timeout: Duration::from_secs(60),
        peer_timeout,
    });
    if part == "size" {
        say(&format!("refused: {}", opened.unwrap_err()));
        return leave();
    }
    let mut world = opened.unwrap();
    assert_eq!(world.size(), size);
    assert!(!world.library().is_empty());
    if part == "stuck" {
        // Rank 1 never takes part in the split.
        world.options.join_timeout = SHORT;
        if world.rank() == 1 {
            stay();
        }
    }
    if part == "kv" || part == "transport" {
        world.open_mail().unwrap();
        let run = match part.as_str() {
            "kv" => crate::transport::mpi::tests::as_a_rank,
            _ => crate::transport::mpi::tests::conforms,
        };
        run(&mut |line| say(line));
        return leave();
    }
    if part == "roles" {
        roles(&world);
        return leave();
    }
    let mut group = world.group(Some(0), 0).unwrap().unwrap();
    assert_eq!((group.rank(), group.size()), (world.rank(), size));
    assert_eq!(group.name(), "mpi");
    match part.as_str() {
        "conform" => {
            for (name, check) in CHECKS {
                say(&format!("rank {}: {name}", group.rank()));
                check(&mut group);
            }
            leave();
        }
        "killed" if group.rank() == 1 => {
            nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL).unwrap();
        }
        "silent" | "killed" => silent(&mut group),
        "unread" => unread(&mut group),
        other => panic!("no part {other}"),
    }
}

/// One line in one piece, for all ranks write to one place.
fn say(line: &str) {
    let line = format!("{line}\n");
    std::io::stderr().write_all(line.as_bytes()).unwrap();
}

/// Until the world is ended around it.
fn stay() -> ! {
    let (_keep, nothing) = channel::<()>();
    nothing.recv_timeout(PATIENCE).unwrap_err();
    panic!("the world was not ended");
}

fn silent(group: &mut MpiGroup) {
    if group.rank() == 0 {
        let error = group.receive(1, &mut Vec::new()).unwrap_err();
        say(&format!("rank 0 says: {error}"));
        let again = group.send(1, b"hello").unwrap_err();
        assert_eq!(error, again);
        assert!(matches!(error, CollectiveError::TimedOut { .. }));
    }
    stay()
}

/// Rank 1 takes none of what rank 0 sends.
fn unread(group: &mut MpiGroup) {
    if group.rank() == 0 {
        let error = loop {
            if let Err(error) = group.send(1, &vec![7; 8 << 20]) {
                break error;
            }
        };
        say(&format!("rank 0 says: {error}"));
    }
    stay()
}

/// Two ranks that meet over TCP and change over to MPI, as those of an instance do. The leader tells its address through
/// a pipe with a name.
fn instance() {
    let rank: usize = std::env::var("OMPI_COMM_WORLD_RANK")
        .unwrap()
        .parse()
        .unwrap();
    let pipe = std::env::var(PIPE).unwrap();
    let secret = Secret::from_hex(&"5a".repeat(32)).unwrap();
    let stop = AtomicBool::new(false);
    let met = if rank == 0 {
        let ranks = LeaderRanks {
            identity: "test".to_owned(),
            secret,
            host: "127.0.0.1".to_owned(),
            hosts: Vec::new(),
            join_timeout: PATIENCE,
            peer_timeout: PATIENCE,
            fabric: Fabric::Mpi,
            call: Arc::new(|_| Ok(())),
        };
        let leader = Leader::bind(&ranks).unwrap();
        std::fs::write(pipe, leader.address()).unwrap();
        leader.gather(2, &ranks, &stop).unwrap()
    } else {
        let spec = FollowerSpec {
            rank,
            size: 2,
            leader: std::fs::read_to_string(pipe).unwrap(),
            identity: "test".to_owned(),
            secret: secret.to_hex(),
            host: "127.0.0.1".to_owned(),
            hosts: Vec::new(),
            join_timeout_ms: 60_000,
            peer_timeout_ms: 60_000,
            fabric: Fabric::Mpi,
            num_threads: None,
        };
        group::join(&spec, &stop).unwrap()
    };
    let mut group = group::on_fabric(met, Fabric::Mpi, PATIENCE, PATIENCE).unwrap();
    assert_eq!((group.rank(), group.name()), (rank, "mpi"));
    for (_, check) in CHECKS {
        check(&mut *group);
    }
    say(&format!("rank {rank} is done"));
}

#[test]
fn an_instance_changes_over_to_mpi() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("address");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    if let Some(ended) = world_with("instance", 2, &pipe) {
        assert!(ended.success, "{}", ended.text);
        for rank in 0..2 {
            let done = format!("rank {rank} is done");
            assert!(ended.text.contains(&done), "{}", ended.text);
        }
    }
}

/// Two groups and one that stands aside, the second group in the opposite order.
fn roles(world: &MpiWorld) {
    let rank = world.rank();
    let (colour, key) = match rank {
        0 => (None, 0),
        1 | 2 => (Some(4), u32::try_from(rank).unwrap()),
        _ => (Some(2), 10 - u32::try_from(rank).unwrap()),
    };
    let group = world.group(colour, key).unwrap();
    let Some(mut group) = group else {
        assert_eq!(rank, 0);
        return;
    };
    let place = match rank {
        1 => (0, 2),
        2 => (1, 2),
        3 => (1, 2),
        _ => (0, 2),
    };
    assert_eq!((group.rank(), group.size()), place);
    let mut values = [f32::from(u8::try_from(rank).unwrap())];
    group.all_reduce_sum(0..2, &mut values).unwrap();
    assert_eq!(values[0], if rank < 3 { 3.0 } else { 7.0 });
}

fn conforms(ranks: usize) {
    if let Some(ended) = world("conform", ranks) {
        assert!(ended.success, "{}", ended.text);
        let last = CHECKS.last().unwrap().0;
        for rank in 0..ranks {
            assert!(ended.text.contains(&format!("rank {rank}: {last}")));
        }
    }
}

#[test]
fn two_ranks_conform() {
    conforms(2);
}

#[test]
fn three_ranks_conform() {
    conforms(3);
}

#[test]
fn four_ranks_conform() {
    conforms(4);
}

#[test]
fn a_world_splits_into_roles() {
    if let Some(ended) = world("roles", 5) {
        assert!(ended.success, "{}", ended.text);
    }
}

/// What holds for every transport holds for the one over MPI.
#[test]
fn the_transport_conforms() {
    if let Some(ended) = world("transport", 1) {
        assert!(ended.success, "{}", ended.text);
        for (name, _) in crate::transport::conformance::CHECKS {
            assert!(ended.text.contains(name), "{name}: {}", ended.text);
        }
    }
}

/// Every rank reads the memory of every other, and its own.
#[test]
fn ranks_read_each_others_arenas() {
    if let Some(ended) = world("kv", 3) {
        assert!(ended.success, "{}", ended.text);
        for rank in 0..3 {
            let done = format!("rank {rank} has read all");
            assert!(ended.text.contains(&done), "{}", ended.text);
        }
    }
}

#[test]
fn a_world_that_is_too_small_is_refused() {
    if let Some(ended) = world("size", 2) {
        let wanted = "MPI sees a world of 2 where this instance alone has 3 ranks\nhint: ";
        assert!(ended.text.contains(wanted), "{}", ended.text);
    }
}

fn ends_soon(ended: &Ended) {
    assert!(!ended.success, "{}", ended.text);
    assert!(ended.after < Duration::from_secs(30), "{:?}", ended.after);
}

#[test]
fn a_silent_rank_ends_the_world_with_its_name() {
    if let Some(ended) = world("silent", 2) {
        ends_soon(&ended);
        let said = ended.text.contains("rank 0 says: rank 1 (")
            && ended.text.contains("while waiting for its message");
        assert!(said, "{}", ended.text);
    }
}

#[test]
fn a_rank_that_takes_nothing_ends_the_world_with_its_name() {
    if let Some(ended) = world("unread", 2) {
        ends_soon(&ended);
        let said = ended.text.contains("rank 0 says: rank 1 (")
            && ended.text.contains("while sending it 8388608 bytes");
        assert!(said, "{}", ended.text);
    }
}

#[test]
fn a_rank_that_is_killed_ends_the_world() {
    if let Some(ended) = world("killed", 3) {
        ends_soon(&ended);
    }
}

#[test]
fn a_call_that_is_stuck_ends_the_world() {
    if let Some(ended) = world("stuck", 2) {
        ends_soon(&ended);
        // Our own words: Open MPI's launcher now and then loses those of MPI_Abort.
        let cause = "stuck in MPI while";
        assert!(ended.text.contains(cause), "{}", ended.text);
    }
}

#[test]
fn a_plugin_that_is_not_there_is_named() {
    let error = MpiError::NoPlugin {
        tried: "libbaton_mpi.so: cannot open shared object file".to_owned(),
    };
    let text = error.to_string();
    assert!(
        text.starts_with("the MPI plug-in libbaton_mpi.so is not there (libbaton"),
        "{text}"
    );
    assert!(
        text.contains("\nhint: build it on this cluster with scripts/build-mpi"),
        "{text}"
    );
    assert!(text.contains("BATON_MPI_PLUGIN"), "{text}");
}
