//! Server-sent events of the OpenAI API, as bytes come: what each says about tokens, and the end. Pure; no clock.

use std::borrow::Cow;

use serde::Deserialize;
use serde::de::IgnoredAny;

/// Largest event: the last one of a long answer with log-probabilities is far below.
const EVENT_BYTES_MAX: usize = 8 << 20;

/// What one event means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Event {
    /// A part of the answer.
    Part(Part),
    /// `[DONE]`.
    Done,
    /// The server's words about what went wrong.
    Error(String),
}

/// What a part of an answer tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Part {
    /// Tokens that it carries: as many as it lists, else one for a text.
    pub(super) tokens: u32,
    /// What has been used so far, where it says so.
    pub(super) usage: Option<Usage>,
}

/// `usage`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(super) struct Usage {
    pub(super) prompt_tokens: Option<u32>,
    pub(super) completion_tokens: Option<u32>,
    prompt_tokens_details: Option<Details>,
}

impl Usage {
    /// Prompt tokens that were found in the server's cache.
    pub(super) fn cached_tokens(&self) -> Option<u32> {
        self.prompt_tokens_details?.cached_tokens
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
struct Details {
    cached_tokens: Option<u32>,
}

/// Why bytes are no such stream.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(super) enum StreamError {
    /// An event has no end.
    #[error("an event of more than {EVENT_BYTES_MAX} bytes")]
    Endless,
    /// An event's data are something else.
    #[error("`{data}` is not an event of the OpenAI API")]
    Foreign {
        /// Their beginning.
        data: String,
    },
}

/// Reads a stream piece by piece.
#[derive(Debug, Default)]
pub(super) struct Reader {
    pending: Vec<u8>,
    data: Vec<u8>,
}

impl Reader {
    /// Takes bytes and hands every event that they complete to `take`, in order.
    ///
    /// # Errors
    /// When they are not events of the OpenAI API.
    pub(super) fn push(
        &mut self,
        bytes: &[u8],
        mut take: impl FnMut(Event),
    ) -> Result<(), StreamError> {
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let (line, after) = rest.split_at(end);
            rest = &after[1..];
            if self.pending.is_empty() {
                self.line(line, &mut take)?;
            } else {
                let mut whole = std::mem::take(&mut self.pending);
                whole.extend_from_slice(line);
                self.line(&whole, &mut take)?;
            }
        }
        self.pending.extend_from_slice(rest);
        if self.pending.len() + self.data.len() > EVENT_BYTES_MAX {
            return Err(StreamError::Endless);
        }
        Ok(())
    }

    /// A line of `data`, or the empty one that ends an event. Comments and other fields say nothing about tokens.
    fn line(&mut self, line: &[u8], take: &mut impl FnMut(Event)) -> Result<(), StreamError> {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() {
            if !self.data.is_empty() {
                take(read(&self.data)?);
                self.data.clear();
            }
        } else if let Some(data) = line.strip_prefix(b"data:") {
            if !self.data.is_empty() {
                self.data.push(b'\n');
            }
            let data = data.strip_prefix(b" ").unwrap_or(data);
            self.data.extend_from_slice(data);
        }
        Ok(())
    }
}

#[derive(Deserialize)]
struct Chunk<'a> {
    #[serde(default, borrow)]
    choices: Vec<Choice<'a>>,
    usage: Option<Usage>,
    error: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(borrow)]
    text: Option<Cow<'a, str>>,
    #[serde(borrow)]
    delta: Option<Delta<'a>>,
    token_ids: Option<Vec<IgnoredAny>>,
    #[serde(borrow)]
    finish_reason: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct Delta<'a> {
    #[serde(borrow)]
    role: Option<Cow<'a, str>>,
    #[serde(borrow)]
    content: Option<Cow<'a, str>>,
    #[serde(borrow)]
    reasoning_content: Option<Cow<'a, str>>,
    #[serde(borrow)]
    reasoning: Option<Cow<'a, str>>,
}

impl Choice<'_> {
    /// Listed ids are what they are. Without them, a text is one token; so is an empty text (half a character) unless it
    /// opens or ends the answer.
    fn tokens(&self) -> u32 {
        if let Some(ids) = &self.token_ids
            && !ids.is_empty()
        {
            return u32::try_from(ids.len()).unwrap_or(u32::MAX);
        }
        let is_listed = self.token_ids.is_some();
        let parts = match &self.delta {
            None => [self.text.as_deref(), None, None],
            Some(delta) => [
                delta.content.as_deref(),
                delta.reasoning_content.as_deref(),
                delta.reasoning.as_deref(),
            ],
        };
        let has_text = parts.iter().flatten().any(|part| !part.is_empty());
        let opens = self
            .delta
            .as_ref()
            .is_some_and(|delta| delta.role.is_some());
        let is_half =
            parts.iter().flatten().next().is_some() && !opens && self.finish_reason.is_none();
        u32::from(!is_listed && (has_text || is_half))
    }
}

