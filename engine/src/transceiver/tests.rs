//! Hand-offs between two transceivers of one process, over every transport: what goes well, what goes wrong, and
//! that all pages are back and no lease is held after each of them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use baton_configs::transceiver::TransceiverConfig;

use super::*;
use crate::backend::BlockId;
use crate::handoff::{HandoffStats, LeaseEnd, RanksEvent};
use crate::page::{KvDtype, Page, PageShape};
use crate::transport::{MemoryKind, memory, windowed};

mod adversity;
mod device;
mod life;
mod open;
mod ranks;
mod resharding;
mod several;
mod unsummed;

/// The transport for tests, started.
const MEMORY: Kind = Kind {
    name: "memory",
    probe: || Err("for tests only".to_owned()),
    start: |_, events| Ok(memory::start_for_tests(events)),
    windows: false,
};

/// The transport through windows of a device that is none.
const WINDOWED: Kind = Kind {
    name: "windowed",
    probe: || Err("for tests only".to_owned()),
    start: |params, events| {
        let params = wires::link_params(params, 0);
        Ok(Arc::new(windowed::tests::start_for_tests(params, events)))
    },
    windows: false,
};

/// How long a test waits for an event that must come.
const PATIENCE: Duration = Duration::from_secs(20);

const SHAPE: PageShape = PageShape {
    layers: 2,
    kv_heads: 3,
    tokens_per_block: 32,
    head_dim: 20,
    dtype: KvDtype::F32,
};

/// Which transport a test runs over, by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Wire(&'static str);

impl Wire {
    const TCP: Self = Self("tcp");
    /// The quickest to start, for tests that are not about transports.
    const MEMORY: Self = Self("memory");
    /// For pages of a device on both sides.
    const WINDOWED: Self = Self("windowed");
}

/// Every transport between processes that this machine has: those that can be cut, stalled and lied over.
fn links() -> Vec<Wire> {
    let there = |kind: &Kind| match (kind.probe)() {
        Ok(there) if there.memory.contains(&MemoryKind::Host) => Some(Wire(kind.name)),
        Ok(_) => None,
        Err(missing) => {
            eprintln!("not over {}: {missing}", kind.name);
            None
        }
    };
    KINDS.iter().filter_map(there).collect()
}

/// These, and the one for tests.
fn wires() -> Vec<Wire> {
    links().into_iter().chain([Wire::MEMORY]).collect()
}

fn layout(page: PageShape) -> KvLayout {
    KvLayout {
        model_fingerprint: 7,
        page,
        tensor_parallel: 1,
        pipeline_parallel: 1,
    }
}

fn params(instance: &str) -> TransceiverParams {
    let config = TransceiverConfig {
        kv_transfer_timeout: PATIENCE * 2,
        ..TransceiverConfig::default()
    };
    TransceiverParams {
        instance: instance.to_owned(),
        ..TransceiverParams::new(config, layout(SHAPE), "127.0.0.1")
    }
}

/// As `params`, with a short time-out.
fn brief(instance: &str) -> TransceiverParams {
    let mut params = params(instance);
    params.config.kv_transfer_timeout = Duration::from_millis(300);
    params
}

/// An instance: a transceiver, and what an engine would keep about it.
struct Instance {
    events: Receiver<HandoffEvent>,
    transceiver: Transceiver,
    shape: PageShape,
    /// Leases not ended, with their pages.
    lent: BTreeMap<u64, Vec<Arc<Page>>>,
    /// Blocks handed over and not back.
    out: BTreeMap<BlockId, u64>,
    /// Pages that came back, by block, with the fetch that they were for.
    back: BTreeMap<BlockId, Page>,
    decided: BTreeMap<u64, Result<HandoffStats, HandoffError>>,
    ended: BTreeMap<u64, LeaseEnd>,
    /// What the ranks have to do together.
    ranks_events: Vec<RanksEvent>,
    next_block: BlockId,
    /// Its pages lie on a device.
    on_device: bool,
}

