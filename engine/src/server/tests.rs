//! The server over real sockets, with a scripted engine behind it and a real tokenizer.

mod chats;
mod completions;
mod connections;
mod endpoints;
mod handoffs;
pub(crate) mod harness;
mod random;
mod refusals;
mod streams;
