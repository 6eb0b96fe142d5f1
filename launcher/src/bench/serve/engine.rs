//! The engine as a target: requests go to its own handle, without HTTP and text.

use std::time::Duration;

use baton_engine::engine::{EngineHandle, RequestStream};
use baton_engine::request::{Event, GenerateRequest, RequestKind, SamplingParams};
use tokio::time::{Instant, timeout_at};

use super::prompts::{Item, Prompt};
use super::record::{Answer, Arrival, Failure, FailureKind};

/// An engine in this process.
#[derive(Debug)]
pub(super) struct EngineTarget {
    pub(super) engine: EngineHandle,
    /// What all requests have in common.
    pub(super) sampling: SamplingParams,
    pub(super) ignore_eos: bool,
    pub(super) timeout: Duration,
}

impl EngineTarget {
    /// Hands a request in and follows its answer to the end; tells when it went.
    pub(super) async fn ask(&self, item: &Item) -> (Instant, Answer) {
        let mut answer = Answer::default();
        let request = match &item.prompt {
            Prompt::Ids(ids) => self.request(ids.clone(), item),
            Prompt::Text(_) => {
                let text = "the engine takes token ids, not text";
                answer.failure = Some(Failure::new(FailureKind::Refused, text));
                return (Instant::now(), answer);
            }
        };
        let sent = Instant::now();
        let failure = match self.engine.submit(request) {
            Err(error) => Some(Failure::new(FailureKind::Refused, &error.to_string())),
            Ok(stream) => self.follow(stream, sent, &mut answer).await,
        };
        answer.failure = failure;
        (sent, answer)
    }

    fn request(&self, prompt: Vec<u32>, item: &Item) -> GenerateRequest {
        GenerateRequest {
            prompt,
            sampling: SamplingParams {
                seed: item.index as u64,
                max_tokens: item.output,
                ignore_eos: self.ignore_eos,
                ..self.sampling.clone()
            },
            kind: RequestKind::Aggregated,
            cache_salt: None,
        }
    }

    async fn follow(
        &self,
        mut stream: RequestStream,
        sent: Instant,
        answer: &mut Answer,
    ) -> Option<Failure> {
        let deadline = sent + self.timeout;
        loop {
            let Ok(event) = timeout_at(deadline, stream.next()).await else {
                let text = format!("no complete answer within {} s", self.timeout.as_secs());
                return Some(Failure::new(FailureKind::Timeout, &text));
            };
            match event {
                Some(Event::Token { .. }) => answer.arrivals.push(Arrival {
                    at_us: u32::try_from(sent.elapsed().as_micros()).unwrap_or(u32::MAX),
                    tokens: 1,
                }),
                Some(Event::Finished { costs, .. }) => {
                    answer.cached_tokens = Some(costs.cached_tokens);
                    answer.counted_tokens = u32::try_from(answer.arrivals.len()).ok();
                    return None;
                }
                Some(Event::Failed(failure)) => {
                    return Some(Failure::new(FailureKind::Engine, &failure.to_string()));
                }
                Some(Event::PromptLogprobs(_) | Event::LeaseOpened(_)) => {}
                None => {
                    return Some(Failure::new(FailureKind::Engine, "the engine has ended"));
                }
            }
        }
    }
}
