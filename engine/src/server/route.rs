//! Paths, methods, and who answers them (COMPAT.md §11).

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Instant;

use baton_configs::wire::{KV_ENDPOINT_PATH, KV_PEERS_PATH, KV_PREFETCH_PATH};
use hyper::body::Incoming;
use hyper::header::HeaderMap;
use hyper::{Method, Request, Response};

use crate::server::app::App;
use crate::server::error::ApiError;
use crate::server::generate::{Api, generate};
use crate::server::info;
use crate::server::peers;
use crate::server::prefetch::prefetch;
use crate::server::reply::ReplyBody;

/// Header of the proxy of TensorRT-LLM that announces a MessagePack body under a JSON content type.
const MSGPACK_HEADER: &str = "x-trtllm-msgpack";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Endpoint {
    Health,
    HealthGenerate,
    Version,
    Models,
    Metrics,
    PerfMetrics,
    Prometheus,
    ServerInfo,
    Clock,
    KvCacheEvents,
    KvPrefetch,
    KvAddress,
    KvPeers,
    Generate(Api),
}

impl Endpoint {
    fn of(path: &str) -> Option<Self> {
        Some(match path {
            "/health" => Self::Health,
            "/health_generate" => Self::HealthGenerate,
            "/version" => Self::Version,
            "/v1/models" => Self::Models,
            "/metrics" => Self::Metrics,
            "/perf_metrics" => Self::PerfMetrics,
            "/prometheus/metrics" => Self::Prometheus,
            "/server_info" => Self::ServerInfo,
            "/steady_clock_offset" => Self::Clock,
            "/kv_cache_events" => Self::KvCacheEvents,
            KV_PREFETCH_PATH => Self::KvPrefetch,
            KV_ENDPOINT_PATH => Self::KvAddress,
            KV_PEERS_PATH => Self::KvPeers,
            "/v1/completions" => Self::Generate(Api::Completions),
            "/v1/chat/completions" => Self::Generate(Api::Chat),
            _ => return None,
        })
    }

    fn methods(self) -> &'static str {
        match self {
            Self::Clock => "GET, HEAD, POST",
            Self::KvCacheEvents | Self::KvPrefetch | Self::KvPeers | Self::Generate(_) => "POST",
            // These take something out or do work, which nobody who asks for a head means.
            Self::HealthGenerate | Self::Metrics | Self::PerfMetrics => "GET",
            Self::Health
            | Self::Version
            | Self::Models
            | Self::Prometheus
            | Self::ServerInfo
            | Self::KvAddress => "GET, HEAD",
        }
    }

    fn allows(self, method: &Method) -> bool {
        self.methods()
            .split(", ")
            .any(|allowed| allowed == method.as_str())
    }
}

/// Answers one request, whatever it is.
pub(crate) async fn handle(
    app: Arc<App>,
    request: Request<Incoming>,
) -> Result<Response<ReplyBody>, Infallible> {
    let arrived = Instant::now();
    let answer = Box::pin(dispatch(&app, request, arrived)).await;
    Ok(answer.unwrap_or_else(|error| {
        tracing::debug!(status = error.status.as_u16(), "refused: {}", error.message);
        error.response()
    }))
}

async fn dispatch(
    app: &Arc<App>,
    request: Request<Incoming>,
    arrived: Instant,
) -> Result<Response<ReplyBody>, ApiError> {
    let (head, body) = request.into_parts();
    let path = head.uri.path();
    let endpoint = Endpoint::of(path).ok_or_else(|| unknown(path))?;
    if !endpoint.allows(&head.method) {
        return Err(ApiError::method(path, endpoint.methods()));
    }
    match endpoint {
        Endpoint::Health => Ok(info::health(app)),
        Endpoint::HealthGenerate => Ok(info::health_generate(app).await),
        Endpoint::Version => Ok(info::version()),
        Endpoint::Models => Ok(info::models(app.loaded()?)),
        Endpoint::Metrics => Ok(info::metrics(app.loaded()?)),
        Endpoint::PerfMetrics => Ok(info::perf_metrics(app, app.loaded()?)),
        Endpoint::Prometheus => info::prometheus(app.loaded()?),
        Endpoint::ServerInfo => Ok(info::server_info(app.loaded()?)),
        Endpoint::KvCacheEvents => Ok(info::kv_cache_events(app.loaded()?)),
        Endpoint::Clock if head.method == Method::POST => {
            let (body, _place) = app.bodies.read(body).await?;
            info::set_clock_offset(app, &body)
        }
        Endpoint::Clock => Ok(info::clock(app, arrived)),
        Endpoint::KvAddress => peers::endpoint(app.loaded()?),
        Endpoint::KvPeers => {
            app.ready()?;
            let (body, _place) = app.bodies.read(body).await?;
            peers::meet(app.ready()?, &body).await
        }
        Endpoint::KvPrefetch => {
            app.ready()?;
            let body = app.bodies.read(body).await?;
            prefetch(app.ready()?, body).await
        }
        Endpoint::Generate(api) => {
            app.ready()?;
            refuse_msgpack(&head.headers)?;
            let (body, place) = app.bodies.read(body).await?;
            // The server may have begun to drain while the body came.
            let service = app.ready()?;
            generate(service, api, &head.headers, (body, place), arrived).await
        }
    }
}

fn unknown(path: &str) -> ApiError {
    if path == "/v1/responses" || path.starts_with("/v1/responses/") {
        return ApiError::not_found(
            "/v1/responses is not served by this engine; use /v1/chat/completions",
        );
    }
    let shown: String = path.chars().take(80).collect();
    ApiError::not_found(format!("there is nothing at {shown}"))
}

fn refuse_msgpack(headers: &HeaderMap) -> Result<(), ApiError> {
    if headers
        .get(MSGPACK_HEADER)
        .is_some_and(|value| value == "1")
    {
        return Err(ApiError::media_type(format!(
            "{MSGPACK_HEADER}: MessagePack bodies are not read by this server; send JSON"
        )));
    }
    Ok(())
}
