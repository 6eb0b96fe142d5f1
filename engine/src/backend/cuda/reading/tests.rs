//! Weights in files, read in pieces by several threads and put together again.

use std::fs;
use std::path::Path;

use super::*;
use crate::backend::{FileRuns, WeightDtype, WeightFile};

const PATIENCE: Duration = Duration::from_secs(20);

fn source(path: &Path, dtype: WeightDtype, [rows, cols]: [usize; 2], gap: usize) -> FileSource {
    let (block_len, block_bytes) = dtype.block();
    let run_bytes = cols / block_len * block_bytes;
    FileSource {
        name: "w".to_owned(),
        rows,
        cols,
        dtype,
        runs: FileRuns {
            file: Arc::new(WeightFile::open(path).expect("it opens")),
            offset: 3,
            run_bytes,
            stride_bytes: run_bytes + gap,
            count: rows,
        },
        scales: None,
    }
}

/// The whole weight by way of readers with few small buffers.
fn read(source: FileSource, form: Form, room: usize) -> Result<Vec<u8>, BackendError> {
    let source = Arc::new(source);
    let mut readers = Readers::start(3)?;
    let mut free = vec![vec![0; room]; 4];
    let all = pieces(&source, form, room).expect("rows fit");
    let mut out = vec![0xee; 1 << 16];
    let mut end = 0;
    let mut take = |done: Read<Vec<u8>, usize>, free: &mut Vec<Vec<u8>>| {
        let target = done.piece.target(&done.source);
        assert_eq!(done.target, target.start, "what was told comes back");
        out[target.clone()].copy_from_slice(&done.buffer[..target.len()]);
        end = end.max(target.end);
        free.push(done.buffer);
    };
    for piece in all {
        if free.is_empty() {
            let done = readers.next(PATIENCE)?.expect("all are under way");
            take(done, &mut free);
        }
        readers.read(Read {
            buffer: free.pop().expect("one came back"),
            source: Arc::clone(&source),
            target: piece.target(&source).start,
            piece,
        });
    }
    while let Some(done) = readers.next(PATIENCE)? {
        take(done, &mut free);
    }
    assert_eq!(free.len(), 4, "every buffer came back");
    out.truncate(end);
    Ok(out)
}

fn file(bytes: &[u8]) -> (tempfile::TempDir, std::path::PathBuf) {
    let root = tempfile::tempdir().expect("a directory");
    let path = root.path().join("weights");
    fs::write(&path, bytes).expect("a file");
    (root, path)
}

#[test]
fn rows_and_columns_come_as_the_file_holds_them() {
    let byte = |at: usize| u8::try_from(at % 253).expect("a small number");
    let bytes: Vec<u8> = (0..20_000).map(byte).collect();
    let (_root, path) = file(&bytes);
    for (shape, gap) in [([40, 64], 0), ([40, 64], 30), ([1, 5000], 0), ([0, 64], 0)] {
        let source = source(&path, WeightDtype::Bf16, shape, gap);
        let runs = source.runs.clone();
        let expected: Vec<u8> = (0..shape[0])
            .flat_map(|row| bytes[3 + row * runs.stride_bytes..][..runs.run_bytes].to_vec())
            .collect();
        for room in [100, 128, 4096, 1 << 16] {
            let found = read(source.clone(), Form::AsIs, room).expect("it is there");
            assert_eq!(
                found, expected,
                "{shape:?} with {gap} between, {room} bytes at a time"
            );
        }
    }
}

#[test]
fn floats_become_16_bits_and_8_bit_ones_take_their_rows_scale() {
    let values: Vec<f32> = (0..1200_u16).map(|at| f32::from(at) / 7.0 - 60.0).collect();
    let mut bytes = vec![0xff; 3];
    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    let (_root, path) = file(&bytes);
    let wide = source(&path, WeightDtype::F32, [30, 40], 0);
    let rounded = |values: &[f32]| -> Vec<u8> {
        let each = values.iter().map(|&value| bf16::from_f32(value));
        each.flat_map(bf16::to_le_bytes).collect()
    };
    let found = read(wide.clone(), Form::Bf16, 40 * 2 * 7).expect("it is there");
    assert_eq!(found, rounded(&values));
    let found = read(wide, Form::F16, 40 * 2).expect("it is there");
    let halves = values.iter().map(|&value| f16::from_f32(value));
    assert_eq!(
        found,
        halves.flat_map(f16::to_le_bytes).collect::<Vec<u8>>()
    );

    let (_root, path) = file(&[[0xff; 3].as_slice(), &[0x38; 12], &[0x40; 12]].concat());
    let narrow = FileSource {
        scales: Some(Arc::from([1.0, 2.0, 3.0, 4.0])),
        ..source(&path, WeightDtype::F8E4m3, [4, 6], 0)
    };
    // 0x38 is 1 and 0x40 is 2.
    let expected = [1.0, 2.0, 6.0, 8.0].map(|value| [value; 6]).concat();
    assert_eq!(
        read(narrow, Form::Bf16, 13).expect("it is there"),
        rounded(&expected)
    );
}

#[test]
fn a_row_that_no_buffer_holds_is_left_to_others() {
    let (_root, path) = file(&[0; 100]);
    let source = source(&path, WeightDtype::F32, [2, 10], 0);
    assert!(pieces(&source, Form::F16, 19).is_none());
    assert_eq!(pieces(&source, Form::F16, 20).expect("it fits").count(), 2);
    let bytes = |piece: Piece| piece.file_bytes(&source);
    assert_eq!(
        pieces(&source, Form::F16, 20)
            .expect("it fits")
            .map(bytes)
            .sum::<usize>(),
        80
    );
}

#[test]
fn what_cannot_be_read_is_said_with_weight_and_file() {
    let (_root, path) = file(&[0; 100]);
    let source = source(&path, WeightDtype::Bf16, [10, 64], 0);
    let error = read(source, Form::AsIs, 64)
        .expect_err("it is too short")
        .to_string();
    assert!(error.starts_with("weight `w`: "), "{error}");
    assert!(
        error.contains("is cut short: 64 bytes are wanted at offset"),
        "{error}"
    );
}

/// A buffer whose reader never gets to the end of it, until it is told to.
struct Stuck(Receiver<()>);

impl AsMut<[u8]> for Stuck {
    fn as_mut(&mut self) -> &mut [u8] {
        // Ends when the test does.
        assert!(self.0.recv().is_err(), "nobody sends");
        &mut []
    }
}

#[test]
fn a_file_that_does_not_answer_is_given_up_in_time() {
    let (_root, path) = file(&[0; 100]);
    let source = Arc::new(source(&path, WeightDtype::Bf16, [0, 4], 0));
    let (hold, held) = mpsc::channel();
    let mut readers = Readers::start(1).expect("a thread");
    assert!(readers.next(PATIENCE).expect("nothing fails").is_none());
    readers.read(Read {
        buffer: Stuck(held),
        source,
        piece: Piece {
            form: Form::AsIs,
            range: 0..0,
        },
        target: (),
    });
    let error = readers
        .next(Duration::from_millis(1))
        .err()
        .expect("it is stuck");
    assert!(
        error
            .to_string()
            .contains("no piece of 1 that are being read"),
        "{error}"
    );
    // It does not wait for its thread.
    drop(readers);
    drop(hold);
}
