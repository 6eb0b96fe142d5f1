//! What the engine's HTTP server and the proxy say to each other.
//!
//! Only the fields that both sides must understand live here; the full OpenAI request is checked by the
//! worker, which is the one that serves it. Field names follow COMPAT.md §10.1 and §10.7.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What a worker is asked to do with a request (COMPAT.md §10.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RequestType {
    /// Read the prompt, sample one token, keep the KV for a generation server.
    ContextOnly,
    /// Take the KV from a context server and write the answer.
    GenerationOnly,
    /// Do both, as an aggregated server does.
    ContextAndGeneration,
}

/// The log-probability of one token as it crosses between servers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WireLogprob {
    /// Token id.
    pub token_id: u32,
    /// Natural log of the probability.
    pub logprob: f32,
    /// 1-based rank among all tokens, where known.
    #[serde(default)]
    pub rank: Option<u32>,
}

/// The `disaggregated_params` object of requests and of `choices[i]` in context-only answers (COMPAT.md §10.1).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DisaggregatedParams {
    /// What the worker is asked to do, or did.
    pub request_type: RequestType,
    /// Tokens sampled by the context server.
    #[serde(default)]
    pub first_gen_tokens: Option<Vec<u32>>,
    /// Log-probabilities of those tokens: the chosen token first, then the alternatives, per position.
    #[serde(default)]
    pub first_gen_log_probs: Option<Vec<Vec<WireLogprob>>>,
    /// Id under which the context server holds the KV.
    #[serde(default)]
    pub ctx_request_id: Option<u64>,
    /// Base64 of the context instance's hand-off state; its content belongs to the engine.
    #[serde(default)]
    pub encoded_opaque_state: Option<String>,
    /// Speculative drafts; always null here.
    #[serde(default)]
    pub draft_tokens: Option<Vec<u32>>,
    /// The proxy's id of the request, the same on both sides.
    #[serde(default)]
    pub disagg_request_id: Option<u64>,
    /// Attention data-parallel rank that holds the KV.
    #[serde(default)]
    pub ctx_dp_rank: Option<u32>,
    /// Where to fetch the context instance's rank facts.
    #[serde(default)]
    pub ctx_info_endpoint: Option<String>,
    /// 0 context_first, 1 generation_first.
    #[serde(default)]
    pub schedule_style: Option<u8>,
    /// Usage of the context phase.
    #[serde(default)]
    pub ctx_usage: Option<Usage>,
    /// Conversation the request belongs to.
    #[serde(default)]
    pub conversation_id: Option<String>,
}

impl DisaggregatedParams {
    /// Parameters of the given type with every other field null.
    #[must_use]
    pub fn new(request_type: RequestType) -> Self {
        Self {
            request_type,
            first_gen_tokens: None,
            first_gen_log_probs: None,
            ctx_request_id: None,
            encoded_opaque_state: None,
            draft_tokens: None,
            disagg_request_id: None,
            ctx_dp_rank: None,
            ctx_info_endpoint: None,
            schedule_style: None,
            ctx_usage: None,
            conversation_id: None,
        }
    }
}

/// Token counts of an answer, as OpenAI reports them.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Prompt and completion together.
    pub total_tokens: u32,
    /// Tokens of the completion.
    #[serde(default)]
    pub completion_tokens: u32,
    /// How much of the prompt was found in the KV cache.
    #[serde(default)]
    pub prompt_tokens_details: Option<PromptTokensDetails>,
}

/// Detail of [`Usage::prompt_tokens`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PromptTokensDetails {
    /// Prompt tokens whose KV was reused.
    pub cached_tokens: u32,
}

/// The error object of every non-2xx answer (COMPAT.md §10.7), shaped so that OpenAI clients read it too.
///
/// OpenAI clients look under `error`; TensorRT-LLM's clients look at the root. Both are filled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// Always `error`.
    pub object: String,
    /// One line for the client.
    pub message: String,
    /// `BadRequestError`, `NotFoundError`, `ServiceUnavailableError`, `InternalServerError` …
    #[serde(rename = "type")]
    pub kind: String,
    /// The offending request field, where there is one.
    pub param: Option<String>,
    /// The HTTP status.
    pub code: u16,
    /// The same for OpenAI's own clients.
    pub error: ErrorDetail,
}

