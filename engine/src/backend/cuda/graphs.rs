//! Recorded decode steps: a step of hundreds of small kernels as one call.
//!
//! Steps of single rows are padded to one of few sizes. The first of a size runs as it comes, which compiles, loads and
//! allocates what it needs; the second is recorded; later ones replay. An engine has all sizes that it may need recorded when
//! it starts, with steps of nothing but padding. The kernels find everything that differs from step to
//! step in the uploaded lists, whose places are the same for all steps of a size. Rows of padding have no block, hence
//! write no KV and attend to nothing; nobody reads what they give. Recordings hold addresses of lists and pages, so they
//! are dropped when either moves.

use std::collections::HashMap;

use super::driver::Graph;
use super::error::CudaError;
use super::{CudaBackend, CudaTensor};
use crate::backend::{Backend, BackendError, StepBatch, StepWish};

/// Most sequences of a recorded step: beyond, launching costs little beside computing.
const ROWS_MAX: usize = 512;

/// What there is for each size.
#[derive(Debug, Default)]
pub(super) struct Graphs {
    by_rows: HashMap<usize, Recording>,
}

#[derive(Debug)]
enum Recording {
    /// A step of this size has run, so that all it needs is there.
    Prepared,
    /// What it gives is where the recorded step left it.
    Recorded { graph: Graph, out: CudaTensor },
}

type Pass<'a> =
    dyn FnMut(&mut CudaBackend, &StepBatch) -> Result<Option<CudaTensor>, BackendError> + 'a;

/// Runs a step; what it gives may have more rows than the batch wants.
pub(super) fn run(
    backend: &mut CudaBackend,
    batch: &StepBatch,
    wish: StepWish<'_>,
    pass: &mut Pass<'_>,
) -> Result<Option<CudaTensor>, BackendError> {
    let size = size_of_step(batch).filter(|_| wish.repeatable);
    let padded = size.map(|rows| pad(batch, rows));
    let batch = padded.as_ref().unwrap_or(batch);
    upload(backend, batch, wish)?;
    let out = match size {
        Some(rows) => replay(backend, (batch, rows), pass),
        None => pass_and_choose(backend, batch, pass),
    };
    backend.staging.end();
    out
}

/// Records all sizes up to that of so many sequences.
pub(super) fn warm_up(
    backend: &mut CudaBackend,
    sequences_max: usize,
    pass: &mut Pass<'_>,
) -> Result<(), BackendError> {
    let mut rows = padded_rows(sequences_max.clamp(1, ROWS_MAX));
    // The largest first: the others find its result's memory.
    while rows > 0 {
        let batch = pad(&StepBatch::default(), rows);
        while !matches!(
            backend.graphs.by_rows.get(&rows),
            Some(Recording::Recorded { .. })
        ) {
            upload(backend, &batch, StepWish::default())?;
            let out = replay(backend, (&batch, rows), pass);
            backend.staging.end();
            out?;
            backend.check()?;
        }
        rows = size_below(rows);
    }
    let waited = backend.gpu.synchronize();
    waited.map_err(|error| error.of("recording steps"))
}

/// Uploads a step's lists. Recordings that would look for them elsewhere are dropped.
fn upload(
    backend: &mut CudaBackend,
    batch: &StepBatch,
    wish: StepWish<'_>,
) -> Result<(), BackendError> {
    let ready = backend.ready_tables(wish.rows);
    ready.map_err(|error| error.of("tables of what sequences hold"))?;
    let per_block = backend.pages().shape().tokens_per_block;
    let wish = (wish, backend.tables.places());
    match backend.staging.begin(batch, wish, per_block) {
        Ok(true) => backend.graphs = Graphs::default(),
        Ok(false) => {}
        Err(error) => return Err(error.of("uploading a step")),
    }
    Ok(())
}

fn replay(
    backend: &mut CudaBackend,
    (batch, rows): (&StepBatch, usize),
    pass: &mut Pass<'_>,
) -> Result<Option<CudaTensor>, BackendError> {
    if !backend.graphs.by_rows.contains_key(&rows) {
        let out = pass_and_choose(backend, batch, pass)?;
        backend.graphs.by_rows.insert(rows, Recording::Prepared);
        return Ok(out);
    }
    if let Some(Recording::Prepared) = backend.graphs.by_rows.get(&rows) {
        let recording = record(backend, batch, pass)?;
        backend.graphs.by_rows.insert(rows, recording);
    }
    let Some(Recording::Recorded { graph, out }) = backend.graphs.by_rows.get(&rows) else {
        return Ok(None);
    };
    let failed = |error: CudaError| error.of("replaying a step");
    graph.launch().map_err(failed)?;
    Ok(Some(out.again()))
}

