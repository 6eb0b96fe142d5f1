//! The pre-tokenizers that GGUF files name (`tokenizer.ggml.pre`): how a text is cut before byte-level BPE.
//!
//! The expressions are the ones that the models publish in their `tokenizer.json`. Each one cuts the pieces of
//! the one before; what it does not match stays a piece.

use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;

use super::error::{TokenizerError, one_line};

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK3: &str = "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

/// One way of cutting, under all the names that files give it.
#[derive(Debug)]
pub(super) struct PreTokenizer {
    names: &'static [&'static str],
    splits: &'static [&'static str],
    /// A piece that is itself a token stays whole, whatever the merges say.
    pub(super) ignore_merges: bool,
    /// Whether a text begins with BOS where the file does not say.
    pub(super) add_bos: bool,
}

const fn cut(names: &'static [&'static str], splits: &'static [&'static str]) -> PreTokenizer {
    PreTokenizer {
        names,
        splits,
        ignore_merges: false,
        add_bos: false,
    }
}

const ALL: &[PreTokenizer] = &[
    cut(
        &["default"],
        &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    ),
    cut(
        &[
            "gpt-2",
            "phi-2",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "mellum",
            "gigachat",
            "exaone4",
            "granite-docling",
        ],
        &[GPT2],
    ),
    cut(
        &[
            "smollm",
            "starcoder",
            "refact",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
        ],
        &[r"\p{N}", GPT2],
    ),
    PreTokenizer {
        names: &[
            "llama-bpe",
            "llama3",
            "llama-v3",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
        ],
        splits: &[LLAMA3],
        ignore_merges: true,
        add_bos: true,
    },
    cut(&["dbrx", "smaug-bpe", "chatglm-bpe"], &[LLAMA3]),
    PreTokenizer {
        names: &["glm4"],
        splits: &[LLAMA3],
        ignore_merges: true,
        add_bos: false,
    },
    cut(
        &[
            "qwen2",
            "deepseek-r1-qwen",
            "stablelm2",
            "megrez",
            "kormo",
            "hunyuan",
            "solar-open",
            "grok-2",
        ],
        &[QWEN2],
    ),
    cut(&["qwen35"], &[QWEN35]),
    PreTokenizer {
        names: &["tekken"],
        splits: &[TEKKEN],
        ignore_merges: true,
        add_bos: true,
    },
    cut(&["gpt-4o", "llama4"], &[GPT4O]),
    cut(
        &["deepseek-v3", "hunyuan-dense"],
        &[
            r"\p{N}{1,3}",
            r"[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+",
            DEEPSEEK3,
        ],
    ),
    cut(
        &["falcon"],
        &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"],
    ),
];

