//! Which servers exchange KV, before there is any: how this one is reached, and whom it shall connect to.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use baton_configs::wire::KvEndpoint;
use hyper::Response;

use crate::request::RequestFailure;
use crate::server::error::ApiError;
use crate::server::reply::{self, ReplyBody};
use crate::server::service::Service;

/// `GET /kv_endpoint`.
pub(super) fn endpoint(service: &Service) -> Result<Response<ReplyBody>, ApiError> {
    let card = service.transceiver.as_ref().and_then(|info| info.card());
    let card = card.ok_or_else(|| ApiError::not_found("this server hands no kv off"))?;
    Ok(reply::json(&KvEndpoint {
        encoded_opaque_state: STANDARD.encode(card),
    }))
}

/// `POST /kv_peers`: answers when it is known whether the other one's KV could be taken; connecting goes on by itself.
pub(super) async fn meet(
    service: &Arc<Service>,
    body: &[u8],
) -> Result<Response<ReplyBody>, ApiError> {
    let peer: KvEndpoint = serde_json::from_slice(body)
        .map_err(|error| ApiError::bad_request(format!("not what /kv_endpoint gives: {error}")))?;
    let state = STANDARD
        .decode(peer.encoded_opaque_state)
        .map_err(|error| ApiError::field("encoded_opaque_state", format!("not base64: {error}")))?;
    match service.engine.meet(state).await {
        Ok(Ok(())) => Ok(reply::empty()),
        Ok(Err(error)) => Err(RequestFailure::Unservable(error.to_string()).into()),
        Err(_) => Err(RequestFailure::Engine("the engine has ended".to_owned()).into()),
    }
}