impl Instance {
    fn start(wire: Wire, params: TransceiverParams) -> Self {
        let (sender, events) = channel();
        let sink: HandoffSink = Arc::new(move |event| drop(sender.send(event)));
        let shape = params.layout.page;
        let kinds: Vec<_> = KINDS.iter().copied().chain([MEMORY, WINDOWED]).collect();
        let preference = Preference::of(vec![wire.0]);
        let transceiver = Transceiver::start_over(params, sink, &preference, &kinds).unwrap();
        Self::around(transceiver, shape, events)
    }

    fn around(transceiver: Transceiver, shape: PageShape, events: Receiver<HandoffEvent>) -> Self {
        Self {
            events,
            transceiver,
            shape,
            lent: BTreeMap::new(),
            out: BTreeMap::new(),
            back: BTreeMap::new(),
            decided: BTreeMap::new(),
            ended: BTreeMap::new(),
            ranks_events: Vec::new(),
            next_block: 0,
            on_device: false,
        }
    }

    /// Empty pages; see [`blank_pages`].
    fn blank_pages(&self, count: usize, number: u64) -> Vec<Page> {
        if self.on_device {
            return device::pool(self.shape, count);
        }
        blank_pages(self.shape, count, number)
    }

    /// Offers pages whose content depends on `id`.
    fn offer(&mut self, id: u64, pages: usize) -> HandoffTicket {
        self.offer_first(id, pages, pages)
    }

    /// Pages from `first` on, whose content depends on `id`.
    fn filled_pages(&self, id: u64, first: usize, count: usize) -> Vec<Arc<Page>> {
        let blank = (first..).zip(self.blank_pages(count, id));
        let filled = blank.map(|(index, mut page)| {
            fill(&mut page, id, index);
            Arc::new(page)
        });
        filled.collect()
    }

    /// Adds the next pages to a lease.
    fn extend(&mut self, id: u64, count: usize) {
        let first = self.lent[&id].len();
        let pages = self.filled_pages(id, first, count);
        self.transceiver.extend(id, pages.clone());
        self.lent.entry(id).or_default().extend(pages);
    }

    /// Offers the first `there` of pages whose content depends on `id`.
    fn offer_first(&mut self, id: u64, pages: usize, there: usize) -> HandoffTicket {
        let token_count = (pages * self.shape.tokens_per_block).saturating_sub(5);
        let pages = self.filled_pages(id, 0, there);
        let opaque_state = self
            .transceiver
            .offer(Offer {
                ctx_request_id: id,
                token_count,
                pages: pages.clone(),
            })
            .unwrap();
        self.lent.insert(id, pages);
        HandoffTicket {
            ctx_request_id: id,
            disagg_request_id: Some(1 << 41),
            opaque_state,
            first_tokens: vec![5],
            first_logprobs: Vec::new(),
        }
    }

    fn fetch(&mut self, request: u64, ticket: &HandoffTicket, pages: usize) {
        let token_count = (pages * self.shape.tokens_per_block).saturating_sub(5);
        let pages = self
            .blank_pages(pages, request)
            .into_iter()
            .map(|page| {
                let block = self.next_block;
                self.next_block += 1;
                self.out.insert(block, request);
                (block, page)
            })
            .collect();
        self.transceiver.fetch(Fetch {
            request: RequestId(request),
            ticket: ticket.clone(),
            token_count,
            first_token: 0,
            pages,
        });
    }

    /// Books the next event; false when none comes within the patience.
    fn step(&mut self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok(event) = self.events.recv_timeout(left) else {
            return false;
        };
        match event {
            HandoffEvent::LeaseEnded {
                ctx_request_id,
                end,
            } => {
                let pages = self.lent.remove(&ctx_request_id).expect("ends once");
                for page in pages {
                    assert!(Arc::into_inner(page).is_some(), "a page has a reader left");
                }
                self.ended.insert(ctx_request_id, end);
            }
            HandoffEvent::FetchEnded { request, outcome } => {
                if outcome.is_ok() {
                    assert!(!self.out.values().any(|of| *of == request.0));
                }
                assert!(self.decided.insert(request.0, outcome).is_none());
            }
            HandoffEvent::Ranks(event) => self.ranks_events.push(event),
            HandoffEvent::PagesReturned { pages } => {
                for (block, page) in pages {
                    assert!(
                        self.out.remove(&block).is_some(),
                        "block {block} is back twice"
                    );
                    self.back.insert(block, page);
                }
            }
        }
        true
    }

