//! GPT-2's byte alphabet: every byte has one printable character, so that BPE can work on text.

/// The byte that a character of the alphabet stands for.
fn byte_of(character: char) -> Option<u8> {
    let code = u32::from(character);
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => u8::try_from(code).ok(),
        // The bytes that are not printable follow from 256 on, in their own order.
        0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        0x121..=0x142 => u8::try_from(code - 0x121 + 0x7f).ok(),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// The bytes of a token written in the alphabet. A token with any other character stands for its own text.
pub(super) fn bytes_of(token: &str) -> Vec<u8> {
    token
        .chars()
        .map(byte_of)
        .collect::<Option<Vec<u8>>>()
        .unwrap_or_else(|| token.as_bytes().to_vec())
}

/// The byte that a byte-fallback token such as `<0x0A>` stands for.
pub(super) fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let plain = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    plain.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    #[test]
    fn the_alphabet_covers_each_byte_once() {
        let mut bytes: Vec<u8> = ByteLevel::alphabet()
            .into_iter()
            .map(|character| byte_of(character).expect("a character of the alphabet"))
            .collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!(bytes_of("Ġthe"), b" the");
        assert_eq!(bytes_of("Ċ"), b"\n");
        assert_eq!(bytes_of("âŃ¢"), "⭢".as_bytes());
    }

    #[test]
    fn other_text_is_taken_as_it_is() {
        assert_eq!(bytes_of("<｜end｜>"), "<｜end｜>".as_bytes());
        assert_eq!(byte_of(' '), None);
        assert_eq!(byte_of('\u{144}'), None);
    }

    #[test]
    fn fallback_tokens_are_recognised_exactly() {
        assert_eq!(fallback_byte("<0x0A>"), Some(10));
        assert_eq!(fallback_byte("<0xff>"), Some(255));
        for other in ["<0x>", "<0x+1>", "<0x100>", "0x0A", "<0x0A", "<0xäö>"] {
            assert_eq!(fallback_byte(other), None, "{other}");
        }
    }
}
