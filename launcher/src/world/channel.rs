//! A connection between two processes of a world: lines of JSON, once both sides have proved the job's secret.
//!
//! The acceptor speaks first (a nonce); the connector answers with its own nonce, its hello and a proof over both; the
//! acceptor proves itself in turn. Each step and each later wait has a deadline, and a line has a bound, so a foreign or
//! slow peer costs one connection and a few kilobytes.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use baton_engine::secret::{self, Nonce, PROOF_BYTES, Proof, Secret};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;

use super::protocol::Hello;

/// How long one step of the handshake may take.
const HANDSHAKE_STEP: Duration = Duration::from_secs(5);
/// Longest line before the proof: nobody unknown gets more memory than this.
const HANDSHAKE_BYTES_MAX: u64 = 64 * 1024;
/// Longest line after it. Orders carry option files, reports the last lines of a process.
const LINE_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Why there is no connection, or no longer one.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChannelError {
    /// The system's word.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The other side hung up.
    #[error("the connection was closed")]
    Closed,
    /// Nothing came in time.
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
    /// A foreign process, or one of another version.
    #[error("what answered is no rank of a baton world ({0})")]
    Foreign(String),
    /// It does not know the secret.
    #[error("the two sides do not share a job and its secret")]
    Unproven,
    /// The acceptor's reason.
    #[error("{0}")]
    Refused(String),
}

#[derive(Debug, Serialize, Deserialize)]
struct Greeting {
    baton_world: u32,
    nonce: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Introduction {
    nonce: String,
    /// JSON of the [`Hello`]: the proof is over these very bytes.
    hello: String,
    proof: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Welcome {
        proof: String,
    },
    /// The proof does not hold here: perhaps another job's port.
    Unproven,
    /// The caller is known, and not wanted.
    Refused {
        reason: String,
    },
}

/// Version of the handshake itself.
const HANDSHAKE_VERSION: u32 = 1;

/// The half that reads.
#[derive(Debug)]
pub(crate) struct Incoming {
    reader: BufReader<OwnedReadHalf>,
    line: Vec<u8>,
}

/// The half that writes.
#[derive(Debug)]
pub(crate) struct Outgoing {
    writer: OwnedWriteHalf,
}

/// Both halves and where they lead.
#[derive(Debug)]
pub(crate) struct Channel {
    pub(crate) incoming: Incoming,
    pub(crate) outgoing: Outgoing,
    /// This side's address.
    pub(crate) local: SocketAddr,
    /// The other side's address.
    pub(crate) peer: SocketAddr,
}

impl Channel {
    fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        let (local, peer) = (stream.local_addr()?, stream.peer_addr()?);
        let (reader, writer) = stream.into_split();
        Ok(Self {
            incoming: Incoming {
                reader: BufReader::new(reader),
                line: Vec::new(),
            },
            outgoing: Outgoing { writer },
            local,
            peer,
        })
    }
}

impl Incoming {
    /// The next value. Not cancel-safe: a dropped wait may lose part of a line.
    pub(crate) async fn next<T: DeserializeOwned>(&mut self) -> Result<T, ChannelError> {
        self.read(LINE_BYTES_MAX).await
    }

    async fn read<T: DeserializeOwned>(&mut self, bytes_max: u64) -> Result<T, ChannelError> {
        self.line.clear();
        let mut bounded = (&mut self.reader).take(bytes_max);
        bounded.read_until(b'\n', &mut self.line).await?;
        if self.line.is_empty() {
            return Err(ChannelError::Closed);
        }
        if self.line.last() != Some(&b'\n') {
            let cut = self.line.len() as u64 >= bytes_max;
            return Err(if cut {
                ChannelError::Foreign(format!("a line longer than {bytes_max} bytes"))
            } else {
                ChannelError::Closed
            });
        }
        serde_json::from_slice(&self.line).map_err(|error| ChannelError::Foreign(error.to_string()))
    }

    async fn step<T: DeserializeOwned>(&mut self) -> Result<T, ChannelError> {
        timeout(HANDSHAKE_STEP, self.read(HANDSHAKE_BYTES_MAX))
            .await
            .map_err(|_| ChannelError::TimedOut(HANDSHAKE_STEP))?
    }
}

