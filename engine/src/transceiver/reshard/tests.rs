//! Every pair of layouts against a dense tensor `[layer, k/v, head, token, dim]`, with real pages.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::page::{KvDtype, Page};

/// A model's keys and values, whole.
#[derive(Debug, Clone, Copy)]
struct Model {
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
}

/// Eight layers do not divide by three, nor four by what has three heads.
const TINY: Model = Model {
    layers: 7,
    kv_heads: 4,
    head_dim: 2,
};

impl Model {
    fn side(self, (tensor, pipeline): (usize, usize), tokens_per_block: usize) -> Side {
        let whole = PageShape {
            layers: self.layers,
            kv_heads: self.kv_heads,
            tokens_per_block,
            head_dim: self.head_dim,
            dtype: KvDtype::F32,
        };
        Side::new(whole, Grid { tensor, pipeline }).expect("a sound side")
    }

    /// The element of the dense tensor, a number that no other has.
    fn element(self, [layer, kv, head, token, dim]: [usize; 5]) -> f32 {
        let index =
            (((layer * 2 + kv) * self.kv_heads + head) * 1024 + token) * self.head_dim + dim;
        f32::from_bits(u32::try_from(index + 1).unwrap())
    }
}

/// Every element of a rank's page: its place in the page and in the dense tensor.
fn elements(side: &Side, rank: usize, page: usize) -> impl Iterator<Item = (usize, [usize; 5])> {
    let (part, shape) = (side.part(rank), side.page(rank));
    (0..shape.len()).map(move |at| {
        let (dim, rest) = (at % shape.head_dim, at / shape.head_dim);
        let (token, rest) = (rest % shape.tokens_per_block, rest / shape.tokens_per_block);
        let (head, rest) = (rest % shape.kv_heads, rest / shape.kv_heads);
        let (kv, layer) = (rest % 2, rest / 2);
        let token = page * shape.tokens_per_block + token;
        (
            at,
            [
                part.layers.start + layer,
                kv,
                part.heads.start + head,
                token,
                dim,
            ],
        )
    })
}

/// A sender's pages; what is behind the last token is something else than zero.
fn filled(model: Model, side: &Side, rank: usize, tokens: usize) -> Vec<Page> {
    (0..side.pages_for(tokens))
        .map(|index| {
            let mut page = Page::zeroed(side.page(rank));
            let words = page.as_f32_mut();
            for (at, element) in elements(side, rank, index) {
                words[at] = if element[3] < tokens {
                    model.element(element)
                } else {
                    -1.0
                };
            }
            page
        })
        .collect()
}

/// Moves `tokens` from all ranks of one side to all of the other and compares each page with the dense tensor. Returns
/// how many bytes each sender sent.
fn check(
    model: Model,
    sender: &Side,
    receiver: &Side,
    tokens: Range<usize>,
) -> BTreeMap<usize, usize> {
    let sources: Vec<_> = (0..sender.ranks())
        .map(|rank| filled(model, sender, rank, tokens.end))
        .collect();
    let mut sent: BTreeMap<usize, usize> = BTreeMap::new();
    for rank in 0..receiver.ranks() {
        let shape = receiver.page(rank);
        let count = receiver.pages_for(tokens.end);
        let mut pages: Vec<_> = (0..count).map(|_| Page::zeroed(shape)).collect();
        let mut bytes = 0;
        for from in senders(receiver, rank, sender) {
            assert!(receivers(sender, from, receiver).contains(&rank));
            for piece in pieces((sender, from), (receiver, rank), tokens.clone()).iter() {
                let source = &sources[from][piece.sender_page];
                let target = &mut pages[piece.receiver_page];
                assert!(
                    piece
                        .runs
                        .fits(source.as_bytes().len(), target.as_bytes().len())
                );
                for (read, write) in piece.runs.stretches() {
                    target.as_bytes_mut()[write].copy_from_slice(&source.as_bytes()[read]);
                }
                bytes += piece.runs.total_bytes();
                *sent.entry(from).or_default() += piece.runs.total_bytes();
            }
        }
        let mut wanted = 0;
        for (index, page) in pages.iter().enumerate() {
            for (at, element) in elements(receiver, rank, index) {
                let inside = tokens.contains(&element[3]);
                wanted += usize::from(inside) * 4;
                let expected = if inside { model.element(element) } else { 0.0 };
                let found = page.as_f32()[at];
                assert_eq!(
                    found.to_bits(),
                    expected.to_bits(),
                    "{sender:?} to rank {rank} of {receiver:?}: page {index}, element {element:?}"
                );
            }
        }
        // Together with the above: no byte twice.
        assert_eq!(bytes, wanted, "{sender:?} to rank {rank} of {receiver:?}");
    }
    sent
}

