//! Several ranks as threads of this process: the golden answers on every grid, refusals, losses, hand-offs between grids.

mod goldens;
pub(crate) mod memory;

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use baton_configs::llm::LlmOptions;

use super::ParallelError;
use super::opening::{self, Following, Leading, Led};
use crate::backend::cpu::CpuBackend;
use crate::model::load::ModelHeader;
use crate::model::shard::Grid;
use memory::MemoryGroup;

/// How long a rank of a test may be silent; far more than any step takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Options for the tiny models on so many ranks.
pub(crate) fn options(tensor: u32, pipeline: u32) -> LlmOptions {
    LlmOptions {
        tensor_parallel_size: tensor,
        pipeline_parallel_size: pipeline,
        num_threads: Some(1),
        ..crate::model::tests::float32()
    }
}

/// Ranks of an instance that follow, each a thread.
#[derive(Debug)]
pub(crate) struct Followers(pub(crate) Vec<JoinHandle<Result<(), ParallelError>>>);

impl Followers {
    /// Each follower's end.
    pub(crate) fn join(self) -> Vec<Result<(), ParallelError>> {
        let ends = self.0.into_iter().map(JoinHandle::join);
        ends.map(|end| end.expect("no rank panics")).collect()
    }
}

/// Starts an instance whose rank 0 is the caller.
pub(crate) fn start(model: &Path, options: &LlmOptions) -> (Result<Led, ParallelError>, Followers) {
    start_group(
        model,
        options,
        memory::group(Grid::of(options).size(), PATIENCE),
    )
}

pub(crate) fn start_group(
    model: &Path,
    options: &LlmOptions,
    mut group: Vec<MemoryGroup>,
) -> (Result<Led, ParallelError>, Followers) {
    let followers = group.drain(1..).map(|end| {
        thread::spawn(move || {
            let stop = AtomicBool::new(false);
            let own = Following {
                num_threads: None,
                stop: &stop,
            };
            opening::follow(Box::new(end), &own, |threads| {
                CpuBackend::new(Some(threads))
            })
        })
    });
    let followers = Followers(followers.collect());
    let leader = group.pop().expect("rank 0");
    (lead(model, options, leader), followers)
}

fn lead(model: &Path, options: &LlmOptions, group: MemoryGroup) -> Result<Led, ParallelError> {
    let model = model.to_str().expect("UTF-8").to_owned();
    let header = ModelHeader::read(&model, options, None)?;
    header.check(Grid::of(options))?;
    let leading = Leading {
        model,
        revision: None,
        options,
        hosts: &[],
        peer_timeout: PATIENCE,
        stop: &AtomicBool::new(false),
    };
    let make = |threads| CpuBackend::new(Some(threads));
    opening::lead(Box::new(group), header, &leading, make, &|_| ())
}
