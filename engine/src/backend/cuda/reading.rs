//! Threads that read weights from their files into buffers that are handed to them, decoding those that are not kept as the file
//! holds them. They know no device.
//!
//! Invariant: a buffer is with its owner or with one reader, so nobody waits for a lock of it; there are as many pieces under way as
//! buffers were handed out. Whoever waits for a piece does so no longer than it says: a file system that hangs cannot be left, so then
//! the reader is, with its buffer.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use bytemuck::Pod;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use parking_lot::Mutex;

use crate::backend::cpu::CpuWeight;
use crate::backend::{BackendError, FileSource, ReadError, WeightBytes, WeightSource};

/// What becomes of a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Bytes as the file holds them.
    AsIs,
    /// Values in bf16.
    Bf16,
    /// Values in f16.
    F16,
}

/// Part of a weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    form: Form,
    /// Of the file's bytes, where they stay as they are, counted from the weight's first; else of rows.
    range: Range<usize>,
}

/// Bytes of a row of 16-bit values.
const fn row_bytes(source: &FileSource) -> usize {
    source.cols * size_of::<u16>()
}

/// A weight in pieces that fit buffers of `room` bytes, in order; `None` where a row does not.
pub(super) fn pieces(
    source: &FileSource,
    form: Form,
    room: usize,
) -> Option<impl Iterator<Item = Piece> + use<>> {
    let (all, each) = match form {
        Form::AsIs => (source.runs.bytes(), room),
        Form::Bf16 | Form::F16 => {
            let rows = room.checked_div(row_bytes(source));
            (source.rows, rows.unwrap_or(source.rows))
        }
    };
    (each > 0 || all == 0).then(|| {
        (0..all).step_by(each.max(1)).map(move |first| Piece {
            form,
            range: first..all.min(first + each),
        })
    })
}

impl Piece {
    /// Bytes that it takes of its buffer, and where they go in the weight.
    pub(super) fn target(&self, source: &FileSource) -> Range<usize> {
        let Range { start, end } = self.range;
        match self.form {
            Form::AsIs => start..end,
            Form::Bf16 | Form::F16 => start * row_bytes(source)..end * row_bytes(source),
        }
    }

    /// Bytes of the file.
    pub(super) fn file_bytes(&self, source: &FileSource) -> usize {
        match self.form {
            Form::AsIs => self.range.len(),
            Form::Bf16 | Form::F16 => self.range.len() * source.runs.run_bytes,
        }
    }

    /// Reads it into the first bytes of `out`.
    fn fill(&self, source: &FileSource, out: &mut [u8]) -> Result<(), BackendError> {
        match self.form {
            Form::AsIs => {
                let read = source
                    .runs
                    .read(self.range.start, &mut out[..self.range.len()]);
                read.map_err(|error| unreadable(source, &error))
            }
            Form::Bf16 => self.decode::<bf16>(source, out),
            Form::F16 => self.decode::<f16>(source, out),
        }
    }

    /// Reads rows and writes their values, rounded to nearest even.
    fn decode<H: Pod>(&self, source: &FileSource, out: &mut [u8]) -> Result<(), BackendError>
    where
        [H]: HalfFloatSliceExt,
    {
        let mut stored = vec![0; self.file_bytes(source)];
        let first = self.range.start * source.runs.run_bytes;
        let read = source.runs.read(first, &mut stored);
        read.map_err(|error| unreadable(source, &error))?;
        let part = CpuWeight::decodable(part_of(source, &self.range, stored))?;
        let (mut values, mut row) = (Vec::new(), vec![H::zeroed(); source.cols]);
        let rows = out.chunks_exact_mut(row_bytes(source).max(1));
        for (index, out) in rows.take(self.range.len()).enumerate() {
            part.row_values(index, &mut values);
            row.convert_from_f32_slice(&values[..source.cols]);
            out.copy_from_slice(bytemuck::cast_slice(&row));
        }
        Ok(())
    }
}

fn unreadable(source: &FileSource, error: &ReadError) -> BackendError {
    BackendError::Read {
        name: source.name.clone(),
        reason: error.to_string(),
    }
}

