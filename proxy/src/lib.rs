//! The OpenAI-compatible front of a disaggregated deployment: readiness, routing, hand-off orchestration, metrics.
//!
//! The proxy reads a request's body once, asks a context server to read the prompt, asks a generation server to
//! write the answer, and relays that answer's bytes as they come. It validates only what it must understand
//! itself; everything else is the worker's to judge, and a worker's verdict reaches the client with its own status.
//! It holds no model and no tokenizer, parses no token of a stream, and keeps no state that a restart would miss.
//!
//! Invariants: nothing waits without a deadline and a name for what it waits on; nothing queues without a bound;
//! dropping a client's connection drops both upstream connections, because the task that serves a client also
//! drives the sockets to the workers.

mod address_file;
mod admission;
mod book;
mod clock;
mod clock_sync;
mod cluster;
mod context_answer;
mod discovery;
mod endpoints;
mod error;
mod flow;
mod health;
mod ids;
mod introduce;
mod metrics;
mod object;
mod options;
mod perf;
mod prefetch;
mod prompt;
mod proxy;
mod reply;
mod request;
mod request_body;
mod retry;
mod router;
mod server;
mod socket;
mod startup;
mod store;
mod stream;
mod timeline;
mod upstream;
mod usage;
mod workers;

pub use options::{Environment, Limits, ProxyOptions, Timeouts};
pub use server::{ProxyError, run};
pub use store::StoreToken;