impl Outgoing {
    /// Sends one value.
    pub(crate) async fn send<T: Serialize + Sync>(
        &mut self,
        value: &T,
        deadline: Duration,
    ) -> Result<(), ChannelError> {
        let mut line = serde_json::to_vec(value).map_err(io::Error::other)?;
        line.push(b'\n');
        timeout(deadline, self.writer.write_all(&line))
            .await
            .map_err(|_| ChannelError::TimedOut(deadline))?
            .map_err(ChannelError::Io)
    }
}

/// A connection whose other side is proved, with what it wants; to be welcomed or refused.
#[derive(Debug)]
pub(crate) struct Caller {
    channel: Channel,
    pub(crate) hello: Hello,
    welcome: Proof,
}

impl Caller {
    /// This side's address, by which the caller came.
    pub(crate) fn local(&self) -> SocketAddr {
        self.channel.local
    }

    /// Lets it in.
    pub(crate) async fn welcome(mut self) -> Result<Channel, ChannelError> {
        let verdict = Verdict::Welcome {
            proof: hex(&self.welcome),
        };
        self.channel.outgoing.send(&verdict, HANDSHAKE_STEP).await?;
        Ok(self.channel)
    }

    /// Turns it away.
    pub(crate) async fn refuse(mut self, reason: &str) {
        let verdict = Verdict::Refused {
            reason: reason.to_owned(),
        };
        if let Err(error) = self.channel.outgoing.send(&verdict, HANDSHAKE_STEP).await {
            tracing::debug!(%error, "a refused caller was gone already");
        }
    }
}

/// Takes a connection: who is it, and does it know the secret?
pub(crate) async fn accept(
    stream: TcpStream,
    secret: &Secret,
    world: &str,
) -> Result<Caller, ChannelError> {
    let mut channel = Channel::new(stream)?;
    let ours = secret::nonce();
    let greeting = Greeting {
        baton_world: HANDSHAKE_VERSION,
        nonce: hex(&ours),
    };
    channel.outgoing.send(&greeting, HANDSHAKE_STEP).await?;
    let introduction: Introduction = channel.incoming.step().await?;
    let theirs: Nonce = unhex(&introduction.nonce)?;
    let nonces = [&ours, &theirs];
    let claim = connector_claim(world, &introduction.hello);
    if !secret.verify(&unhex(&introduction.proof)?, &claim, nonces) {
        channel
            .outgoing
            .send(&Verdict::Unproven, HANDSHAKE_STEP)
            .await?;
        return Err(ChannelError::Unproven);
    }
    let hello = serde_json::from_str(&introduction.hello)
        .map_err(|error| ChannelError::Foreign(error.to_string()))?;
    Ok(Caller {
        channel,
        hello,
        welcome: secret.proof(&acceptor_claim(world, &introduction.hello), nonces),
    })
}

/// Connects and introduces itself; the other side has proved the secret when this returns.
pub(crate) async fn connect(
    address: &str,
    secret: &Secret,
    world: &str,
    hello: &Hello,
) -> Result<Channel, ChannelError> {
    let stream = timeout(HANDSHAKE_STEP, TcpStream::connect(address))
        .await
        .map_err(|_| ChannelError::TimedOut(HANDSHAKE_STEP))??;
    let mut channel = Channel::new(stream)?;
    let greeting: Greeting = channel.incoming.step().await?;
    if greeting.baton_world != HANDSHAKE_VERSION {
        let version = greeting.baton_world;
        return Err(ChannelError::Foreign(format!(
            "handshake version {version}"
        )));
    }
    let (theirs, ours): (Nonce, Nonce) = (unhex(&greeting.nonce)?, secret::nonce());
    let nonces = [&theirs, &ours];
    let hello = serde_json::to_string(hello).map_err(io::Error::other)?;
    let introduction = Introduction {
        nonce: hex(&ours),
        proof: hex(&secret.proof(&connector_claim(world, &hello), nonces)),
        hello,
    };
    channel.outgoing.send(&introduction, HANDSHAKE_STEP).await?;
    match channel.incoming.step().await? {
        Verdict::Refused { reason } => Err(ChannelError::Refused(reason)),
        Verdict::Unproven => Err(ChannelError::Unproven),
        Verdict::Welcome { proof } => {
            let claim = acceptor_claim(world, &introduction.hello);
            if secret.verify(&unhex(&proof)?, &claim, nonces) {
                Ok(channel)
            } else {
                Err(ChannelError::Unproven)
            }
        }
    }
}

