//! Weights that are still in their file, to be read piece by piece into memory of the reader's.
//!
//! Never through a mapping: of a file that was cut short meanwhile, or a disk that fails, a read says so by name, where touching a
//! mapping ends the process. Invariant: what lies between the runs is not read.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::WeightDtype;

/// Runs with no more than this between them are asked of the disk together: it reads in units of about this size anyway.
const GAP_MAX: usize = 64 << 10;

/// Why a stretch of a file cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The system refused.
    #[error("{} cannot be read at offset {offset}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Where in it.
        offset: u64,
        /// What the system says.
        error: io::Error,
    },
    /// The file ends too early.
    #[error("{} is cut short: {wanted} bytes are wanted at offset {offset}, {there} are there", path.display())]
    Short {
        /// The file.
        path: PathBuf,
        /// Where in it.
        offset: u64,
        /// Bytes that were wanted.
        wanted: usize,
        /// Bytes that it has from there on.
        there: usize,
    },
}

/// An opened file with weights in it.
#[derive(Debug)]
pub struct WeightFile {
    path: PathBuf,
    file: File,
}

impl WeightFile {
    /// Opens a regular file for reading. A fifo or a device is refused before it is opened, because opening may block.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        if !std::fs::metadata(path)?.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a regular file",
            ));
        }
        Ok(Self {
            path: path.to_owned(),
            file: File::open(path)?,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) const fn file(&self) -> &File {
        &self.file
    }

    /// Fills `out` with the bytes from `offset` on.
    pub(crate) fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), ReadError> {
        let (mut done, wanted) = (0, out.len());
        while done < wanted {
            match self.file.read_at(&mut out[done..], offset + done as u64) {
                Ok(0) => {
                    return Err(ReadError::Short {
                        path: self.path.clone(),
                        offset,
                        wanted,
                        there: done,
                    });
                }
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    return Err(ReadError::Io {
                        path: self.path.clone(),
                        offset: offset + done as u64,
                        error,
                    });
                }
            }
        }
        Ok(())
    }
}

/// Runs of bytes of one length, at equal distances in a file: a tensor, or some rows or columns of one. One after the other
/// they are the weight.
#[derive(Debug, Clone)]
pub struct FileRuns {
    /// The file.
    pub(crate) file: Arc<WeightFile>,
    /// Of the first run, in the file.
    pub(crate) offset: u64,
    /// Bytes of a run: of a row, as far as it is wanted.
    pub(crate) run_bytes: usize,
    /// From one run to the next: bytes of a row.
    pub(crate) stride_bytes: usize,
    /// How many: rows.
    pub(crate) count: usize,
}

impl FileRuns {
    /// Bytes of all runs.
    pub(crate) const fn bytes(&self) -> usize {
        self.run_bytes * self.count
    }

    /// Fills `out` with the weight's bytes from number `from` on.
    pub(crate) fn read(&self, from: usize, out: &mut [u8]) -> Result<(), ReadError> {
        assert!(from + out.len() <= self.bytes(), "a read is of the weight");
        if self.run_bytes == self.stride_bytes {
            return self.file.read(self.offset + from as u64, out);
        }
        if out.is_empty() {
            return Ok(());
        }
        self.announce(from, out.len());
        let (mut run, mut within, mut rest) = (from / self.run_bytes, from % self.run_bytes, out);
        while !rest.is_empty() {
            let count = rest.len().min(self.run_bytes - within);
            let (now, later) = rest.split_at_mut(count);
            self.file.read(self.place(run) + within as u64, now)?;
            (run, within, rest) = (run + 1, 0, later);
        }
        Ok(())
    }

    /// Where a run begins in the file.
    const fn place(&self, run: usize) -> u64 {
        self.offset + run as u64 * self.stride_bytes as u64
    }

    /// Has the system fetch what short reads will ask for one by one.
    fn announce(&self, from: usize, len: usize) {
        if self.stride_bytes - self.run_bytes > GAP_MAX {
            return;
        }
        let first = self.place(from / self.run_bytes);
        let last = self.place((from + len - 1) / self.run_bytes) + self.run_bytes as u64;
        let (Ok(offset), Ok(len)) = (i64::try_from(first), i64::try_from(last - first)) else {
            return;
        };
        let advice = PosixFadviseAdvice::POSIX_FADV_WILLNEED;
        if let Err(error) = posix_fadvise(self.file.file(), offset, len, advice) {
            tracing::trace!(%error, "the file system reads without being told what comes");
        }
    }
}

/// A weight that is still in its file; see [`super::WeightSource`].
#[derive(Debug, Clone)]
pub struct FileSource {
    /// Name in the file, for messages.
    pub name: String,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// How the bytes are to be read.
    pub dtype: WeightDtype,
    /// Where they are: a run a row.
    pub runs: FileRuns,
    /// What 8-bit elements are multiplied with: one for all, or one a row. `None` for other types.
    pub scales: Option<Arc<[f32]>>,
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// What the test's file holds at a place.
    fn byte(at: usize) -> u8 {
        u8::try_from(at % 251).expect("a small number")
    }

    fn file(bytes: usize) -> (tempfile::TempDir, Arc<WeightFile>) {
        let root = tempfile::tempdir().expect("a directory");
        let path = root.path().join("weights");
        let content: Vec<u8> = (0..bytes).map(byte).collect();
        fs::write(&path, content).expect("a file");
        let opened = WeightFile::open(&path).expect("it opens");
        (root, Arc::new(opened))
    }

    fn runs(
        file: &Arc<WeightFile>,
        offset: u64,
        [run_bytes, stride_bytes, count]: [usize; 3],
    ) -> FileRuns {
        FileRuns {
            file: Arc::clone(file),
            offset,
            run_bytes,
            stride_bytes,
            count,
        }
    }

    #[test]
    fn pieces_of_runs_are_the_runs() {
        let (_root, file) = file(1000);
        for shape in [[10, 10, 20], [10, 37, 20], [1, 2, 99], [700, 800, 1]] {
            let runs = runs(&file, 5, shape);
            let [run, stride, count] = shape;
            let expected: Vec<u8> = (0..count)
                .flat_map(|row| (0..run).map(move |at| byte(5 + row * stride + at)))
                .collect();
            assert_eq!(runs.bytes(), expected.len());
            for piece in [1, 3, 7, 10, 64, expected.len()] {
                let mut found = vec![0; expected.len()];
                for (index, part) in found.chunks_mut(piece).enumerate() {
                    runs.read(index * piece, part).expect("it is there");
                }
                assert_eq!(found, expected, "{shape:?} in pieces of {piece}");
            }
        }
    }

    #[test]
    fn a_file_that_was_cut_short_is_named() {
        let (root, file) = file(1000);
        let path = root.path().join("weights");
        let shortened = fs::OpenOptions::new().write(true).open(&path);
        shortened
            .and_then(|file| file.set_len(330))
            .expect("it is shortened");
        let error = runs(&file, 0, [10, 20, 40]).read(0, &mut [0; 400]);
        let error = error.expect_err("half of it is gone").to_string();
        assert!(
            error.ends_with("is cut short: 10 bytes are wanted at offset 340, 0 are there"),
            "{error}"
        );
        assert!(error.starts_with(&path.display().to_string()), "{error}");
    }

    #[test]
    fn what_is_no_regular_file_is_refused() {
        let error = WeightFile::open(Path::new("/dev/null")).expect_err("a device");
        assert_eq!(error.to_string(), "not a regular file");
    }
}
