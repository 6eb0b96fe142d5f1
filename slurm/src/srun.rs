//! The `srun` commands of a deployment, first with node numbers, then with the hosts of an allocation.
//!
//! What a job needs inside its allocation is kept in `run.json` of the run folder, so that nothing is planned twice: the
//! supervisor of steps, the binder of listed worlds and the small program in front of a task all read [`RunFile`].

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::hostlist::{self, ListError};
use crate::plan::place::even;

/// Raised with every change of [`RunFile`].
pub const RUN_FILE_VERSION: u32 = 1;

/// Ranks on one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The node, from 0 in the order of the job's node list.
    pub node: u32,
    /// The GPUs of the ranks there, in the order of the ranks.
    pub gpus: Vec<u32>,
}

/// Ranks of a launch that follow each other and have one role.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// `ctx0`, or `proxy`.
    pub label: String,
    /// Whose environment they have: `context`, `generation` or `proxy`.
    pub role: String,
    /// How many there are.
    pub ranks: u32,
}

/// One `srun`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    /// `ctx0`, `proxy`, or the job's name.
    pub label: String,
    /// Options that do not say where.
    pub options: Vec<String>,
    /// Options of the layout, which come last.
    pub free: Vec<String>,
    /// Where the ranks are, in the order of their numbers.
    pub places: Vec<Place>,
    /// Whose ranks they are.
    pub parts: Vec<Part>,
    /// Whether the ranks see their own GPUs of the node only.
    pub own_gpus: bool,
    /// What each rank runs.
    pub command: Vec<String>,
}

/// A launch with hosts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bound {
    /// The command.
    pub argv: Vec<String>,
    /// The host of each rank, one a line, for the file that `SLURM_HOSTFILE` names; `None` if `srun` needs none.
    pub hosts: Option<String>,
}

/// Why a launch cannot have the hosts of an allocation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// The allocation's node list is not one.
    #[error("the allocation's node list is damaged: {0}")]
    NodeList(#[from] ListError),
    /// The allocation is smaller than the plan.
    #[error(
        "the plan has {needed} nodes, but the allocation has {found}\n  hint: submit the script that was written with the plan, without other `--nodes`"
    )]
    TooFew {
        /// What the plan needs.
        needed: usize,
        /// What there is.
        found: usize,
    },
}

impl Launch {
    fn counts(&self) -> Vec<u32> {
        let count = |place: &Place| u32::try_from(place.gpus.len()).unwrap_or(u32::MAX);
        self.places.iter().map(count).collect()
    }

    /// Its number of ranks.
    #[must_use]
    pub fn ranks(&self) -> u32 {
        self.counts().iter().sum()
    }

    fn nodes(&self) -> u32 {
        u32::try_from(self.places.len()).unwrap_or(u32::MAX).max(1)
    }

    /// Whether even blocks over its nodes are its places.
    #[must_use]
    pub fn is_even(&self) -> bool {
        let in_order = self.places.is_sorted_by_key(|place| place.node);
        in_order && self.counts() == even(self.ranks(), self.nodes())
    }

    fn words(&self, own: Vec<String>) -> Vec<String> {
        let mut options = [self.options.clone(), own].concat();
        options.sort();
        let mut words = vec!["srun".to_owned()];
        words.extend(options);
        words.extend(self.free.iter().cloned());
        words.extend(self.command.iter().cloned());
        words
    }

    /// The command where the job has the launch's nodes and no others, and deals the ranks out evenly.
    #[must_use]
    pub fn on_all_nodes(&self) -> Vec<String> {
        self.words(self.blocks())
    }

    fn blocks(&self) -> Vec<String> {
        vec![
            "--distribution=block".to_owned(),
            format!("--nodes={}", self.nodes()),
            format!("--ntasks={}", self.ranks()),
            // Said again, because the job's own number is in the environment and is another one.
            format!(
                "--ntasks-per-node={}",
                self.counts().into_iter().max().unwrap_or(1)
            ),
        ]
    }

    /// The command on the hosts of an allocation, in the order of its node list.
    ///
    /// # Errors
    /// When there are fewer hosts than the plan has nodes.
    pub fn on_hosts(&self, hosts: &[String]) -> Result<Bound, BindError> {
        let host = |place: &Place| {
            let too_few = BindError::TooFew {
                needed: place.node as usize + 1,
                found: hosts.len(),
            };
            hosts.get(place.node as usize).ok_or(too_few)
        };
        let own: Vec<&String> = self.places.iter().map(host).collect::<Result<_, _>>()?;
        if self.is_even() {
            let list = hostlist::compress(&own)?;
            let own = [self.blocks(), vec![format!("--nodelist={list}")]].concat();
            return Ok(Bound {
                argv: self.words(own),
                hosts: None,
            });
        }
        let lines: Vec<String> = own
            .iter()
            .zip(&self.places)
            .flat_map(|(host, place)| place.gpus.iter().map(move |_| format!("{host}\n")))
            .collect();
        let argv = self.words(vec![
            "--distribution=arbitrary".to_owned(),
            format!("--ntasks={}", self.ranks()),
        ]);
        Ok(Bound {
            argv,
            hosts: Some(lines.concat()),
        })
    }

    /// Whose rank this is, and the GPUs of its part on its node; `None` if the launch has no such rank.
    #[must_use]
    pub fn task(&self, rank: u32) -> Option<(&Part, &[u32])> {
        let mut before = 0;
        let part = self.parts.iter().find(|part| {
            before += part.ranks;
            rank < before
        })?;
        let mut before = 0;
        let place = self.places.iter().zip(self.counts()).find(|(_, count)| {
            before += count;
            rank < before
        });
        place.map(|(place, _)| (part, place.gpus.as_slice()))
    }
}

/// `run.json`: what a job needs inside its allocation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunFile {
    /// [`RUN_FILE_VERSION`] of the program that wrote it.
    pub version: u32,
    /// The folder of log files.
    pub logs: String,
    /// Environment of each role, and of the proxy.
    pub environment: BTreeMap<String, BTreeMap<String, String>>,
    /// Everything that is started.
    pub launches: Vec<Launch>,
}

impl RunFile {
    /// The launch with this label.
    #[must_use]
    pub fn launch(&self, label: &str) -> Option<&Launch> {
        self.launches.iter().find(|launch| launch.label == label)
    }

    /// Reads the file's text.
    ///
    /// # Errors
    /// When it is not one that this version wrote.
    pub fn parse(text: &str) -> Result<Self, RunFileError> {
        let file: Self = serde_json::from_str(text)?;
        if file.version == RUN_FILE_VERSION {
            Ok(file)
        } else {
            Err(RunFileError::Version(file.version))
        }
    }

    /// The file's text.
    #[must_use]
    pub fn to_json(&self) -> String {
        let text = serde_json::to_string_pretty(self);
        text.expect("a tree of strings and numbers can be written") + "\n"
    }

    /// Whether a rank of this launch has anything to set before its command runs.
    #[must_use]
    pub fn has_task_environment(&self, launch: &Launch) -> bool {
        let variables = |part: &Part| {
            self.environment
                .get(&part.role)
                .is_some_and(|variables| !variables.is_empty())
        };
        launch.own_gpus || launch.parts.iter().any(variables)
    }
}

/// Why a `run.json` cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunFileError {
    /// It is damaged.
    #[error("not a run file: {0}")]
    Json(#[from] serde_json::Error),
    /// Another version wrote it.
    #[error(
        "written by another version of baton (format {0}, expected {RUN_FILE_VERSION})\n  hint: render the run folder again with the version that the nodes have"
    )]
    Version(u32),
}
