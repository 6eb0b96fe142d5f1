//! One supervised process: its command, its streams, its end.

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::os;
use crate::output::LineSink;
use crate::supervisor::Event;

/// How long after a process's end its last lines are waited for.
const PIPE_DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// What to run and under which name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ChildSpec {
    /// `ctx0`, `gen0`, `proxy`.
    pub(crate) label: String,
    /// Program and arguments.
    pub(crate) argv: Vec<OsString>,
    /// Added to this process's environment.
    pub(crate) environment: Vec<(String, String)>,
    /// Where its output goes besides the terminal.
    pub(crate) log_file: PathBuf,
}

impl ChildSpec {
    /// The command as a person would type it.
    pub(crate) fn command_line(&self) -> String {
        let mut words: Vec<String> = self
            .environment
            .iter()
            .map(|(name, value)| format!("{name}={}", quoted(value)))
            .collect();
        words.extend(self.argv.iter().map(|word| quoted(&word.to_string_lossy())));
        words.join(" ")
    }
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%+,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// What a child reads and where its lines go.
#[derive(Debug)]
pub(crate) struct ChildStreams {
    /// Where its lines go; `None` lets it have this process's own streams.
    pub(crate) sink: Option<LineSink>,
    /// What it finds on its standard input.
    pub(crate) input: Input,
}

/// A child's standard input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Input {
    /// Nothing.
    Empty,
    /// This text, then the end.
    Text(String),
    /// This process's own, unless it is a terminal: a background group must not read from one.
    Inherited,
}

impl Input {
    fn stdio(&self) -> Stdio {
        match self {
            Self::Text(_) => Stdio::piped(),
            Self::Inherited if !io::stdin().is_terminal() => Stdio::inherit(),
            Self::Inherited | Self::Empty => Stdio::null(),
        }
    }
}

/// A running child. Dropping it kills its process group.
#[derive(Debug)]
pub(crate) struct Child {
    group: Pid,
    waiter: JoinHandle<()>,
    ended: bool,
}

impl Child {
    /// Starts the process with nothing to read. Its end is reported as [`Event::Exited`] once its streams are read to
    /// the end.
    pub(crate) fn start(
        spec: &ChildSpec,
        index: usize,
        sink: LineSink,
        events: mpsc::Sender<Event>,
    ) -> io::Result<Self> {
        let streams = ChildStreams {
            sink: Some(sink),
            input: Input::Empty,
        };
        Self::start_with(spec, streams, index, events)
    }

    /// Starts the process with these streams.
    pub(crate) fn start_with(
        spec: &ChildSpec,
        streams: ChildStreams,
        index: usize,
        events: mpsc::Sender<Event>,
    ) -> io::Result<Self> {
        let mut command = Command::new(&spec.argv[0]);
        command
            .args(&spec.argv[1..])
            .envs(spec.environment.iter().map(|(name, value)| (name, value)));
        let output = || match streams.sink {
            Some(_) => Stdio::piped(),
            None => Stdio::inherit(),
        };
        command
            .stdin(streams.input.stdio())
            .stdout(output())
            .stderr(output())
            .kill_on_drop(true);
        os::bind_to_parent(&mut command);
        let mut process = command.spawn()?;
        if let (Input::Text(text), Some(mut pipe)) = (streams.input, process.stdin.take()) {
            // A child that does not read its input to the end says so by itself.
            tokio::spawn(async move {
                let _ = pipe.write_all(text.as_bytes()).await;
            });
        }
        let id = process
            .id()
            .ok_or_else(|| io::Error::other("the process ended before it had an id"))?;
        let group = Pid::from_raw(i32::try_from(id).map_err(io::Error::other)?);
        let sink = streams.sink;
        let readers = [
            sink.clone()
                .zip(process.stdout.take())
                .map(|(sink, stream)| tokio::spawn(sink.drain(stream))),
            sink.zip(process.stderr.take())
                .map(|(sink, stream)| tokio::spawn(sink.drain(stream))),
        ];
        let waiter = tokio::spawn(async move {
            let status = process.wait().await.ok();
            // A grandchild may hold the pipes open for ever; what the process itself wrote is there at once.
            for reader in readers.into_iter().flatten() {
                let _ = tokio::time::timeout(PIPE_DRAIN_TIMEOUT, reader).await;
            }
            // The receiver lives as long as the supervisor; without it nobody needs the news.
            let _ = events.send(Event::Exited { index, status }).await;
        });
        Ok(Self {
            group,
            waiter,
            ended: false,
        })
    }

    /// Sends a signal to the whole process group.
    pub(crate) fn signal(&self, signal: Signal) {
        if !self.ended {
            // ESRCH means that it ended on its own; its Exited event is on the way.
            let _ = killpg(self.group, signal);
        }
    }

    /// Notes that the process is gone, so that its id is never signalled again.
    pub(crate) fn mark_ended(&mut self) {
        self.ended = true;
    }

    /// Whether the process may still run.
    pub(crate) fn is_running(&self) -> bool {
        !self.ended
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.signal(Signal::SIGKILL);
        self.waiter.abort();
    }
}

/// How a process ended, for people.
pub(crate) fn describe(status: Option<ExitStatus>) -> String {
    use std::os::unix::process::ExitStatusExt;
    let Some(status) = status else {
        return "its end could not be read".to_owned();
    };
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(number)) => {
            let name = Signal::try_from(number)
                .map_or_else(|_| number.to_string(), |signal| signal.to_string());
            format!("killed by {name}")
        }
        (None, None) => status.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line_can_be_pasted() {
        let spec = ChildSpec {
            label: "ctx0".to_owned(),
            argv: ["baton", "serve", "a model", "--x=1"]
                .map(OsString::from)
                .to_vec(),
            environment: vec![("A".to_owned(), "it's".to_owned())],
            log_file: PathBuf::new(),
        };
        assert_eq!(
            spec.command_line(),
            r"A='it'\''s' baton serve 'a model' --x=1"
        );
    }
}
