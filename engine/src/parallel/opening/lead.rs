//! Rank 0's way from the assembled group to a model.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use baton_configs::llm::{self, LlmOptions};

use super::load::PROGRESS_PERIOD;
use super::{Hello, LoadOrder, Report, ToAll, ToLeader, from_bytes, to_bytes};
use crate::backend::Backend;
use crate::collective::{Collective, RankNames};
use crate::machine::{self, Processors};
use crate::model::Model;
use crate::model::load::{LoadProgress, LoadedModel, LoadedShard, ModelHeader, page_shape};
use crate::model::shard::{Grid, Shard};
use crate::parallel::ParallelError;
use crate::parallel::model::{ParallelModel, Ranks};
use crate::transceiver;

/// How often the log says who still loads.
const REPORT_PERIOD: Duration = Duration::from_secs(10);

/// What rank 0 goes by.
#[derive(Debug)]
pub(crate) struct Leading<'a> {
    /// MODEL, as every rank finds it.
    pub(crate) model: String,
    pub(crate) revision: Option<String>,
    pub(crate) options: &'a LlmOptions,
    pub(crate) names: RankNames,
    /// How long a rank may be silent.
    pub(crate) peer_timeout: Duration,
    /// Looked at between messages.
    pub(crate) stop: &'a AtomicBool,
}

/// What one machine has for its ranks' pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Room {
    /// What was left when the ranks had loaded.
    pub(crate) available_bytes: u64,
    /// Weights that are used where they are mapped, so that they count as available.
    pub(crate) weight_bytes: u64,
    /// A block takes so much on this machine.
    pub(crate) page_bytes: u64,
}

/// A model on several ranks.
#[derive(Debug)]
pub(crate) struct Led {
    pub(crate) loaded: LoadedModel,
    /// Of every machine.
    pub(crate) rooms: Vec<Room>,
}

