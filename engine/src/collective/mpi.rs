//! Ranks that talk over MPI, through the plug-in that a site builds against its own MPI.
//!
//! The world is one fate, as MPI says: a rank that is lost, or silent for too long, ends all of them within seconds.
//! A call that fails says so first; a few seconds later the world is aborted with that cause, so that there is time to
//! log it. Sums are ours, over MPI's messages, and not `MPI_Allreduce`, whose order of additions is the library's own:
//! they have the bits of every other fabric.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::RankNames;
use super::doing::Doing;
use plugin::Plugin;
use watch::Watch;

pub(crate) use flight::{Flight, Patience};
pub use group::MpiGroup;
pub(crate) use mail::{FIRST_TAG, LAST_TAG, Mail, mail};

mod find;
mod flight;
mod group;
mod mail;
mod plugin;
mod watch;

#[cfg(test)]
mod tests;

/// Opens the plug-in, and the MPI behind it, but starts nothing: whether MPI can be used here at all.
///
/// # Errors
/// When it is not there, or does not open.
pub fn probe() -> Result<(), MpiError> {
    Plugin::open().map(|_| ())
}

/// Why MPI cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MpiError {
    /// The plug-in is not there.
    #[error(
        "the MPI plug-in {name} is not there ({tried}); it carries sums and messages between ranks over MPI\nhint: build it on this cluster with scripts/build-mpi and put it next to the executable, or name it in {variable}; the fabric `tcp` needs neither MPI nor the plug-in",
        name = find::NAME,
        variable = find::VARIABLE
    )]
    NoPlugin {
        /// Each place with what the system said.
        tried: String,
    },
    /// The plug-in is there and does not open.
    #[error(
        "the MPI plug-in {path} does not open: {reason}\nhint: load the MPI that it was built with, or build it again with scripts/build-mpi"
    )]
    Unusable {
        /// Where it is.
        path: String,
        /// What the system said.
        reason: String,
    },
    /// MPI does not start.
    #[error("MPI does not start: {0}")]
    Start(String),
    /// MPI is stuck in its start.
    #[error(
        "MPI did not start within {waited_s} s: it waits for ranks that do not come\nhint: all ranks of the world must use MPI, and be started by one srun --mpi=pmix or one mpirun"
    )]
    Stuck {
        /// Seconds.
        waited_s: u64,
    },
    /// The world is too small: MPI does not see what the launcher started.
    #[error(
        "MPI sees a world of {found} where this instance alone has {size_min} ranks\nhint: start with srun --mpi=pmix (srun --mpi=list says what there is) or with the mpirun of the MPI that the plug-in was built with ({library})"
    )]
    WorldSize {
        /// What MPI says.
        found: usize,
        /// What must be there.
        size_min: usize,
        /// The MPI library.
        library: String,
    },
    /// The world does not split into instances.
    #[error("the MPI world does not split: {0}")]
    Split(String),
}

/// How to open the world.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MpiOptions {
    /// Ranks that the world must have at least.
    pub size_min: usize,
    /// How long the other ranks may take to come.
    pub join_timeout: Duration,
    /// How long a rank may be silent while it is waited for.
    pub peer_timeout: Duration,
}

/// MPI, while it is on: like MPI itself, once in a process.
static OPEN: Mutex<Option<Arc<Watch>>> = Mutex::new(None);

/// Ends MPI in good order, if this process uses it: a process that ends without it, as after a failure, takes the world
/// along. Waits, with a limit, for all ranks of the world to do the same.
pub fn leave() {
    mail::close();
    let open = OPEN.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(watch) = open {
        watch.close();
    }
}

/// All ranks that one srun or mpirun started, connected by MPI. Once in a process, until [`leave`].
#[derive(Debug, Clone)]
pub struct MpiWorld {
    watch: Arc<Watch>,
    rank: usize,
    size: usize,
    library: String,
    options: MpiOptions,
}

impl MpiWorld {
    /// Opens the plug-in and starts MPI; all ranks of the world do so.
    ///
    /// # Errors
    /// When there is no plug-in or no MPI, or the ranks do not come together in time.
    pub fn open(options: MpiOptions) -> Result<Self, MpiError> {
        let plugin = Arc::new(Plugin::open()?);
        let (watch, facts) = Watch::start(plugin, options.join_timeout)?;
        let watch = Arc::new(watch);
        *OPEN.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&watch));
        let world = Self {
            watch,
            rank: facts.rank,
            size: facts.size,
            library: facts.library,
            options,
        };
        if world.size < world.options.size_min {
            return Err(MpiError::WorldSize {
                found: world.size,
                size_min: world.options.size_min,
                library: world.library,
            });
        }
        Ok(world)
    }

    /// This rank's number in the world.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Ranks of the world.
    #[must_use]
    pub fn size(&self) -> usize {
        self.size
    }

    /// Name and version of the MPI library.
    #[must_use]
    pub fn library(&self) -> &str {
        &self.library
    }

    /// Splits the world: the ranks with the same colour are a group, numbered in the order of `key`. `None` stands aside
    /// and gets none. All ranks of the world call this, each as often as the others.
    ///
    /// # Errors
    /// When MPI refuses. Where a rank does not take part, the world is aborted after `join_timeout`.
    pub fn group(&self, colour: Option<u32>, key: u32) -> Result<Option<MpiGroup>, MpiError> {
        let number = |value: u32| {
            i32::try_from(value).map_err(|_| MpiError::Split(format!("{value} is too large")))
        };
        let (colour, key) = (colour.map_or(Ok(-1), number)?, number(key)?);
        let guard = self
            .watch
            .guard(self.options.join_timeout, Doing::Splitting);
        let plugin = self.watch.plugin();
        let split = plugin.split(colour, key).map_err(MpiError::Split)?;
        drop(guard);
        let Some(group) = split else {
            return Ok(None);
        };
        let hosts: Result<Vec<String>, String> = (0..group.size())
            .map(|rank| plugin.host(&group, rank))
            .collect();
        Ok(Some(MpiGroup::new(
            Arc::clone(&self.watch),
            group,
            RankNames::new(&hosts.map_err(MpiError::Split)?),
            self.options.peer_timeout,
        )))
    }

    /// Opens the mail between all ranks of the world ([`mail`]). All of them call this, once.
    ///
    /// # Errors
    /// When MPI refuses, or rank 0 is not heard of within `join_timeout`.
    pub fn open_mail(&self) -> Result<(), MpiError> {
        let limit = self.options.join_timeout;
        let guard = self.watch.guard(limit, Doing::Splitting);
        let key = i32::try_from(self.rank)
            .map_err(|_| MpiError::Split(format!("{} is too large", self.rank)))?;
        let split = self.watch.plugin().split(0, key);
        drop(guard);
        let group = split
            .map_err(MpiError::Split)?
            .ok_or_else(|| MpiError::Split("this rank has got no mail".to_owned()))?;
        mail::open(Arc::clone(&self.watch), group, limit).map_err(MpiError::Split)
    }

    /// Ends all processes of the world at once, this one too, and logs why.
    pub fn abort(&self, cause: &str) {
        self.watch.abort(cause);
    }
}
