//! SentencePiece-like vocabularies (`tokenizer.ggml.model = llama`): pieces with scores, no merges.
//!
//! SentencePiece's BPE joins, again and again, the neighbours whose union has the best score. Written as a list
//! of merges: every way to cut a piece in two known pieces, best piece first. Transformers converts the same
//! files the same way, so both make the same ids.

use std::cmp::Reverse;
use std::collections::HashMap;

use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Replace, Sequence};

use super::error::{TokenizerError, one_line};

/// What stands for a space.
pub(super) const SPACE: char = '\u{2581}';

/// Pieces longer than this are never merged (SentencePiece's own limit is 16 unless the trainer says otherwise).
const MERGED_PIECE_BYTES_MAX: usize = 512;

/// A piece of the vocabulary.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece<'a> {
    pub(super) text: &'a str,
    pub(super) score: f32,
    /// Whether merging may make it; control, byte and unknown pieces are not made that way.
    pub(super) mergeable: bool,
}

/// The model: merges from scores, bytes for what no piece covers.
pub(super) fn model(pieces: &[Piece<'_>], unknown: Option<&str>) -> Result<BPE, TokenizerError> {
    let mut vocab = Vocab::default();
    for (id, piece) in pieces.iter().enumerate() {
        let id = u32::try_from(id).expect("the table bounds the number of tokens");
        vocab.insert(piece.text.to_owned(), id);
    }
    let mut builder = BPE::builder()
        .vocab_and_merges(vocab, merges(pieces))
        .fuse_unk(true)
        .byte_fallback(true);
    if let Some(unknown) = unknown {
        builder = builder.unk_token(unknown.to_owned());
    }
    builder
        .build()
        .map_err(|error| TokenizerError::vocabulary(one_line(&error.to_string())))
}

/// Spaces become [`SPACE`]; with `add_space_prefix` one more stands before each stretch of text.
pub(super) fn normalizer(add_space_prefix: bool) -> NormalizerWrapper {
    let mut steps: Vec<NormalizerWrapper> = Vec::new();
    if add_space_prefix {
        steps.push(Prepend::new(SPACE.to_string()).into());
    }
    let replace = Replace::new(" ", SPACE.to_string()).expect("a plain string is a valid pattern");
    steps.push(replace.into());
    Sequence::new(steps).into()
}

fn merges(pieces: &[Piece<'_>]) -> Merges {
    let known: HashMap<&str, usize> = pieces
        .iter()
        .enumerate()
        .filter(|(_, piece)| piece.mergeable)
        .map(|(id, piece)| (piece.text, id))
        .collect();
    let mut cuts: Vec<(&Piece<'_>, &str, &str)> = Vec::new();
    for piece in pieces.iter().filter(|piece| piece.mergeable) {
        if piece.text.len() > MERGED_PIECE_BYTES_MAX {
            continue;
        }
        let first = cuts.len();
        for (at, _) in piece.text.char_indices().skip(1) {
            let (left, right) = piece.text.split_at(at);
            if known.contains_key(left) && known.contains_key(right) {
                cuts.push((piece, left, right));
            }
        }
        cuts[first..].sort_by_key(|(_, left, right)| (known[left], known[right]));
    }
    cuts.sort_by(
        |(one, one_left, one_right), (other, other_left, other_right)| {
            other.score.total_cmp(&one.score).then_with(|| {
                let one = (one_left.chars().count(), one_right.chars().count());
                let other = (other_left.chars().count(), other_right.chars().count());
                Reverse(one).cmp(&Reverse(other))
            })
        },
    );
    cuts.into_iter()
        .map(|(_, left, right)| (left.to_owned(), right.to_owned()))
        .collect()
}