fn read(data: &[u8]) -> Result<Event, StreamError> {
    if data == b"[DONE]" {
        return Ok(Event::Done);
    }
    let foreign = |_| StreamError::Foreign {
        data: String::from_utf8_lossy(data).chars().take(120).collect(),
    };
    let chunk: Chunk<'_> = serde_json::from_slice(data).map_err(foreign)?;
    if let Some(error) = chunk.error.filter(|error| !error.is_null()) {
        let message = error["message"].as_str().map(str::to_owned);
        return Ok(Event::Error(message.unwrap_or_else(|| error.to_string())));
    }
    Ok(Event::Part(Part {
        tokens: chunk.choices.iter().map(Choice::tokens).sum(),
        usage: chunk.usage,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{Strategy, any, prop, proptest};

    fn events(bytes: &[u8], cuts: &[usize]) -> Result<Vec<Event>, StreamError> {
        let mut reader = Reader::default();
        let mut events = Vec::new();
        let mut begin = 0;
        for end in cuts.iter().copied().chain([bytes.len()]) {
            let end = end.clamp(begin, bytes.len());
            reader.push(&bytes[begin..end], |event| events.push(event))?;
            begin = end;
        }
        Ok(events)
    }

    fn tokens(data: &str) -> u32 {
        match read(data.as_bytes()) {
            Ok(Event::Part(part)) => part.tokens,
            other => panic!("{data}: {other:?}"),
        }
    }

    const STREAM: &str = "data: {\"choices\":[{\"text\":\"a\"}]}\r\n\r\n: a comment\n\nevent: x\ndata:{\"choices\":[],\ndata: \"usage\":{\"prompt_tokens\":3,\"completion_tokens\":1,\"prompt_tokens_details\":{\"cached_tokens\":2}}}\n\ndata: [DONE]\n\n";

    #[test]
    fn a_stream_is_read_to_its_end() {
        let events = events(STREAM.as_bytes(), &[]).unwrap();
        assert_eq!(events.len(), 3);
        assert_eq!(
            events[0],
            Event::Part(Part {
                tokens: 1,
                usage: None
            })
        );
        let Event::Part(Part {
            tokens: 0,
            usage: Some(usage),
        }) = events[1]
        else {
            panic!("{:?}", events[1])
        };
        assert_eq!(usage.prompt_tokens, Some(3));
        assert_eq!(usage.completion_tokens, Some(1));
        assert_eq!(usage.cached_tokens(), Some(2));
        assert_eq!(events[2], Event::Done);
    }

    proptest! {
        #[test]
        fn pieces_may_be_cut_anywhere(cuts in prop::collection::vec(any::<u8>().prop_map(usize::from), 0..8)) {
            let mut cuts = cuts;
            cuts.sort_unstable();
            assert_eq!(events(STREAM.as_bytes(), &cuts), events(STREAM.as_bytes(), &[]));
        }
    }

    #[test]
    fn tokens_are_counted_as_the_server_lists_them() {
        assert_eq!(
            tokens(r#"{"choices":[{"text":"","token_ids":[1,2,3],"finish_reason":null}]}"#),
            3
        );
        assert_eq!(tokens(r#"{"choices":[{"text":"ab","token_ids":[]}]}"#), 0);
        assert_eq!(tokens(r#"{"choices":[{"text":"ab","token_ids":null}]}"#), 1);
        assert_eq!(
            tokens(r#"{"choices":[{"text":"","finish_reason":null}]}"#),
            1
        );
        assert_eq!(
            tokens(r#"{"choices":[{"text":"","finish_reason":"length"}]}"#),
            0
        );
        assert_eq!(
            tokens(r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#),
            0
        );
        assert_eq!(
            tokens(r#"{"choices":[{"delta":{"content":"é\"","role":null}}]}"#),
            1
        );
        assert_eq!(
            tokens(r#"{"choices":[{"delta":{"reasoning_content":"so"}}]}"#),
            1
        );
        assert_eq!(
            tokens(r#"{"choices":[{"delta":{},"finish_reason":"stop"}]}"#),
            0
        );
        assert_eq!(tokens(r#"{"choices":[],"usage":null}"#), 0);
    }

    #[test]
    fn errors_are_the_servers_words() {
        let error = |data: &str| read(data.as_bytes()).unwrap();
        assert_eq!(
            error(r#"{"error":{"message":"device lost"}}"#),
            Event::Error("device lost".to_owned())
        );
        assert_eq!(
            error(r#"{"error":"gone"}"#),
            Event::Error("\"gone\"".to_owned())
        );
        let foreign = read(b"<html>").unwrap_err().to_string();
        assert!(foreign.contains("<html>"), "{foreign}");
    }

    #[test]
    fn an_event_without_an_end_is_given_up() {
        let mut reader = Reader::default();
        let piece = vec![b'a'; EVENT_BYTES_MAX];
        reader.push(&piece, |_| {}).unwrap();
        assert_eq!(reader.push(b"a", |_| {}), Err(StreamError::Endless));
    }
}
