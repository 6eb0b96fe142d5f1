//! The local Slurm cluster of `scripts/slurm-cluster`: jobs that end with their handles, and nodes that a test can cut off.
//!
//! The cluster is one for the whole machine. Tests that only run jobs share it; a test that hurts a node has it alone.
//! Jobs see the machine's files but not its /tmp: what they need lies in the repository or in [`Cluster::folder`].

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};
use tempfile::TempDir;

use crate::process::eventually;

/// Held while the cluster is used: shared by those who run jobs, alone by those who hurt it.
const USERS_LOCK: &str = "/run/baton-slurm-cluster.users";
/// How long the cluster may be in use by others.
const TURN: Duration = Duration::from_secs(600);
/// How long one command of the script or of Slurm may take.
const COMMAND: Duration = Duration::from_secs(90);

/// A running cluster, held until dropped.
#[derive(Debug)]
pub struct Cluster {
    conf: String,
    folder: TempDir,
    _turn: File,
}

/// One process on a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeProcess {
    /// Process id, valid on this machine.
    pub pid: i32,
    /// Its parent.
    pub parent: i32,
    /// Seconds since it started.
    pub age_s: u64,
    /// Its command line.
    pub command: String,
}

impl Cluster {
    /// The cluster, started when it does not run, to be shared with other tests. `None` where it cannot run; the
    /// reason is printed.
    ///
    /// # Panics
    /// When it should run (as root, or with CI=true) and does not.
    pub async fn get() -> Option<Self> {
        Self::take(|file| file.try_lock_shared().is_ok()).await
    }

    /// The same for a test that nobody may share it with, because it cuts or kills.
    ///
    /// # Panics
    /// As [`Cluster::get`].
    pub async fn alone() -> Option<Self> {
        Self::take(|file| file.try_lock().is_ok()).await
    }

    async fn take(lock: impl Fn(&File) -> bool) -> Option<Self> {
        if !Uid::effective().is_root() && std::env::var("CI").as_deref() != Ok("true") {
            say("skipped: a local Slurm cluster needs root");
            return None;
        }
        let turn = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(USERS_LOCK)
            .unwrap_or_else(|error| panic!("{USERS_LOCK}: {error}"));
        eventually("other tests to leave the cluster", TURN, async || {
            lock(&turn).then_some(())
        })
        .await;
        if !script(&["status"]).await.status.success() {
            let started = script(&["start"]).await;
            assert!(started.status.success(), "{}", text(&started.stderr));
        }
        let env = text(&script(&["env"]).await.stdout);
        let conf = env
            .trim()
            .strip_prefix("export SLURM_CONF=")
            .unwrap_or_else(|| panic!("no SLURM_CONF in {env:?}"));
        let folder = tempfile::Builder::new()
            .prefix("baton-cluster-test-")
            .tempdir_in("/var/tmp")
            .expect("a folder that the nodes see");
        Some(Self {
            conf: conf.to_owned(),
            folder,
            _turn: turn,
        })
    }

    /// A folder of this test's own that every node sees under the same path.
    #[must_use]
    pub fn folder(&self) -> PathBuf {
        self.folder.path().to_owned()
    }

    /// What makes Slurm's commands find this cluster.
    #[must_use]
    pub fn environment(&self) -> (&'static str, &str) {
        ("SLURM_CONF", &self.conf)
    }

    /// Every node's name and address.
    pub async fn nodes(&self) -> Vec<(String, String)> {
        let listed = text(&script(&["nodes"]).await.stdout);
        let pair = |line: &str| {
            line.split_once(' ')
                .map(|(n, a)| (n.to_owned(), a.to_owned()))
        };
        listed.lines().filter_map(pair).collect()
    }

    /// Starts `srun ARGUMENTS…`.
    ///
    /// # Panics
    /// When srun cannot be started.
    #[must_use]
    pub fn srun(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Step {
        self.start("srun", arguments, environment)
    }

    /// Starts any program that calls Slurm by itself, such as `salloc` or `baton slurm submit`, as [`Cluster::srun`] does.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn start(&self, program: &str, arguments: &[&str], environment: &[(&str, &str)]) -> Step {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let job = format!("baton-test-{}-{number}", std::process::id());
        let log = self.folder.path().join(format!("{job}.log"));
        let out = File::create(&log).expect("a log file");
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env("SLURM_CONF", &self.conf)
            .env("SLURM_JOB_NAME", &job)
            .env("SBATCH_JOB_NAME", &job)
            .envs(environment.iter().copied())
            .current_dir(crate::root())
            .stdin(Stdio::null())
            .stdout(out.try_clone().expect("a second handle"))
            .stderr(out);
        let child = command
            .spawn()
            .unwrap_or_else(|error| panic!("{program} cannot be started: {error}"));
        Step {
            child,
            words: format!("{program} {}", arguments.join(" ")),
            conf: self.conf.clone(),
            job,
            log,
        }
    }

