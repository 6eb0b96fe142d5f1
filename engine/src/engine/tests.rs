//! The engine against a fake model whose answers depend on every token it reads from its own pages.

mod answers;
mod early;
mod fakes;
mod hands;
mod life;
mod overlap;
mod random;

use std::sync::mpsc::Receiver;
use std::task::{Context, Poll, Waker};

use super::inbox::Command;
use super::*;
use crate::handoff::HandoffTicket;
use crate::metrics::EngineStats;
use crate::request::{
    Event, FinishReason, GenerateRequest, RequestCosts, RequestFailure, RequestKind,
    SamplingParams, TokenLogprobs,
};

use fakes::{FakeHandoff, FakeModel, VOCAB, Wire, fill_pages, logits_after};

const EOS: TokenId = 0;

fn small_config() -> EngineConfig {
    EngineConfig {
        max_batch_size: 4,
        max_num_tokens: 16,
        max_seq_len: 64,
        tokens_per_block: 4,
        block_count: 32,
        kv_dtype: KvDtype::F32,
        eos_token_ids: vec![EOS],
        event_buffer_max_size: 1000,
        ..EngineConfig::default()
    }
}

/// An engine without its thread: the test is the loop.
struct Rig {
    core: Core,
    commands: Receiver<Command>,
    handle: EngineHandle,
    wire: Wire,
    sink: crate::handoff::HandoffSink,
}

impl Rig {
    fn new(config: EngineConfig) -> Self {
        Self::with_capacity(config, 100)
    }

    fn with_capacity(config: EngineConfig, capacity: usize) -> Self {
        Self::of(FakeModel::new(), config, capacity)
    }

    fn of(model: FakeModel, config: EngineConfig, capacity: usize) -> Self {
        let mut model: Box<dyn Model> = Box::new(model);
        model
            .allocate_pages(page_shape(model.as_ref(), &config), config.block_count)
            .expect("memory");
        let wire = Wire::default();
        let handoff: Box<dyn Handoff> = Box::new(FakeHandoff(wire.clone()));
        let inbox = Inbox::new(capacity);
        let sink = inbox.handoff_sink();
        let limits = EngineLimits::new(&config, VOCAB, true);
        let (shared, commands) = Shared::new(inbox, limits, &config);
        let shared = Arc::new(shared);
        Self {
            core: Core::new(model, Some(handoff), config, Arc::clone(&shared)),
            commands,
            handle: EngineHandle::new(shared),
            wire,
            sink,
        }
    }

    fn submit(&self, request: GenerateRequest) -> Reader {
        Reader::new(self.handle.submit(request).expect("room in the queue"))
    }

    fn obey(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            thread::obey(&mut self.core, command, &mut None);
        }
    }

    /// One turn of the loop. False when there was nothing to do.
    fn step(&mut self) -> bool {
        self.obey();
        let progress = self.core.step().expect("the fake device works");
        if !progress {
            self.core.check_books();
            self.core.publish_stats();
        }
        progress
    }

    /// Turns until nothing can be done.
    fn run(&mut self) {
        for _ in 0..100_000 {
            if !self.step() {
                return;
            }
        }
        panic!("the engine makes steps without end");
    }

    fn stats(&mut self) -> EngineStats {
        self.obey();
        self.core.publish_stats();
        self.handle.stats()
    }

    /// Asserts that nobody holds anything.
    fn assert_clean(&mut self) {
        let stats = self.stats();
        assert_eq!(stats.blocks_used, 0, "{stats:?}");
        assert_eq!(stats.blocks_quarantined, 0, "{stats:?}");
        assert_eq!(stats.leases, 0, "{stats:?}");
        assert_eq!(
            stats.requests_waiting + stats.requests_running + stats.requests_fetching,
            0
        );
        assert_eq!(self.handle.queued(), 0);
        assert_eq!(
            stats.requests_total,
            stats.requests_finished_total
                + stats.requests_failed_total
                + stats.requests_cancelled_total
        );
        assert!(self.core.clients.is_empty());
    }
}

/// A client's side of a request.
struct Reader {
    stream: Option<RequestStream>,
    answer: Answer,
}

/// What came of a request so far.
#[derive(Debug, Default)]
struct Answer {
    tokens: Vec<TokenId>,
    logprobs: Vec<Option<TokenLogprobs>>,
    prompt_logprobs: Option<Vec<TokenLogprobs>>,
    /// The ticket of a lease that grows.
    lease: Option<HandoffTicket>,
    end: Option<End>,
}

#[derive(Debug, Clone, PartialEq)]
enum End {
    Finished(FinishReason, RequestCosts, Option<HandoffTicket>),
    Failed(RequestFailure),
}

