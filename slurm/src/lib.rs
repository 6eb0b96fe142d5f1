//! Planning of jobs on Slurm: a layout becomes a plan, a plan becomes files; both pure, total and deterministic.
//!
//! Slurm's compact lists of nodes and of tasks per node are in [`hostlist`]. Only [`commands`] runs anything.

pub mod commands;
pub mod hostlist;
pub mod plan;
pub mod render;
mod script;
pub mod srun;