/// The nested half of [`ErrorBody`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorDetail {
    /// One line for the client.
    pub message: String,
    /// Error class.
    #[serde(rename = "type")]
    pub kind: String,
    /// The offending request field, where there is one.
    pub param: Option<String>,
    /// The HTTP status.
    pub code: u16,
}

impl ErrorBody {
    /// An error object with both shapes filled.
    #[must_use]
    pub fn new(status: u16, kind: &str, message: &str, param: Option<&str>) -> Self {
        Self {
            object: "error".to_owned(),
            message: message.to_owned(),
            kind: kind.to_owned(),
            param: param.map(str::to_owned),
            code: status,
            error: ErrorDetail {
                message: message.to_owned(),
                kind: kind.to_owned(),
                param: param.map(str::to_owned),
                code: status,
            },
        }
    }
}

/// Header in which a worker's answer carries its own timeline as JSON ([`RequestTimeline`]); the proxy passes it on.
pub const TIMELINE_HEADER: &str = "x-baton-timeline";

/// Name of the server-sent event comment that ends a stream with the request's timeline: `: baton-timeline {json}`.
///
/// A comment line is ignored by every OpenAI client, so the relay stays byte-transparent. It is only sent
/// when the request asked for it with the header [`TIMELINE_REQUEST_HEADER`].
pub const TIMELINE_COMMENT: &str = "baton-timeline";

/// Request header (`1`) that asks for [`TIMELINE_COMMENT`] or [`TIMELINE_HEADER`].
pub const TIMELINE_REQUEST_HEADER: &str = "x-baton-want-timeline";

/// Request header (`1`) of a context-only request: a context server that reads the prompt in several steps may answer, as
/// soon as some of it is read, with lines. The answer then has this header too, and its body is
///
/// 1. the body of a request to [`KV_PREFETCH_PATH`], one line of JSON, sent at once;
/// 2. an [`AnswerHead`], one line of JSON, when the answer is there;
/// 3. the answer's body.
///
/// Any other answer is as it would be without the header.
pub const KV_PREFETCH_HEADER: &str = "x-baton-kv-prefetch";

/// Where a generation server is asked to fetch the KV of a prompt that is still being read. It answers when the
/// generation-only request with the same ticket has come, or when it fetches no more; whoever goes away before ends the fetch.
pub const KV_PREFETCH_PATH: &str = "/kv_prefetch";

/// Where a server tells how its KV transceiver is reached ([`KvEndpoint`]).
pub const KV_ENDPOINT_PATH: &str = "/kv_endpoint";

/// Where a server is told of another one whose KV it will fetch: it connects, so that the first request finds the
/// connection there. What [`KV_ENDPOINT_PATH`] gave is posted as it is; KV that could not be taken is refused with a line.
pub const KV_PEERS_PATH: &str = "/kv_peers";

/// How a KV transceiver is reached, and what its KV looks like.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KvEndpoint {
    /// As in a ticket, of no lease.
    pub encoded_opaque_state: String,
}

/// See [`KV_PREFETCH_HEADER`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnswerHead {
    /// The HTTP status that the answer would have.
    pub status: u16,
    /// Its headers, by name in lower case.
    pub headers: BTreeMap<String, String>,
}

/// Where a request's time went, all in microseconds.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct RequestTimeline {
    /// Waiting in the context server's queue.
    #[serde(default)]
    pub queue_us: u64,
    /// Prefill on the context server (or on the aggregated one).
    #[serde(default)]
    pub prefill_us: u64,
    /// Hand-off, from asking for the KV to the last verified byte.
    #[serde(default)]
    pub handoff_us: Option<u64>,
    /// KV bytes moved.
    #[serde(default)]
    pub handoff_bytes: Option<u64>,
    /// The transport that moved them.
    #[serde(default)]
    pub handoff_transport: Option<String>,
    /// From arrival to the first token, as this worker saw it.
    #[serde(default)]
    pub first_token_us: u64,
    /// From the first token to the last.
    #[serde(default)]
    pub decode_us: u64,
    /// Tokens written after the first.
    #[serde(default)]
    pub decode_tokens: u32,
}
