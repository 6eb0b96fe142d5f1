//! The engine without a server around it, for measurements: model, KV pool and thread. No socket, no tokenizer, no hand-off.

use std::sync::atomic::AtomicBool;

use super::load::QUEUE_MAX;
use super::plan::Plan;
use super::progress::Progress;
use super::{ServeError, ServeOptions, ranks};
use crate::engine::{Engine, EngineHandle, EngineThread, Inbox};
use crate::model::load::LoadedModel;
use crate::parallel::Led;
use crate::server::app::App;

/// A running engine that only its handle reaches.
#[derive(Debug)]
pub struct Offline {
    /// The way to it.
    pub engine: EngineHandle,
    /// Its thread, to be joined after [`EngineHandle::shutdown`].
    pub thread: EngineThread,
    /// The model's name.
    pub model: String,
    /// What it computes on.
    pub backend: String,
    /// Tokens of its vocabulary.
    pub vocab: u32,
}

/// Loads a model and starts an engine, as [`super::serve`] does, and nothing else. Blocks the calling thread, which must not
/// be that of an async runtime. Answers end at the end-of-sequence tokens that the model's own configuration names.
///
/// # Errors
/// As [`super::serve`] before it serves.
pub fn offline(options: &ServeOptions, stop: &AtomicBool) -> Result<Offline, ServeError> {
    let progress = Progress::new(App::new(), &options.model);
    let Led { loaded, rooms } = ranks::load(options, &progress, stop)?;
    progress.stage("making the kv pool");
    let LoadedModel {
        model,
        tokens,
        name,
        ..
    } = loaded;
    let plan = Plan::new(&options.llm, model.as_ref(), tokens.eos_ids, &rooms)?;
    let backend = model.backend_description();
    let vocab = u32::try_from(model.shape().vocab).unwrap_or(u32::MAX);
    let (engine, thread) = Engine::start(model, None, plan.engine, Inbox::new(QUEUE_MAX))?;
    Ok(Offline {
        engine,
        thread,
        model: name,
        backend,
        vocab,
    })
}