    fn wait(&mut self, what: &str, until: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !until(self) {
            assert!(self.step(deadline), "nothing came while waiting for {what}");
        }
    }

    fn outcome(&mut self, request: u64) -> Result<HandoffStats, HandoffError> {
        self.wait("a fetch's end", |node| node.decided.contains_key(&request));
        self.decided.remove(&request).unwrap()
    }

    fn lease_end(&mut self, id: u64) -> LeaseEnd {
        self.wait("a lease's end", |node| node.ended.contains_key(&id));
        self.ended.remove(&id).unwrap()
    }

    /// Everything is back and nothing is held.
    fn assert_clean(&mut self) {
        self.wait("pages and leases", |node| {
            node.out.is_empty() && node.lent.is_empty()
        });
        let stats = self.transceiver.info().stats();
        assert_eq!(
            (
                stats.leases_held,
                stats.fetches_held,
                stats.pages_quarantined
            ),
            (0, 0, 0)
        );
        assert!(self.events.try_recv().is_err(), "an event too many");
        assert_eq!(self.ranks_events, []);
    }

    /// The pages that came back hold what was offered under `id`, from block `first` on: the tokens that there are, and
    /// nothing behind them.
    fn assert_content(&self, first: BlockId, id: u64, pages: usize) {
        let shape = self.shape;
        let (row, block) = (shape.head_dim * 4, shape.tokens_per_block);
        let tokens = (pages * block).saturating_sub(5);
        for (index, page) in (0..pages).zip(first..) {
            let sent = filled(shape, id, index);
            let came = self.back[&page].to_host().unwrap();
            for (at, (came, sent)) in came
                .chunks(row)
                .zip(sent.as_bytes().chunks(row))
                .enumerate()
            {
                if index * block + at % block < tokens {
                    assert_eq!(came, sent, "row {at} of page {index} of {id}");
                } else {
                    assert!(
                        came.iter().all(|byte| *byte == 0),
                        "row {at} of page {index}"
                    );
                }
            }
        }
    }
}

/// Bytes of the KV that is offered as so many pages.
fn kv_bytes(pages: usize) -> u64 {
    let tokens = (pages * SHAPE.tokens_per_block).saturating_sub(5);
    (SHAPE.bytes() / SHAPE.tokens_per_block * tokens) as u64
}

/// Pages of one arena for an even number, of private memory for an odd one.
fn blank_pages(shape: PageShape, count: usize, number: u64) -> Vec<Page> {
    if number.is_multiple_of(2) {
        Page::pool(shape, count).unwrap()
    } else {
        (0..count).map(|_| Page::zeroed(shape)).collect()
    }
}

fn filled(shape: PageShape, id: u64, index: usize) -> Page {
    let mut page = Page::zeroed(shape);
    fill(&mut page, id, index);
    page
}

fn fill(page: &mut Page, id: u64, index: usize) {
    let seed = id.wrapping_mul(0x9e37_79b9).wrapping_add(index as u64);
    let byte = |at: u64| u8::try_from((seed + at * 13 + at / 251) % 255).unwrap() + 1;
    let bytes: Vec<u8> = (0..page.shape().bytes() as u64).map(byte).collect();
    page.write(0, &bytes).unwrap();
}

/// A context and a generation instance over one wire.
fn two(wire: Wire) -> (Instance, Instance) {
    (
        Instance::start(wire, params("ctx-0")),
        Instance::start(wire, params("gen-0")),
    )
}

fn assert_both_clean(context: &mut Instance, generation: &mut Instance) {
    context.assert_clean();
    generation.assert_clean();
}

/// The state inside a ticket, changed.
fn tamper(ticket: &HandoffTicket, change: impl FnOnce(&mut OpaqueState)) -> HandoffTicket {
    let mut state = OpaqueState::decode(&ticket.opaque_state).unwrap();
    change(&mut state);
    HandoffTicket {
        opaque_state: state.encode().unwrap(),
        ..ticket.clone()
    }
}
