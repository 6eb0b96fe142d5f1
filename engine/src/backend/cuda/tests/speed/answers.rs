//! Whole answers of an 8B model through the engine, measured.

use super::*;
use crate::engine::{Engine, EngineConfig, EngineHandle, Inbox};
use crate::metrics::IterationStats;
use crate::request::{Event, GenerateRequest, RequestKind};

/// What is compared with other engines: 256 sequences of up to 16k tokens, nothing reused.
fn large(overlap: bool, kv_dtype: KvDtype) -> EngineConfig {
    EngineConfig {
        overlap,
        kv_dtype,
        iteration_stats_max: 1 << 16,
        max_batch_size: 256,
        max_seq_len: 16_384,
        enable_chunked_prefill: true,
        prefill_tokens_alone: 8192,
        prefill_tokens_beside_decode: 2048,
        block_count: 13_000,
        enable_block_reuse: false,
        ..EngineConfig::default()
    }
}

/// Tokens a second over those steps in which nothing was read and so many wrote.
fn steady_rate(iterations: &[IterationStats], writers: u32) -> f64 {
    let steady = iterations.iter().filter(|iteration| {
        let step = &iteration.inflight_batching_stats;
        step.num_ctx_tokens == 0 && step.num_gen_requests == writers as usize
    });
    let (mut tokens, mut seconds) = (0.0, 0.0);
    for iteration in steady {
        tokens += f64::from(writers);
        seconds += iteration.iter_latency_ms / 1e3;
    }
    tokens / seconds
}

pub(super) fn with_engine(
    overlap: bool,
    (in_8_bits, kv_dtype): (bool, KvDtype),
    measure: impl FnOnce(&EngineHandle),
) {
    let begun = Instant::now();
    let Some(backend) = gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    let model = llama_8b(folder.path(), backend, in_8_bits);
    let (engine, thread) =
        Engine::start(model, None, large(overlap, kv_dtype), Inbox::new(1024)).unwrap();
    eprintln!("engine ready after {:.2} s", begun.elapsed().as_secs_f64());
    measure(&engine);
    engine.shutdown(Instant::now());
    thread
        .join(Instant::now() + std::time::Duration::from_secs(10))
        .unwrap();
}

/// So many requests at once, all of them sampled like that.
pub(super) fn answer(
    what: &str,
    engine: &EngineHandle,
    (requests, input, output): (u32, u32, u32),
    sampling: &SamplingParams,
) {
    drop(engine.take_iterations());
    let started = Instant::now();
    let request = |index: u32| GenerateRequest {
        prompt: (0..input)
            .map(|at| (index * 7919 + at * 104_729) % 128_000)
            .collect(),
        sampling: SamplingParams {
            max_tokens: output,
            ..sampling.clone()
        },
        kind: RequestKind::Aggregated,
        cache_salt: None,
    };
    let streams: Vec<_> = (0..requests)
        .map(|index| engine.submit(request(index)).unwrap())
        .collect();
    let (mut first, mut tokens) = (f64::INFINITY, 0);
    for mut stream in streams {
        while let Some(event) = stream.blocking_next() {
            match event {
                Event::Token { .. } => tokens += 1,
                Event::Failed(failure) => panic!("{failure}"),
                _ => {}
            }
            first = first.min(started.elapsed().as_secs_f64());
        }
    }
    let all = started.elapsed().as_secs_f64();
    let prompt_rate = f64::from(requests * input) / all;
    eprintln!(
        "engine {what}{requests} x {input} in {output} out: first {:.1} ms, all {:.1} ms, {:.0} tok/s out, {prompt_rate:.0} tok/s in, after the first {:.0} tok/s, while all write {:.0} tok/s",
        first * 1e3,
        all * 1e3,
        f64::from(tokens) / all,
        f64::from(tokens - requests) / (all - first),
        steady_rate(&engine.take_iterations(), requests)
    );
}
