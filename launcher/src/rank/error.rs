//! Why the environment does not tell which rank this is.

use baton_slurm::hostlist::ListError;

use super::environment::Named;

/// Why the environment does not tell which rank this is. Names the variables at fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum RankError {
    /// Text where a launcher writes a number.
    #[error(
        "{name}=`{value}` is not a number\nhint: something between the launcher and this process has changed {name}; \
         unset it to run alone"
    )]
    NotANumber {
        /// The variable.
        name: &'static str,
        /// What it holds.
        value: String,
    },
    /// A rank outside its world.
    #[error(
        "{rank_name}={rank} does not fit {size_name}={size}: ranks count from 0 to one below the size\n\
         hint: one of the two is not of this launch; start all ranks with one srun or mpirun and set neither by hand"
    )]
    Outside {
        /// The variable of the rank.
        rank_name: &'static str,
        /// What it holds.
        rank: u32,
        /// The variable of the size.
        size_name: &'static str,
        /// What it holds.
        size: u32,
    },
    /// A rank without a size beside it.
    #[error("{rank_name}={rank} has none of {} beside it\nhint: {hint}", wanted.join(", "))]
    NoSize {
        /// The variable of the rank.
        rank_name: &'static str,
        /// What it holds.
        rank: u32,
        /// Variables that would tell.
        wanted: &'static [&'static str],
        /// What to do.
        hint: &'static str,
    },
    /// Two variables that both speak of this launch and differ.
    #[error(
        "{one}={one_value} and {other}={other_value} speak of the same {what} and differ\nhint: {hint}"
    )]
    Differ {
        /// What both tell.
        what: &'static str,
        /// One variable.
        one: &'static str,
        /// What it holds.
        one_value: String,
        /// The other variable.
        other: &'static str,
        /// What it holds.
        other_value: String,
        /// What to do.
        hint: &'static str,
    },
    /// A list that Slurm would not write.
    #[error("{name}=`{value}`: {source}\nhint: something has changed {name}; it is Slurm's to set")]
    List {
        /// The variable.
        name: &'static str,
        /// What it holds.
        value: String,
        /// What is wrong with it.
        source: ListError,
    },
}

impl RankError {
    /// A rank that its world's size does not reach.
    pub(super) fn outside(rank: Named, size: Named) -> Self {
        Self::Outside {
            rank_name: rank.name,
            rank: rank.value,
            size_name: size.name,
            size: size.value,
        }
    }
}
