//! A follower's way from its first word to its last.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use baton_configs::llm::{self, LlmOptions, LlmOverrides};
use baton_configs::transceiver::TransceiverConfig;
use baton_configs::yaml::Document;

use super::{Hello, LoadOrder, Report, ToAll, ToLeader, from_bytes, to_bytes};
use crate::backend::Backend;
use crate::collective::Collective;
use crate::machine;
use crate::model::Model;
use crate::model::decoder::Decoder;
use crate::model::load::{LoadProgress, ModelHeader};
use crate::model::shard::{Grid, Shard};
use crate::parallel::ParallelError;
use crate::parallel::follower::{self, Follower};

/// How often a rank that loads says so.
pub(super) const PROGRESS_PERIOD: Duration = Duration::from_secs(1);

/// What a follower has of its own.
#[derive(Debug)]
pub(crate) struct Following<'a> {
    /// Threads to compute on, where the launcher says so.
    pub(crate) num_threads: Option<usize>,
    /// Its address, which the other ranks reach.
    pub(crate) host: String,
    /// Looked at between messages.
    pub(crate) stop: &'a AtomicBool,
}

/// What rank 0 asks this rank to load.
#[derive(Debug)]
pub(crate) struct Ordered {
    order: LoadOrder,
    pub(crate) options: LlmOptions,
}

/// Says hello to rank 0 and hears what to load.
///
/// # Errors
/// When rank 0 is lost, silent or gives up, or its options are not understood.
pub(crate) fn await_order(collective: &mut dyn Collective) -> Result<Ordered, ParallelError> {
    collective.send(0, &to_bytes(&Hello::of_this_process()))?;
    let mut message = Vec::new();
    collective.broadcast(&mut message)?;
    let order: LoadOrder = match from_bytes(0, &message)? {
        ToAll::Load(order) => order,
        ToAll::GiveUp(reason) => return Err(ParallelError::GivenUp(reason)),
        ToAll::Wait | ToAll::Begin => {
            return Err(ParallelError::Message {
                from: 0,
                reason: "nothing was loaded yet".to_owned(),
            });
        }
    };
    let options = parse(&order.options)?;
    Ok(Ordered { order, options })
}

/// Loads what rank 0 asks for and follows it to the end. `make` gives the device, for so many threads.
///
/// # Errors
/// When rank 0 or another rank is lost, silent or gives up, or this rank cannot load or compute.
pub(crate) fn follow<B: Backend>(
    collective: Box<dyn Collective>,
    ordered: &Ordered,
    own: &Following<'_>,
    make: impl FnOnce(usize) -> Result<B, ParallelError>,
) -> Result<(), ParallelError> {
    let rank = collective.rank();
    let collective = RefCell::new(collective);
    let loaded = load(ordered, &collective, own, make);
    let mut collective = collective.into_inner();
    let (mut decoder, shards, transceiver) = match loaded {
        Ok(loaded) => {
            collective.send(0, &to_bytes(&ToLeader::Loaded(loaded.report)))?;
            (loaded.decoder, loaded.shards, loaded.transceiver)
        }
        Err(error) => {
            // If rank 0 is gone too, this rank's own error is the one that matters.
            let failed = ToLeader::Failed(error.to_string());
            drop(collective.send(0, &to_bytes(&failed)));
            return Err(error);
        }
    };
    await_beginning(collective.as_mut(), own.stop)?;
    decoder.join(collective, &shards)?;
    tracing::info!(rank, "following");
    let follower = Follower {
        shard: &shards[rank],
        transceiver,
        host: own.host.clone(),
        stop: own.stop,
    };
    follower::follow(&mut decoder, &follower)
}

/// What a follower has once it has loaded.
struct Loaded<B: Backend> {
    decoder: Decoder<B>,
    shards: Vec<Shard>,
    report: Report,
    transceiver: Option<TransceiverConfig>,
}

/// Loads this rank's part.
fn load<B: Backend>(
    Ordered { order, options }: &Ordered,
    collective: &RefCell<Box<dyn Collective>>,
    own: &Following<'_>,
    make: impl FnOnce(usize) -> Result<B, ParallelError>,
) -> Result<Loaded<B>, ParallelError> {
    let rank = collective.borrow().rank();
    let grid = Grid::of(options);
    let header = ModelHeader::read(&order.model, options, order.revision.as_deref())?;
    header.check(grid)?;
    let shards = Shard::all(&header.config, grid);
    let told = options.num_threads.map(|threads| threads as usize);
    let share = order.threads.get(rank).copied();
    let threads = own.num_threads.or(told).or(share).unwrap_or(1);
    let mut backend = make(threads)?;
    backend.expect_ranks()?;
    let said = RefCell::new(Instant::now());
    let progress = |step: LoadProgress<'_>| {
        if said.borrow().elapsed() < PROGRESS_PERIOD {
            return;
        }
        said.replace(Instant::now());
        let progress = ToLeader::Progress {
            bytes_done: step.bytes_done,
            bytes_total: step.bytes_total,
        };
        // A rank 0 that is gone is noticed by the next message, which is not for information only.
        drop(collective.borrow_mut().send(0, &to_bytes(&progress)));
    };
    let loaded = header.load(backend, grid.place(rank), &progress)?;
    let decoder = loaded.decoder;
    tracing::info!(
        rank,
        backend = decoder.backend_description(),
        "this rank's part is there"
    );
    let report = Report {
        fingerprint: decoder.shape().fingerprint,
        identity: loaded.identity,
        weight_bytes: decoder.weight_bytes() as u64,
        available_bytes: machine::available_bytes(),
        device_bytes: decoder.free_device_bytes(options),
    };
    Ok(Loaded {
        decoder,
        shards,
        report,
        transceiver: options.transceiver.clone(),
    })
}

/// Waits until all others have loaded as well.
fn await_beginning(
    collective: &mut dyn Collective,
    stop: &AtomicBool,
) -> Result<(), ParallelError> {
    let mut message = Vec::new();
    loop {
        collective.broadcast(&mut message)?;
        if stop.load(Ordering::Relaxed) {
            return Err(ParallelError::Stopped);
        }
        match from_bytes(0, &message)? {
            ToAll::Begin => return Ok(()),
            ToAll::Wait => {}
            ToAll::GiveUp(reason) => return Err(ParallelError::GivenUp(reason)),
            ToAll::Load(_) => {
                return Err(ParallelError::Message {
                    from: 0,
                    reason: "there is to be loaded twice".to_owned(),
                });
            }
        }
    }
}

fn parse(text: &str) -> Result<LlmOptions, ParallelError> {
    let document = Document::parse("rank 0's options", text);
    document
        .and_then(|document| llm::resolve(Some(&document), &LlmOverrides::default()))
        .map(|(options, _)| options)
        .map_err(|errors| ParallelError::Options(errors.to_string()))
}
