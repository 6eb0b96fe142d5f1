//! The suite on the CPU, and what only the CPU promises: equality over threads and instruction sets.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::backend::conformance::{
    DTYPES, assert_close, assert_same_bits, columns, conformance_tests, noise, plain, stored,
    upload,
};
use crate::backend::{RopePairing, SequenceSpan};
use crate::page::KvDtype;

mod two_threads {
    use super::*;
    conformance_tests!(CpuBackend::new(Some(2)));
}

mod every_isa {
    use super::*;

    mod avx2_or_portable {
        use super::*;
        conformance_tests!(CpuBackend::with_isa(
            1,
            *Isa::detected()
                .iter()
                .rev()
                .nth(1)
                .unwrap_or(&Isa::detected()[0])
        ));
    }

    mod portable {
        use super::*;
        conformance_tests!(CpuBackend::with_isa(1, Isa::Portable(simd::Portable)));
    }
}

/// One pass through every operation, as a model makes it; what each gave.
fn pass(backend: &mut CpuBackend) -> Vec<(String, Vec<f32>)> {
    let mut results = Vec::new();
    let tokens = 70;
    for dtype in DTYPES {
        let cols = 4 * columns(dtype);
        let (source, _) = stored(dtype, 90, cols, 1);
        let weight = backend.load_weight(source).expect("sizes fit");
        for tokens in [1, 3, tokens] {
            let x = upload(backend, cols, &noise(2, tokens * cols));
            let mut out = backend.tensor(tokens, 90);
            backend.linear(&x, &weight, None, &mut out);
            results.push((format!("linear {dtype:?} {tokens}"), backend.to_host(&out)));
        }
    }
    let (heads, kv_heads, dim) = (6, 2, 64);
    let mut q = upload(backend, heads * dim, &noise(3, tokens * heads * dim));
    let k = upload(backend, kv_heads * dim, &noise(4, tokens * kv_heads * dim));
    let norm = plain(backend, dim, &noise(5, dim));
    backend.head_norm(&mut q, &norm, 1e-5);
    results.push(("head norm".to_owned(), backend.to_host(&q)));
    let batch = StepBatch {
        tokens: vec![0; tokens],
        positions: (0..).take(tokens).collect(),
        sequences: vec![SequenceSpan {
            rows: 0..tokens,
            past_len: 0,
            blocks: vec![2, 0, 1],
        }],
        logit_rows: Vec::new(),
    };
    let table = RopeTable {
        inverse_frequencies: noise(6, dim / 2),
        pairing: RopePairing::Adjacent,
        magnitude: 1.0,
    };
    backend.rope(&mut q, &batch.positions, &table);
    results.push(("rope".to_owned(), backend.to_host(&q)));
    let shape = PageShape {
        layers: 1,
        kv_heads,
        tokens_per_block: 32,
        head_dim: dim,
        dtype: KvDtype::F16,
    };
    backend.allocate_pages(shape, 3).expect("a small pool");
    backend.write_kv(0, &batch, &k, &k);
    let spec = AttentionSpec {
        layer: 0,
        heads,
        scale: 0.5,
        window: None,
    };
    let mut out = backend.tensor(tokens, heads * dim);
    backend.attention(&spec, &batch, &q, &mut out);
    results.push(("attention".to_owned(), backend.to_host(&out)));
    backend.silu_mul(&mut out, &q);
    results.push(("silu".to_owned(), backend.to_host(&out)));
    results
}

#[test]
fn threads_and_instruction_sets_give_the_same_bits() {
    let expected = pass(&mut CpuBackend::with_isa(1, Isa::detected()[0]));
    for isa in Isa::detected() {
        for threads in [1, 2, 5] {
            let found = pass(&mut CpuBackend::with_isa(threads, isa));
            for ((what, found), (_, expected)) in found.iter().zip(&expected) {
                let what = format!("{what} on {} with {threads} threads", isa.name());
                if isa.rounds_once() == Isa::detected()[0].rounds_once() {
                    assert_same_bits(found, expected, &what);
                } else {
                    let expected: Vec<f64> = expected.iter().map(|x| f64::from(*x)).collect();
                    assert_close(found, &expected, 1e-5, &what);
                }
            }
        }
    }
}

#[test]
fn the_description_names_instructions_and_threads() {
    let capability = CpuBackend::new(Some(3)).capability();
    assert!(capability.host_pages);
    assert!(
        capability.description.ends_with(", 3 threads)"),
        "{}",
        capability.description
    );
    assert!(
        capability.description.starts_with("cpu ("),
        "{}",
        capability.description
    );
    let one = CpuBackend::with_isa(1, Isa::Portable(simd::Portable)).capability();
    assert!(
        one.description.ends_with(", 1 thread)"),
        "{}",
        one.description
    );
}

#[test]
fn dropped_tensors_serve_again_with_the_right_shape() {
    let backend = CpuBackend::new(Some(1));
    let first = backend.tensor(10, 100);
    let address = first.values().as_ptr();
    drop(first);
    let second = backend.tensor(7, 100);
    assert_eq!(second.values().as_ptr(), address);
    assert_eq!(
        (second.rows(), second.cols(), second.values().len()),
        (7, 100, 700)
    );
    assert_ne!(backend.tensor(7, 100).values().as_ptr(), address);
}

#[test]
fn a_team_does_each_task_once_in_each_of_many_regions() {
    let team = Team::new(4);
    for round in 0..20_000 {
        let mut done = [0_u32; 9];
        let tasks = done.iter_mut().take(round % 10).collect();
        team.run(tasks, |task: &mut u32| *task += 1);
        let (begun, rest) = done.split_at((round % 10).min(9));
        assert!(begun.iter().all(|count| *count == 1) && rest.iter().all(|count| *count == 0));
    }
}

#[test]
fn a_team_serves_two_callers_at_once() {
    let team = Team::new(3);
    let total = AtomicUsize::new(0);
    let count = |task| {
        total.fetch_add(task, Ordering::Relaxed);
    };
    let call = || (0..1000).for_each(|_| team.run((0..10).collect(), count));
    std::thread::scope(|scope| {
        scope.spawn(call);
        scope.spawn(call);
    });
    assert_eq!(total.into_inner(), 2 * 1000 * 45);
}

#[test]
fn a_panic_in_a_helper_reaches_the_caller() {
    let team = Team::new(3);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        team.run((0..100).collect(), |task| assert_ne!(task, 57));
    }));
    assert!(result.is_err());
    let done = AtomicUsize::new(0);
    team.run((0..100).collect(), |task: usize| {
        done.fetch_add(task, Ordering::Relaxed);
    });
    assert_eq!(done.into_inner(), 4950);
}
