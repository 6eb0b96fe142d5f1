//! The two phases of a request and what follows from their failures (COMPAT.md §8.1).
//!
//! A context phase gives a ticket, a generation phase turns it into an answer. A ticket that a generation server may
//! have touched is void: the next attempt starts with a context phase of its own, under an id of its own.

use std::sync::Arc;

use baton_configs::wire::{KV_PREFETCH_HEADER, TIMELINE_HEADER};
use bytes::Bytes;
use hyper::header::{
    CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER,
    TRAILER, TRANSFER_ENCODING, UPGRADE,
};
use hyper::{Method, Response, StatusCode, http};
use tokio::time::Instant;

use crate::book::RequestBook;
use crate::context_answer::{self, ContextAnswer, Ticket};
use crate::error::{Failure, Fault, UpstreamFailure, WorkerError};
use crate::perf::Hop;
use crate::prefetch::{Lines, Prefetch, read_head};
use crate::proxy::Proxy;
use crate::reply::{self, Reply, ReplyBody};
use crate::request_body::{Api, ClientRequest};
use crate::retry::Retries;
use crate::upstream::{self, Answer, AnswerBody, Call};
use crate::workers::{Role, Worker};
use crate::{timeline, usage};

/// Headers that belong to one connection, or that the proxy's own framing replaces.
const NOT_RELAYED: [HeaderName; 6] = [
    CONNECTION,
    CONTENT_LENGTH,
    TRANSFER_ENCODING,
    TRAILER,
    UPGRADE,
    HeaderName::from_static("keep-alive"),
];
/// Bytes of a worker's error that are kept.
const ERROR_BYTES_MAX: usize = 1 << 20;

/// What the client gets.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// An answer that is known whole.
    Whole(Reply),
    /// A stream that has begun.
    Stream {
        /// Status and headers for the client.
        head: http::response::Parts,
        /// Its first piece.
        first: Bytes,
        /// What is to come.
        rest: AnswerBody,
    },
}

/// A context phase that is done.
#[derive(Debug)]
struct Handed {
    worker: Arc<Worker>,
    ticket: Ticket,
    timeline: Option<HeaderValue>,
    /// The KV's way to a generation server, where it began before the phase was done.
    prefetch: Option<Prefetch>,
}

enum Prefilled {
    Handed(Box<Handed>),
    Complete(Reply),
}

/// Why an attempt ended.
enum Stop {
    /// No further attempt can help.
    Final(Failure),
    /// A worker failed; another one of the role of `blamed` might do better.
    Upstream {
        failure: UpstreamFailure,
        blamed: Arc<Worker>,
    },
}

impl From<UpstreamFailure> for Stop {
    fn from(failure: UpstreamFailure) -> Self {
        let blamed = failure.worker.clone();
        Self::Upstream { failure, blamed }
    }
}

/// One request on its way.
pub(crate) struct Flow<'a> {
    pub(crate) proxy: &'a Proxy,
    pub(crate) api: Api,
    pub(crate) request: &'a ClientRequest<'a>,
    /// The client asked for a timeline.
    pub(crate) want_timeline: bool,
    /// What workers get as headers.
    pub(crate) headers: HeaderMap,
    pub(crate) retries: Retries,
    pub(crate) book: &'a mut RequestBook,
}

