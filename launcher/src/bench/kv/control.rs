//! The line between the two sides of a benchmark: a child's pipes, or a TCP connection. What is measured goes elsewhere.
//!
//! Invariant: every wait ends, and says what for and on whom. Dropping a line ends the child behind it.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::message::{Answer, Ask};

/// Longest line: the states of some thousands of requests.
const LINE_BYTES_MAX: u64 = 64 << 20;
/// Lines that wait to be heard; each is an answer, so there is never more than one.
const LINES_MAX: usize = 4;
/// How long a child may take to end when its input has ended.
const CHILD_END: Duration = Duration::from_secs(10);
/// How long one attempt to connect may take, and the pause after a failed one.
const ATTEMPT: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(100);

/// Why the two sides do not understand each other any more.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(super) enum ControlError {
    /// The other side cannot be reached.
    #[error("{0}")]
    Unreachable(String),
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// Which.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// A child or thread cannot be started.
    #[error("cannot start {what}: {source}")]
    Start {
        /// Which.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// It has ended or closed the line.
    #[error("{who} has gone while it was to {what}")]
    Gone {
        /// Who.
        who: String,
        /// What was waited for.
        what: String,
    },
    /// It did not answer in time.
    #[error("{who} did not {what} within {} s", limit.as_secs())]
    TimedOut {
        /// Who.
        who: String,
        /// What was waited for.
        what: String,
        /// How long.
        limit: Duration,
    },
    /// It says something else than a benchmark does.
    #[error("{who} speaks another language: {line}")]
    Foreign {
        /// Who.
        who: String,
        /// The start of what it said.
        line: String,
    },
    /// It could not do it.
    #[error("{who}: {reason}")]
    Failed {
        /// Who.
        who: String,
        /// Its words.
        reason: String,
    },
}

/// One end of the line.
#[derive(Debug)]
pub(super) struct Control {
    /// The other side, for messages.
    pub(super) who: String,
    /// The address of this machine that the other side reaches.
    pub(super) host: String,
    writer: Option<Writer>,
    lines: Receiver<String>,
    reader: Option<JoinHandle<()>>,
    end: End,
}

/// Where lines go.
#[derive(Debug)]
enum Writer {
    Child(std::process::ChildStdin),
    Socket(TcpStream),
    Stdout(io::Stdout),
}

/// What must be ended with the line.
#[derive(Debug)]
enum End {
    Child(Child),
    Socket(TcpStream),
    Stdio,
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Child(pipe) => pipe.write(bytes),
            Self::Socket(socket) => socket.write(bytes),
            Self::Stdout(stdout) => stdout.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Child(pipe) => pipe.flush(),
            Self::Socket(socket) => socket.flush(),
            Self::Stdout(stdout) => stdout.flush(),
        }
    }
}

impl Control {
    /// Starts the holding side as a child of this process. It ends when its input does, hence with this process.
    ///
    /// # Errors
    /// When it cannot be started.
    pub(super) fn child() -> Result<Self, ControlError> {
        const WHAT: &str = "the holding side";
        let start = |source| ControlError::Start { what: WHAT, source };
        let mut child = Command::new(std::env::current_exe().map_err(start)?)
            .args(["bench", "kv-hold"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(start)?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let (input, output) = pipes.expect("both were asked for");
        let (lines, reader) = read_lines(output)?;
        Ok(Self {
            who: WHAT.to_owned(),
            host: "127.0.0.1".to_owned(),
            writer: Some(Writer::Child(input)),
            lines,
            reader: Some(reader),
            end: End::Child(child),
        })
    }

    /// The child's end of its line.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub(super) fn stdio() -> Result<Self, ControlError> {
        let (lines, reader) = read_lines(io::stdin())?;
        Ok(Self {
            who: "the fetching side".to_owned(),
            host: "127.0.0.1".to_owned(),
            writer: Some(Writer::Stdout(io::stdout())),
            lines,
            reader: Some(reader),
            end: End::Stdio,
        })
    }

    /// Connects, again and again, until the other side listens.
    ///
    /// # Errors
    /// When it does not by the deadline.
    pub(super) fn connect(address: &str, wait: Duration) -> Result<Self, ControlError> {
        let deadline = Instant::now() + wait;
        loop {
            let refused = match attempt(address) {
                Ok(socket) => return Self::socket(socket),
                Err(error) => error,
            };
            if Instant::now() + PAUSE >= deadline {
                return Err(ControlError::Unreachable(format!(
                    "{address} was not reached within {} s: {refused}\nhint: the other side is `baton bench kv --listen {address}`",
                    wait.as_secs()
                )));
            }
            std::thread::park_timeout(PAUSE);
        }
    }

    /// Waits for the other side to connect.
    ///
    /// # Errors
    /// When the address cannot be bound, or nobody comes by the deadline.
    pub(super) fn accept(listener: &TcpListener, wait: Duration) -> Result<Self, ControlError> {
        let address = listener
            .local_addr()
            .map_or_else(|_| String::new(), |address| address.to_string());
        let timeout = PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX);
        let mut waiting = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        let came = poll(&mut waiting, timeout).unwrap_or(0) > 0;
        let nobody = || {
            ControlError::Unreachable(format!(
                "nobody came to {address} within {} s\nhint: the other side is `baton bench kv --peer HOST:PORT`",
                wait.as_secs()
            ))
        };
        match listener.accept() {
            Ok((socket, _)) if came => Self::socket(socket),
            Ok(_) | Err(_) => Err(nobody()),
        }
    }

