//! The work of a rank: models, paged KV, continuous batching, the KV hand-off and the worker's HTTP server.
//!
//! One OS thread owns the backend and the scheduler and runs schedule → run → sample → publish; the HTTP
//! side and the transceiver talk to it over bounded channels. This crate knows nothing of the proxy.

pub mod backend;
mod blocks;
pub mod collective;
pub mod engine;
pub mod group;
pub mod handoff;
pub mod machine;
pub mod metrics;
pub mod model;
pub mod page;
pub mod parallel;
mod prefix;
pub mod ranks;
pub mod request;
mod sampler;
mod scheduler;
pub mod secret;
mod sequence;
pub mod serve;
mod server;
pub mod tokenizer;
pub mod transceiver;
pub mod transport;
mod wishes;
