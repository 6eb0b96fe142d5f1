//! The guard between candle's GGUF reader and a hostile file.
//!
//! candle bounds each length by the bytes that remain. What it does not bound is memory, since a one-byte element
//! becomes a 32-byte value, nor does it refuse an alignment of zero, by which it divides. So it reads through a
//! [`HeaderReader`] that limits the header's bytes and the number of values and refuses that alignment. This is
//! no second parser: it sees only the sizes and contents of single reads.

use std::io::{self, Cursor, ErrorKind, Read, Seek, SeekFrom};

use candle_core::quantized::gguf_file::Content;

use crate::model::error::ModelErrorKind;

/// Vocabularies of 256k tokens with all their merges take some 20 MB.
const HEADER_BYTES_MAX: usize = 256 << 20;
/// The same take some 2.5 million reads; each may leave a 32-byte value behind.
const READ_COUNT_MAX: usize = 1 << 23;
const ALIGNMENT_KEY: &[u8] = b"general.alignment";

/// Reads the header at the start of the file.
pub(super) fn read(file: &[u8]) -> Result<Content, ModelErrorKind> {
    let mut reader = HeaderReader {
        bytes: Cursor::new(&file[..file.len().min(HEADER_BYTES_MAX)]),
        reads_left: READ_COUNT_MAX,
        watch: Watch::Idle,
    };
    Content::read(&mut reader).map_err(|error| ModelErrorKind::Header {
        format: "GGUF",
        // Further lines would be a backtrace.
        reason: error
            .to_string()
            .lines()
            .next()
            .unwrap_or_default()
            .to_owned(),
    })
}

/// Where the reader is within the pair `general.alignment`: value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Watch {
    Idle,
    KeySeen,
    TypeSeen,
}

#[derive(Debug)]
struct HeaderReader<'a> {
    bytes: Cursor<&'a [u8]>,
    reads_left: usize,
    watch: Watch,
}

impl HeaderReader<'_> {
    fn watch_alignment(&mut self, read: &[u8]) -> io::Result<()> {
        self.watch = match self.watch {
            Watch::KeySeen => Watch::TypeSeen,
            Watch::TypeSeen if read.iter().all(|&byte| byte == 0) => {
                return Err(invalid("`general.alignment` is 0"));
            }
            // candle drops trailing zeros of a key, so they must not hide this one.
            Watch::Idle | Watch::TypeSeen if without_zeros(read) == ALIGNMENT_KEY => Watch::KeySeen,
            Watch::Idle | Watch::TypeSeen => Watch::Idle,
        };
        Ok(())
    }
}

impl Read for HeaderReader<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.reads_left = self
            .reads_left
            .checked_sub(1)
            .ok_or_else(|| invalid(format!("more than {READ_COUNT_MAX} values")))?;
        let len = self.bytes.read(out)?;
        if len < out.len() {
            return Err(io::Error::new(
                ErrorKind::UnexpectedEof,
                format!(
                    "the file ends inside its header, after {} bytes",
                    self.bytes.get_ref().len()
                ),
            ));
        }
        self.watch_alignment(out)?;
        Ok(len)
    }
}

impl Seek for HeaderReader<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.bytes.seek(to)
    }
}

fn without_zeros(mut bytes: &[u8]) -> &[u8] {
    while let [rest @ .., 0] = bytes {
        bytes = rest;
    }
    bytes
}

fn invalid(reason: impl Into<String>) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, reason.into())
}
