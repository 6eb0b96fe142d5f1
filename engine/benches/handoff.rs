//! The KV hand-off over loopback: 16 pages of a 135M-parameter model (512 tokens, 12 MB) from one transceiver to another.
//!
//! First every byte is compared, then the clock runs. The bound is the host's memory: each byte is summed twice,
//! copied into the kernel and out of it. Prints GB/s of verified payload.
#![expect(
    missing_docs,
    reason = "criterion_group! makes an undocumented public function"
)]

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use baton_configs::transceiver::TransceiverConfig;
use baton_engine::handoff::{
    BlockPages, Fetch, Handoff, HandoffEvent, HandoffSink, HandoffTicket, KvLayout, Offer,
};
use baton_engine::page::{KvDtype, Page, PageShape};
use baton_engine::request::RequestId;
use baton_engine::transceiver::{Transceiver, TransceiverParams};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const PATIENCE: Duration = Duration::from_secs(10);

/// SmolLM2-135M's KV in half precision: 737,280 bytes a page.
const SHAPE: PageShape = PageShape {
    layers: 30,
    kv_heads: 3,
    tokens_per_block: 32,
    head_dim: 64,
    dtype: KvDtype::F16,
};
const PAGES: usize = 16;
const TOKENS: usize = PAGES * SHAPE.tokens_per_block;

struct Node {
    transceiver: Transceiver,
    events: Receiver<HandoffEvent>,
}

fn node() -> Node {
    let layout = KvLayout {
        model_fingerprint: 1,
        page: SHAPE,
        tensor_parallel: 1,
        pipeline_parallel: 1,
    };
    let (sender, events) = channel();
    let sink: HandoffSink = Arc::new(move |event| drop(sender.send(event)));
    let params = TransceiverParams::new(TransceiverConfig::default(), layout, "127.0.0.1");
    let transceiver = Transceiver::start(params, sink).expect("loopback can be listened on");
    Node {
        transceiver,
        events,
    }
}

/// One hand-off; the pages come back filled, with the time that it took.
fn hand_off(
    context: &mut Node,
    generation: &mut Node,
    source: &[Arc<Page>],
    target: BlockPages,
    id: u64,
) -> (BlockPages, Duration) {
    let offer = Offer {
        ctx_request_id: id,
        token_count: TOKENS,
        pages: source.to_vec(),
    };
    let opaque_state = context.transceiver.offer(offer).expect("one lease is held");
    let began = Instant::now();
    generation.transceiver.fetch(Fetch {
        request: RequestId(id),
        ticket: HandoffTicket {
            ctx_request_id: id,
            disagg_request_id: None,
            opaque_state,
            first_tokens: vec![1],
            first_logprobs: Vec::new(),
        },
        token_count: TOKENS,
        first_token: 0,
        pages: target,
    });
    let pages = match generation.events.recv_timeout(PATIENCE) {
        Ok(HandoffEvent::PagesReturned { pages }) => pages,
        other => panic!("{other:?}"),
    };
    match generation.events.recv_timeout(PATIENCE) {
        Ok(HandoffEvent::FetchEnded { outcome: Ok(_), .. }) => {}
        other => panic!("{other:?}"),
    }
    let elapsed = began.elapsed();
    match context.events.recv_timeout(PATIENCE) {
        Ok(HandoffEvent::LeaseEnded { .. }) => {}
        other => panic!("{other:?}"),
    }
    (pages, elapsed)
}

fn handoff(criterion: &mut Criterion) {
    let (mut context, mut generation) = (node(), node());
    let source: Vec<_> = (0..PAGES)
        .map(|index| {
            let mut page = Page::zeroed(SHAPE);
            for (at, byte) in page.as_bytes_mut().iter_mut().enumerate() {
                *byte = u8::try_from((at * 31 + at / 251 + index) % 256).unwrap_or(0);
            }
            Arc::new(page)
        })
        .collect();
    let blank = (0..).zip((0..PAGES).map(|_| Page::zeroed(SHAPE))).collect();
    let (pages, _) = hand_off(&mut context, &mut generation, &source, blank, 0);
    for (source, page) in source.iter().zip(&pages.pages) {
        assert_eq!(source.as_bytes(), page.as_bytes());
    }
    let mut target = Some(pages);
    let mut id = 0;
    let mut group = criterion.benchmark_group("handoff");
    group.throughput(Throughput::Bytes((PAGES * SHAPE.bytes()) as u64));
    group.bench_function("tcp loopback, 16 pages, 12 MB", |bencher| {
        bencher.iter_custom(|iterations| {
            let mut total = Duration::ZERO;
            for _ in 0..iterations {
                id += 1;
                let pages = target.take().expect("the pages came back last time");
                let (pages, elapsed) = hand_off(&mut context, &mut generation, &source, pages, id);
                target = Some(pages);
                total += elapsed;
            }
            total
        });
    });
    group.finish();
}

criterion_group!(benches, handoff);
criterion_main!(benches);
