//! Which bytes of which rank go where, when the two sides of a hand-off divide the same model differently. Pure.
//!
//! A rank holds the planes of its layers and, in each, its KV heads (`model/shard.rs`); its pages are `[L, 2, K, P, D]`. A
//! receiver takes every layer and head that it holds from exactly one sender, which may hold more; the receivers
//! of keys and values that several senders hold take turns with these. Both sides make the same plan from the
//! same numbers, so nothing but the layouts crosses the wire. Not done here: comparing what must be equal.
//!
//! Invariant: the pieces of all of a receiver's senders write each wanted byte exactly once, and no other byte.

use std::ops::Range;

use crate::model::shard::{Grid, KvPart, kv_obstacle};
use crate::page::PageShape;
use crate::transport::runs::{RUNS_MAX, Run, Runs};
use pieces::PieceRow;
pub(super) use pieces::{Piece, Pieces};

mod pieces;

/// Most of anything in a layout; far above any model, and no more than there may be runs in a piece.
const SIZE_MAX: usize = RUNS_MAX;

/// Most ranks of an instance.
const RANKS_MAX: usize = 1 << 12;

/// Most bytes of a whole model's page.
const PAGE_BYTES_MAX: u128 = 1 << 40;

/// One side of a hand-off: the whole model's page, and how ranks divide it. Its numbers are sound, wherever they came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Side {
    whole: PageShape,
    grid: Grid,
}

impl Side {
    /// A side; otherwise what is wrong with its numbers.
    pub(super) fn new(whole: PageShape, grid: Grid) -> Result<Self, String> {
        let sizes = [
            whole.layers,
            whole.kv_heads,
            whole.tokens_per_block,
            whole.head_dim,
        ];
        if sizes.iter().any(|size| !(1..=SIZE_MAX).contains(size)) {
            return Err(format!("a kv page of {sizes:?}"));
        }
        let bytes = sizes
            .iter()
            .fold(2 * whole.dtype.bytes() as u128, |bytes, size| {
                bytes * *size as u128
            });
        if bytes > PAGE_BYTES_MAX {
            return Err(format!("a kv page of {bytes} bytes"));
        }
        if let Some(obstacle) = kv_obstacle(whole.layers, whole.kv_heads, grid) {
            return Err(obstacle);
        }
        if grid.tensor.saturating_mul(grid.pipeline) > RANKS_MAX {
            return Err(format!(
                "{} x {} ranks, at most {RANKS_MAX} allowed",
                grid.tensor, grid.pipeline
            ));
        }
        Ok(Self { whole, grid })
    }

    /// Ranks of this side.
    pub(super) fn ranks(&self) -> usize {
        self.grid.size()
    }

    /// Tokens of a page.
    pub(super) fn tokens_per_block(&self) -> usize {
        self.whole.tokens_per_block
    }

    /// A rank's page.
    pub(super) fn page(&self, rank: usize) -> PageShape {
        self.part(rank).page(self.whole)
    }

    /// Pages that hold so many tokens.
    pub(super) fn pages_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.whole.tokens_per_block)
    }

    fn part(&self, rank: usize) -> KvPart {
        let place = self.grid.place(rank);
        KvPart::new(self.whole.layers, self.whole.kv_heads, place)
    }

    fn parts(&self) -> impl Iterator<Item = KvPart> {
        (0..self.ranks()).map(|rank| self.part(rank))
    }
}

/// The ranks of `sender` that a rank of `receiver` takes its keys and values from, in rank order (COMPAT.md §13.3).
pub(super) fn senders(receiver: &Side, rank: usize, sender: &Side) -> Vec<usize> {
    let wanted = receiver.part(rank);
    let chosen = sender.parts().enumerate().filter(|(_, held)| {
        if !overlap(held, &wanted) {
            return false;
        }
        // Those who want it take the ranks that have it in turn.
        let before = receiver.parts().take(rank);
        let turn = before.filter(|other| overlap(held, other)).count();
        turn % held.copies == held.copy
    });
    chosen.map(|(rank, _)| rank).collect()
}

/// The ranks of `receiver` that take something from a rank of `sender`, in rank order.
pub(super) fn receivers(sender: &Side, rank: usize, receiver: &Side) -> Vec<usize> {
    let takes = |other: &usize| senders(receiver, *other, sender).contains(&rank);
    (0..receiver.ranks()).filter(takes).collect()
}

fn overlap(a: &KvPart, b: &KvPart) -> bool {
    !common(&a.layers, &b.layers).is_empty() && !common(&a.heads, &b.heads).is_empty()
}

fn common(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    a.start.max(b.start)..a.end.min(b.end)
}

