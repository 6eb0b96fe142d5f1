//! Everything that takes time: weights, tokenizer, KV pool, transceiver, engine. On a thread of its own, so that a
//! shutdown need not wait for it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;

use baton_configs::llm::LlmOptions;
use tokio::sync::oneshot;

use super::plan::Plan;
use super::progress::Progress;
use super::{ServeError, ServeOptions, ranks};
use crate::backend::TokenId;
use crate::engine::{Engine, EngineHandle, EngineThread, Inbox};
use crate::handoff::Handoff;
use crate::model::load::{LoadedModel, TokenizerFiles};
use crate::model::{GenerationDefaults, Model};
use crate::parallel::Led;
use crate::request::SamplingParams;
use crate::server::app::App;
use crate::server::listener::{reachable, reachable_host};
use crate::server::metrics::Metrics;
use crate::server::perf::PerfRing;
use crate::server::port::EnginePort;
use crate::server::pulse::Pulse;
use crate::server::sampling::Limits;
use crate::server::service::{Service, TransportFacts};
use crate::server::text::TextTools;
use crate::tokenizer::{ChatError, ChatTemplate, Tokenizer};
use crate::transceiver::{Transceiver, TransceiverInfo, TransceiverParams};
use crate::transport::fault::FaultPlan;

/// Most requests that wait for their first step; more are told to come again.
pub(super) const QUEUE_MAX: usize = 4096;

/// A loaded instance.
pub(super) struct Started {
    pub(super) service: Arc<Service>,
    pub(super) engine: EngineHandle,
    pub(super) thread: EngineThread,
}

/// Begins to load.
pub(super) fn start(
    options: ServeOptions,
    (address, app): (SocketAddr, Arc<App>),
    stop: &Arc<AtomicBool>,
) -> Result<oneshot::Receiver<Result<Started, ServeError>>, ServeError> {
    let (tell, told) = oneshot::channel();
    let stop = Arc::clone(stop);
    thread::Builder::new()
        .name("load".to_owned())
        .spawn(move || {
            // Nobody listens when the server was told to stop meanwhile.
            drop(tell.send(load_all(&options, (address, app), &stop)));
        })
        .map_err(ServeError::Thread)?;
    Ok(told)
}

fn load_all(
    options: &ServeOptions,
    (address, app): (SocketAddr, Arc<App>),
    stop: &AtomicBool,
) -> Result<Started, ServeError> {
    let llm = &options.llm;
    let progress = Progress::new(app, &options.model);
    let Led { mut loaded, rooms } = ranks::load(options, &progress, stop)?;
    progress.stage("reading the tokenizer");
    let (tools, eos_tokens) = text_tools(llm, &loaded)?;
    progress.stage("making the kv pool");
    let plan = Plan::new(llm, loaded.model.as_ref(), eos_tokens, &rooms)?;
    let inbox = Inbox::new(QUEUE_MAX);
    let device = loaded.model.page_device();
    let model = loaded.model.as_mut();
    let transceiver = start_transceiver(options, (address, device), &plan, (model, &inbox))?;
    let info = transceiver.as_ref().map(Transceiver::info);
    let handoff = transceiver.map(|transceiver| Box::new(transceiver) as Box<dyn Handoff>);
    let mut facts = plan.facts(&loaded, llm, info.as_ref().map(transport_facts));
    let LoadedModel {
        model, generation, ..
    } = loaded;
    let vocab = model.shape().vocab;
    let (engine, thread) = Engine::start(model, handoff, plan.engine, inbox)?;
    // The pool may be too small for the longest sequence.
    facts.limits.max_seq_len = u32::try_from(engine.limits().max_seq_len).unwrap_or(u32::MAX);
    let port: Arc<dyn EnginePort> = Arc::new(engine.clone());
    let service = Arc::new(Service {
        limits: Limits {
            vocab: u32::try_from(vocab).unwrap_or(u32::MAX),
            max_seq_len: facts.limits.max_seq_len,
            defaults: sampling_defaults(&generation),
        },
        facts,
        tools,
        metrics: Metrics::new(Arc::clone(&port), info.clone()),
        transceiver: info,
        engine: port,
        perf: PerfRing::new(perf_capacity(llm)),
        pulse: Pulse::new(),
    });
    Ok(Started {
        service,
        engine,
        thread,
    })
}

