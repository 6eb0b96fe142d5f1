//! A `baton` process under test: started, found by its address file, signalled by pid, ended with its handle.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::client;

/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(10);

/// Waits for a condition with a deadline.
///
/// # Panics
/// When the deadline passes; the text names what was waited for.
pub async fn eventually<T>(
    what: &str,
    limit: Duration,
    mut look: impl AsyncFnMut() -> Option<T>,
) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = look().await {
            return value;
        }
        assert!(
            Instant::now() < deadline,
            "gave up after {limit:?} waiting for {what}"
        );
        tokio::time::sleep(POLL).await;
    }
}

/// A running process with its own folder for address file and log.
#[derive(Debug)]
pub struct Baton {
    child: Child,
    folder: TempDir,
    arguments: Vec<String>,
}

impl Baton {
    /// Starts `baton ARGUMENTS… --report-addr FILE`.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn start(arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        Self::start_with(&[], arguments, environment)
    }

    /// The same with files, name and text each, in the process's own folder; an argument `@/NAME` names one of them.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn start_with(
        files: &[(&str, &str)],
        arguments: &[&str],
        environment: &[(&str, &str)],
    ) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for (name, text) in files {
            std::fs::write(folder.path().join(name), text).expect("a file of the process");
        }
        let own = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
        let named = |word: &&str| {
            word.strip_prefix("@/")
                .map_or_else(|| (*word).to_owned(), own)
        };
        let mut arguments: Vec<String> = arguments.iter().map(named).collect();
        arguments.extend(["--report-addr".to_owned(), own("addr")]);
        Self {
            child: spawn(&arguments, environment, &folder.path().join("log")),
            folder,
            arguments,
        }
    }

    /// Runs `baton ARGUMENTS…` to its end and returns status, stdout and stderr.
    ///
    /// # Panics
    /// When it does not end within 60 s.
    pub async fn run(
        arguments: &[&str],
        environment: &[(&str, &str)],
    ) -> (ExitStatus, String, String) {
        let mut command = tokio::process::Command::new(crate::binary());
        command
            .args(arguments)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .kill_on_drop(true);
        let output = tokio::time::timeout(Duration::from_secs(60), command.output());
        let output = output
            .await
            .expect("the command ends within 60 s")
            .expect("the command starts");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status, text(&output.stdout), text(&output.stderr))
    }

    /// The address it bound.
    ///
    /// # Panics
    /// When it ends or takes over 30 s.
    pub async fn address(&mut self) -> String {
        let path = self.folder.path().join("addr");
        eventually("the address file", Duration::from_secs(30), async || {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                panic!(
                    "`baton {}` ended with {status}:\n{}",
                    self.arguments.join(" "),
                    self.log()
                );
            }
            std::fs::read_to_string(&path)
                .ok()
                .map(|text| text.trim().to_owned())
                .filter(|text| !text.is_empty())
        })
        .await
    }

    /// Waits until `/health` is 200 and returns the address.
    ///
    /// # Panics
    /// When it ends or takes over 60 s.
    pub async fn ready(&mut self) -> String {
        let address = self.address().await;
        eventually("/health to be 200", Duration::from_secs(60), async || {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                panic!(
                    "`baton {}` ended with {status}:\n{}",
                    self.arguments.join(" "),
                    self.log()
                );
            }
            (client::get(&address, "/health").await.ok()?.status == 200).then_some(())
        })
        .await;
        address
    }

    /// Sends a signal to this process.
    ///
    /// # Panics
    /// When it is gone already.
    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("the process is there");
    }

    /// Its process id.
    ///
    /// # Panics
    /// Never in practice: Linux process ids fit.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("process ids fit in i32"))
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it takes longer than `limit`.
    pub async fn ended(&mut self, limit: Duration) -> ExitStatus {
        eventually("the process to end", limit, async || {
            self.child.try_wait().expect("a child can be waited for")
        })
        .await
    }

    /// Kills it and starts it again on the same port.
    ///
    /// # Panics
    /// When it cannot be started.
    pub async fn restart_at(&mut self, address: &str, environment: &[(&str, &str)]) {
        self.child.kill().ok();
        self.child.wait().expect("a killed child can be waited for");
        let port = address.rsplit(':').next().unwrap_or_default().to_owned();
        let at = self
            .arguments
            .iter()
            .position(|word| word == "--port")
            .expect("a server has a port");
        self.arguments[at + 1] = port;
        std::fs::remove_file(self.folder.path().join("addr")).ok();
        self.child = spawn(
            &self.arguments,
            environment,
            &self.folder.path().join("log"),
        );
        self.ready().await;
    }

    /// What it has logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.folder.path().join("log")).unwrap_or_default())
            .into_owned()
    }

    /// Its folder, gone with the handle.
    #[must_use]
    pub fn folder(&self) -> PathBuf {
        self.folder.path().to_path_buf()
    }
}

fn spawn(arguments: &[String], environment: &[(&str, &str)], log: &Path) -> Child {
    let log = File::options()
        .create(true)
        .append(true)
        .open(log)
        .expect("a log file");
    let mut command = Command::new(crate::binary());
    command
        .args(arguments)
        .envs(environment.iter().copied())
        .stdin(Stdio::null());
    command
        .stdout(log.try_clone().expect("a second handle"))
        .stderr(log);
    command.spawn().expect("the binary starts")
}

impl Drop for Baton {
    fn drop(&mut self) {
        // A stopped process only dies from KILL; `baton up` takes its children along.
        self.child.kill().ok();
        self.child.wait().ok();
        if std::thread::panicking() {
            let log = self.log();
            let start = log.len().saturating_sub(4000);
            let start = (start..=log.len())
                .find(|at| log.is_char_boundary(*at))
                .unwrap_or(0);
            let mut err = std::io::stderr().lock();
            writeln!(
                err,
                "--- log of `baton {}`:\n{}",
                self.arguments.join(" "),
                &log[start..]
            )
            .ok();
        }
    }
}
