//! The one field of a completion that the proxy must understand: a hand-off carries one prompt.
//!
//! Looks at the shape only; whether the text or the token ids make sense is the worker's to say.

use serde_json::value::RawValue;

/// How the prompt has to be sent on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum PromptShape<'a> {
    /// One string or one list of token ids.
    Single,
    /// A list that holds one prompt: this one.
    Unwrapped(&'a str),
}

/// The shape of a raw `prompt` value, or what is wrong with it.
pub(crate) fn shape(raw: &str) -> Result<PromptShape<'_>, String> {
    const EXPECTED: &str = "expected one string or one list of token ids";
    match raw.as_bytes().first() {
        Some(b'"') => return Ok(PromptShape::Single),
        Some(b'[') => {}
        _ => return Err(format!("prompt is {}, {EXPECTED}", excerpt(raw))),
    }
    let inside = raw[1..].trim_start();
    if inside.starts_with(|c: char| c.is_ascii_digit() || c == '-') {
        return Ok(PromptShape::Single);
    }
    let items: Vec<&RawValue> =
        serde_json::from_str(raw).map_err(|error| format!("prompt is not a list: {error}"))?;
    match items.as_slice() {
        [] => Err(format!("prompt is an empty list, {EXPECTED}")),
        [one] if one.get().starts_with(['"', '[']) => Ok(PromptShape::Unwrapped(one.get())),
        [one] => Err(format!("prompt[0] is {}, {EXPECTED}", excerpt(one.get()))),
        many => Err(format!(
            "prompt holds {} prompts, {EXPECTED}; send one request for each",
            many.len()
        )),
    }
}

/// The start of a value, for an error text.
pub(crate) fn excerpt(raw: &str) -> String {
    const CHARS_MAX: usize = 40;
    let mut text: String = raw.chars().take(CHARS_MAX).collect();
    if text.len() < raw.len() {
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_prompt_passes_and_a_list_of_one_is_unwrapped() {
        assert_eq!(shape(r#""hello""#), Ok(PromptShape::Single));
        assert_eq!(shape("[ 1, 2]"), Ok(PromptShape::Single));
        assert_eq!(shape(r#"["a"]"#), Ok(PromptShape::Unwrapped(r#""a""#)));
        assert_eq!(shape("[[1, 2] ]"), Ok(PromptShape::Unwrapped("[1, 2]")));
    }

    #[test]
    fn anything_else_is_named() {
        for (raw, expected) in [
            ("[]", "empty list"),
            (r#"["a","b"]"#, "holds 2 prompts"),
            ("[[1],[2],[3]]", "holds 3 prompts"),
            ("null", "prompt is null"),
            ("7", "prompt is 7"),
            (r#"{"a":1}"#, r#"prompt is {"a":1}"#),
            ("[true]", "prompt[0] is true"),
        ] {
            let error = shape(raw).unwrap_err();
            assert!(error.contains(expected), "{raw}: {error}");
        }
    }
}
