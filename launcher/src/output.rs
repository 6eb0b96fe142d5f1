//! One log view for many processes: coloured role prefixes on the terminal, a plain file per process.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anstyle::{AnsiColor, Style};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};

/// Lines kept of each process, to be shown when it fails.
const TAIL_LINES: usize = 12;
/// Longer lines are cut: a process that never ends its line must not fill the memory of the supervisor.
const LINE_BYTES_MAX: usize = 16 * 1024;

const COLOURS: &[AnsiColor] = &[
    AnsiColor::Cyan,
    AnsiColor::Blue,
    AnsiColor::Green,
    AnsiColor::Magenta,
    AnsiColor::Yellow,
    AnsiColor::BrightCyan,
];

/// Where one process's lines go.
#[derive(Debug, Clone)]
pub(crate) struct LineSink {
    inner: Arc<Mutex<SinkState>>,
}

#[derive(Debug)]
struct SinkState {
    prefix: String,
    file: Option<File>,
    tail: VecDeque<String>,
}

impl LineSink {
    /// A sink with a prefix padded to `width`, appending to `path`. `index` picks the colour.
    pub(crate) fn open(label: &str, index: usize, width: usize, path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        Ok(Self::with(label, index, width, Some(file)))
    }

    /// The same without a file.
    pub(crate) fn terminal(label: &str, index: usize, width: usize) -> Self {
        Self::with(label, index, width, None)
    }

    fn with(label: &str, index: usize, width: usize, file: Option<File>) -> Self {
        let padded = format!("{label:<width$} |");
        let prefix = if io::stderr().is_terminal() {
            let style = Style::new().fg_color(Some(COLOURS[index % COLOURS.len()].into()));
            format!("{style}{padded}{style:#} ")
        } else {
            format!("{padded} ")
        };
        Self {
            inner: Arc::new(Mutex::new(SinkState {
                prefix,
                file,
                tail: VecDeque::new(),
            })),
        }
    }

    /// Shows and keeps one line. A full disk or a closed terminal must not end the deployment, so failures
    /// to write are dropped here.
    fn line(&self, text: &str) {
        let mut state = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = &mut state.file {
            let _ = writeln!(file, "{text}");
        }
        let _ = writeln!(io::stderr().lock(), "{}{text}", state.prefix);
        if state.tail.len() == TAIL_LINES {
            state.tail.pop_front();
        }
        state.tail.push_back(text.to_owned());
    }

    /// The last lines.
    pub(crate) fn tail(&self) -> Vec<String> {
        self.inner
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .tail
            .iter()
            .cloned()
            .collect()
    }

    /// Reads a stream to its end, line by line; bytes that are not UTF-8 are shown as U+FFFD.
    pub(crate) async fn drain(self, stream: impl AsyncRead + Unpin) {
        let mut reader = BufReader::with_capacity(LINE_BYTES_MAX, stream);
        let mut line: Vec<u8> = Vec::new();
        loop {
            let (used, ended) = match reader.fill_buf().await {
                Ok([]) | Err(_) => break,
                Ok(bytes) => match bytes.iter().position(|byte| *byte == b'\n') {
                    Some(end) => {
                        line.extend_from_slice(&bytes[..end]);
                        (end + 1, true)
                    }
                    None => {
                        line.extend_from_slice(bytes);
                        (bytes.len(), line.len() >= LINE_BYTES_MAX)
                    }
                },
            };
            reader.consume(used);
            if ended {
                self.line(String::from_utf8_lossy(&line).trim_end_matches('\r'));
                line.clear();
            }
        }
        if !line.is_empty() {
            self.line(&String::from_utf8_lossy(&line));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_reach_the_file_and_the_tail_whatever_their_ends() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.log");
        let sink = LineSink::open("ctx0", 0, 6, &path).unwrap();
        let bytes: &[u8] = b"one\r\ntwo\n\xff\nlast without end";
        sink.clone().drain(bytes).await;
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            "one\ntwo\n\u{fffd}\nlast without end\n"
        );
        assert_eq!(sink.tail().last().unwrap(), "last without end");
    }

    #[tokio::test]
    async fn an_endless_line_is_cut_and_the_tail_is_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.log");
        let sink = LineSink::open("ctx0", 0, 6, &path).unwrap();
        let bytes = vec![b'x'; LINE_BYTES_MAX * 40];
        sink.clone().drain(bytes.as_slice()).await;
        assert_eq!(sink.tail().len(), TAIL_LINES);
        assert!(
            sink.tail()
                .iter()
                .all(|line| line.len() <= 2 * LINE_BYTES_MAX)
        );
    }
}
