//! The model of an instance: on this process alone, or divided over ranks that are called for; and the ranks that follow.
//!
//! What does not divide is refused from the model's header, before anybody is called.

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use baton_configs::llm::{ComputeDtype, Device, LlmOptions};

use super::progress::Progress;
use super::{ServeError, ServeOptions};
use crate::backend::cpu::CpuBackend;
use crate::backend::cuda::CudaBackend;
use crate::backend::{Backend, BackendError};
use crate::collective::{Collective, RankNames, mpi};
use crate::model::Model as _;
use crate::model::load::{LoadProgress, ModelHeader, page_shape};
use crate::model::shard::{Grid, Place};
use crate::parallel::{self, Following, Leading, Led, ParallelError, Room};
use crate::ranks::{FollowerSpec, LeaderRanks, RankCall};
use crate::{group, machine, transceiver};

/// Loads the model onto as many ranks as the options ask for.
pub(super) fn load(
    options: &ServeOptions,
    progress: &Progress,
    stop: &AtomicBool,
) -> Result<Led, ServeError> {
    let (llm, revision) = (&options.llm, options.revision.as_deref());
    let header = ModelHeader::read(&options.model, llm, revision)?;
    let grid = Grid::of(llm);
    header.check(grid)?;
    if grid == Grid::ALONE {
        if let Some(ranks) = &options.ranks {
            group::stand_aside(ranks.fabric, ranks.join_timeout, ranks.peer_timeout)?;
        }
        return load_alone(header, options, progress);
    }
    let Some(ranks) = &options.ranks else {
        return Err(ServeError::NoRanks {
            tensor: grid.tensor,
            pipeline: grid.pipeline,
        });
    };
    let group = gather(grid, ranks, progress, stop)?;
    let leading = Leading {
        model: everywhere(&options.model),
        revision: options.revision.clone(),
        options: llm,
        names: RankNames::new(&ranks.hosts),
        peer_timeout: ranks.peer_timeout,
        stop,
    };
    let advance = |step: LoadProgress<'_>| progress.advance(step);
    match gpu(llm)? {
        Some(gpu) => Ok(parallel::lead(
            group,
            header,
            &leading,
            |_| Ok(gpu),
            &advance,
        )?),
        None => Ok(parallel::lead(group, header, &leading, cpu, &advance)?),
    }
}

fn cpu(threads: usize) -> Result<CpuBackend, ParallelError> {
    Ok(CpuBackend::new(Some(threads)))
}

/// The GPU, where the options want one and there is one that can be used. None computes in 32 bits.
fn gpu(options: &LlmOptions) -> Result<Option<CudaBackend>, BackendError> {
    match (options.device, options.dtype) {
        (Device::Cpu, _) | (Device::Auto, ComputeDtype::Float32) => return Ok(None),
        (Device::Cuda, ComputeDtype::Float32) => {
            return Err(BackendError::Device {
                what: "device: cuda".to_owned(),
                reason: "`dtype: float32` is arithmetic in 32 bits, which is the CPU's: say `device: cpu`, \
                         or `dtype: auto` with `kv_cache_config.dtype: float32`"
                    .to_owned(),
            });
        }
        (Device::Auto | Device::Cuda, _) => {}
    }
    match (options.device, CudaBackend::open()) {
        (_, Ok(gpu)) => Ok(Some(gpu)),
        (Device::Cuda, Err(error)) => Err(BackendError::Device {
            what: "device: cuda".to_owned(),
            reason: error.to_string(),
        }),
        (_, Err(error)) if error.is_absence() => Ok(None),
        (_, Err(error)) => {
            tracing::warn!(%error, "the gpu cannot be used, the cpu computes");
            Ok(None)
        }
    }
}

fn load_alone(
    header: ModelHeader,
    options: &ServeOptions,
    progress: &Progress,
) -> Result<Led, ServeError> {
    let threads = options.llm.num_threads.map(|threads| threads as usize);
    match gpu(&options.llm)? {
        Some(gpu) => load_on(gpu, header, &options.llm, progress),
        None => load_on(CpuBackend::new(threads), header, &options.llm, progress),
    }
}

