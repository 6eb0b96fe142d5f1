//! Answers that are sent when they are complete.

use std::cmp::Reverse;

use baton_configs::wire::TIMELINE_HEADER;
use hyper::Response;
use hyper::header::HeaderValue;

use crate::request::RequestFailure;
use crate::server::answer::Piece;
use crate::server::error::ApiError;
use crate::server::generate::Answer;
use crate::server::prefetch;
use crate::server::render::Choice;
use crate::server::reply::{ReplyBody, json_text};
use crate::server::run::Part;

/// Waits for every answer and sends them as one object; where KV is told of early, that first.
pub(super) async fn respond(mut answer: Box<Answer>) -> Result<Response<ReplyBody>, ApiError> {
    let mut first = answer.runs.next().await;
    let lease = match &mut first {
        Some(Ok(part)) => part.piece.lease.take(),
        Some(Err(_)) | None => None,
    };
    match lease {
        Some(ticket) => prefetch::respond_early(answer, ticket),
        None => finish(answer, first).await,
    }
}

/// Waits for the rest of every answer, `first` being the next part.
pub(super) async fn finish(
    mut answer: Box<Answer>,
    first: Option<Result<Part, RequestFailure>>,
) -> Result<Response<ReplyBody>, ApiError> {
    let pieces = match collect(&mut answer, first).await {
        Ok(pieces) => pieces,
        Err(error) => {
            answer.record.failed();
            return Err(error);
        }
    };
    let leased = pieces
        .iter()
        .find_map(|piece| piece.end.as_ref()?.ticket.as_ref())
        .map(|ticket| ticket.ctx_request_id);
    let choices = choices(&mut answer, pieces);
    let usage = answer.runs.usage();
    let prompt = answer.composer.returned_prompt();
    let body = answer
        .composer
        .header
        .whole(choices, usage, prompt)
        .map_err(|error| ApiError::internal(format!("writing the answer failed: {error}")))?;
    let ctx_request_id = answer.composer.ctx_request_id().or(leased);
    answer.record.finished(
        &answer.runs.costs(),
        answer.runs.first_token(),
        ctx_request_id,
    );
    let mut response = json_text(body);
    if answer.want_timeline
        && let Ok(timeline) = serde_json::to_string(&answer.runs.timeline())
        && let Ok(value) = HeaderValue::try_from(timeline)
    {
        response.headers_mut().insert(TIMELINE_HEADER, value);
    }
    Ok(response)
}

/// Every answer in one piece, in order.
async fn collect(
    answer: &mut Answer,
    mut next: Option<Result<Part, RequestFailure>>,
) -> Result<Vec<Piece>, ApiError> {
    let mut pieces: Vec<Piece> = Vec::new();
    pieces.resize_with(answer.runs.len(), Piece::default);
    while let Some(part) = next {
        let part = part?;
        let whole = &mut pieces[part.run];
        whole.text.push_str(&part.piece.text);
        whole.tokens.extend(part.piece.tokens);
        whole.logprobs.extend(part.piece.logprobs);
        if part.piece.prompt_logprobs.is_some() {
            whole.prompt_logprobs = part.piece.prompt_logprobs;
        }
        whole.end = part.piece.end;
        next = answer.runs.next().await;
    }
    Ok(pieces)
}

/// The wanted ones of each prompt's answers: the likeliest first where more were tried.
fn choices(answer: &mut Answer, pieces: Vec<Piece>) -> Vec<Choice> {
    let (wanted, tried) = answer.composer.wanted_and_tried();
    let mut numbered: Vec<(usize, Piece)> = pieces.into_iter().enumerate().collect();
    let mut choices = Vec::new();
    for candidates in numbered.chunks_mut(tried) {
        if tried > wanted {
            candidates.sort_by_key(|(_, piece)| Reverse(Likelihood(cumulative_logprob(piece))));
        }
        for (run, piece) in candidates.iter_mut().take(wanted) {
            let mut piece = std::mem::take(piece);
            piece.text.insert_str(0, answer.composer.echo(*run));
            let index = choices.len();
            let choice = answer
                .composer
                .choice(&answer.service.tools, *run, index, piece);
            choices.push(choice);
        }
    }
    choices
}

fn cumulative_logprob(piece: &Piece) -> f64 {
    let logprobs = piece.logprobs.iter();
    logprobs.map(|entry| f64::from(entry.chosen.logprob)).sum()
}

/// A number that can be sorted by.
#[derive(PartialEq)]
struct Likelihood(f64);

impl Eq for Likelihood {}

impl PartialOrd for Likelihood {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Likelihood {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}
