//! KV on its way before its prompt is read: what a context server tells the proxy early, and what a generation server is
//! asked then (`baton_configs::wire::KV_PREFETCH_HEADER`).

use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;

use baton_configs::wire::{AnswerHead, DisaggregatedParams, KV_PREFETCH_HEADER};
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::Response;
use hyper::header::{CONTENT_LENGTH, HeaderValue};
use serde::Serialize;

use crate::backend::TokenId;
use crate::handoff::HandoffTicket;
use crate::request::{
    Event, FinishReason, GenerateRequest, RequestFailure, RequestKind, SamplingParams,
};
use crate::server::body::BodyPlace;
use crate::server::disagg::prefetch_ticket;
use crate::server::error::ApiError;
use crate::server::fields::Fields;
use crate::server::generate::Answer;
use crate::server::reply::{Next, ReplyBody, json, lines};
use crate::server::sampling::check_vocab;
use crate::server::service::Service;
use crate::server::whole;

/// The body of a request to fetch.
#[derive(Debug, Serialize)]
pub(super) struct Prefetch<'a> {
    pub(super) prompt_token_ids: &'a [TokenId],
    pub(super) cache_salt: Option<&'a str>,
    pub(super) disaggregated_params: DisaggregatedParams,
}

/// What became of a request to fetch.
#[derive(Debug, Serialize)]
struct Prefetched {
    /// Whether the generation-only request has come and goes on with it.
    taken_over: bool,
}

/// An answer of which only the lease is known.
struct Early {
    answer: Box<Answer>,
    /// The line that tells of it.
    line: Option<Bytes>,
}

/// Sends the ticket of a lease that grows, then the answer when it is there.
pub(super) fn respond_early(
    answer: Box<Answer>,
    ticket: HandoffTicket,
) -> Result<Response<ReplyBody>, ApiError> {
    let line = line(&answer.composer.prefetch(ticket))?;
    let line = Some(line.into());
    let mut response = lines(Box::new(Early { answer, line }), step);
    let headers = response.headers_mut();
    headers.insert(KV_PREFETCH_HEADER, HeaderValue::from_static("1"));
    Ok(response)
}

fn step(mut state: Box<Early>) -> Pin<Box<dyn Future<Output = Next<Box<Early>>> + Send>> {
    Box::pin(async move {
        if let Some(line) = state.line.take() {
            return Next::Send(line, state);
        }
        let first = state.answer.runs.next().await;
        let response = whole::finish(state.answer, first).await;
        let response = response.unwrap_or_else(|error| error.response());
        match in_lines(response).await {
            Ok(bytes) => Next::Last(bytes),
            Err(error) => {
                tracing::error!("an answer could not be written: {}", error.message);
                Next::Cut(Bytes::new())
            }
        }
    })
}

/// An answer as a line that has its head, and its body.
async fn in_lines(response: Response<ReplyBody>) -> Result<Bytes, ApiError> {
    let (head, body) = response.into_parts();
    let named = head
        .headers
        .iter()
        .filter(|(name, _)| **name != CONTENT_LENGTH);
    let text = |value: &HeaderValue| value.to_str().unwrap_or_default().to_owned();
    let headers: BTreeMap<_, _> = named
        .map(|(name, value)| (name.as_str().to_owned(), text(value)))
        .collect();
    let mut out = line(&AnswerHead {
        status: head.status.as_u16(),
        headers,
    })?;
    let body = body.collect().await;
    let body = body.map_err(|cut| ApiError::internal(cut.to_string()))?;
    out.extend_from_slice(&body.to_bytes());
    Ok(out.into())
}

fn line<T: Serialize>(value: &T) -> Result<Vec<u8>, ApiError> {
    let mut line = serde_json::to_vec(value)
        .map_err(|error| ApiError::internal(format!("writing the answer failed: {error}")))?;
    line.push(b'\n');
    Ok(line)
}

/// Fetches KV for a request that is still to come, until it has come. Whoever goes away before ends the fetch.
pub(crate) async fn prefetch(
    service: &Arc<Service>,
    (body, place): (Bytes, BodyPlace),
) -> Result<Response<ReplyBody>, ApiError> {
    let request = read(service, &body)?;
    drop((body, place));
    let mut events = service.engine.submit(request)?;
    loop {
        match poll_fn(|cx| events.poll_next(cx)).await {
            Some(Event::Finished { reason, .. }) => {
                return Ok(json(&Prefetched {
                    taken_over: reason == FinishReason::NotFinished,
                }));
            }
            Some(Event::Failed(failure)) => return Err(failure.into()),
            None => {
                let reason = "the engine ended before the fetch did".to_owned();
                return Err(RequestFailure::Engine(reason).into());
            }
            Some(Event::LeaseOpened(_) | Event::PromptLogprobs(_) | Event::Token { .. }) => {}
        }
    }
}

fn read(service: &Service, body: &[u8]) -> Result<GenerateRequest, ApiError> {
    let mut fields = Fields::read(body)?;
    let missing = |name| ApiError::field(name, "missing");
    let prompt: Vec<TokenId> = fields
        .take("prompt_token_ids", "a list of token ids")?
        .ok_or_else(|| missing("prompt_token_ids"))?;
    check_vocab("prompt_token_ids", &prompt, service.limits.vocab)?;
    let cache_salt = fields.text("cache_salt")?;
    let params: DisaggregatedParams = fields
        .take("disaggregated_params", "a context server's")?
        .ok_or_else(|| missing("disaggregated_params"))?;
    fields.finish()?;
    Ok(GenerateRequest {
        prompt,
        sampling: SamplingParams::default(),
        kind: RequestKind::Prefetch(prefetch_ticket(params)?),
        cache_salt,
    })
}
