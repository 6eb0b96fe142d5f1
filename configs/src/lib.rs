//! Every schema that crosses a process border of Baton: YAML documents and the wire between engine and proxy.
//!
//! Each document goes from a raw form, in which every field may be missing, to a resolved type whose
//! fields all have a value. This crate reads text and returns values; it opens no socket, starts nothing, and writes but one small
//! file for its callers.

mod benchmark;
pub mod check;
pub mod cluster;
pub mod disagg;
pub mod error;
pub mod explain;
pub mod layout;
pub mod llm;
pub mod metadata;
pub mod schema;
mod section;
pub mod small_file;
pub mod transceiver;
pub mod wire;
pub mod yaml;
