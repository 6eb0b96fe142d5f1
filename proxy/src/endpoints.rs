//! The paths of the front and who serves them (COMPAT.md §7.1).

use std::sync::{Arc, PoisonError};

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::header::{ALLOW, HeaderValue};
use hyper::{Method, Request, StatusCode};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::cluster::Group;
use crate::error::{Failure, Fault, UpstreamFailure};
use crate::proxy::Proxy;
use crate::reply::{self, Reply};
use crate::request_body::Api;
use crate::store::http::StoreCall;
use crate::upstream::{self, Call};
use crate::workers::{Role, Worker};
use crate::{perf, request, store};

/// Bytes of a `/v1/models` answer.
const MODELS_BYTES_MAX: usize = 1 << 20;

/// Serves one request of any kind.
pub(crate) async fn handle(proxy: &Proxy, request: Request<Incoming>) -> Reply {
    let (path, method) = (request.uri().path(), request.method());
    let api = match path {
        "/v1/completions" => Some(Api::Completions),
        "/v1/chat/completions" => Some(Api::Chat),
        _ => None,
    };
    if let Some(api) = api {
        if method != Method::POST {
            return wrong_method(method, path, "POST");
        }
        return request::serve(proxy, api, request).await;
    }
    if let (Some(store), Some(call)) = (&proxy.store, StoreCall::of_path(path)) {
        return store::http::handle(store, call, request, proxy.timeouts.client_body).await;
    }
    if !is_known(path) {
        return reply::error(
            StatusCode::NOT_FOUND,
            &format!("no such path: {path}"),
            None,
        );
    }
    if method != Method::GET && method != Method::HEAD {
        return wrong_method(method, path, "GET, HEAD");
    }
    match path {
        "/health" => health(proxy),
        "/version" => {
            let version = json!({"version": env!("CARGO_PKG_VERSION")});
            reply::json(StatusCode::OK, version.to_string())
        }
        "/cluster_info" => reply::json(StatusCode::OK, cluster_info(proxy).to_string()),
        "/perf_metrics" => reply::json(StatusCode::OK, perf::drain(proxy).await),
        "/prometheus/metrics" => {
            let admission = &proxy.admission;
            let text =
                proxy
                    .metrics
                    .render(&proxy.cluster, admission.active(), admission.waiting());
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            reply::with_type(StatusCode::OK, kind, text)
        }
        _ => match models(proxy).await {
            Ok(body) => reply::json(StatusCode::OK, body),
            Err(failure) => failure.into_reply(),
        },
    }
}

fn is_known(path: &str) -> bool {
    matches!(
        path,
        "/health"
            | "/version"
            | "/cluster_info"
            | "/perf_metrics"
            | "/prometheus/metrics"
            | "/v1/models"
    )
}

fn wrong_method(method: &Method, path: &str, allowed: &'static str) -> Reply {
    let text = format!("{method} is not allowed on {path}, use {allowed}");
    let mut reply = reply::error(StatusCode::METHOD_NOT_ALLOWED, &text, None);
    reply
        .headers_mut()
        .insert(ALLOW, HeaderValue::from_static(allowed));
    reply
}

fn health(proxy: &Proxy) -> Reply {
    match proxy.readiness() {
        Ok(()) => reply::empty(StatusCode::OK),
        Err(reason) => reply::text(StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
    }
}

/// Workers that can serve now under the known key, the others with their reasons beside it.
fn cluster_info(proxy: &Proxy) -> Value {
    let describe = |worker: &Arc<Worker>| {
        let (_, number) = worker.role().in_cluster_info();
        let endpoint = worker.endpoint();
        json!({
            "worker_id": worker.id(),
            "host": endpoint.host,
            "port": endpoint.port,
            "role": number,
        })
    };
    let up = |group: &Group| -> Vec<Value> {
        let servers = group.servers();
        let up = servers.iter().filter(|worker| worker.is_up());
        up.map(describe).collect()
    };
    let missing = |group: &Group| -> Vec<Value> {
        let servers = group.servers();
        let down = servers.iter().filter(|worker| !worker.is_up());
        down.map(|worker| {
            let mut value = describe(worker);
            value["reason"] = json!(worker.condition().to_string());
            value
        })
        .collect()
    };
    let context = proxy.cluster.group(Role::Context);
    let generation = proxy.cluster.group(Role::Generation);
    json!({
        "is_ready": proxy.readiness().is_ok(),
        "current_workers": {"context_servers": up(context), "generation_servers": up(generation)},
        "minimal_instances": {"context_servers": context.up_min(), "generation_servers": generation.up_min()},
        "missing_workers": {"context_servers": missing(context), "generation_servers": missing(generation)},
    })
}

/// What a live worker says it serves; asked again after a few seconds.
async fn models(proxy: &Proxy) -> Result<Bytes, Failure> {
    let lock = || proxy.models.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((fetched, body)) = &*lock()
        && fetched.elapsed() < Proxy::MODELS_AGE_MAX
    {
        return Ok(body.clone());
    }
    let worker = [Role::Generation, Role::Context]
        .into_iter()
        .find_map(|role| proxy.cluster.group(role).choose(&[]));
    let Some(worker) = worker else {
        proxy.ensure_ready()?;
        return Err(Failure::Unavailable(
            "not ready: no server is up".to_owned(),
        ));
    };
    let call = Call::probe("/v1/models", proxy.timeouts.probe);
    let mut answer = upstream::call(&worker, &call).await?;
    let status = answer.head.status;
    let fault = match answer.body.collect(MODELS_BYTES_MAX).await {
        Ok(body) if status == StatusCode::OK => {
            *lock() = Some((Instant::now(), body.clone()));
            return Ok(body);
        }
        Ok(_) => Fault::BadAnswer(format!("status {} for /v1/models", status.as_u16())),
        Err(fault) => fault,
    };
    Err(UpstreamFailure { worker, fault }.into())
}
