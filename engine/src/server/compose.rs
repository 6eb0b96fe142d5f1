//! Pieces to choices: which answer a piece belongs to, what is echoed before it, its log-probabilities.

use crate::backend::TokenId;
use crate::handoff::HandoffTicket;
use crate::server::answer::Piece;
use crate::server::disagg::{Phase, context_answer};
use crate::server::generate::Job;
use crate::server::logprobs::{ChatLogprobs, CompletionLogprobs, Logprobs};
use crate::server::prefetch::Prefetch;
use crate::server::render::{Choice, Header, Shape};
use crate::server::sampling::StreamUsage;
use crate::server::text::TextTools;

/// Turns the pieces of one request into choices.
#[derive(Debug)]
pub(super) struct Composer {
    pub(super) header: Header,
    job: Job,
    /// Per answer, characters of the tokens whose log-probabilities were written.
    offsets: Vec<usize>,
    /// Per answer, whether its beginning was written.
    opened: Vec<bool>,
}

impl Composer {
    /// For a request that has just been submitted.
    pub(super) fn new(header: Header, job: Job) -> Self {
        let answers = job.prompts.len() * job.common.best_of as usize;
        Self {
            header,
            job,
            offsets: vec![0; answers],
            opened: vec![false; answers],
        }
    }

    /// Whether the client asked for a stream.
    pub(super) fn is_stream(&self) -> bool {
        self.job.common.stream.is_some()
    }

    /// How a stream reports usage.
    pub(super) fn stream_usage(&self) -> StreamUsage {
        self.job.common.stream.unwrap_or_default()
    }

    /// Answers wanted, and tried, for each prompt.
    pub(super) fn wanted_and_tried(&self) -> (usize, usize) {
        (self.job.common.n as usize, self.job.common.best_of as usize)
    }

    /// A context-only answer repeats its prompt, which the generation server needs.
    pub(super) fn returned_prompt(&self) -> Option<&[TokenId]> {
        match self.job.common.phase {
            Phase::Context { .. } => self.job.prompts.first().map(Vec::as_slice),
            Phase::Whole | Phase::Generation { .. } => None,
        }
    }

    /// The lease that fed this request, or that it left behind.
    pub(super) fn ctx_request_id(&self) -> Option<u64> {
        match &self.job.common.phase {
            Phase::Generation { ticket, .. } => Some(ticket.ctx_request_id),
            Phase::Whole | Phase::Context { .. } => None,
        }
    }

    /// What a generation server is to be asked, so that it fetches the KV of a prompt that is still being read.
    pub(super) fn prefetch(&self, ticket: HandoffTicket) -> Prefetch<'_> {
        Prefetch {
            prompt_token_ids: self.returned_prompt().unwrap_or_default(),
            cache_salt: self.job.common.cache_salt.as_deref(),
            disaggregated_params: context_answer(Some(ticket), None, &[]),
        }
    }

    /// Whether this is the answer's first piece; true once.
    pub(super) fn open(&mut self, run: usize) -> bool {
        !std::mem::replace(&mut self.opened[run], true)
    }

    /// What stands before an answer; taken out by the one who writes it.
    pub(super) fn echo(&self, run: usize) -> &str {
        &self.job.echoes[run / self.job.common.best_of as usize]
    }

    /// A piece as a choice under an index of the client's.
    pub(super) fn choice(
        &mut self,
        tools: &TextTools,
        run: usize,
        index: usize,
        mut piece: Piece,
    ) -> Choice {
        let logprobs = self.logprobs(tools, run, &mut piece);
        let disaggregated_params = match (&self.job.common.phase, &mut piece.end) {
            (
                Phase::Context {
                    disagg_request_id, ..
                },
                Some(end),
            ) => {
                let ticket = end.ticket.take();
                Some(context_answer(ticket, *disagg_request_id, &piece.tokens))
            }
            _ => None,
        };
        let (finish, stop_reason) = match piece.end {
            Some(end) => (Some(end.finish), end.stop_reason),
            None => (None, None),
        };
        Choice {
            index,
            text: piece.text,
            token_ids: piece.tokens,
            logprobs,
            finish,
            stop_reason,
            disaggregated_params,
        }
    }

    fn logprobs(&mut self, tools: &TextTools, run: usize, piece: &mut Piece) -> Option<Logprobs> {
        self.job.common.sampling.logprobs?;
        if matches!(self.header.shape, Shape::Chat { .. }) {
            return Some(Logprobs::Chat(ChatLogprobs::new(tools, &piece.logprobs)));
        }
        let offset = &mut self.offsets[run];
        let mut written = CompletionLogprobs::default();
        if let Some(prompt_logprobs) = piece.prompt_logprobs.take() {
            let prompt = &self.job.prompts[run / self.job.common.best_of as usize];
            if let Some(first) = prompt.first() {
                written.push_first(tools, *first, offset);
            }
            for entry in &prompt_logprobs {
                written.push(tools, entry, offset);
            }
        }
        for entry in &piece.logprobs {
            written.push(tools, entry, offset);
        }
        Some(Logprobs::Completion(written))
    }
}
