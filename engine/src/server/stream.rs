//! Answers that are sent as they grow, as server-sent events.
//!
//! The status is sent with the first piece, so that whatever fails before it has a true one. A failure after
//! it is one more event, `data: {"error": …}`, and then a cut connection without `[DONE]`.

use std::future::Future;
use std::pin::Pin;

use baton_configs::wire::TIMELINE_COMMENT;
use bytes::Bytes;
use hyper::Response;

use crate::request::RequestFailure;
use crate::server::error::ApiError;
use crate::server::generate::Answer;
use crate::server::render::append_event;
use crate::server::reply::{Next, ReplyBody, event_stream};
use crate::server::run::Part;

/// A stream on its way to the client. Dropped with the connection, it cancels what still runs.
struct Streaming {
    answer: Box<Answer>,
    /// The piece that was waited for before the status was sent.
    first: Option<Part>,
}

/// Waits for the first piece and sends it and all that follow.
pub(super) async fn respond(mut answer: Box<Answer>) -> Result<Response<ReplyBody>, ApiError> {
    let first = match answer.runs.next().await {
        Some(Ok(part)) => Some(part),
        Some(Err(failure)) => {
            answer.record.failed();
            return Err(failure.into());
        }
        None => None,
    };
    Ok(event_stream(Box::new(Streaming { answer, first }), step))
}

fn step(mut state: Box<Streaming>) -> Pin<Box<dyn Future<Output = Next<Box<Streaming>>> + Send>> {
    Box::pin(async move {
        let next = match state.first.take() {
            Some(part) => Some(Ok(part)),
            None => state.answer.runs.next().await,
        };
        let mut out = String::new();
        let written = match next {
            Some(Ok(part)) => write_part(&mut state.answer, part, &mut out),
            Some(Err(failure)) => return cut(&mut state.answer, &failure.into(), out),
            None => {
                return match write_end(&mut state.answer, &mut out) {
                    Ok(()) => Next::Last(Bytes::from(out)),
                    Err(error) => cut(&mut state.answer, &broken(&error), String::new()),
                };
            }
        };
        match written {
            Ok(()) => Next::Send(Bytes::from(out), state),
            Err(error) => cut(&mut state.answer, &broken(&error), String::new()),
        }
    })
}

fn write_part(answer: &mut Answer, part: Part, out: &mut String) -> Result<(), serde_json::Error> {
    let usage = answer.composer.stream_usage();
    let usage = usage.continuous.then(|| answer.runs.usage());
    let mut echo = String::new();
    if answer.composer.open(part.run) {
        echo.push_str(answer.composer.echo(part.run));
        if answer.composer.header.is_chat() {
            let opening = std::mem::take(&mut echo);
            answer
                .composer
                .header
                .opening_chunk(out, part.run, opening, usage.clone())?;
        }
    }
    // A stream tries as many answers as are wanted, so an answer's number is its index.
    let mut choice = answer
        .composer
        .choice(&answer.service.tools, part.run, part.run, part.piece);
    choice.text.insert_str(0, &echo);
    answer.composer.header.chunk(out, Some(choice), usage)
}

fn write_end(answer: &mut Answer, out: &mut String) -> Result<(), serde_json::Error> {
    if answer.composer.stream_usage().at_end {
        let usage = answer.runs.usage();
        answer.composer.header.chunk(out, None, Some(usage))?;
    }
    if answer.want_timeline {
        let timeline = serde_json::to_string(&answer.runs.timeline())?;
        out.push_str(": ");
        out.push_str(TIMELINE_COMMENT);
        out.push(' ');
        out.push_str(&timeline);
        out.push_str("\n\n");
    }
    append_event(out, "[DONE]");
    let ctx_request_id = answer.composer.ctx_request_id();
    answer.record.finished(
        &answer.runs.costs(),
        answer.runs.first_token(),
        ctx_request_id,
    );
    Ok(())
}

fn cut(answer: &mut Answer, error: &ApiError, mut out: String) -> Next<Box<Streaming>> {
    answer.record.failed();
    tracing::warn!(
        status = error.status.as_u16(),
        "a stream failed: {}",
        error.message
    );
    append_event(&mut out, &error.json());
    Next::Cut(Bytes::from(out))
}

fn broken(error: &serde_json::Error) -> ApiError {
    RequestFailure::Engine(format!("writing the answer failed: {error}")).into()
}
