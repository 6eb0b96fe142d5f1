//! Reads a JSON object field by field, so that every mistake is answered with the field's name.
//!
//! Values stay text until their field is asked for: a body of millions of tokens becomes one vector of numbers,
//! never a tree of them. Fields that nobody asked for are errors, with the nearest name that exists.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use crate::server::error::ApiError;

/// Longest part of an offending value that an error message shows.
const SHOWN_CHARS_MAX: usize = 48;

/// Similarity from which an unknown name is taken for a misspelling.
const SIMILARITY_MIN: f64 = 0.7;

/// The fields of one object.
#[derive(Debug)]
pub(super) struct Fields<'a> {
    values: BTreeMap<String, &'a RawValue>,
    known: Vec<&'static str>,
}

/// What a JSON value is, told from its first character.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Null,
    Bool,
    Number,
    Text,
    List,
    Object,
}

/// The kind of a value.
pub(super) fn kind(raw: &RawValue) -> Kind {
    match raw.get().as_bytes().first() {
        Some(b'"') => Kind::Text,
        Some(b'[') => Kind::List,
        Some(b'{') => Kind::Object,
        Some(b't' | b'f') => Kind::Bool,
        Some(b'n') => Kind::Null,
        _ => Kind::Number,
    }
}

/// The value as an error message shows it.
pub(super) fn shown(raw: &RawValue) -> String {
    let mut chars = raw.get().chars();
    let mut text: String = chars.by_ref().take(SHOWN_CHARS_MAX).collect();
    if chars.next().is_some() {
        text.push('…');
    }
    text
}

/// Reads a value that was taken with [`Fields::raw`].
pub(super) fn parse<T: DeserializeOwned>(
    name: &str,
    raw: &RawValue,
    expected: &str,
) -> Result<T, ApiError> {
    serde_json::from_str(raw.get()).map_err(|_| wrong_type(name, raw, expected))
}

/// The 400 for a value of the wrong type.
pub(super) fn wrong_type(name: &str, raw: &RawValue, expected: &str) -> ApiError {
    ApiError::field(name, format!("expected {expected}, got {}", shown(raw)))
}

impl<'a> Fields<'a> {
    /// The fields of a body.
    pub(super) fn read(body: &'a [u8]) -> Result<Self, ApiError> {
        let text = std::str::from_utf8(body).map_err(|error| {
            ApiError::bad_request(format!("the request body is not utf-8: {error}"))
        })?;
        let values = serde_json::from_str(text).map_err(|error| {
            ApiError::bad_request(format!("the request body is not a json object: {error}"))
        })?;
        Ok(Self {
            values,
            known: Vec::new(),
        })
    }

