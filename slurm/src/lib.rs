//! Pure planning of jobs on Slurm: text in, text out, nothing is run.
//!
//! Today: Slurm's compact lists, [`hostlist`], of nodes and of tasks per node.

pub mod hostlist;
