//! Worlds of ranks under test: their configs, their golden answers, and an mpirun of one's own.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use serde_json::json;
use tempfile::TempDir;

use crate::client;
use crate::golden::{self, Item};
use crate::process::eventually;

/// How long a world may take until it can serve. Generous: the machine may be busy.
pub const READY: Duration = Duration::from_secs(120);

/// Where two tokens are this close, either may be chosen, and everything after it parts.
const MARGIN_MIN: f32 = 0.001;

/// Instances of a role.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// How many.
    pub instances: u32,
    /// `tensor_parallel_size` of each.
    pub tensor_parallel: u32,
    /// `pipeline_parallel_size` of each.
    pub pipeline_parallel: u32,
}

impl Shape {
    /// One or more instances of so many ranks.
    #[must_use]
    pub const fn new(instances: u32, tensor_parallel: u32, pipeline_parallel: u32) -> Self {
        Self {
            instances,
            tensor_parallel,
            pipeline_parallel,
        }
    }

    /// Ranks of all of them.
    #[must_use]
    pub const fn ranks(self) -> u32 {
        self.instances * self.tensor_parallel * self.pipeline_parallel
    }
}

/// The text of a disagg_config.yaml without any address: what a world of ranks needs. `host` is the proxy's.
#[must_use]
pub fn config(model: &str, host: &str, context: Shape, generation: Shape) -> String {
    let mut text = format!("model: {model}\nhostname: {host}\nport: 0\n");
    for (section, shape) in [
        ("context_servers", context),
        ("generation_servers", generation),
    ] {
        let Shape {
            instances,
            tensor_parallel,
            pipeline_parallel,
        } = shape;
        write!(
            text,
            "{section}:\n  num_instances: {instances}\n  tensor_parallel_size: {tensor_parallel}\n  \
             pipeline_parallel_size: {pipeline_parallel}\n  dtype: float32\n  max_seq_len: 1536\n  \
             kv_cache_config:\n    max_tokens: 4096\n"
        )
        .expect("writing to a String cannot fail");
    }
    text
}

/// Asks a server or proxy for all of a tiny model's golden ids.
///
/// # Panics
/// When an answer is another.
pub async fn answers_tiny(address: &str, family: &str) {
    let items = golden::tiny().remove(family).expect("a tiny model");
    answers(address, &items).await;
}

/// Asks for the golden ids of items whose best token is never in doubt.
///
/// # Panics
/// When an answer is another, or there is nothing to ask.
pub async fn answers(address: &str, items: &[Item]) {
    let certain: Vec<&Item> = items
        .iter()
        .filter(|item| item.min_margin > MARGIN_MIN)
        .collect();
    assert!(!certain.is_empty(), "no item to ask for");
    for item in certain {
        assert_eq!(
            ids(address, item).await,
            item.output_token_ids,
            "{:?}",
            item.prompt
        );
    }
}

/// The ids that a server writes for an item's prompt.
///
/// # Panics
/// When it does not answer with ids.
pub async fn ids(address: &str, item: &Item) -> Vec<u32> {
    let body = json!({
        "model": "m", "prompt": item.prompt_token_ids, "max_tokens": item.output_token_ids.len(),
        "temperature": 0, "detokenize": false,
    });
    let answer = client::post(address, "/v1/completions", &body).await;
    let answer = answer.unwrap_or_else(|error| panic!("{address}: {error:#}"));
    assert_eq!(answer.status, 200, "{}", answer.body);
    serde_json::from_value(answer.json()["choices"][0]["token_ids"].clone()).expect("token ids")
}

/// The program beside `baton` that scripts name.
#[must_use]
pub fn llmapi_launch() -> PathBuf {
    crate::binary().with_file_name("llmapi-launch")
}

/// What a file says once it is there and whole (written by rename).
///
/// # Panics
/// When it is not there in time, or `ended` says that nobody will write it any more.
pub async fn file_text(path: &Path, limit: Duration, mut ended: impl FnMut() -> bool) -> String {
    let what = format!("{} to be written", path.display());
    eventually(&what, limit, async || {
        // In this order, so that what was written just before the end is seen.
        let over = ended();
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let text = text.trim();
        assert!(
            !(over && text.is_empty()),
            "nobody is left that would write {}",
            path.display()
        );
        (!text.is_empty()).then(|| text.to_owned())
    })
    .await
}

/// Whether this machine has Open MPI's mpirun; says so when not.
#[must_use]
pub fn has_mpirun() -> bool {
    let there = Command::new("mpirun").arg("--version").output();
    there.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("Open MPI"))
}

/// A launcher of ranks on this machine, such as mpirun, ended with its handle.
#[derive(Debug)]
pub struct Launcher {
    child: Child,
    folder: TempDir,
    words: String,
}

impl Launcher {
    /// Starts `mpirun -n RANKS baton ARGUMENTS…`.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn mpirun(ranks: u32, arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        let count = ranks.to_string();
        let baton = crate::binary().to_string_lossy().into_owned();
        let own = [
            "--allow-run-as-root",
            "--oversubscribe",
            "--bind-to",
            "none",
        ];
        let all = [&own[..], &["-n", &count, &baton], arguments].concat();
        Self::start("mpirun", &all, environment)
    }

    /// Starts any launcher.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn start(program: &str, arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let log = File::create(folder.path().join("log")).expect("a log file");
        let child = Command::new(program)
            .args(arguments)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .process_group(0)
            .spawn()
            .unwrap_or_else(|error| panic!("{program} cannot be started: {error}"));
        Self {
            child,
            folder,
            words: format!("{program} {}", arguments.join(" ")),
        }
    }

    /// What all ranks have written so far.
    #[must_use]
    pub fn log(&self) -> String {
        let bytes = std::fs::read(self.folder.path().join("log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Sends a signal to the launcher itself.
    ///
    /// # Panics
    /// When it is gone already.
    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("the launcher is there");
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

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("process ids fit in i32"))
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        if self.try_status().is_none() {
            // mpirun takes its ranks along on TERM; what is still there after KILL dies with its parent.
            kill(self.pid(), Signal::SIGTERM).ok();
            let deadline = std::time::Instant::now() + Duration::from_secs(10);
            while self.try_status().is_none() && std::time::Instant::now() < deadline {
                std::thread::park_timeout(Duration::from_millis(20));
            }
        }
        killpg(self.pid(), Signal::SIGKILL).ok();
        self.child.wait().ok();
        if std::thread::panicking() {
            // Nobody is left to tell when stderr is gone.
            let mut err = std::io::stderr().lock();
            writeln!(err, "--- output of `{}`:\n{}", self.words, self.log()).ok();
        }
    }
}