impl PreTokenizer {
    /// The one of that name.
    pub(super) fn named(name: &str) -> Result<&'static Self, TokenizerError> {
        ALL.iter()
            .find(|one| one.names.contains(&name))
            .ok_or_else(|| TokenizerError::UnknownPreTokenizer {
                name: one_line(name),
                supported: ALL
                    .iter()
                    .flat_map(|one| one.names)
                    .copied()
                    .collect::<Vec<_>>()
                    .join(", "),
            })
    }

    /// The cuts, and the byte alphabet at their end.
    pub(super) fn build(&self) -> PreTokenizerWrapper {
        let mut steps: Vec<PreTokenizerWrapper> = self
            .splits
            .iter()
            .map(|expression| {
                let pattern = SplitPattern::Regex((*expression).to_owned());
                Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
                    .expect("a test compiles every built-in expression")
                    .into()
            })
            .collect();
        steps.push(ByteLevel::new(false, false, false).into());
        Sequence::new(steps).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::byte_level::bytes_of;
    use tokenizers::tokenizer::{
        OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _,
    };

    /// The pieces of a text, as text again.
    fn pieces(name: &str, text: &str) -> Vec<String> {
        let mut cut = PreTokenizedString::from(text);
        PreTokenizer::named(name)
            .expect("a built-in name")
            .build()
            .pre_tokenize(&mut cut)
            .expect("cutting cannot fail");
        cut.get_splits(OffsetReferential::Normalized, OffsetType::Byte)
            .into_iter()
            .map(|(piece, _, _)| {
                String::from_utf8(bytes_of(piece)).expect("pieces end at characters")
            })
            .collect()
    }

    #[track_caller]
    fn check(name: &str, text: &str, expected: &[&str]) {
        assert_eq!(pieces(name, text), expected, "{name}: {text:?}");
    }

    #[test]
    fn every_expression_compiles_and_every_name_is_unique() {
        let mut names: Vec<&str> = ALL.iter().flat_map(|one| one.names).copied().collect();
        for one in ALL {
            one.build();
        }
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn no_text_is_lost() {
        let text = "a1 \t\n\r\n  日本語 123456 don't DON'T «é» e\u{301} 😀👩‍🚀 $x+=1; \u{a0}end  ";
        for one in ALL {
            assert_eq!(
                pieces(one.names[0], text).concat(),
                text,
                "{}",
                one.names[0]
            );
        }
    }

    #[test]
    fn an_unknown_name_is_named() {
        let error = PreTokenizer::named("nonsense\n2").expect_err("unknown");
        let text = error.to_string();
        assert!(
            text.starts_with("gguf pre-tokenizer `nonsense 2` is not supported"),
            "{text}"
        );
        assert!(text.contains("llama-bpe") && !text.contains('\n'), "{text}");
    }

    #[test]
    fn digits() {
        check("llama-bpe", "1234567", &["123", "456", "7"]);
        check("llama-bpe", "a 12", &["a", " ", "12"]);
        check("qwen2", "1234", &["1", "2", "3", "4"]);
        check("qwen2", "a 12", &["a", " ", "1", "2"]);
        check("gpt-2", "a 1234", &["a", " 1234"]);
        check("smollm", "a 12", &["a", " ", "1", "2"]);
        check("default", "12345", &["123", "45"]);
        check("tekken", "2024", &["2", "0", "2", "4"]);
        check("gpt-4o", "2024", &["202", "4"]);
    }

    #[test]
    fn contractions() {
        check(
            "llama-bpe",
            "don't I'LL we'Ve",
            &["don", "'t", " I", "'LL", " we", "'Ve"],
        );
        check("qwen2", "it's 'tis", &["it", "'s", " '", "tis"]);
        check("gpt-2", "I'LL it's", &["I", "'", "LL", " it", "'s"]);
        check("tekken", "don't", &["don", "'t"]);
        check("gpt-4o", "don't", &["don't"]);
    }

    #[test]
    fn newlines_and_spaces() {
        check("llama-bpe", "a\n\nb", &["a", "\n\n", "b"]);
        check("llama-bpe", "a  \n  b", &["a", "  \n", " ", " b"]);
        check("llama-bpe", "x;\n\ny", &["x", ";\n\n", "y"]);
        check("llama-bpe", "a   b", &["a", "  ", " b"]);
        check("llama-bpe", "a\tb", &["a", "\tb"]);
        check("llama-bpe", "a \r\n", &["a", " \r\n"]);
        check("llama-bpe", "end  ", &["end", "  "]);
        check("qwen2", "}\r\n\r\n", &["}\r\n\r\n"]);
        check("gpt-2", "a\n\nb", &["a", "\n", "\n", "b"]);
        check("gpt-2", "a \n b", &["a", " \n", " b"]);
        check("tekken", "a/\n//", &["a", "/\n//"]);
    }

    #[test]
    fn other_scripts_and_symbols() {
        check("llama-bpe", "日本語。テスト", &["日本語", "。テスト"]);
        check("qwen2", "中文123", &["中文", "1", "2", "3"]);
        check("llama-bpe", "\u{a0}é", &["\u{a0}é"]);
        check("llama-bpe", "hi😀 ok", &["hi", "😀", " ok"]);
        check("llama-bpe", "½²", &["½²"]);
        check("qwen2", "½²", &["½", "²"]);
        check(
            "tekken",
            "HelloWorld HTMLParser",
            &["Hello", "World", " HTMLParser"],
        );
        check("deepseek-v3", "日本語abc", &["日本語", "abc"]);
    }
}