/// All pieces that take `tokens` from a rank of the sender to a rank of the receiver, in the order of the tokens.
pub(super) fn pieces(
    sender: (&Side, usize),
    receiver: (&Side, usize),
    tokens: Range<usize>,
) -> Pieces {
    let pair = Pair::new(sender, receiver);
    let (from, to) = (
        sender.0.whole.tokens_per_block,
        receiver.0.whole.tokens_per_block,
    );
    let mut pieces = Pieces::default();
    // Pieces repeat: the runs of the last one of each kind serve the next.
    let mut known: Vec<(Span, Runs)> = Vec::new();
    let mut token = tokens.start;
    while token < tokens.end {
        let (sender_page, receiver_page) = (token / from, token / to);
        let end = tokens
            .end
            .min((sender_page + 1) * from)
            .min((receiver_page + 1) * to);
        let span = Span {
            source: token % from,
            target: token % to,
            tokens: end - token,
        };
        let runs = match known.iter().find(|(other, _)| *other == span) {
            Some((_, runs)) => runs.clone(),
            None => {
                let runs = pair.runs(span);
                known.push((span, runs.clone()));
                runs
            }
        };
        // Whole pages of one size are all alike.
        let count = match span.tokens == from && from == to {
            true => (tokens.end - token) / from,
            false => 1,
        };
        let row = PieceRow {
            sender_page,
            receiver_page,
            runs,
        };
        pieces.push(row, count);
        token = end + (count - 1) * from;
    }
    pieces
}

/// Tokens within a page of either side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Span {
    /// The first one's index in the sender's page.
    source: usize,
    /// The first one's index in the receiver's page.
    target: usize,
    tokens: usize,
}

/// What two ranks have in common.
#[derive(Debug)]
struct Pair {
    layers: usize,
    heads: usize,
    source: End,
    target: End,
    token_bytes: usize,
}

/// Where it is in one rank's page; in bytes.
#[derive(Debug)]
struct End {
    start: usize,
    /// From a plane to the next; keys and values of a layer are neighbours, and so are layers.
    plane: usize,
    /// From a head to the next.
    head: usize,
}

impl Pair {
    fn new(sender: (&Side, usize), receiver: (&Side, usize)) -> Self {
        let (held, wanted) = (sender.0.part(sender.1), receiver.0.part(receiver.1));
        let layers = common(&held.layers, &wanted.layers);
        let heads = common(&held.heads, &wanted.heads);
        let whole = &sender.0.whole;
        let token_bytes = whole.head_dim * whole.dtype.bytes();
        let end = |side: &Side, part: &KvPart| {
            let head = side.whole.tokens_per_block * token_bytes;
            let plane = part.heads.len() * head;
            let (layer, first) = (
                layers.start - part.layers.start,
                heads.start - part.heads.start,
            );
            End {
                start: layer * 2 * plane + first * head,
                plane,
                head,
            }
        };
        Self {
            source: end(sender.0, &held),
            target: end(receiver.0, &wanted),
            layers: layers.len(),
            heads: heads.len(),
            token_bytes,
        }
    }

    fn runs(&self, span: Span) -> Runs {
        let planes = Level {
            count: self.layers * 2,
            source_stride: self.source.plane,
            target_stride: self.target.plane,
        };
        let heads = Level {
            count: self.heads,
            source_stride: self.source.head,
            target_stride: self.target.head,
        };
        let source = self.source.start + span.source * self.token_bytes;
        let target = self.target.start + span.target * self.token_bytes;
        compact(
            (source, target),
            span.tokens * self.token_bytes,
            [planes, heads],
        )
    }
}

/// Stretches at equal distances.
#[derive(Debug, Clone, Copy)]
struct Level {
    count: usize,
    source_stride: usize,
    target_stride: usize,
}

/// The fewest runs for stretches of `bytes` at two levels of distances, the outer one first.
fn compact((source, target): (usize, usize), mut bytes: usize, levels: [Level; 2]) -> Runs {
    let mut levels: Vec<Level> = levels.into_iter().filter(|l| l.count > 1).collect();
    while let Some(inner) = levels.last()
        && (inner.source_stride, inner.target_stride) == (bytes, bytes)
    {
        bytes *= inner.count;
        levels.pop();
    }
    if let [outer, inner] = levels[..]
        && outer.source_stride == inner.count * inner.source_stride
        && outer.target_stride == inner.count * inner.target_stride
    {
        let count = outer.count * inner.count;
        levels = vec![Level { count, ..inner }];
    }
    // The longer of two levels is what a run repeats; there is a run for each step of the other.
    levels.sort_by_key(|level| level.count);
    let once = Level {
        count: 1,
        source_stride: bytes,
        target_stride: bytes,
    };
    let repeated = levels.pop().unwrap_or(once);
    let each = levels.pop().unwrap_or(once);
    let run = |step: usize| Run {
        source: source + step * each.source_stride,
        target: target + step * each.target_stride,
        bytes,
        count: repeated.count,
        source_stride: repeated.source_stride,
        target_stride: repeated.target_stride,
    };
    Runs::new((0..each.count).map(run)).expect("runs within the pages of sound sides")
}

#[cfg(test)]
mod tests;
