//! What coordinator, agents and leading ranks say to each other: one JSON value a line, after both sides have proved
//! the job's secret (`channel.rs`). Plain data; nothing here decides.

use baton_engine::ranks::RankCall;
use serde::{Deserialize, Serialize};

/// Raised with every change of these types: ranks of two versions do not work together.
pub(crate) const VERSION: u32 = 1;

/// Who connects, and what for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "as", rename_all = "snake_case")]
pub(crate) enum Hello {
    /// The launcher of one rank of the world.
    Agent(AgentHello),
    /// The leading rank of an instance calls for its followers.
    Leader {
        /// `gen0`.
        instance: String,
        /// Which start of the instance this is.
        epoch: u32,
        /// What it needs.
        call: RankCall,
    },
}

/// One rank's launcher.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AgentHello {
    /// Its rank in the world.
    pub(crate) rank: u32,
    /// The size of the world, as its starter told it.
    pub(crate) size: u32,
    /// Its machine's name.
    pub(crate) host: String,
    /// Its process.
    pub(crate) pid: u32,
    /// [`VERSION`] of its program.
    pub(crate) version: u32,
    /// Environment for its rank's process: devices.
    pub(crate) environment: Vec<(String, String)>,
    /// CPU threads for its rank's process.
    pub(crate) num_threads: u32,
}

/// What an agent tells the coordinator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "snake_case")]
pub(crate) enum Report {
    /// Nothing new.
    Alive,
    /// A process listens.
    Bound {
        /// Which.
        slot: SlotId,
        /// `host:port`.
        address: String,
    },
    /// A process ended.
    Ended {
        /// Which.
        slot: SlotId,
        /// How.
        end: End,
        /// Its last lines.
        tail: Vec<String>,
    },
    /// A process could not be started.
    NotStarted {
        /// Which.
        slot: SlotId,
        /// Why.
        reason: String,
    },
    /// The agent was asked to end by this signal.
    Asked {
        /// Its number.
        signal: i32,
    },
}

/// What the coordinator tells an agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case")]
pub(crate) enum Order {
    /// Nothing new.
    Alive,
    /// Start a process.
    Start(Box<Start>),
    /// Send a signal to a process's group, if it still runs.
    Signal {
        /// Which.
        slot: SlotId,
        /// The signal's number.
        signal: i32,
    },
    /// End all processes that are left, then yourself.
    Leave {
        /// With this exit code. Rank 0 has said why, for all.
        code: u8,
    },
}

/// One process of the world, in one of its lives.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct SlotId {
    /// `gen0`, `ctx1`, `proxy`, `command`.
    pub(crate) instance: String,
    /// Rank within the instance.
    pub(crate) rank: u32,
    /// Which start of the instance this is; a report about an earlier one is stale.
    pub(crate) epoch: u32,
}

impl SlotId {
    /// `gen0` for a leader, `gen0.2` for a follower.
    pub(crate) fn label(&self) -> String {
        if self.rank == 0 {
            self.instance.clone()
        } else {
            format!("{}.{}", self.instance, self.rank)
        }
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum End {
    /// With this exit code.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// Nobody could tell.
    Unknown,
}

impl End {
    /// What a shell would see.
    pub(crate) fn shell_code(self) -> u8 {
        match self {
            Self::Code(code) => u8::try_from(code).unwrap_or(1),
            Self::Signal(number) => u8::try_from(128 + number).unwrap_or(1),
            Self::Unknown => 1,
        }
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(number) => match nix::sys::signal::Signal::try_from(*number) {
                Ok(signal) => write!(f, "killed by {signal}"),
                Err(_) => write!(f, "killed by signal {number}"),
            },
            Self::Unknown => f.write_str("its end could not be read"),
        }
    }
}

/// A process to be started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Start {
    /// Which.
    pub(crate) slot: SlotId,
    /// What runs.
    pub(crate) program: Program,
    /// Arguments. `{dir}` at the start of one stands for the folder that holds [`Start::files`].
    pub(crate) arguments: Vec<String>,
    /// Added to the agent's environment.
    pub(crate) environment: Vec<(String, String)>,
    /// Files that it reads, name and text.
    pub(crate) files: Vec<(String, String)>,
    /// What it finds on its standard input, if anything.
    pub(crate) input: Option<String>,
    /// Whether it takes `--report-addr FILE` and its address is wanted.
    pub(crate) reports_address: bool,
    /// Where its lines go.
    pub(crate) streams: Streams,
    /// Folder for a log file of its own, if one is wanted.
    pub(crate) log_dir: Option<String>,
}

/// What an agent runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Program {
    /// This very program.
    Baton,
    /// Whatever the user wants, found on the search path.
    Other(String),
}

/// Where a process's lines go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Streams {
    /// Through the agent, with the process's label in front.
    Labelled,
    /// They are the agent's own: what runs cannot tell the difference.
    Inherited,
}

/// The answer to a leader's call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Answer {
    /// Why there will be no followers.
    pub(crate) refusal: Option<String>,
}