fn perf_capacity(llm: &LlmOptions) -> usize {
    if llm.return_perf_metrics {
        llm.perf_metrics_max_requests as usize
    } else {
        0
    }
}

/// The tokenizer with what belongs to it, and every token that ends an answer.
fn text_tools(
    llm: &LlmOptions,
    loaded: &LoadedModel,
) -> Result<(TextTools, Vec<TokenId>), ServeError> {
    let tokenizer = match (&llm.tokenizer, &loaded.files) {
        (Some(path), _) => Tokenizer::from_hf_dir(&directory_of(Path::new(path)))?,
        (None, TokenizerFiles::HuggingFace(directory)) => Tokenizer::from_hf_dir(directory)?,
        (None, TokenizerFiles::Gguf(metadata)) => Tokenizer::from_gguf(metadata)?,
    };
    let template = chat_template(llm, &tokenizer)?;
    let mut eos_tokens = loaded.tokens.eos_ids.clone();
    eos_tokens.extend(tokenizer.end_tokens());
    eos_tokens.sort_unstable();
    eos_tokens.dedup();
    let tools = TextTools::new(Arc::new(tokenizer), template, eos_tokens.clone());
    Ok((tools, eos_tokens))
}

/// `--tokenizer` takes a directory or the `tokenizer.json` in it.
fn directory_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if path.is_file() => parent.to_owned(),
        _ => path.to_owned(),
    }
}

/// A template that was asked for must be good; without a usable one of the model's own, completions still work.
fn chat_template(
    llm: &LlmOptions,
    tokenizer: &Tokenizer,
) -> Result<Option<ChatTemplate>, ServeError> {
    if let Some(option) = &llm.chat_template {
        return Ok(Some(ChatTemplate::from_option(tokenizer, option)?));
    }
    match ChatTemplate::of_model(tokenizer) {
        Ok(template) => Ok(Some(template)),
        Err(ChatError::NoTemplate) => Ok(None),
        Err(error) => {
            tracing::warn!(%error, "the model's chat template cannot be used");
            Ok(None)
        }
    }
}

fn sampling_defaults(generation: &GenerationDefaults) -> SamplingParams {
    let usual = SamplingParams::default();
    SamplingParams {
        temperature: generation.temperature.unwrap_or(usual.temperature),
        top_p: generation.top_p.unwrap_or(usual.top_p),
        top_k: generation.top_k.unwrap_or(usual.top_k),
        min_p: generation.min_p.unwrap_or(usual.min_p),
        repetition_penalty: generation
            .repetition_penalty
            .unwrap_or(usual.repetition_penalty),
        ..usual
    }
}

fn start_transceiver(
    options: &ServeOptions,
    (address, device): (SocketAddr, Option<usize>),
    plan: &Plan,
    (model, inbox): (&mut dyn Model, &Inbox),
) -> Result<Option<Transceiver>, ServeError> {
    let Some(config) = &options.llm.transceiver else {
        return Ok(None);
    };
    let bind_host = address.ip().to_string();
    let mut params = TransceiverParams::new(config.clone(), plan.layout.clone(), &bind_host);
    params.advertise_host = reachable_host(address);
    params.instance = if options.instance.is_empty() {
        reachable(address)
    } else {
        options.instance.clone()
    };
    params.device = device;
    params.faults = FaultPlan::from_environment()?;
    let sink = inbox.handoff_sink();
    Ok(Some(Transceiver::lead(params, model, sink)?))
}

fn transport_facts(info: &TransceiverInfo) -> TransportFacts {
    TransportFacts {
        name: info.transport().to_owned(),
        reason: info.reason().to_owned(),
        endpoint: info.endpoint().to_owned(),
    }
}