    /// Submits a batch job with `sbatch ARGUMENTS…`; its output is in the file that [`Batch::output`] reads.
    ///
    /// # Panics
    /// When sbatch refuses it.
    pub async fn sbatch(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Batch {
        let pattern = self.folder.path().join("batch-%j.out");
        let mut all = vec![
            "--parsable".to_owned(),
            format!("--output={}", pattern.display()),
        ];
        all.extend(arguments.iter().map(|word| (*word).to_owned()));
        let mut command = tokio::process::Command::new("sbatch");
        command.args(&all).envs(environment.iter().copied());
        let answer = self.ended(command).await;
        assert!(
            answer.status.success(),
            "sbatch {}: {}",
            all.join(" "),
            text(&answer.stderr)
        );
        let stdout = text(&answer.stdout);
        let id = stdout
            .trim()
            .split(';')
            .next()
            .unwrap_or_default()
            .to_owned();
        Batch {
            output: self.folder.path().join(format!("batch-{id}.out")),
            conf: self.conf.clone(),
            id,
        }
    }

    /// Runs one of Slurm's commands, such as `squeue` or `scancel`, to its end.
    ///
    /// # Panics
    /// When it takes longer than it may.
    pub async fn slurm(&self, program: &str, arguments: &[&str]) -> Output {
        let mut command = tokio::process::Command::new(program);
        command.args(arguments);
        self.ended(command).await
    }

    async fn ended(&self, mut command: tokio::process::Command) -> Output {
        command
            .env("SLURM_CONF", &self.conf)
            .current_dir(crate::root())
            .stdin(Stdio::null())
            .kill_on_drop(true);
        within(command).await
    }

    /// Runs a command inside a node, where its network, host name, /tmp and /dev/shm are the node's.
    pub async fn exec(&self, node: &str, words: &[&str]) -> Output {
        script(&[&["exec", node], words].concat()).await
    }

    /// Cuts a node from the network until the handle is dropped.
    ///
    /// # Panics
    /// When there is no such node.
    pub async fn cut(&self, node: &str) -> Cut {
        let done = script(&["cut", node]).await;
        assert!(done.status.success(), "{}", text(&done.stderr));
        Cut {
            node: node.to_owned(),
        }
    }

    /// What runs on a node besides Slurm's own processes.
    ///
    /// # Panics
    /// When there is no such node.
    pub async fn processes(&self, node: &str) -> Vec<NodeProcess> {
        let listed = script(&["ps", node]).await;
        assert!(listed.status.success(), "{}", text(&listed.stderr));
        text(&listed.stdout)
            .lines()
            .filter_map(process_of)
            .collect()
    }

    /// Waits until no node runs a process whose command holds `needle`.
    ///
    /// # Panics
    /// When that takes longer than `limit`; the text lists what is left.
    pub async fn nothing_left(&self, needle: &str, limit: Duration) {
        let nodes = self.nodes().await;
        let mut left = Vec::new();
        let gone = eventually("left-over processes to end", limit * 2, async || {
            left.clear();
            for (node, _) in &nodes {
                let all = self.processes(node).await.into_iter();
                let ours = all.filter(|process| process.command.contains(needle));
                left.extend(ours.map(|process| (node.clone(), process)));
            }
            left.is_empty().then_some(())
        });
        if tokio::time::timeout(limit, gone).await.is_err() {
            panic!("still there after {limit:?}: {left:#?}");
        }
    }
}

/// A node whose link is down; healed when dropped.
#[derive(Debug)]
pub struct Cut {
    node: String,
}

impl Drop for Cut {
    fn drop(&mut self) {
        let healed = Command::new(script_path())
            .args(["heal", &self.node])
            .status();
        if !healed.is_ok_and(|status| status.success()) {
            say(&format!("{} could not be connected again", self.node));
        }
    }
}

/// A running `srun`, or another program with a job; the job is cancelled when it is dropped.
#[derive(Debug)]
pub struct Step {
    child: Child,
    words: String,
    conf: String,
    job: String,
    log: PathBuf,
}

impl Step {
    /// What it has written so far, stdout and stderr as they came.
    #[must_use]
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Waits for a line that holds `needle` and returns the line.
    ///
    /// # Panics
    /// When it ends without such a line, or takes longer than `limit`.
    pub async fn line(&mut self, needle: &str, limit: Duration) -> String {
        let what = format!("a line with {needle:?} from `{}`", self.words);
        eventually(&what, limit, async || {
            let ended = self.try_status();
            let log = self.log();
            let line = log.lines().find(|line| line.contains(needle));
            assert!(
                line.is_some() || ended.is_none(),
                "`{}` ended without {needle:?}: {ended:?}",
                self.words
            );
            line.map(str::to_owned)
        })
        .await
    }