    fn socket(socket: TcpStream) -> Result<Self, ControlError> {
        let start = |source| ControlError::Start {
            what: "a connection",
            source,
        };
        let who = socket.peer_addr().map_err(start)?.to_string();
        let host = socket.local_addr().map_err(start)?.ip().to_string();
        socket.set_nodelay(true).map_err(start)?;
        socket.set_nonblocking(false).map_err(start)?;
        let (lines, reader) = read_lines(socket.try_clone().map_err(start)?)?;
        Ok(Self {
            who,
            host,
            writer: Some(Writer::Socket(socket.try_clone().map_err(start)?)),
            lines,
            reader: Some(reader),
            end: End::Socket(socket),
        })
    }

    /// Says something.
    ///
    /// # Errors
    /// When nobody listens any more.
    pub(super) fn say(&mut self, what: &impl Serialize) -> Result<(), ControlError> {
        let mut line = serde_json::to_vec(what).expect("messages have string keys only");
        line.push(b'\n');
        let written = self.writer.as_mut().map(|writer| {
            writer.write_all(&line)?;
            writer.flush()
        });
        match written {
            Some(Ok(())) => Ok(()),
            Some(Err(_)) | None => Err(self.gone("listen")),
        }
    }

    /// Waits for what the other side says.
    ///
    /// # Errors
    /// When it says nothing in time, has gone, or is no benchmark.
    pub(super) fn hear<T: DeserializeOwned>(
        &self,
        what: &str,
        limit: Duration,
    ) -> Result<T, ControlError> {
        match self.lines.recv_timeout(limit) {
            Ok(line) => serde_json::from_str(&line).map_err(|_| ControlError::Foreign {
                who: self.who.clone(),
                line: line.chars().take(80).collect(),
            }),
            Err(RecvTimeoutError::Timeout) => Err(ControlError::TimedOut {
                who: self.who.clone(),
                what: what.to_owned(),
                limit,
            }),
            Err(RecvTimeoutError::Disconnected) => Err(self.gone(what)),
        }
    }

    /// Asks for something and waits for the answer.
    ///
    /// # Errors
    /// As [`Control::hear`], and when the other side cannot do it.
    pub(super) fn ask(
        &mut self,
        ask: &Ask,
        what: &str,
        limit: Duration,
    ) -> Result<Answer, ControlError> {
        self.say(ask)?;
        match self.hear(what, limit)? {
            Answer::Failed { reason } => Err(ControlError::Failed {
                who: self.who.clone(),
                reason,
            }),
            answer => Ok(answer),
        }
    }

    /// An answer that belongs to another question.
    pub(super) fn foreign(&self, answer: &Answer) -> ControlError {
        ControlError::Foreign {
            who: self.who.clone(),
            line: format!("{answer:?}").chars().take(80).collect(),
        }
    }

