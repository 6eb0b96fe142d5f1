//! Instances of several ranks that divide one model differently: each rank's transceiver over the wire, against a dense
//! tensor; and what cannot be converted.

use std::ops::Range;

use super::*;
use crate::handoff::BlockPages;
use crate::model::shard::{Grid, KvPart};

/// A whole model's page but for its tokens.
const WHOLE: PageShape = PageShape {
    layers: 5,
    kv_heads: 4,
    tokens_per_block: 0,
    head_dim: 6,
    dtype: KvDtype::F32,
};

const TOKENS: usize = 77;

/// The ranks of an instance.
struct Group {
    grid: Grid,
    whole: PageShape,
    ranks: Vec<Instance>,
}

impl Group {
    fn start(wire: Wire, name: &str, (tensor, pipeline): (usize, usize), block: usize) -> Self {
        let grid = Grid { tensor, pipeline };
        let whole = PageShape {
            tokens_per_block: block,
            ..WHOLE
        };
        let size = |size: usize| u32::try_from(size).unwrap();
        let mut ranks: Vec<Instance> = Vec::new();
        for rank in 0..grid.size() {
            let mut params = params(name);
            params.layout = KvLayout {
                model_fingerprint: 7,
                page: whole,
                tensor_parallel: size(tensor),
                pipeline_parallel: size(pipeline),
            };
            params.rank = size(rank);
            params.epoch = ranks
                .first()
                .map(|leader| leader.transceiver.info().epoch());
            ranks.push(Instance::start(wire, params));
        }
        let mut group = Self { grid, whole, ranks };
        group.name_all();
        group
    }

    /// Has tickets name every rank.
    fn name_all(&mut self) {
        let ranks = self.ranks.iter();
        let records = ranks.map(|node| node.transceiver.template.ranks[0].clone());
        self.ranks[0].transceiver.template.ranks = records.collect();
    }

    fn part(&self, rank: usize) -> KvPart {
        KvPart::new(
            self.whole.layers,
            self.whole.kv_heads,
            self.grid.place(rank),
        )
    }

    /// Every row of a rank's page: its index, and what the dense tensor has there.
    fn rows(&self, rank: usize, page: usize) -> Vec<(usize, [f32; 6])> {
        let part = self.part(rank);
        let (heads, block) = (part.heads.len(), self.whole.tokens_per_block);
        let rows = part.layers.len() * 2 * heads * block;
        (0..rows)
            .map(|at| {
                let (token, plane) = (at % block, at / block);
                let (head, plane) = (plane % heads, plane / heads);
                let (layer, kv) = (part.layers.start + plane / 2, plane % 2);
                let token = page * block + token;
                let row = ((layer * 2 + kv) * 4 + part.heads.start + head) * 1000 + token;
                let value = |dim: u32| f32::from_bits(u32::try_from(row).unwrap() * 8 + dim + 1);
                (
                    at,
                    std::array::from_fn(|dim| value(u32::try_from(dim).unwrap())),
                )
            })
            .collect()
    }

    /// How many pages there are.
    fn page_count(&self) -> usize {
        TOKENS.div_ceil(self.whole.tokens_per_block)
    }

    /// Pages of a rank.
    fn pages(&self, rank: usize, which: Range<usize>) -> Vec<Arc<Page>> {
        let shape = self.part(rank).page(self.whole);
        which
            .map(|index| {
                let mut page = Page::zeroed(shape);
                for (at, row) in self.rows(rank, index) {
                    page.as_f32_mut()[at * 6..][..6].copy_from_slice(&row);
                }
                Arc::new(page)
            })
            .collect()
    }

    /// Adds pages to a lease on every rank.
    fn extend(&mut self, id: u64, which: Range<usize>) {
        for rank in 0..self.ranks.len() {
            let pages = self.pages(rank, which.clone());
            let node = &mut self.ranks[rank];
            node.transceiver.extend(id, pages.clone());
            node.lent.entry(id).or_default().extend(pages);
        }
    }

    /// Offers so many pages; more may follow.
    fn offer(&mut self, id: u64, count: usize) -> HandoffTicket {
        let mut state = Vec::new();
        for rank in 0..self.ranks.len() {
            let pages = self.pages(rank, 0..count);
            let offer = Offer {
                ctx_request_id: id,
                token_count: TOKENS,
                pages: pages.clone(),
            };
            let transceiver = &mut self.ranks[rank].transceiver;
            if rank == 0 {
                state = transceiver.offer(offer).unwrap();
            } else {
                transceiver.join_offer(offer, &state);
            }
            self.ranks[rank].lent.insert(id, pages);
        }
        HandoffTicket {
            ctx_request_id: id,
            disagg_request_id: None,
            opaque_state: state,
            first_tokens: vec![5],
            first_logprobs: Vec::new(),
        }
    }

    /// Fetches on all ranks from a token on.
    fn fetch(&mut self, request: u64, ticket: &HandoffTicket, first_token: usize) {
        let block = self.whole.tokens_per_block;
        let pages = first_token / block..TOKENS.div_ceil(block);
        for rank in 0..self.ranks.len() {
            let shape = self.part(rank).page(self.whole);
            let lent = pages.clone().map(|index| {
                let block = BlockId::try_from(index).unwrap();
                (block, Page::zeroed(shape))
            });
            let node = &mut self.ranks[rank];
            let lent: BlockPages = lent.collect();
            node.out
                .extend(lent.blocks.iter().map(|block| (*block, request)));
            node.transceiver.check(ticket).unwrap();
            node.transceiver.fetch(Fetch {
                request: RequestId(request),
                ticket: ticket.clone(),
                token_count: TOKENS,
                first_token,
                pages: lent,
            });
        }
    }

