//! What each token stands for: its bytes, and whether it is shown. One arena, so that a lookup is two loads.

use std::fmt;

use super::error::TokenizerError;
use crate::backend::TokenId;

/// More tokens than any real vocabulary has (the largest known hold 262,144).
pub(super) const TOKENS_MAX: usize = 1 << 22;
/// More bytes than any real token has.
pub(super) const TOKEN_BYTES_MAX: usize = 1 << 14;
/// More bytes than all tokens of any real vocabulary have together.
const ARENA_BYTES_MAX: usize = 1 << 26;

/// How a token is treated when ids become text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenKind {
    /// Ordinary text.
    Text,
    /// A control token: shown only where special tokens are not skipped.
    Special,
    /// A hole in the vocabulary: no text at all.
    Unused,
}

/// The bytes and kind of every token.
#[derive(Default)]
pub(super) struct TokenTable {
    arena: Vec<u8>,
    ends: Vec<u32>,
    kinds: Vec<TokenKind>,
}

impl fmt::Debug for TokenTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TokenTable({} tokens)", self.len())
    }
}

impl TokenTable {
    /// Appends the next token.
    pub(super) fn push(&mut self, bytes: &[u8], kind: TokenKind) -> Result<(), TokenizerError> {
        let id = self.kinds.len();
        if id >= TOKENS_MAX {
            return Err(TokenizerError::vocabulary(format!(
                "more than {TOKENS_MAX} tokens"
            )));
        }
        if bytes.len() > TOKEN_BYTES_MAX {
            return Err(TokenizerError::vocabulary(format!(
                "token {id} has {} bytes (at most {TOKEN_BYTES_MAX})",
                bytes.len()
            )));
        }
        let end = self.arena.len() + bytes.len();
        if end > ARENA_BYTES_MAX {
            return Err(TokenizerError::vocabulary(format!(
                "the tokens' text is longer than {ARENA_BYTES_MAX} bytes"
            )));
        }
        self.arena.extend_from_slice(bytes);
        self.ends
            .push(u32::try_from(end).expect("ARENA_BYTES_MAX fits u32"));
        self.kinds.push(kind);
        Ok(())
    }

    /// One more than the highest id.
    pub(super) fn len(&self) -> usize {
        self.kinds.len()
    }

    /// A token's bytes; none for an id outside the vocabulary.
    pub(super) fn bytes(&self, id: TokenId) -> &[u8] {
        let index = id as usize;
        let Some(&end) = self.ends.get(index) else {
            return &[];
        };
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.arena[start as usize..end as usize]
    }

    /// A token's kind; an id outside the vocabulary is unused.
    pub(super) fn kind(&self, id: TokenId) -> TokenKind {
        self.kinds
            .get(id as usize)
            .copied()
            .unwrap_or(TokenKind::Unused)
    }
}