/// Runs a pass over tokens of which some may come from the step before, and chooses tokens by what it gives.
fn pass_and_choose(
    backend: &mut CudaBackend,
    batch: &StepBatch,
    pass: &mut Pass<'_>,
) -> Result<Option<CudaTensor>, BackendError> {
    backend.carry(batch.tokens.len());
    let out = pass(backend, batch)?;
    if let Some(out) = &out {
        backend.choose(out);
    }
    Ok(out)
}

fn record(
    backend: &mut CudaBackend,
    batch: &StepBatch,
    pass: &mut Pass<'_>,
) -> Result<Recording, BackendError> {
    let failed = |error: CudaError| error.of("recording a step");
    backend.gpu.begin_capture().map_err(failed)?;
    let out = pass_and_choose(backend, batch, pass);
    // The stream records until it is told otherwise, whatever happened.
    let graph = backend.gpu.end_capture();
    backend.check()?;
    let (out, graph) = (out?, graph.map_err(failed)?);
    tracing::debug!(rows = batch.tokens.len(), "recorded a decode step");
    let out = out.expect("a step whose rows all have logits gives them");
    Ok(Recording::Recorded { graph, out })
}

/// The size that a step of single rows, each with logits, is padded to.
fn size_of_step(batch: &StepBatch) -> Option<usize> {
    let rows = batch.tokens.len();
    let single = batch.sequences.len() == rows && batch.logit_rows.len() == rows;
    (single && rows <= ROWS_MAX).then(|| padded_rows(rows))
}

/// Few sizes, and little waste.
const fn padded_rows(rows: usize) -> usize {
    match rows {
        0..=8 => rows.next_power_of_two(),
        9..=64 => rows.next_multiple_of(8),
        65..=256 => rows.next_multiple_of(16),
        _ => rows.next_multiple_of(32),
    }
}

/// The size before; 0 before the first.
const fn size_below(rows: usize) -> usize {
    match rows {
        0..=8 => rows / 2,
        9..=64 => rows - 8,
        65..=256 => rows - 16,
        _ => rows - 32,
    }
}

fn pad(batch: &StepBatch, rows: usize) -> StepBatch {
    let mut padded = batch.clone();
    padded.tokens.resize(rows, 0);
    padded.positions.resize(rows, 0);
    padded.logit_rows.extend(batch.tokens.len()..rows);
    padded
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::SequenceSpan;

    #[test]
    fn sizes_are_few_and_hold_their_steps() {
        let sizes: Vec<usize> = (1..=ROWS_MAX).map(padded_rows).collect();
        assert!((1..).zip(&sizes).all(|(rows, &size)| size >= rows));
        assert!(sizes.is_sorted());
        let mut distinct = sizes;
        distinct.dedup();
        let below = distinct.iter().map(|&size| size_below(size));
        assert!(below.eq([0].into_iter().chain(distinct.iter().copied().take(30))));
        assert_eq!(distinct.len(), 31);
        assert_eq!(distinct.last(), Some(&ROWS_MAX));
    }

    #[test]
    fn only_single_rows_that_all_have_logits_repeat() {
        let mut batch = StepBatch {
            tokens: vec![1, 2, 3],
            positions: vec![0, 5, 9],
            sequences: (0..3)
                .map(|row| SequenceSpan {
                    rows: row..row + 1,
                    past_len: 0,
                    blocks: vec![0],
                })
                .collect(),
            logit_rows: vec![0, 1, 2],
        };
        assert_eq!(size_of_step(&batch), Some(4));
        let padded = pad(&batch, 4);
        assert_eq!((padded.tokens.len(), padded.positions[3]), (4, 0));
        assert_eq!(padded.logit_rows, [0, 1, 2, 3]);
        assert_eq!(padded.sequences, batch.sequences);
        batch.logit_rows.pop();
        assert_eq!(size_of_step(&batch), None);
    }
}
