//! From a request to its answer: read, tokenize, submit, write; whole or as a stream.

use std::sync::Arc;
use std::time::Instant;

use baton_configs::wire::{KV_PREFETCH_HEADER, TIMELINE_REQUEST_HEADER};
use bytes::Bytes;
use hyper::Response;
use hyper::header::HeaderMap;

use crate::backend::TokenId;
use crate::server::body::BodyPlace;
use crate::server::compose::Composer;
use crate::server::disagg::Phase;
use crate::server::error::ApiError;
use crate::server::prompt::{PromptInput, to_tokens};
use crate::server::render::{Header, Shape};
use crate::server::reply::ReplyBody;
use crate::server::run::{Order, Runs};
use crate::server::sampling::Common;
use crate::server::service::{Record, Service};
use crate::server::{chat, completion, stream, whole};

/// Requests up to this size are read where they arrive; longer ones would hold up other connections meanwhile.
const INLINE_BYTES_MAX: usize = 4096;

/// Which of the two APIs a request speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Api {
    /// `/v1/completions`.
    Completions,
    /// `/v1/chat/completions`.
    Chat,
}

impl Api {
    /// As metrics name it.
    fn name(self) -> &'static str {
        match self {
            Self::Completions => "completions",
            Self::Chat => "chat_completions",
        }
    }
}

/// A request that was read and tokenized; everything about it is known to be servable but the engine's own word.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) common: Common,
    pub(super) shape: Shape,
    /// One a prompt.
    pub(super) prompts: Vec<Vec<TokenId>>,
    /// What stands before each prompt's answers; empty where nothing is echoed.
    pub(super) echoes: Vec<String>,
    /// Whether the prompt's log-probabilities are part of the answer.
    pub(super) echo_logprobs: bool,
}

impl Job {
    /// With its KV told of early, where that is wanted and it is a context-only request of one answer.
    fn early(mut self, wanted: bool) -> Self {
        let one = self.common.best_of == 1;
        if let Phase::Context { early, .. } = &mut self.common.phase {
            *early = wanted && one;
        }
        self
    }
}

/// A running request.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) service: Arc<Service>,
    pub(super) composer: Composer,
    pub(super) runs: Runs,
    pub(super) record: Record,
    pub(super) want_timeline: bool,
}

/// Answers a generation request.
pub(crate) async fn generate(
    service: &Arc<Service>,
    api: Api,
    headers: &HeaderMap,
    body: (Bytes, BodyPlace),
    arrived: Instant,
) -> Result<Response<ReplyBody>, ApiError> {
    let mut record = Record::open(service, api.name(), arrived);
    let started = match read_job(service, api, body).await {
        Ok(job) => start(
            service,
            job.early(wants(headers, KV_PREFETCH_HEADER)),
            arrived,
        ),
        Err(error) => Err(error),
    };
    let (composer, runs) = match started {
        Ok(started) => started,
        Err(error) => {
            record.failed();
            return Err(error);
        }
    };
    let answer = Box::new(Answer {
        service: Arc::clone(service),
        composer,
        runs,
        record,
        want_timeline: wants(headers, TIMELINE_REQUEST_HEADER),
    });
    if answer.composer.is_stream() {
        stream::respond(answer).await
    } else {
        whole::respond(answer).await
    }
}

fn start(service: &Arc<Service>, job: Job, arrived: Instant) -> Result<(Composer, Runs), ApiError> {
    let runs = Runs::start(&Order {
        engine: &*service.engine,
        tools: &service.tools,
        common: &job.common,
        prompts: &job.prompts,
        prompt_logprobs: job.echo_logprobs,
        max_seq_len: service.limits.max_seq_len,
        arrived,
    })?;
    let header = Header::new(job.shape.clone(), &service.facts.model);
    Ok((Composer::new(header, job), runs))
}

/// The body's place is free again when the job, which is much smaller, has been made of it.
async fn read_job(
    service: &Arc<Service>,
    api: Api,
    (body, place): (Bytes, BodyPlace),
) -> Result<Job, ApiError> {
    let inline = body.len() <= INLINE_BYTES_MAX;
    let service = Arc::clone(service);
    let read = move || {
        let job = match api {
            Api::Completions => completion_job(&service, &body),
            Api::Chat => chat_job(&service, &body),
        };
        drop((body, place));
        job
    };
    if inline {
        return read();
    }
    tokio::task::spawn_blocking(read)
        .await
        .map_err(|error| ApiError::internal(format!("reading the request failed: {error}")))?
}

fn completion_job(service: &Service, body: &[u8]) -> Result<Job, ApiError> {
    let request = completion::read(body, &service.limits)?;
    let prompts = to_tokens(
        service,
        &request.common,
        request.add_special_tokens,
        request.prompts,
        "prompt",
    )?;
    let echo = |prompt: &Vec<TokenId>| match request.common.echo {
        true => service.tools.echo(prompt),
        false => String::new(),
    };
    Ok(Job {
        echoes: prompts.iter().map(echo).collect(),
        prompts,
        shape: Shape::Completion,
        echo_logprobs: request.common.echo && request.common.sampling.logprobs.is_some(),
        common: request.common,
    })
}

fn chat_job(service: &Service, body: &[u8]) -> Result<Job, ApiError> {
    let request = chat::read(body, &service.limits)?;
    let (input, field) = match request.prompt_token_ids {
        Some(tokens) => (PromptInput::Tokens(tokens), "prompt_token_ids"),
        None => {
            let text = service.tools.render(&request.conversation)?;
            (PromptInput::Text(text), "messages")
        }
    };
    let prompts = to_tokens(
        service,
        &request.common,
        request.add_special_tokens,
        vec![input],
        field,
    )?;
    let continued = request.conversation.continued().unwrap_or_default();
    let echo = if request.common.echo { continued } else { "" };
    Ok(Job {
        prompts,
        shape: Shape::Chat {
            role: request.conversation.role().to_owned(),
        },
        echoes: vec![echo.to_owned()],
        echo_logprobs: false,
        common: request.common,
    })
}

/// Whether a header says `1`.
fn wants(headers: &HeaderMap, name: &str) -> bool {
    headers.get(name).is_some_and(|value| value == "1")
}