    /// Sends a signal to the program itself.
    ///
    /// # Panics
    /// When it is gone already.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).expect("process ids fit in i32");
        kill(Pid::from_raw(pid), signal).expect("the process is there");
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it takes longer than `limit`.
    pub async fn ended(&mut self, limit: Duration) -> ExitStatus {
        let what = format!("`{}` to end", self.words);
        eventually(&what, limit, async || self.try_status()).await
    }

    /// Its status when it has ended.
    ///
    /// # Panics
    /// When the system loses the child.
    pub fn try_status(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child can be waited for")
    }

    /// Name of its job, for `squeue` and `scancel`.
    #[must_use]
    pub fn job(&self) -> &str {
        &self.job
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if self.try_status().is_none() {
            cancel(&self.conf, &["--name", &self.job]);
        }
        self.child.kill().ok();
        self.child.wait().ok();
        if std::thread::panicking() {
            say(&format!(
                "--- output of `{}`:\n{}",
                self.words,
                tail(&self.log())
            ));
        }
    }
}

/// A batch job; cancelled when dropped.
#[derive(Debug)]
pub struct Batch {
    /// Its job id.
    pub id: String,
    output: PathBuf,
    conf: String,
}

impl Batch {
    /// What it has written so far.
    #[must_use]
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.output).unwrap_or_default()).into_owned()
    }

    /// Waits for a line that holds `needle` and returns the line.
    ///
    /// # Panics
    /// When it takes longer than `limit`.
    pub async fn line(&self, needle: &str, limit: Duration) -> String {
        let what = format!("a line with {needle:?} from job {}", self.id);
        eventually(&what, limit, async || {
            let output = self.output();
            let line = output.lines().find(|line| line.contains(needle));
            line.map(str::to_owned)
        })
        .await
    }

    /// Waits until the job has left the queue.
    ///
    /// # Panics
    /// When it takes longer than `limit`.
    pub async fn ended(&self, cluster: &Cluster, limit: Duration) {
        let what = format!("job {} to leave the queue", self.id);
        eventually(&what, limit, async || {
            let query = ["-h", "-o", "%A", "-j", &self.id];
            let queue = cluster.slurm("squeue", &query).await;
            text(&queue.stdout).trim().is_empty().then_some(())
        })
        .await;
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        cancel(&self.conf, &[&self.id]);
        if std::thread::panicking() {
            say(&format!(
                "--- output of job {}:\n{}",
                self.id,
                tail(&self.output())
            ));
        }
    }
}

/// Ends jobs at once. There is nobody left to tell when it fails; a job that is gone already is no failure.
fn cancel(conf: &str, which: &[&str]) {
    Command::new("scancel")
        .args(["--quiet", "--signal=KILL", "--full"])
        .args(which)
        .env("SLURM_CONF", conf)
        .status()
        .ok();
    Command::new("scancel")
        .arg("--quiet")
        .args(which)
        .env("SLURM_CONF", conf)
        .status()
        .ok();
}

fn script_path() -> PathBuf {
    crate::root().join("scripts/slurm-cluster")
}

async fn script(words: &[&str]) -> Output {
    let mut command = tokio::process::Command::new(script_path());
    command.args(words).stdin(Stdio::null()).kill_on_drop(true);
    within(command).await
}

async fn within(mut command: tokio::process::Command) -> Output {
    let words = format!("{:?}", command.as_std());
    tokio::time::timeout(COMMAND, command.output())
        .await
        .unwrap_or_else(|_| panic!("{words} takes longer than {COMMAND:?}"))
        .unwrap_or_else(|error| panic!("{words}: {error}"))
}

/// A line of `slurm-cluster ps`: pid, parent, age, command.
fn process_of(line: &str) -> Option<NodeProcess> {
    let mut words = line.split_whitespace();
    Some(NodeProcess {
        pid: words.next()?.parse().ok()?,
        parent: words.next()?.parse().ok()?,
        age_s: words.next()?.parse().ok()?,
        command: words.collect::<Vec<_>>().join(" "),
    })
}

/// A line for whoever reads the test's output.
fn say(line: &str) {
    // Nobody is left to tell when stderr is gone.
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The last lines of a log.
fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(80)..].join("\n")
}