fn load_on<B: Backend>(
    backend: B,
    header: ModelHeader,
    llm: &LlmOptions,
    progress: &Progress,
) -> Result<Led, ServeError> {
    let advance = |step: LoadProgress<'_>| progress.advance(step);
    let shard = header.load(backend, Place::ALONE, &advance)?;
    let page = page_shape(shard.decoder.shape(), llm);
    let device_bytes = shard.decoder.free_device_bytes(llm).map(|free| {
        let windows = transceiver::device_bytes(llm.transceiver.as_ref(), &page);
        free.saturating_sub(windows)
    });
    let loaded = header.with_model(Box::new(shard.decoder));
    let weight_bytes = loaded.model.weight_bytes() as u64;
    let room = Room {
        available_bytes: device_bytes.unwrap_or_else(machine::available_bytes),
        // On a device they have taken their place.
        weight_bytes: device_bytes.map_or(weight_bytes, |_| 0),
        page_bytes: page.bytes() as u64,
    };
    Ok(Led {
        loaded,
        rooms: vec![room],
    })
}

/// Calls for the other ranks and waits until they are there.
fn gather(
    grid: Grid,
    ranks: &LeaderRanks,
    progress: &Progress,
    stop: &AtomicBool,
) -> Result<Box<dyn Collective>, ServeError> {
    let leader = group::Leader::bind(ranks)?;
    let call = RankCall {
        leader: leader.address(),
        size: grid.size(),
        tensor_parallel: grid.tensor,
        pipeline_parallel: grid.pipeline,
    };
    (ranks.call)(&call).map_err(ServeError::Call)?;
    progress.stage(&format!("waiting for {} ranks to join", grid.size() - 1));
    let met = leader.gather(grid.size(), ranks, stop)?;
    let (join, peer) = (ranks.join_timeout, ranks.peer_timeout);
    Ok(group::on_fabric(met, ranks.fabric, join, peer)?)
}

/// MODEL in a form that means the same in another working directory.
fn everywhere(model: &str) -> String {
    let path = Path::new(model);
    let absolute = path.exists().then(|| std::path::absolute(path).ok());
    let absolute = absolute
        .flatten()
        .and_then(|path| path.to_str().map(str::to_owned));
    absolute.unwrap_or_else(|| model.to_owned())
}

/// The life of a rank that follows: joins its leader's group, loads its part, computes, and ends when the leader says
/// goodbye. Blocks the calling thread.
///
/// `stop` ends it at the leader's next word, in the midst of whatever runs: set it only when the instance is to be given
/// up. For an orderly end it is enough to stop the leader.
///
/// # Errors
/// When the group does not come about, this rank cannot load or compute, or the leader or another rank is lost.
pub fn follow(spec: &FollowerSpec, stop: &AtomicBool) -> Result<(), ServeError> {
    let met = group::join(spec, stop)?;
    let join = Duration::from_millis(spec.join_timeout_ms);
    let peer = Duration::from_millis(spec.peer_timeout_ms);
    let mut group = group::on_fabric(met, spec.fabric, join, peer)?;
    let own = Following {
        num_threads: spec.num_threads.map(|threads| threads as usize),
        host: spec.host.clone(),
        stop,
    };
    let ordered = parallel::await_order(group.as_mut())?;
    let ended = match gpu(&ordered.options) {
        Ok(Some(gpu)) => parallel::follow(group, &ordered, &own, |_| Ok(gpu)),
        Ok(None) => parallel::follow(group, &ordered, &own, cpu),
        // Rank 0 is told.
        Err(error) => parallel::follow(group, &ordered, &own, |_| {
            Err::<CpuBackend, _>(error.into())
        }),
    };
    match ended {
        Err(ParallelError::Stopped) => {
            tracing::info!(rank = spec.rank, "told to stop");
            Ok(())
        }
        ended => {
            ended?;
            mpi::leave();
            Ok(())
        }
    }
}
