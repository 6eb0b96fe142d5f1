//! A rank's part of a page, out of the whole model's page and into it.
//!
//! The whole page `[L, 2, K, P, D]` is what a hand-off moves, whatever the ranks of either side; a rank has the planes
//! of its layers and its KV heads. For each layer, keys and values apart, a rank's heads lie together in both.

use std::ops::Range;

use crate::model::shard::Shard;
use crate::page::{Page, PageShape};

/// Copies a rank's part out of a whole page.
pub(super) fn take(whole: &Page, shard: &Shard) -> Page {
    let mut part = Page::zeroed(shard.page(*whole.shape()));
    for (from, to) in runs(whole.shape(), shard) {
        part.as_bytes_mut()[to].copy_from_slice(&whole.as_bytes()[from]);
    }
    part
}

/// Copies the bytes of a rank's page into a whole page.
pub(super) fn put(whole: &mut Page, shard: &Shard, part: &[u8]) {
    let shape = *whole.shape();
    for (to, from) in runs(&shape, shard) {
        whole.as_bytes_mut()[to].copy_from_slice(&part[from]);
    }
}

/// Bytes that belong together, in the whole page and in the rank's.
fn runs(whole: &PageShape, shard: &Shard) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
    let head_bytes = whole.tokens_per_block * whole.head_dim * whole.dtype.bytes();
    let (heads, held) = (whole.kv_heads, shard.kv_heads.clone());
    let run_bytes = held.len() * head_bytes;
    let planes = shard.layers.start * 2..shard.layers.end * 2;
    planes.enumerate().map(move |(index, plane)| {
        let start = (plane * heads + held.start) * head_bytes;
        let own = index * run_bytes;
        (start..start + run_bytes, own..own + run_bytes)
    })
}