impl Flow<'_> {
    /// Both phases, as often as the budget allows.
    pub(crate) async fn run(mut self) -> Result<Outcome, Failure> {
        let mut held = None;
        loop {
            let (failure, blamed) = match self.attempt(&mut held).await {
                Ok(outcome) => return Ok(outcome),
                Err(Stop::Final(failure)) => return Err(failure),
                Err(Stop::Upstream { failure, blamed }) => (failure, blamed),
            };
            if !self.retries.allow(&failure, &blamed, &self.proxy.cluster) {
                return Err(failure.into());
            }
            self.proxy.metrics.role(blamed.role()).retry_requests.inc();
            tracing::debug!("trying another {} server: {failure}", blamed.role().name());
        }
    }

    /// Both phases once. `held` keeps a finished context phase that no generation server has touched.
    async fn attempt(&mut self, held: &mut Option<Box<Handed>>) -> Result<Outcome, Stop> {
        if self.request.whole_because.is_some() {
            return self.generation(None).await;
        }
        let handed = match held.take() {
            Some(handed) => handed,
            None => match self.context().await? {
                Prefilled::Handed(handed) => handed,
                Prefilled::Complete(reply) => return Ok(Outcome::Whole(reply)),
            },
        };
        let outcome = self.generation(Some(&handed)).await;
        if let Err(Stop::Upstream { failure, .. }) = &outcome
            && matches!(failure.fault, Fault::Unreachable(_))
        {
            *held = Some(handed);
        }
        outcome
    }

    /// The context phase: any of its attempts has an id of its own.
    async fn context(&self) -> Result<Prefilled, Stop> {
        let worker = self.choose(Role::Context, None)?;
        let id = self.proxy.ids.next();
        let started = Instant::now();
        let mut answer = self.call(&worker, self.request.context_body(id)).await?;
        let limit = self.proxy.limits.max_answer_bytes;
        let (mut head, body, prefetch) = if answer.head.headers.contains_key(KV_PREFETCH_HEADER) {
            self.early_answer(&worker, answer).await?
        } else {
            let body = answer.body.collect(limit).await;
            let body = body.map_err(|fault| self.failed(&worker, fault))?;
            (answer.head, body, None)
        };
        let read = context_answer::read(&body, self.request.conversation_id())
            .map_err(|reason| self.failed(&worker, Fault::BadAnswer(reason)))?;
        let elapsed = started.elapsed();
        self.proxy
            .metrics
            .role(Role::Context)
            .completed(Some(elapsed), elapsed);
        let timeline = head.headers.remove(TIMELINE_HEADER);
        match read {
            ContextAnswer::Ticket(ticket) => Ok(Prefilled::Handed(Box::new(Handed {
                worker,
                ticket,
                timeline,
                prefetch,
            }))),
            ContextAnswer::Complete => {
                let reply = self.complete(&body, timeline);
                let reply =
                    reply.map_err(|reason| self.failed(&worker, Fault::BadAnswer(reason)))?;
                Ok(Prefilled::Complete(reply))
            }
        }
    }

    /// An answer that told of its KV before it was there: has a generation server fetch, and waits for the answer.
    async fn early_answer(
        &self,
        worker: &Arc<Worker>,
        answer: Answer,
    ) -> Result<(http::response::Parts, Bytes, Option<Prefetch>), Stop> {
        let failed = |fault| self.failed(worker, fault);
        let mut lines = Lines::new(answer.body, self.proxy.limits.max_answer_bytes);
        let line = lines.next("kv's announcement").await.map_err(failed)?;
        let prefetch = self.choose(Role::Generation, Some(worker)).ok().map(|to| {
            self.proxy.metrics.kv_prefetches.inc();
            Prefetch::begin(to, self.headers.clone(), line, &self.proxy.timeouts)
        });
        let head = lines.next("rest of the answer").await.map_err(failed)?;
        let head = read_head(&head).map_err(failed)?;
        let body = lines.rest().await.map_err(failed)?;
        if head.status.is_success() {
            Ok((head, body, prefetch))
        } else {
            Err(failed(refusal(&head, body)).into())
        }
    }

    /// The client's answer when the first token was the last.
    fn complete(&self, body: &[u8], timeline: Option<HeaderValue>) -> Result<Reply, String> {
        let mut reply = if self.request.stream {
            let stream =
                context_answer::complete_stream(self.api, body, self.request.include_usage)?;
            reply::with_type(StatusCode::OK, "text/event-stream; charset=utf-8", stream)
        } else {
            reply::json(StatusCode::OK, context_answer::complete_whole(body)?)
        };
        if let Some(timeline) = timeline {
            reply.headers_mut().insert(TIMELINE_HEADER, timeline);
        }
        Ok(reply)
    }

    /// The generation phase, or, without a ticket, all of it on one generation server.
    async fn generation(&mut self, handed: Option<&Handed>) -> Result<Outcome, Stop> {
        let worker = match handed.and_then(|handed| self.fetching(handed)) {
            Some(worker) => worker,
            None => self.choose(Role::Generation, handed.map(|handed| &handed.worker))?,
        };
        let body = match handed {
            Some(handed) => self.request.generation_body(&handed.ticket),
            None => self.request.whole_body(),
        };
        self.book.sent();
        let outcome = async {
            let answer = self.call(&worker, body).await?;
            if self.request.stream && is_event_stream(&answer.head.headers) {
                self.open_stream(&worker, answer, handed).await
            } else {
                self.collect_answer(&worker, answer, handed).await
            }
        }
        .await;
        match (outcome, handed) {
            (Ok(outcome), Some(handed)) => {
                self.proxy.perf.record(&Hop {
                    ctx_server: &handed.worker,
                    gen_server: &worker,
                    ctx_request_id: handed.ticket.ctx_request_id,
                    since_arrival: self.book.elapsed(),
                });
                Ok(outcome)
            }
            (Err(failure), Some(handed)) if is_handoff_failure(&failure) => {
                handed.worker.suspect();
                Err(Stop::Upstream {
                    failure,
                    blamed: handed.worker.clone(),
                })
            }
            (outcome, _) => outcome.map_err(Stop::from),
        }
    }

    /// Waits for the first piece: until it is here, the request can still be tried elsewhere.
    async fn open_stream(
        &self,
        worker: &Arc<Worker>,
        mut answer: Answer,
        handed: Option<&Handed>,
    ) -> Result<Outcome, UpstreamFailure> {
        let first = match answer.body.next("first piece of the stream").await {
            Ok(Some(first)) => first,
            Ok(None) => {
                let reason = "the stream ended before its first piece".to_owned();
                return Err(self.failed(worker, Fault::Lost(reason)));
            }
            Err(fault) => return Err(self.failed(worker, fault)),
        };
        let mut head = relayed_head(answer.head);
        if let Some(timeline) = handed.and_then(|handed| handed.timeline.clone()) {
            head.headers.insert(TIMELINE_HEADER, timeline);
        }
        Ok(Outcome::Stream {
            head,
            first,
            rest: answer.body,
        })
    }

    async fn collect_answer(
        &self,
        worker: &Arc<Worker>,
        mut answer: Answer,
        handed: Option<&Handed>,
    ) -> Result<Outcome, UpstreamFailure> {
        let limit = self.proxy.limits.max_answer_bytes;
        let body = answer.body.collect(limit).await;
        let mut body = body.map_err(|fault| self.failed(worker, fault))?;
        // What answers a request for a stream without being one is not ours to interpret.
        if !self.request.stream {
            let usage = handed.and_then(|handed| handed.ticket.usage.as_ref());
            body = usage::rewrite(&body, usage)
                .map_err(|reason| self.failed(worker, Fault::BadAnswer(reason)))?;
        }
        let elapsed = self.book.sent_at().elapsed();
        self.proxy
            .metrics
            .role(Role::Generation)
            .completed(None, elapsed);
        let mut head = relayed_head(answer.head);
        if self.want_timeline
            && let Some(timeline) = self.merged_timeline(&head.headers, handed)
        {
            head.headers.insert(TIMELINE_HEADER, timeline);
        }
        Ok(Outcome::Whole(Response::from_parts(
            head,
            ReplyBody::Whole(body.into()),
        )))
    }

    fn merged_timeline(
        &self,
        generation: &HeaderMap,
        handed: Option<&Handed>,
    ) -> Option<HeaderValue> {
        let mut context = HeaderMap::new();
        context.insert(TIMELINE_HEADER, handed?.timeline.clone()?);
        let before = self.book.sent_at() - self.book.arrived();
        let before_us = u64::try_from(before.as_micros()).unwrap_or(u64::MAX);
        let merged = timeline::merge(
            &timeline::of(&context)?,
            timeline::of(generation)?,
            before_us,
        );
        timeline::header(&merged)
    }

    /// The server that fetches the KV already, if it may be asked.
    fn fetching(&self, handed: &Handed) -> Option<Arc<Worker>> {
        let worker = handed.prefetch.as_ref()?.worker();
        let excluded = self.retries.excluded();
        let is_excluded = excluded.iter().any(|other| Arc::ptr_eq(other, worker));
        (worker.is_up() && !is_excluded).then(|| Arc::clone(worker))
    }

    /// A server of `role` that has not failed this request; not the one that wrote the ticket if there is another.
    fn choose(&self, role: Role, context: Option<&Arc<Worker>>) -> Result<Arc<Worker>, Stop> {
        let group = self.proxy.cluster.group(role);
        let excluded = self.retries.excluded();
        let apart = context.and_then(|context| {
            let mut excluded = excluded.to_vec();
            excluded.push(context.clone());
            group.choose(&excluded)
        });
        apart.or_else(|| group.choose(excluded)).ok_or_else(|| {
            let reason = self.proxy.readiness().err();
            let reason = reason.unwrap_or_else(|| format!("no other {} server is up", role.name()));
            Stop::Final(Failure::Unavailable(format!("not ready: {reason}")))
        })
    }

    /// One upstream call. An answer that is not a success becomes a failure with the worker's own words.
    async fn call(&self, worker: &Arc<Worker>, body: Bytes) -> Result<Answer, UpstreamFailure> {
        let timeouts = &self.proxy.timeouts;
        let mut headers = self.headers.clone();
        if worker.role() == Role::Context && self.proxy.prefetches_kv {
            headers.insert(KV_PREFETCH_HEADER, HeaderValue::from_static("1"));
        }
        let call = Call {
            method: Method::POST,
            path: self.api.path(),
            headers,
            body,
            connect: timeouts.connect,
            total: timeouts.request,
            fresh: false,
        };
        let role = self.proxy.metrics.role(worker.role());
        role.total_requests.inc();
        let answer = upstream::call(worker, &call).await;
        let mut answer = answer.inspect_err(|_| {
            role.error_requests.inc();
        })?;
        let status = answer.head.status;
        if status.is_success() {
            return Ok(answer);
        }
        let fault = match answer.body.collect(ERROR_BYTES_MAX).await {
            Err(fault) => fault,
            Ok(body) => refusal(&answer.head, body),
        };
        Err(self.failed(worker, fault))
    }

    fn failed(&self, worker: &Arc<Worker>, fault: Fault) -> UpstreamFailure {
        self.proxy.metrics.role(worker.role()).error_requests.inc();
        let is_clients = matches!(&fault, Fault::Status(error) if error.status.is_client_error());
        if !is_clients {
            worker.suspect();
        }
        UpstreamFailure {
            worker: worker.clone(),
            fault,
        }
    }
}

/// What an answer that is no success means.
fn refusal(head: &http::response::Parts, body: Bytes) -> Fault {
    let status = head.status;
    if !status.is_client_error() && !status.is_server_error() {
        return Fault::BadAnswer(format!("status {}", status.as_u16()));
    }
    let header = |name: HeaderName| head.headers.get(name).cloned();
    Fault::Status(Box::new(WorkerError {
        status,
        content_type: header(CONTENT_TYPE),
        retry_after: header(RETRY_AFTER),
        body,
    }))
}

/// A generation server answers 502 when what failed is behind it: the KV that it was to fetch.
fn is_handoff_failure(failure: &UpstreamFailure) -> bool {
    matches!(&failure.fault, Fault::Status(error) if error.status == StatusCode::BAD_GATEWAY)
}

fn is_event_stream(headers: &HeaderMap) -> bool {
    headers
        .get(CONTENT_TYPE)
        .is_some_and(|value| value.as_bytes().starts_with(b"text/event-stream"))
}

fn relayed_head(mut head: http::response::Parts) -> http::response::Parts {
    for name in NOT_RELAYED {
        head.headers.remove(name);
    }
    head.version = http::Version::HTTP_11;
    head.extensions.clear();
    head
}