/// Has all ranks load and makes one model of them. `header` has been checked for the options' sizes; `make` gives the
/// device, for so many threads.
///
/// # Errors
/// When a rank is lost or silent, cannot load, or has something else than rank 0.
pub(crate) fn lead<B: Backend>(
    mut collective: Box<dyn Collective>,
    header: ModelHeader,
    leading: &Leading<'_>,
    make: impl FnOnce(usize) -> Result<B, ParallelError>,
    progress: &dyn Fn(LoadProgress<'_>),
) -> Result<Led, ParallelError> {
    let begun = Instant::now();
    let processors = greet(collective.as_mut(), leading)?;
    let threads: Vec<usize> = processors
        .iter()
        .map(|own| own.fair_share(&processors))
        .collect();
    let told = leading.options.num_threads.map(|threads| threads as usize);
    let own_threads = told.unwrap_or(threads[0]);
    let order = LoadOrder {
        model: leading.model.clone(),
        revision: leading.revision.clone(),
        options: llm::to_yaml(&for_followers(leading.options)),
        threads,
    };
    collective.broadcast(&mut to_bytes(&ToAll::Load(order)))?;
    let collective = RefCell::new(collective);
    let own = make(own_threads)
        .and_then(|backend| load(&header, leading, &collective, (backend, progress)));
    let mut collective = collective.into_inner();
    let outcome = own.and_then(|own| {
        let reports = await_others(collective.as_mut(), leading, &own)?;
        Ok((own, reports))
    });
    let (own, reports) = match outcome {
        Ok(done) => done,
        Err(error) => {
            let give_up = ToAll::GiveUp(error.to_string());
            // Whoever cannot be told notices that rank 0 is gone.
            drop(collective.broadcast(&mut to_bytes(&give_up)));
            return Err(error);
        }
    };
    collective.broadcast(&mut to_bytes(&ToAll::Begin))?;
    tracing::info!(
        ranks = reports.len(),
        elapsed_ms = begun.elapsed().as_millis(),
        "all ranks have loaded"
    );
    let shards = Shard::all(&header.config, Grid::of(leading.options));
    let rooms = rooms(&reports, &shards, &processors, leading.options, &own);
    let weight_bytes: u64 = reports.iter().map(|report| report.weight_bytes).sum();
    let mut decoder = own.decoder;
    decoder.join(collective, &shards)?;
    let ranks = Ranks {
        shards,
        names: leading.names.clone(),
        weight_bytes: usize::try_from(weight_bytes).unwrap_or(usize::MAX),
        peer_timeout: leading.peer_timeout,
    };
    let model = Box::new(ParallelModel::new(decoder, ranks));
    Ok(Led {
        loaded: header.with_model(model),
        rooms,
    })
}

/// Hears everybody's first word. Returns the processors of all ranks.
fn greet(
    collective: &mut dyn Collective,
    leading: &Leading<'_>,
) -> Result<Vec<Processors>, ParallelError> {
    let own = Hello::of_this_process();
    let mut processors = vec![own.processors];
    let mut message = Vec::new();
    for rank in 1..collective.size() {
        collective.receive(rank, &mut message)?;
        let hello: Hello = from_bytes(rank, &message)?;
        if hello.version != own.version {
            return Err(ParallelError::Disagree {
                rank: leading.names.name(rank),
                there: format!("baton {}", hello.version),
                here: format!("baton {}", own.version),
                hint: "install the same version on every node".to_owned(),
            });
        }
        processors.push(hello.processors);
    }
    Ok(processors)
}

/// Options without what is rank 0's alone.
fn for_followers(options: &LlmOptions) -> LlmOptions {
    LlmOptions {
        chat_template: None,
        tokenizer: None,
        ..options.clone()
    }
}

/// Loads rank 0's part; tells the others, who may be done, that it still does.
fn load<B: Backend>(
    header: &ModelHeader,
    leading: &Leading<'_>,
    collective: &RefCell<Box<dyn Collective>>,
    (mut backend, progress): (B, &dyn Fn(LoadProgress<'_>)),
) -> Result<LoadedShard<B>, ParallelError> {
    backend.expect_ranks()?;
    let said = RefCell::new(Instant::now());
    let told = |step: LoadProgress<'_>| {
        progress(step);
        if said.borrow().elapsed() >= PROGRESS_PERIOD {
            said.replace(Instant::now());
            // A rank that is gone is noticed when its report is waited for.
            drop(
                collective
                    .borrow_mut()
                    .broadcast(&mut to_bytes(&ToAll::Wait)),
            );
        }
    };
    let place = Grid::of(leading.options).place(0);
    Ok(header.load(backend, place, &told)?)
}

/// Waits until everybody has loaded. Returns all reports, rank 0's first.
fn await_others<B: Backend>(
    collective: &mut dyn Collective,
    leading: &Leading<'_>,
    own: &LoadedShard<B>,
) -> Result<Vec<Report>, ParallelError> {
    let mut reports = BTreeMap::from([(
        0,
        Report {
            fingerprint: own.decoder.shape().fingerprint,
            identity: own.identity,
            weight_bytes: own.decoder.weight_bytes() as u64,
            available_bytes: machine::available_bytes(),
            device_bytes: own.decoder.free_device_bytes(leading.options),
        },
    )]);
    let mut message = Vec::new();
    let (mut said, mut logged) = (Instant::now(), Instant::now());
    while reports.len() < collective.size() {
        let missing: Vec<usize> = (0..collective.size())
            .filter(|rank| !reports.contains_key(rank))
            .collect();
        if logged.elapsed() >= REPORT_PERIOD {
            logged = Instant::now();
            let ranks = leading.names.list(&missing);
            tracing::info!(ranks, "waiting for ranks to load");
        }
        for rank in missing {
            if leading.stop.load(Ordering::Relaxed) {
                return Err(ParallelError::Stopped);
            }
            collective.receive(rank, &mut message)?;
            match from_bytes(rank, &message)? {
                ToLeader::Progress {
                    bytes_done,
                    bytes_total,
                } => tracing::debug!(rank, bytes_done, bytes_total, "a rank loads"),
                ToLeader::Loaded(report) => {
                    check(rank, &report, &reports[&0], leading)?;
                    reports.insert(rank, report);
                }
                ToLeader::Failed(reason) => {
                    let rank = leading.names.name(rank);
                    return Err(ParallelError::Rank { rank, reason });
                }
            }
            if said.elapsed() >= PROGRESS_PERIOD {
                said = Instant::now();
                collective.broadcast(&mut to_bytes(&ToAll::Wait))?;
            }
        }
    }
    Ok(reports.into_values().collect())
}

/// Whether a rank has what rank 0 has.
fn check(
    rank: usize,
    there: &Report,
    here: &Report,
    leading: &Leading<'_>,
) -> Result<(), ParallelError> {
    let disagree = |there: String, here: String| {
        Err(ParallelError::Disagree {
            rank: leading.names.name(rank),
            there,
            here,
            hint: format!("put the same files at {} on every node", leading.model),
        })
    };
    if there.fingerprint != here.fingerprint {
        let text = |report: &Report| format!("a model of kind {:016x}", report.fingerprint);
        return disagree(text(there), text(here));
    }
    if there.identity != here.identity {
        let text = |report: &Report| {
            let identity = report.identity;
            format!(
                "weights of {} bytes, hash {:016x}",
                identity.bytes, identity.hash
            )
        };
        return disagree(text(there), text(here));
    }
    Ok(())
}

/// What each machine, or each device with memory of its own, has. Ranks of one machine share its memory.
fn rooms<B: Backend>(
    reports: &[Report],
    shards: &[Shard],
    processors: &[Processors],
    options: &LlmOptions,
    own: &LoadedShard<B>,
) -> Vec<Room> {
    let whole = page_shape(own.decoder.shape(), options);
    let mut machines: BTreeMap<&str, Room> = BTreeMap::new();
    let mut devices = Vec::new();
    for (rank, (report, shard)) in reports.iter().zip(shards).enumerate() {
        if let Some(device_bytes) = report.device_bytes {
            let page = shard.page(whole);
            let windows = transceiver::device_bytes(options.transceiver.as_ref(), &page);
            devices.push(Room {
                available_bytes: device_bytes.saturating_sub(windows),
                weight_bytes: 0,
                page_bytes: page.bytes() as u64,
            });
            continue;
        }
        let room = machines.entry(&processors[rank].machine).or_insert(Room {
            available_bytes: report.available_bytes,
            weight_bytes: 0,
            page_bytes: 0,
        });
        room.available_bytes = room.available_bytes.min(report.available_bytes);
        room.weight_bytes += report.weight_bytes;
        room.page_bytes += shard.page(whole).bytes() as u64;
    }
    machines.into_values().chain(devices).collect()
}
