//! The decoder of `tokenizer.json`, as a rule for one token at a time: which bytes it stands for, and what is
//! taken off the start of the whole.

use serde_json::Value;

use super::byte_level::{bytes_of, fallback_byte};
use super::detokenizer::LeadingStrip;
use super::error::TokenizerError;

/// One step of making a token's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    ByteLevel,
    ByteFallback,
    Replace {
        from: String,
        to: String,
    },
    /// Up to so many of a character off both ends of each token.
    StripEach {
        character: char,
        start: usize,
        stop: usize,
    },
}

/// The whole decoder.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct DecodeRule {
    steps: Vec<Step>,
    pub(super) leading_strip: LeadingStrip,
    fused: bool,
}

impl DecodeRule {
    /// Reads the serialised decoder; `null` where there is none.
    pub(super) fn read(decoder: &Value) -> Result<Self, TokenizerError> {
        let mut rule = Self::default();
        rule.add(decoder)?;
        Ok(rule)
    }

    /// The bytes of a token of the model (not of an added one, whose text is taken as it is).
    pub(super) fn bytes(&self, token: &str) -> Vec<u8> {
        let mut text = token.to_owned();
        for step in &self.steps {
            match step {
                Step::ByteLevel => return bytes_of(&text),
                Step::ByteFallback => {
                    if let Some(byte) = fallback_byte(&text) {
                        return vec![byte];
                    }
                }
                Step::Replace { from, to } => text = text.replace(from.as_str(), to),
                Step::StripEach {
                    character,
                    start,
                    stop,
                } => {
                    text = strip_ends(&text, *character, *start, *stop).to_owned();
                }
            }
        }
        text.into_bytes()
    }

    fn add(&mut self, decoder: &Value) -> Result<(), TokenizerError> {
        let name = decoder["type"].as_str().unwrap_or("none");
        let unsupported = || TokenizerError::UnsupportedDecoder {
            name: name.to_owned(),
        };
        let text = |key: &str| decoder[key].as_str().ok_or_else(unsupported);
        match name {
            "Sequence" => {
                for part in decoder["decoders"].as_array().ok_or_else(unsupported)? {
                    self.add(part)?;
                }
            }
            "Fuse" => self.fused = true,
            "ByteLevel" => self.steps.push(Step::ByteLevel),
            "ByteFallback" => self.steps.push(Step::ByteFallback),
            "Replace" => {
                let from = decoder["pattern"]["String"].as_str();
                let from = from
                    .filter(|from| !from.is_empty())
                    .ok_or_else(unsupported)?;
                self.steps.push(Step::Replace {
                    from: from.to_owned(),
                    to: text("content")?.to_owned(),
                });
            }
            "Strip" => self.add_strip(decoder).ok_or_else(unsupported)?,
            "Metaspace" => {
                self.steps.push(Step::Replace {
                    from: text("replacement")?.to_owned(),
                    to: " ".to_owned(),
                });
                let prepends = decoder["prepend_scheme"] != "never";
                self.leading_strip = LeadingStrip {
                    character: ' ',
                    count: usize::from(prepends),
                };
            }
            _ => return Err(unsupported()),
        }
        Ok(())
    }

    /// After `Fuse` it acts on the whole text, of which only the start can be known as it comes.
    fn add_strip(&mut self, decoder: &Value) -> Option<()> {
        let mut characters = decoder["content"].as_str()?.chars();
        let character = characters.next().filter(|_| characters.next().is_none())?;
        let count = |key: &str| usize::try_from(decoder[key].as_u64()?).ok();
        let (start, stop) = (count("start")?, count("stop")?);
        if !self.fused {
            self.steps.push(Step::StripEach {
                character,
                start,
                stop,
            });
            return Some(());
        }
        self.leading_strip = LeadingStrip {
            character,
            count: start,
        };
        (stop == 0).then_some(())
    }
}

fn strip_ends(text: &str, character: char, start: usize, stop: usize) -> &str {
    let mut rest = text;
    for _ in 0..start.min(text.len()) {
        rest = rest.strip_prefix(character).unwrap_or(rest);
    }
    for _ in 0..stop.min(text.len()) {
        rest = rest.strip_suffix(character).unwrap_or(rest);
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn llama_2_style() {
        let rule = DecodeRule::read(&json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}))
        .expect("supported");
        assert_eq!(rule.bytes("▁the▁"), b" the ");
        assert_eq!(rule.bytes("<0x0A>"), b"\n");
        assert_eq!(
            rule.leading_strip,
            LeadingStrip {
                character: ' ',
                count: 1
            }
        );
    }

    #[test]
    fn byte_level_and_metaspace() {
        let rule = DecodeRule::read(&json!({"type": "ByteLevel"})).expect("supported");
        assert_eq!(rule.bytes("Ġhi"), b" hi");
        assert_eq!(rule.leading_strip.count, 0);
        let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"});
        let rule = DecodeRule::read(&metaspace).expect("supported");
        assert_eq!(rule.bytes("▁hi"), b" hi");
        assert_eq!(rule.leading_strip.count, 1);
        let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"});
        assert_eq!(
            DecodeRule::read(&metaspace)
                .expect("supported")
                .leading_strip
                .count,
            0
        );
    }

    #[test]
    fn a_strip_before_fuse_acts_on_each_token() {
        let strip = json!({"type": "Strip", "content": "_", "start": 1, "stop": 2});
        let rule = DecodeRule::read(&strip).expect("supported");
        assert_eq!(rule.bytes("__a___"), b"_a_");
        assert_eq!(rule.bytes("_"), b"");
    }

    #[test]
    fn what_cannot_be_done_token_by_token_is_named() {
        for (decoder, name) in [
            (json!(null), "none"),
            (
                json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
                "WordPiece",
            ),
            (
                json!({"type": "Replace", "pattern": {"Regex": "a+"}, "content": ""}),
                "Replace",
            ),
            (
                json!({"type": "Sequence", "decoders": [{"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 0, "stop": 1}]}),
                "Strip",
            ),
        ] {
            let error = DecodeRule::read(&decoder)
                .expect_err("unsupported")
                .to_string();
            assert!(
                error.starts_with(&format!("decoder `{name}` of tokenizer.json")),
                "{error}"
            );
        }
    }
}
