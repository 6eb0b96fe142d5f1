//! Everything that is not generation: health, names, numbers, clocks.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::{Response, StatusCode};
use serde::Serialize;
use serde_json::{Value, json};

use crate::metrics::EngineStats;
use crate::request::{Event, GenerateRequest, RequestKind, SamplingParams};
use crate::server::app::App;
use crate::server::error::ApiError;
use crate::server::fields::Fields;
use crate::server::reply::{self, ReplyBody};
use crate::server::service::Service;

/// How long `/health_generate` waits for its token.
const PROBE_DEADLINE: Duration = Duration::from_secs(30);

/// `GET /health`: 200 when a request would be taken now, else 503 with the reason.
pub(super) fn health(app: &App) -> Response<ReplyBody> {
    let service = match app.ready() {
        Ok(service) => service,
        Err(error) => return error.as_text(),
    };
    match service.pulse.stuck(&*service.engine) {
        None => reply::empty(),
        Some(still) => ApiError::unavailable(format!(
            "the engine has work but has made no step for {} s",
            still.as_secs()
        ))
        .as_text(),
    }
}

/// `GET /health_generate`: whether a token can be written.
pub(super) async fn health_generate(app: &App) -> Response<ReplyBody> {
    let service = match app.ready() {
        Ok(service) => service,
        Err(error) => return error.as_text(),
    };
    let probe = tokio::time::timeout(PROBE_DEADLINE, probe(service)).await;
    let problem = match probe {
        Ok(Ok(())) => return reply::empty(),
        Ok(Err(problem)) => problem,
        Err(_) => format!("no token within {} s", PROBE_DEADLINE.as_secs()),
    };
    reply::text(StatusCode::INTERNAL_SERVER_ERROR, problem)
}

async fn probe(service: &Service) -> Result<(), String> {
    let request = GenerateRequest {
        prompt: vec![0],
        sampling: SamplingParams {
            temperature: 0.0,
            max_tokens: 1,
            ..SamplingParams::default()
        },
        kind: RequestKind::Aggregated,
        cache_salt: None,
    };
    let mut events = service
        .engine
        .submit(request)
        .map_err(|error| error.to_string())?;
    loop {
        match poll_fn(|cx| events.poll_next(cx)).await {
            Some(Event::Finished { .. }) => return Ok(()),
            Some(Event::Failed(failure)) => return Err(failure.to_string()),
            Some(Event::Token { .. } | Event::PromptLogprobs(_) | Event::LeaseOpened(_)) => {}
            None => return Err("the engine is not running".to_owned()),
        }
    }
}

/// `GET /version`.
pub(super) fn version() -> Response<ReplyBody> {
    reply::json(&json!({"version": env!("CARGO_PKG_VERSION")}))
}

/// `GET /v1/models`.
pub(super) fn models(service: &Service) -> Response<ReplyBody> {
    reply::json(&json!({
        "object": "list",
        "data": [{
            "id": service.facts.model,
            "object": "model",
            "created": service.facts.created,
            "owned_by": "baton",
        }],
    }))
}

/// The current state in the place of an iteration, so that the counters can be read when nothing runs.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct CurrentState<'a> {
    num_active_requests: usize,
    num_queued_requests: usize,
    kv_cache_stats: CurrentBlocks,
    engine_stats: &'a EngineStats,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct CurrentBlocks {
    max_num_blocks: usize,
    free_num_blocks: usize,
    used_num_blocks: usize,
    tokens_per_block: usize,
}