    /// The bytes that a fetch has brought.
    fn fetched(&mut self, request: u64) -> u64 {
        self.ranks
            .iter_mut()
            .map(|node| node.outcome(request).unwrap().bytes)
            .sum()
    }

    fn assert_dense(&self, first_token: usize) {
        let wanted = |token, row| match (first_token..TOKENS).contains(&token) {
            true => row,
            false => [0.0; 6],
        };
        for (rank, node) in self.ranks.iter().enumerate() {
            for (&index, page) in &node.back {
                let index = index as usize;
                for (at, row) in self.rows(rank, index) {
                    let block = self.whole.tokens_per_block;
                    let token = index * block + at % block;
                    let found = &page.as_f32()[at * 6..][..6];
                    let expected = wanted(token, row);
                    assert_eq!(found, expected, "rank {rank}, page {index}, row {at}");
                }
            }
        }
    }
}

/// Whether all KV is there before it is fetched, or it is written page by page meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kv {
    There,
    Growing,
}

/// Tensor ranks, pipeline ranks and tokens per block.
type Division = (usize, usize, usize);

fn hand_over(wire: Wire, (from, to): (Division, Division), first: usize, kv: Kv) {
    let mut context = Group::start(wire, "ctx-0", (from.0, from.1), from.2);
    let mut generation = Group::start(wire, "gen-0", (to.0, to.1), to.2);
    let count = context.page_count();
    let begun = if kv == Kv::There { count } else { 1 };
    let ticket = context.offer(1, begun);
    generation.fetch(1, &ticket, first);
    for page in begun..count {
        context.extend(1, page..page + 1);
    }
    let bytes = generation.fetched(1);
    generation.assert_dense(first);
    let row = 6 * 4 * (TOKENS - first) as u64;
    let parts = (0..generation.ranks.len()).map(|rank| generation.part(rank));
    let planes = parts.map(|part| (part.layers.len() * 2 * part.heads.len()) as u64);
    assert_eq!(bytes, planes.sum::<u64>() * row);
    let mut delivered = 0;
    for node in &mut context.ranks {
        if node.transceiver.info().stats().bytes_sent > 0 {
            assert_eq!(node.lease_end(1), LeaseEnd::Delivered);
            delivered += 1;
        } else {
            // Nobody takes anything of a rank whose heads another one gives.
            node.transceiver.withdraw(1);
            assert_eq!(node.lease_end(1), LeaseEnd::Cancelled);
        }
    }
    assert!(delivered > 0);
    let nodes = context.ranks.iter_mut().chain(&mut generation.ranks);
    nodes.for_each(Instance::assert_clean);
}

#[test]
fn kv_goes_from_any_division_to_any_other() {
    let grids = [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (8, 1)];
    for from in grids {
        for to in grids {
            let divisions = ((from.0, from.1, 16), (to.0, to.1, 16));
            hand_over(Wire::MEMORY, divisions, 0, Kv::There);
        }
    }
}

#[test]
fn blocks_may_differ_and_a_prefix_stays_where_it_is() {
    for (from, to, first) in [
        ((2, 1, 16), (1, 2, 64), 0),
        ((1, 2, 64), (2, 1, 16), 48),
        ((4, 1, 32), (2, 1, 32), 64),
        ((1, 1, 32), (1, 1, 16), 16),
        ((2, 2, 32), (4, 1, 32), 32),
    ] {
        for wire in wires() {
            hand_over(wire, (from, to), first, Kv::There);
            hand_over(wire, (from, to), first, Kv::Growing);
        }
    }
}

#[test]
fn a_flipped_byte_of_one_rank_is_named_with_the_rank() {
    let mut context = Group::start(Wire::TCP, "ctx-0", (2, 1), 16);
    let mut generation = Group::start(Wire::TCP, "gen-0", (1, 1), 16);
    let mut spoiled = params("ctx-0");
    spoiled.layout = KvLayout {
        model_fingerprint: 7,
        page: context.whole,
        tensor_parallel: 2,
        pipeline_parallel: 1,
    };
    spoiled.rank = 1;
    spoiled.epoch = Some(context.ranks[0].transceiver.info().epoch());
    spoiled.faults = FaultPlan::parse("flip_byte=2000").unwrap();
    context.ranks[1] = Instance::start(Wire::TCP, spoiled);
    context.name_all();
    let ticket = context.offer(1, context.page_count());
    let node = &mut generation.ranks[0];
    let count = TOKENS.div_ceil(16);
    node.shape = generation.whole;
    let pages: BlockPages = (0..)
        .take(count)
        .map(|b| (b, Page::zeroed(node.shape)))
        .collect();
    node.out
        .extend(pages.blocks.iter().map(|block| (*block, 1)));
    node.transceiver.fetch(Fetch {
        request: RequestId(1),
        ticket,
        token_count: TOKENS,
        first_token: 0,
        pages,
    });
    let text = node.outcome(1).unwrap_err().to_string();
    assert!(text.starts_with("kv checksum mismatch: piece"), "{text}");
    assert!(
        text.contains("from context server ctx-0 rank 1 at"),
        "{text}"
    );
    for node in &mut context.ranks {
        assert_eq!(node.lease_end(1), LeaseEnd::Cancelled);
    }
    let nodes = context.ranks.iter_mut().chain(&mut generation.ranks);
    nodes.for_each(Instance::assert_clean);
}