fn connector_claim(world: &str, hello: &str) -> String {
    format!("connector\n{world}\n{hello}")
}

fn acceptor_claim(world: &str, hello: &str) -> String {
    format!("acceptor\n{world}\n{hello}")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Result<[u8; PROOF_BYTES], ChannelError> {
    let wrong = || ChannelError::Foreign("a nonce or proof that is none".to_owned());
    if text.len() != 2 * PROOF_BYTES || !text.is_ascii() {
        return Err(wrong());
    }
    let mut bytes = [0; PROOF_BYTES];
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).map_err(|_| wrong())?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::protocol::{AgentHello, Answer, VERSION};
    use tokio::net::TcpListener;

    fn hello() -> Hello {
        Hello::Agent(AgentHello {
            rank: 1,
            size: 2,
            host: "node2".to_owned(),
            pid: 7,
            version: VERSION,
            environment: Vec::new(),
            num_threads: 1,
        })
    }

    async fn meet(
        (accepts, connects): (&Secret, &Secret),
        (accept_world, connect_world): (&str, &str),
    ) -> (Result<Caller, ChannelError>, Result<Channel, ChannelError>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let acceptor = async {
            let (stream, _) = listener.accept().await.unwrap();
            accept(stream, accepts, accept_world).await
        };
        let both = async {
            let hello = hello();
            tokio::join!(
                async {
                    match acceptor.await {
                        Ok(caller) => {
                            let again = Caller {
                                hello: caller.hello.clone(),
                                welcome: caller.welcome,
                                channel: caller.welcome().await.unwrap(),
                            };
                            Ok(again)
                        }
                        Err(error) => Err(error),
                    }
                },
                connect(&address, connects, connect_world, &hello)
            )
        };
        timeout(Duration::from_secs(20), both).await.unwrap()
    }

    #[tokio::test]
    async fn two_sides_of_one_job_meet_and_talk() {
        let secret = Secret::generate();
        let (caller, channel) = meet((&secret, &secret), ("job 1", "job 1")).await;
        let (mut caller, mut channel) = (caller.unwrap(), channel.unwrap());
        assert_eq!(caller.hello, hello());
        let answer = Answer { refusal: None };
        let limit = Duration::from_secs(5);
        caller.channel.outgoing.send(&answer, limit).await.unwrap();
        assert_eq!(channel.incoming.next::<Answer>().await.unwrap(), answer);
    }

    #[tokio::test]
    async fn another_secret_or_another_job_is_turned_away() {
        let (one, two) = (Secret::generate(), Secret::generate());
        for (secrets, worlds) in [
            ((&one, &two), ("job 1", "job 1")),
            ((&one, &one), ("job 1", "job 2")),
        ] {
            let (caller, channel) = meet(secrets, worlds).await;
            assert!(matches!(caller, Err(ChannelError::Unproven)));
            assert!(matches!(channel, Err(ChannelError::Unproven)));
        }
    }

    #[tokio::test]
    async fn a_foreign_server_is_named_so() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream
                .write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                .await
                .unwrap();
            stream
        };
        let secret = Secret::generate();
        let hello = hello();
        let (_stream, channel) = tokio::join!(server, connect(&address, &secret, "w", &hello));
        let error = channel.unwrap_err();
        assert!(matches!(error, ChannelError::Foreign(_)), "{error}");
    }

    #[tokio::test]
    async fn an_endless_line_is_cut() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let flood = async {
            let mut stream = TcpStream::connect(&address).await.unwrap();
            let junk = vec![b'x'; 2 * usize::try_from(HANDSHAKE_BYTES_MAX).unwrap()];
            // The other side may hang up in the middle; that is the point.
            let _ = stream.write_all(&junk).await;
            stream
        };
        let secret = Secret::generate();
        let server = async {
            let (stream, _) = listener.accept().await.unwrap();
            accept(stream, &secret, "w").await
        };
        let (_stream, caller) = tokio::join!(flood, server);
        assert!(matches!(caller, Err(ChannelError::Foreign(_))));
    }
}