/// `GET /metrics`: the iterations since the last call, then the state now.
pub(super) fn metrics(service: &Service) -> Response<ReplyBody> {
    let iterations = service.engine.take_iterations();
    let stats = service.engine.stats();
    let free = stats.blocks_free + stats.blocks_cached;
    let state = CurrentState {
        num_active_requests: stats.requests_running + stats.requests_fetching,
        num_queued_requests: stats.requests_waiting,
        kv_cache_stats: CurrentBlocks {
            max_num_blocks: stats.blocks_total,
            free_num_blocks: free,
            used_num_blocks: stats.blocks_total.saturating_sub(free),
            tokens_per_block: service.facts.kv_layout.tokens_per_block,
        },
        engine_stats: &stats,
    };
    let elements: Result<Vec<Value>, serde_json::Error> = iterations
        .iter()
        .map(serde_json::to_value)
        .chain(std::iter::once(serde_json::to_value(&state)))
        .collect();
    match elements {
        Ok(elements) => reply::json(&elements),
        Err(error) => ApiError::internal(format!("writing the metrics failed: {error}")).response(),
    }
}

/// `GET /perf_metrics`: finished requests since the last call.
pub(super) fn perf_metrics(app: &App, service: &Service) -> Response<ReplyBody> {
    reply::json(&service.perf.drain(&app.clock))
}

/// `GET /prometheus/metrics`.
pub(super) fn prometheus(service: &Service) -> Result<Response<ReplyBody>, ApiError> {
    service
        .metrics
        .encode()
        .map(reply::open_metrics)
        .map_err(|_| ApiError::internal("the metrics could not be written"))
}

/// `GET /server_info`.
pub(super) fn server_info(service: &Service) -> Response<ReplyBody> {
    let facts = &service.facts;
    // Where KV is handed off, everything that a generation server needs travels in the ticket.
    let disaggregated_params = facts.transport.as_ref().map(|_| json!({}));
    reply::json(&json!({
        "disaggregated_params": disaggregated_params,
        "kv_cache_hash_algo": "v1_block_key",
        "version": env!("CARGO_PKG_VERSION"),
        "model": facts.model,
        "architecture": facts.architecture,
        "backend": facts.backend,
        "kv_layout": facts.kv_layout,
        "transport": transport(service),
        "limits": facts.limits,
    }))
}

/// The transport that is taken first and why, and all that there are, those that are not, over which of them KV went last to
/// or from whom, and what came from which rank to which.
fn transport(service: &Service) -> Value {
    let mut transport = json!(service.facts.transport);
    if let Some(info) = &service.transceiver {
        let wires = info.wires().into_iter().map(|wire| {
            json!({
                "name": wire.transport,
                "endpoint": wire.endpoint,
                "bytes_sent": wire.bytes_sent,
                "bytes_received": wire.bytes_received,
                "fetches": wire.fetches,
            })
        });
        transport["available"] = wires.collect();
        let missing = info.missing().iter();
        transport["missing"] = missing
            .map(|(name, reason)| json!({"name": name, "reason": reason}))
            .collect();
        transport["peers"] = json!(info.peers());
        transport["rank_pairs"] = json!(info.pairs());
    }
    transport
}

/// `POST /kv_cache_events`: events since the last call.
pub(super) fn kv_cache_events(service: &Service) -> Response<ReplyBody> {
    reply::json(&service.engine.take_kv_events())
}

/// `GET /steady_clock_offset`: when the question came and when the answer left, for an NTP-like exchange.
pub(super) fn clock(app: &Arc<App>, arrived: Instant) -> Response<ReplyBody> {
    reply::json(&json!({
        "receive_ts": app.clock.raw_seconds(arrived),
        "transmit_ts": app.clock.raw_seconds(Instant::now()),
    }))
}

/// `POST /steady_clock_offset`: what to add to this process's clock when it reports times.
pub(super) fn set_clock_offset(app: &App, body: &[u8]) -> Result<Response<ReplyBody>, ApiError> {
    let mut fields = Fields::read(body)?;
    let offset: Option<f64> = fields.take("offset", "a number of seconds")?;
    fields.finish()?;
    match offset {
        Some(offset) => {
            app.clock.set_offset(offset);
            Ok(reply::json(&json!({"offset": offset})))
        }
        None => Err(ApiError::field(
            "offset",
            "missing; expected a number of seconds",
        )),
    }
}
