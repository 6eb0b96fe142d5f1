//! The worker's HTTP server: OpenAI's API in front of the engine thread (COMPAT.md §10, §11).
//!
//! A request's life: `listener` accepts, `route` finds who answers, `generate` reads and tokenizes, `run` submits and
//! follows the engine's events, `answer` turns tokens into text, `compose` and `render` into JSON, `whole` or
//! `stream` sends it. Dropping a connection drops the events, and that cancels the request. Nothing here knows
//! whether this instance is a context or a generation server: each request says what it is.

mod answer;
pub(crate) mod app;
mod body;
mod chat;
mod completion;
mod compose;
mod disagg;
pub(crate) mod error;
mod fields;
mod generate;
mod info;
pub(crate) mod listener;
mod logprobs;
pub(crate) mod metrics;
mod peers;
pub(crate) mod perf;
pub(crate) mod port;
mod prefetch;
mod prompt;
pub(crate) mod pulse;
pub(crate) mod registration;
mod render;
mod reply;
mod route;
mod run;
pub(crate) mod sampling;
pub(crate) mod service;
mod stall;
mod stream;
pub(crate) mod text;
mod whole;

pub(crate) use render::unix_seconds;

#[cfg(test)]
pub(crate) mod tests;