const SIZES: [usize; 3] = [1, 2, 4];

fn grids() -> impl Iterator<Item = (usize, usize)> {
    SIZES
        .into_iter()
        .flat_map(|tensor| SIZES.map(|pipeline| (tensor, pipeline)))
}

#[test]
fn every_pair_of_grids_and_block_sizes_gives_the_dense_tensor() {
    for from in grids() {
        for to in grids() {
            for (sender_block, receiver_block) in [
                (16, 16),
                (16, 32),
                (16, 64),
                (32, 16),
                (32, 32),
                (32, 64),
                (64, 16),
                (64, 32),
                (64, 64),
            ] {
                let (sender, receiver) =
                    (TINY.side(from, sender_block), TINY.side(to, receiver_block));
                check(TINY, &sender, &receiver, 0..70);
            }
        }
    }
}

#[test]
fn a_suffix_travels_alone() {
    for from in grids() {
        for to in grids() {
            let (sender, receiver) = (TINY.side(from, 32), TINY.side(to, 16));
            check(TINY, &sender, &receiver, 48..77);
        }
    }
    let whole = TINY.side((1, 1), 16);
    assert_eq!(pieces((&whole, 0), (&whole, 0), 5..5).len(), 0);
}

#[test]
fn duplicated_heads_are_taken_once_and_from_all_their_holders() {
    let tiny_llama = Model { layers: 8, ..TINY };
    let of = |grid| tiny_llama.side(grid, 32);
    let sent = check(tiny_llama, &of((8, 1)), &of((4, 1)), 0..40);
    assert_eq!(sent.len(), 4, "one holder of each head: {sent:?}");
    // Two stages want each head: its two holders serve one each.
    let sent = check(tiny_llama, &of((8, 1)), &of((4, 2)), 0..40);
    assert_eq!(
        sent.keys().copied().collect::<Vec<_>>(),
        Vec::from_iter(0..8)
    );
    let even = sent.values().next().copied().unwrap();
    assert!(sent.values().all(|bytes| *bytes == even), "{sent:?}");
    // Duplicates on both sides pair up; a receiver of all takes one holder of each.
    let sent = check(tiny_llama, &of((8, 1)), &of((8, 1)), 0..40);
    assert_eq!(sent.len(), 8);
    assert_eq!(senders(&of((1, 1)), 0, &of((8, 1))), [0, 2, 4, 6]);
    check(tiny_llama, &of((4, 1)), &of((8, 2)), 0..40);
}

#[test]
fn three_heads_go_to_three_ranks() {
    let smollm2 = Model {
        layers: 30,
        kv_heads: 3,
        head_dim: 2,
    };
    let (one, three) = (smollm2.side((1, 1), 32), smollm2.side((3, 1), 32));
    check(smollm2, &one, &three, 0..45);
    check(smollm2, &three, &smollm2.side((1, 4), 64), 0..45);
    check(smollm2, &three, &smollm2.side((3, 7), 16), 0..45);
}

#[test]
fn the_counterparts_are_those_of_the_table() {
    let tiny_llama = Model { layers: 8, ..TINY };
    let table = |from, to| -> Vec<Vec<usize>> {
        let (sender, receiver) = (tiny_llama.side(from, 32), tiny_llama.side(to, 32));
        (0..receiver.ranks())
            .map(|rank| senders(&receiver, rank, &sender))
            .collect()
    };
    assert_eq!(table((2, 1), (1, 1)), [vec![0, 1]]);
    assert_eq!(table((1, 1), (2, 1)), [[0], [0]]);
    assert_eq!(table((4, 1), (2, 1)), [[0, 1], [2, 3]]);
    assert_eq!(table((2, 1), (1, 2)), [[0, 1], [0, 1]]);
    assert_eq!(table((1, 2), (2, 1)), [[0, 1], [0, 1]]);
}

fn runs_of(
    from: (usize, usize, usize),
    to: (usize, usize, usize),
    tokens: Range<usize>,
) -> Vec<Run> {
    let tiny_llama = Model { layers: 8, ..TINY };
    let sender = tiny_llama.side((from.0, from.1), from.2);
    let receiver = tiny_llama.side((to.0, to.1), to.2);
    let pieces = pieces((&sender, 0), (&receiver, 0), tokens);
    pieces.get(0).unwrap().runs.as_slice().to_vec()
}