    fn gone(&self, what: &str) -> ControlError {
        ControlError::Gone {
            who: self.who.clone(),
            what: what.to_owned(),
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        drop(self.writer.take());
        match &mut self.end {
            // Its output ends with it.
            End::Child(child) => {
                let deadline = Instant::now() + CHILD_END;
                let left = || deadline.saturating_duration_since(Instant::now());
                while self.lines.recv_timeout(left()).is_ok() {}
                if !matches!(child.try_wait(), Ok(Some(_))) {
                    end(child, left());
                }
            }
            End::Socket(socket) => drop(socket.shutdown(std::net::Shutdown::Both)),
            // Nothing can call its reader off; it ends with the process.
            End::Stdio => return,
        }
        if let Some(reader) = self.reader.take()
            && reader.join().is_err()
        {
            tracing::error!("the reader of a line panicked");
        }
    }
}

/// A child that has closed its output is about to end; one that has not is killed.
fn end(child: &mut Child, left: Duration) {
    if left.is_zero() {
        // It may have ended by itself meanwhile.
        let _ = child.kill();
    }
    if let Err(error) = child.wait() {
        tracing::warn!(%error, "the holding side cannot be waited for");
    }
}

fn attempt(address: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, ATTEMPT) {
            Ok(socket) => return Ok(socket),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Binds where the other side shall connect.
///
/// # Errors
/// When that cannot be.
pub(super) fn bind(address: &str) -> Result<(TcpListener, SocketAddr), ControlError> {
    let refused = |source| ControlError::Bind {
        address: address.to_owned(),
        source,
    };
    let listener = TcpListener::bind(address).map_err(refused)?;
    listener.set_nonblocking(true).map_err(refused)?;
    let bound = listener.local_addr().map_err(refused)?;
    Ok((listener, bound))
}

/// Reads lines on a thread of its own, until there are no more.
fn read_lines(
    source: impl Read + Send + 'static,
) -> Result<(Receiver<String>, JoinHandle<()>), ControlError> {
    let (sender, lines) = sync_channel(LINES_MAX);
    let reader = std::thread::Builder::new()
        .name("bench-lines".to_owned())
        .spawn(move || pass_on(source, &sender))
        .map_err(|source| ControlError::Start {
            what: "a thread",
            source,
        })?;
    Ok((lines, reader))
}

fn pass_on(source: impl Read, lines: &SyncSender<String>) {
    let mut source = BufReader::new(source);
    loop {
        let mut line = String::new();
        let read = source.by_ref().take(LINE_BYTES_MAX).read_line(&mut line);
        let whole = matches!(read, Ok(1..)) && line.ends_with('\n');
        // A line that was cut off is no message; nobody listens any more when the channel is closed.
        if !whole || lines.try_send(line).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    fn pair() -> (Control, Control) {
        let (listener, address) = bind("127.0.0.1:0").unwrap();
        let connecting = std::thread::spawn(move || Control::connect(&address.to_string(), SOON));
        let here = Control::accept(&listener, SOON).unwrap();
        (here, connecting.join().unwrap().unwrap())
    }

    #[test]
    fn questions_and_answers_cross() {
        let (mut here, mut there) = pair();
        assert_eq!(here.host, "127.0.0.1");
        there.say(&Ask::Offer { round: 2 }).unwrap();
        let ask: Ask = here.hear("ask", SOON).unwrap();
        assert_eq!(ask, Ask::Offer { round: 2 });
        here.say(&Answer::Failed {
            reason: "no".to_owned(),
        })
        .unwrap();
        let error = there.ask(&Ask::Settle, "settle", SOON).unwrap_err();
        assert!(matches!(error, ControlError::Failed { .. }), "{error}");
    }

    #[test]
    fn a_line_that_ends_or_says_something_else_is_an_error_with_a_name() {
        let (here, mut there) = pair();
        there.say(&"hello").unwrap();
        let error = here.hear::<Ask>("ask", SOON).unwrap_err();
        assert!(matches!(error, ControlError::Foreign { .. }), "{error}");
        let who = here.who.clone();
        drop(there);
        let error = here.hear::<Ask>("ask", SOON).unwrap_err().to_string();
        assert_eq!(error, format!("{who} has gone while it was to ask"));
    }

    #[test]
    fn waits_end() {
        let (listener, address) = bind("127.0.0.1:0").unwrap();
        let error = Control::accept(&listener, Duration::from_millis(1)).unwrap_err();
        assert!(error.to_string().contains("--peer"), "{error}");
        drop(listener);
        let error = Control::connect(&address.to_string(), Duration::from_millis(1)).unwrap_err();
        assert!(error.to_string().contains("--listen"), "{error}");
        let (here, _there) = pair();
        let error = here
            .hear::<Ask>("ask", Duration::from_millis(1))
            .unwrap_err();
        assert!(matches!(error, ControlError::TimedOut { .. }), "{error}");
    }
}
