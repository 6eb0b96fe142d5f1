//! One timeline of a request out of the two that its servers kept (`configs::wire::RequestTimeline`).
//!
//! A whole answer carries the merged one in its header. A stream carries the context server's part in the header,
//! because nothing else is known when it starts, and the generation server's own as a comment among its events,
//! which the relay passes on unread; the client adds the two up.

use baton_configs::wire::{RequestTimeline, TIMELINE_HEADER, TIMELINE_REQUEST_HEADER};
use hyper::header::{HeaderMap, HeaderValue};

/// Whether the client wants one.
pub(crate) fn is_wanted(headers: &HeaderMap) -> bool {
    headers
        .get(TIMELINE_REQUEST_HEADER)
        .is_some_and(|value| value == "1")
}

/// The part of the server that answered with `headers`.
pub(crate) fn of(headers: &HeaderMap) -> Option<RequestTimeline> {
    serde_json::from_str(headers.get(TIMELINE_HEADER)?.to_str().ok()?).ok()
}

/// Context and generation part as one. `before_generation_us` is the time from the request's arrival at the proxy
/// to the generation call.
pub(crate) fn merge(
    context: &RequestTimeline,
    generation: RequestTimeline,
    before_generation_us: u64,
) -> RequestTimeline {
    RequestTimeline {
        queue_us: context.queue_us,
        prefill_us: context.prefill_us,
        first_token_us: before_generation_us + generation.first_token_us,
        ..generation
    }
}

/// As a header's value.
pub(crate) fn header(timeline: &RequestTimeline) -> Option<HeaderValue> {
    let text = serde_json::to_string(timeline).ok()?;
    HeaderValue::try_from(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_merged_by_who_knows_them() {
        let context = RequestTimeline {
            queue_us: 1,
            prefill_us: 2,
            first_token_us: 3,
            ..RequestTimeline::default()
        };
        let generation = RequestTimeline {
            queue_us: 10,
            handoff_us: Some(20),
            handoff_bytes: Some(30),
            handoff_transport: Some("tcp".to_owned()),
            first_token_us: 40,
            decode_us: 50,
            decode_tokens: 6,
            ..RequestTimeline::default()
        };
        let merged = merge(&context, generation.clone(), 100);
        assert_eq!(
            merged,
            RequestTimeline {
                queue_us: 1,
                prefill_us: 2,
                first_token_us: 140,
                ..generation
            }
        );
        let mut headers = HeaderMap::new();
        headers.insert(TIMELINE_HEADER, header(&merged).unwrap());
        assert_eq!(of(&headers), Some(merged));
    }
}