#[test]
fn runs_are_as_few_as_the_layouts_allow() {
    let (head, plane) = (32 * 2 * 4, 4 * 32 * 2 * 4);
    // The same layout: a whole page is one stretch; a part of its tokens, one run over heads and planes.
    assert_eq!(
        runs_of((1, 1, 32), (1, 1, 32), 0..32),
        [Run::once(0, 0, 16 * plane)]
    );
    let part = Run {
        source: 0,
        target: 0,
        bytes: 5 * 8,
        count: 16 * 4,
        source_stride: head,
        target_stride: head,
    };
    assert_eq!(runs_of((1, 1, 32), (1, 1, 32), 0..5), [part]);
    // Stages are a part of a page in one stretch.
    assert_eq!(
        runs_of((1, 2, 32), (1, 1, 32), 0..32),
        [Run::once(0, 0, 8 * plane)]
    );
    // Two of four heads: one run over the planes; a part of the tokens, one for each head.
    let half = Run {
        source: 0,
        target: 0,
        bytes: 2 * head,
        count: 16,
        source_stride: 2 * head,
        target_stride: plane,
    };
    assert_eq!(runs_of((2, 1, 32), (1, 1, 32), 0..32), [half]);
    assert_eq!(runs_of((2, 1, 32), (1, 1, 32), 0..5).len(), 2);
    // Other block sizes, same heads: one run.
    assert_eq!(runs_of((2, 1, 32), (2, 1, 16), 0..32).len(), 1);
}

#[test]
fn unsound_sides_are_refused() {
    let whole = TINY.side((1, 1), 32).whole;
    let refused =
        |whole, tensor, pipeline| Side::new(whole, Grid { tensor, pipeline }).unwrap_err();
    assert!(refused(whole, 3, 1).contains("tensor_parallel_size 3 neither divides 4"));
    assert!(refused(whole, 1, 8).contains("more than the model's 7 layers"));
    assert!(refused(whole, 0, 1).contains("at least 1"));
    assert!(refused(whole, 1, 0).contains("at least 1"));
    assert!(refused(whole, 4 << 20, 1).contains("at most"));
    for broken in [
        PageShape { layers: 0, ..whole },
        PageShape {
            head_dim: usize::MAX,
            ..whole
        },
        PageShape {
            layers: 4096,
            kv_heads: 4096,
            tokens_per_block: 4096,
            head_dim: 4096,
            ..whole
        },
    ] {
        assert!(refused(broken, 1, 1).contains("kv page"));
    }
}

/// A grid that divides so many layers and heads; ranks may outnumber the heads.
fn any_grid(layers: usize, kv_heads: usize) -> impl Strategy<Value = (usize, usize)> {
    let tensors: Vec<usize> = (1..=kv_heads * 3)
        .filter(|size| kv_heads.is_multiple_of(*size) || size.is_multiple_of(kv_heads))
        .collect();
    (prop::sample::select(tensors), 1..=layers)
}

/// A model, two grids, two block sizes, and the tokens that travel.
type Pair = (Model, [(usize, usize); 2], [usize; 2], Range<usize>);

fn any_pair() -> impl Strategy<Value = Pair> {
    (1_usize..8, 1_usize..5, 1_usize..4).prop_flat_map(|(layers, kv_heads, head_dim)| {
        let model = Model {
            layers,
            kv_heads,
            head_dim,
        };
        let grids = [any_grid(layers, kv_heads), any_grid(layers, kv_heads)];
        let tokens = (0_usize..40, 0_usize..40).prop_map(|(a, b)| a.min(b)..a.max(b));
        (Just(model), grids, [1_usize..12, 1_usize..12], tokens)
    })
}

proptest! {
    #[test]
    fn any_pair_gives_the_dense_tensor((model, grids, blocks, tokens) in any_pair()) {
        let sender = model.side(grids[0], blocks[0]);
        let receiver = model.side(grids[1], blocks[1]);
        check(model, &sender, &receiver, tokens);
        // Nobody is asked more than one time too often: holders of the same take turns.
        for rank in 0..sender.ranks() {
            let part = sender.part(rank);
            let wanting = receiver.parts().filter(|wanted| overlap(&part, wanted)).count();
            prop_assert!(receivers(&sender, rank, &receiver).len() <= wanting.div_ceil(part.copies));
        }
    }
}