    /// Takes a field as it stands; `null` counts as absent.
    pub(super) fn raw(&mut self, name: &'static str) -> Option<&'a RawValue> {
        self.known.push(name);
        self.values
            .remove(name)
            .filter(|raw| kind(raw) != Kind::Null)
    }

    /// Takes a field; `expected` completes "expected …" when it is something else.
    pub(super) fn take<T: DeserializeOwned>(
        &mut self,
        name: &'static str,
        expected: &str,
    ) -> Result<Option<T>, ApiError> {
        self.raw(name)
            .map(|raw| parse(name, raw, expected))
            .transpose()
    }

    /// Takes a truth value.
    pub(super) fn bool(&mut self, name: &'static str, default: bool) -> Result<bool, ApiError> {
        Ok(self.take(name, "true or false")?.unwrap_or(default))
    }

    /// Takes a string.
    pub(super) fn text(&mut self, name: &'static str) -> Result<Option<String>, ApiError> {
        self.take(name, "a string")
    }

    /// Takes a whole number within bounds.
    pub(super) fn count(
        &mut self,
        name: &'static str,
        min: u32,
        max: u32,
    ) -> Result<Option<u32>, ApiError> {
        let expected = if max == u32::MAX {
            format!("a whole number of at least {min}")
        } else {
            format!("a whole number from {min} to {max}")
        };
        let Some(raw) = self.raw(name) else {
            return Ok(None);
        };
        match parse::<u32>(name, raw, &expected)? {
            value if (min..=max).contains(&value) => Ok(Some(value)),
            _ => Err(wrong_type(name, raw, &expected)),
        }
    }

    /// Takes a number that `accepts` agrees with.
    pub(super) fn number(
        &mut self,
        name: &'static str,
        expected: &str,
        accepts: fn(f64) -> bool,
    ) -> Result<Option<f32>, ApiError> {
        let Some(raw) = self.raw(name) else {
            return Ok(None);
        };
        let value: f64 = parse(name, raw, expected)?;
        if !value.is_finite() || !accepts(value) {
            return Err(wrong_type(name, raw, expected));
        }
        narrowed(value)
            .map(Some)
            .ok_or_else(|| wrong_type(name, raw, expected))
    }

    /// Refuses a field unless it is absent, null or one of its neutral values.
    pub(super) fn neutral(
        &mut self,
        name: &'static str,
        neutral: &[&str],
        why: &str,
    ) -> Result<(), ApiError> {
        let Some(raw) = self.raw(name) else {
            return Ok(());
        };
        let value: Option<serde_json::Value> = serde_json::from_str(raw.get()).ok();
        let is_neutral = neutral
            .iter()
            .any(|text| value == serde_json::from_str(text).ok());
        if is_neutral {
            return Ok(());
        }
        let also = match neutral.first() {
            Some(value) => format!("; leave it out or set it to {value}"),
            None => "; leave it out".to_owned(),
        };
        Err(ApiError::field(
            name,
            format!("{why}, got {}{also}", shown(raw)),
        ))
    }

    /// Ends the reading: whatever was not asked for is unknown.
    pub(super) fn finish(self) -> Result<(), ApiError> {
        let Some(name) = self.values.keys().next() else {
            return Ok(());
        };
        let shown: String = name.chars().take(SHOWN_CHARS_MAX).collect();
        let nearest = self
            .known
            .iter()
            .map(|known| (strsim::jaro_winkler(known, &shown), *known))
            .filter(|(similarity, _)| *similarity >= SIMILARITY_MIN)
            .max_by(|a, b| a.0.total_cmp(&b.0));
        let hint = nearest.map_or_else(String::new, |(_, known)| {
            format!("; did you mean `{known}`?")
        });
        Err(ApiError::field(&shown, format!("unknown field{hint}")))
    }
}

/// The number in single precision, unless it is too large for it.
fn narrowed(value: f64) -> Option<f32> {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "losing precision is meant; overflow is checked"
    )]
    let narrow = value as f32;
    narrow.is_finite().then_some(narrow)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(result: Result<impl std::fmt::Debug, ApiError>) -> String {
        result.unwrap_err().message
    }

    #[test]
    fn an_unknown_field_is_named_with_the_nearest() {
        let mut fields = Fields::read(br#"{"temprature": 1}"#).unwrap();
        fields.number("temperature", "a number", |_| true).unwrap();
        fields.text("model").unwrap();
        assert_eq!(
            message(fields.finish()),
            "`temprature`: unknown field; did you mean `temperature`?"
        );
    }

    #[test]
    fn a_wrong_type_shows_expectation_and_value() {
        let mut fields = Fields::read(br#"{"n": "two", "top_p": 1e999, "m": 3.5}"#).unwrap();
        assert_eq!(
            message(fields.count("n", 1, 8)),
            "`n`: expected a whole number from 1 to 8, got \"two\""
        );
        assert_eq!(
            message(fields.number("top_p", "a number", |_| true)),
            "`top_p`: expected a number, got 1e999"
        );
        assert_eq!(
            message(fields.count("m", 0, u32::MAX)),
            "`m`: expected a whole number of at least 0, got 3.5"
        );
    }

    #[test]
    fn numbers_that_single_precision_cannot_hold_are_refused() {
        let mut fields = Fields::read(br#"{"a": 1e39}"#).unwrap();
        assert!(fields.number("a", "a number", |_| true).is_err());
    }

    #[test]
    fn neutral_values_pass_and_others_are_named() {
        let mut fields = Fields::read(br#"{"a": null, "b": { }, "c": 1.0, "d": [1]}"#).unwrap();
        for (name, neutral) in [("a", "{}"), ("b", "{}"), ("c", "1.0")] {
            fields.neutral(name, &[neutral], "not served").unwrap();
        }
        assert_eq!(
            message(fields.neutral("d", &[], "is not served")),
            "`d`: is not served, got [1]; leave it out"
        );
    }

    #[test]
    fn deep_nesting_is_an_error_and_not_a_crash() {
        let deep = format!("{{\"a\": {}{}}}", "[".repeat(100_000), "]".repeat(100_000));
        let mut fields = Fields::read(deep.as_bytes()).unwrap();
        assert!(fields.take::<serde_json::Value>("a", "json").is_err());
    }
}