/// Some rows as a weight of their own.
fn part_of(source: &FileSource, rows: &Range<usize>, stored: Vec<u8>) -> WeightSource {
    WeightSource {
        name: source.name.clone(),
        rows: rows.len(),
        cols: source.cols,
        dtype: source.dtype,
        bytes: WeightBytes::Shared {
            range: 0..stored.len(),
            buffer: Arc::new(stored),
        },
        scales: source.scales.as_ref().map(|scales| match scales.len() {
            1 => Arc::clone(scales),
            _ => scales[rows.clone()].into(),
        }),
    }
}

/// A piece that is there, in the buffer that was handed over for it.
#[derive(Debug)]
pub(super) struct Read<B, T> {
    pub(super) buffer: B,
    pub(super) source: Arc<FileSource>,
    pub(super) piece: Piece,
    /// What its owner wants to know again.
    pub(super) target: T,
}

type Outcome<B, T> = Result<Read<B, T>, BackendError>;

/// The threads. `B` holds bytes.
#[derive(Debug)]
pub(super) struct Readers<B, T> {
    /// `None` when they are told to end.
    tasks: Option<Sender<Read<B, T>>>,
    done: Receiver<Outcome<B, T>>,
    under_way: usize,
    threads: Vec<JoinHandle<()>>,
    /// Whether one has been given up.
    stuck: bool,
}

impl<B: AsMut<[u8]> + Send + 'static, T: Send + 'static> Readers<B, T> {
    /// Starts so many.
    pub(super) fn start(count: usize) -> Result<Self, BackendError> {
        let (tasks, taken) = mpsc::channel();
        let (tell, done) = mpsc::channel();
        let taken = Arc::new(Mutex::new(taken));
        let mut readers = Self {
            tasks: Some(tasks),
            done,
            under_way: 0,
            threads: Vec::with_capacity(count),
            stuck: false,
        };
        for index in 0..count {
            let (taken, tell) = (Arc::clone(&taken), tell.clone());
            let begun = thread::Builder::new()
                .name(format!("weights-{index}"))
                .spawn(move || serve(&taken, &tell));
            let thread = begun.map_err(|error| BackendError::Device {
                what: "a thread that reads weights".to_owned(),
                reason: error.to_string(),
            })?;
            readers.threads.push(thread);
        }
        Ok(readers)
    }

    /// Has a piece read.
    pub(super) fn read(&mut self, task: Read<B, T>) {
        let tasks = self.tasks.as_ref().expect("readers end with their owner");
        self.under_way += 1;
        // Readers outlive their tasks' sender, unless they panic, which the wait for the piece notices.
        drop(tasks.send(task));
    }

    /// A piece that is there by now.
    pub(super) fn ready(&mut self) -> Result<Option<Read<B, T>>, BackendError> {
        match self.done.try_recv() {
            Ok(outcome) => {
                self.under_way -= 1;
                outcome.map(Some)
            }
            // Whoever waits next is told.
            Err(_) => Ok(None),
        }
    }

    /// Waits for a piece, at most so long; `None` when none is under way.
    pub(super) fn next(&mut self, patience: Duration) -> Result<Option<Read<B, T>>, BackendError> {
        if self.under_way == 0 {
            return Ok(None);
        }
        let reason = match self.done.recv_timeout(patience) {
            Ok(outcome) => {
                self.under_way -= 1;
                return outcome.map(Some);
            }
            Err(RecvTimeoutError::Timeout) => {
                self.stuck = true;
                format!(
                    "no piece of {} that are being read came within {patience:?}\nhint: the file system with the model does not answer",
                    self.under_way
                )
            }
            Err(RecvTimeoutError::Disconnected) => "all readers have ended".to_owned(),
        };
        Err(BackendError::Device {
            what: "reading weights".to_owned(),
            reason,
        })
    }
}

impl<B, T> Drop for Readers<B, T> {
    fn drop(&mut self) {
        self.tasks = None;
        if self.stuck {
            return;
        }
        for thread in self.threads.drain(..) {
            // One that panicked has said so.
            drop(thread.join());
        }
    }
}

/// A reader's life: until its owner is gone.
fn serve<B: AsMut<[u8]>, T>(tasks: &Mutex<Receiver<Read<B, T>>>, tell: &Sender<Outcome<B, T>>) {
    loop {
        let next = tasks.lock().recv();
        let Ok(mut task) = next else { return };
        let filled = task.piece.fill(&task.source, task.buffer.as_mut());
        if tell.send(filled.map(|()| task)).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests;
