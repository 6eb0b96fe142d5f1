//! Who may hold a page.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::*;
use crate::backend::{BackendError, SequenceSpan, StepBatch};
use crate::page::{KvDtype, Page, PageShape};

const SHAPE: PageShape = PageShape {
    layers: 1,
    kv_heads: 1,
    tokens_per_block: 2,
    head_dim: 4,
    dtype: KvDtype::F32,
};

/// Whether a page, wherever it lies, is full of this.
fn holds(page: &Page, value: f32) -> bool {
    let copy = page.copied().expect("a page of this device");
    copy.as_f32().iter().all(|found| *found == value)
}

pub(crate) fn pages_are_shared_lent_and_returned<B: Backend>(backend: &mut B) {
    backend.allocate_pages(SHAPE, 2).expect("a small pool");
    assert!(backend.page_is_unshared(0));
    let reader = backend.share_page(0);
    assert!(!backend.page_is_unshared(0));
    assert!(backend.page_is_unshared(1));
    assert!(holds(&reader, 0.0));
    drop(reader);
    assert!(backend.page_is_unshared(0));
    let mut page = backend.lend_page(0);
    assert!(
        !backend.page_is_unshared(0),
        "a lent page may not be written"
    );
    let threes = [3.0_f32; SHAPE.len()];
    page.write(0, bytemuck::cast_slice(&threes))
        .expect("a page of this device");
    backend.return_page(0, page);
    assert!(backend.page_is_unshared(0));
    assert!(holds(&backend.share_page(0), 3.0));
    assert!(holds(&backend.share_page(1), 0.0));
}

#[track_caller]
fn assert_panics<B>(backend: &mut B, what: &str, act: impl FnOnce(&mut B)) {
    let result = catch_unwind(AssertUnwindSafe(|| act(backend)));
    assert!(result.is_err(), "{what} must panic");
}

pub(crate) fn misused_pages_panic<B: Backend>(backend: &mut B) {
    backend.allocate_pages(SHAPE, 2).expect("a small pool");
    let row = upload(backend, 4, &[1.0; 4]);
    let batch = StepBatch {
        tokens: vec![0],
        positions: vec![0],
        sequences: vec![SequenceSpan {
            rows: 0..1,
            past_len: 0,
            blocks: vec![0],
        }],
        logit_rows: Vec::new(),
    };
    let reader = backend.share_page(0);
    assert_panics(backend, "writing a shared page", |backend| {
        backend.write_kv(0, &batch, &row, &row);
    });
    assert_panics(backend, "lending a shared page", |backend| {
        backend.lend_page(0);
    });
    drop(reader);
    assert_panics(backend, "returning a page that was not lent", |backend| {
        backend.return_page(1, Page::zeroed(SHAPE));
    });
    let page = backend.lend_page(1);
    assert_panics(backend, "lending twice", |backend| {
        backend.lend_page(1);
    });
    backend.return_page(1, page);
    let table = plain(backend, 4, &[1.0; 8]);
    let mut out = backend.tensor(1, 4);
    assert_panics(backend, "a token outside the table", |backend| {
        backend.embed(&table, &[2], &mut out);
    });
}

pub(crate) fn a_pool_that_cannot_fit_is_refused<B: Backend>(backend: &mut B) {
    let refused = backend.allocate_pages(SHAPE, usize::MAX / 64);
    assert!(
        matches!(refused, Err(BackendError::OutOfMemory { .. })),
        "{refused:?}"
    );
}
