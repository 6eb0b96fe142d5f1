//! Several ranks as threads of this process: the golden answers on every grid, equal bits, refusals, losses, hand-offs
//! between grids.

mod bits;
mod goldens;
mod handoffs;
mod lives;
pub(crate) mod memory;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use baton_configs::llm::LlmOptions;

use super::{Following, Leading, Led, ParallelError, await_order, follow, lead};
use crate::backend::cpu::CpuBackend;
use crate::collective::RankNames;
use crate::model::load::ModelHeader;
use crate::model::shard::Grid;
use crate::model::tests::golden_path;
use memory::MemoryGroup;

/// How long a rank of a test may be silent; far more than any step takes on a busy machine.
const PATIENCE_MS: u64 = 60_000;

/// Options for the tiny models on so many ranks.
fn options(tensor: u32, pipeline: u32) -> LlmOptions {
    LlmOptions {
        tensor_parallel_size: tensor,
        pipeline_parallel_size: pipeline,
        num_threads: Some(1),
        ..crate::model::tests::float32()
    }
}

/// Ranks of an instance that follow, each a thread.
#[derive(Debug)]
struct Followers(Vec<JoinHandle<Result<(), ParallelError>>>);

impl Followers {
    /// Each follower's end.
    fn join(self) -> Vec<Result<(), ParallelError>> {
        let ends = self.0.into_iter().map(JoinHandle::join);
        ends.map(|end| end.expect("no rank panics")).collect()
    }

    fn join_well(self) {
        for (index, end) in self.join().into_iter().enumerate() {
            end.unwrap_or_else(|error| panic!("rank {}: {error}", index + 1));
        }
    }
}

/// An instance to be started.
#[derive(Debug)]
struct Instance {
    model: PathBuf,
    /// What the other ranks find; the same, unless the test wants otherwise.
    elsewhere: PathBuf,
    options: LlmOptions,
    group: Vec<MemoryGroup>,
    peer_timeout: Duration,
}

impl Instance {
    fn new(model: &Path, options: LlmOptions) -> Self {
        Self {
            model: model.to_owned(),
            elsewhere: model.to_owned(),
            group: memory::group(Grid::of(&options).size(), PATIENCE_MS),
            options,
            peer_timeout: Duration::from_millis(PATIENCE_MS),
        }
    }

    /// `tiny-NAME`.
    fn tiny(name: &str, tensor: u32, pipeline: u32) -> Self {
        Self::new(
            &golden_path(&format!("tiny-{name}")),
            options(tensor, pipeline),
        )
    }

    /// Starts the other ranks and loads; the caller is rank 0.
    fn start(mut self) -> (Result<Led, ParallelError>, Followers) {
        let followers = self
            .group
            .drain(1..)
            .map(|end| thread::spawn(move || follow_to_the_end(end)));
        let followers = Followers(followers.collect());
        let own = self.group.pop().expect("rank 0");
        (self.lead(own), followers)
    }

    fn lead(&self, own: MemoryGroup) -> Result<Led, ParallelError> {
        let model = self.model.to_str().expect("UTF-8");
        let header = ModelHeader::read(model, &self.options, None)?;
        header.check(Grid::of(&self.options))?;
        let leading = Leading {
            model: self.elsewhere.to_str().expect("UTF-8").to_owned(),
            revision: None,
            options: &self.options,
            names: RankNames::new(&["node0".to_owned(), "node1".to_owned()]),
            peer_timeout: self.peer_timeout,
            stop: &AtomicBool::new(false),
        };
        lead(Box::new(own), header, &leading, backend, &|_| ())
    }
}

fn backend(threads: usize) -> Result<CpuBackend, ParallelError> {
    Ok(CpuBackend::new(Some(threads)))
}

fn follow_to_the_end(mut end: MemoryGroup) -> Result<(), ParallelError> {
    let own = Following {
        num_threads: None,
        host: "127.0.0.1".to_owned(),
        stop: &AtomicBool::new(false),
    };
    let ordered = await_order(&mut end)?;
    follow(Box::new(end), &ordered, &own, backend)
}