impl Answer {
    fn take(&mut self, event: Event) {
        assert!(self.end.is_none(), "an event came after the end: {event:?}");
        match event {
            Event::LeaseOpened(ticket) => {
                assert!(self.tokens.is_empty() && self.lease.is_none());
                self.lease = Some(ticket);
            }
            Event::PromptLogprobs(list) => {
                assert!(self.tokens.is_empty() && self.prompt_logprobs.is_none());
                self.prompt_logprobs = Some(list);
            }
            Event::Token { token, logprobs } => {
                self.tokens.push(token);
                self.logprobs.push(logprobs);
            }
            Event::Finished {
                reason,
                costs,
                ticket,
            } => self.end = Some(End::Finished(reason, costs, ticket)),
            Event::Failed(failure) => self.end = Some(End::Failed(failure)),
        }
    }

    fn reason(&self) -> FinishReason {
        match &self.end {
            Some(End::Finished(reason, ..)) => *reason,
            other => panic!("no finish reason: {other:?}"),
        }
    }

    fn costs(&self) -> &RequestCosts {
        match &self.end {
            Some(End::Finished(_, costs, _)) => costs,
            other => panic!("no costs: {other:?}"),
        }
    }

    fn ticket(&self) -> Option<&HandoffTicket> {
        match &self.end {
            Some(End::Finished(_, _, ticket)) => ticket.as_ref(),
            other => panic!("no end: {other:?}"),
        }
    }

    fn failure(&self) -> &RequestFailure {
        match &self.end {
            Some(End::Failed(failure)) => failure,
            other => panic!("no failure: {other:?}"),
        }
    }
}

impl Reader {
    fn new(stream: RequestStream) -> Self {
        Self {
            stream: Some(stream),
            answer: Answer::default(),
        }
    }

    /// What has come so far, without waiting.
    fn read(&mut self) -> &Answer {
        if let Some(stream) = &mut self.stream {
            let mut context = Context::from_waker(Waker::noop());
            while let Poll::Ready(Some(event)) = stream.poll_next(&mut context) {
                self.answer.take(event);
            }
        }
        &self.answer
    }

    /// The client goes away.
    fn drop_stream(&mut self) {
        self.stream = None;
    }
}

fn request(prompt: &[TokenId], max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        prompt: prompt.to_vec(),
        sampling: SamplingParams {
            temperature: 0.0,
            max_tokens,
            ..SamplingParams::default()
        },
        kind: RequestKind::Aggregated,
        cache_salt: None,
    }
}

/// The answer by its definition: one token after the other from all tokens before, no pages, no batches.
fn closed_form(request: &GenerateRequest, max_len: usize) -> (Vec<TokenId>, FinishReason) {
    let mut tokens = request.prompt.clone();
    let mut sampler = crate::sampler::Sampler::default();
    loop {
        let answer = &tokens[request.prompt.len()..];
        let logits = logits_after(&tokens);
        let token = sampler
            .sample(&crate::sampler::SampleInput {
                params: &request.sampling,
                eos: &[EOS],
                prompt: &request.prompt,
                answer,
                logits: &logits,
            })
            .expect("finite")
            .token;
        tokens.push(token);
        let answer = tokens[request.prompt.len()..].to_vec();
        if token == EOS && !request.sampling.ignore_eos {
            return (answer, FinishReason::Eos);
        }
        if request.sampling.stop_token_ids.contains(&token) {
            return (answer, FinishReason::StopToken(token));
        }
        if answer.len() == request.sampling.max_tokens as usize || tokens.len() >= max_len {
            return (answer, FinishReason::Length);
        }
    }
}

/// Asserts that what was told of the answer's tokens is right, of all but those that another server chose.
fn assert_logprobs(request: &GenerateRequest, answer: &Answer) {
    let mut tokens = request.prompt.clone();
    for (index, (&token, told)) in answer.tokens.iter().zip(&answer.logprobs).enumerate() {
        let expected = request.sampling.logprobs.map(|top| {
            crate::sampler::prompt_logprobs(&logits_after(&tokens), token, top).expect("finite")
        });
        let forced = index == 0 && matches!(request.kind, RequestKind::GenerationOnly(_));
        assert!(*told == expected || forced && told.is_none(), "{request:?}");
        tokens.push(token);
    }
}

/// A prompt whose answer does not end by itself soon, so that tests can count tokens.
fn long_running(salt: TokenId) -> Vec<TokenId> {
    (0..)
        .map(|n| vec![salt, 1 + n % 40, 1 + n / 40, 5, 6])
        .find(|prompt| closed_form(&request(prompt, 40), 64).1 == FinishReason::Length)
        .expect("some prompt does")
}
