//! A JSON object in light form: members in order, keys as text, values as the raw text they came in.
//!
//! Checks that the text is JSON and nothing more. Unknown members, number spellings and order survive; a value
//! costs no more than finding its end.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// Members of a JSON object, in order, duplicates kept.
#[derive(Debug, Clone, Default)]
pub(crate) struct RawObject<'a> {
    members: Vec<(Cow<'a, str>, Cow<'a, str>)>,
}

impl<'a> RawObject<'a> {
    /// Reads one JSON object that takes up all of `text`.
    pub(crate) fn parse(text: &'a [u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(text)
    }

    /// The raw value of a member; the last one where a name is repeated, as JSON readers do.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.members
            .iter()
            .rev()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_ref())
    }

    /// As [`RawObject::get`], but `null` counts as absent.
    pub(crate) fn get_set(&self, name: &str) -> Option<&str> {
        self.get(name).filter(|value| *value != "null")
    }

    /// Replaces a member where it stands, or appends it.
    pub(crate) fn set(&mut self, name: &'a str, value: impl Into<Cow<'a, str>>) {
        let value = value.into();
        match self.members.iter().position(|(key, _)| key == name) {
            Some(first) => {
                self.members[first].1 = value;
                let mut index = 0;
                self.members.retain(|(key, _)| {
                    index += 1;
                    key != name || index - 1 == first
                });
            }
            None => self.members.push((Cow::Borrowed(name), value)),
        }
    }

    /// Removes every member of that name.
    pub(crate) fn remove(&mut self, name: &str) {
        self.members.retain(|(key, _)| key != name);
    }

    /// The object as text, without the members named in `without` and with `extra` (name, raw value) at the end.
    pub(crate) fn write(&self, without: &[&str], extra: &[(&str, &str)]) -> Vec<u8> {
        let size: usize = self
            .members
            .iter()
            .map(|(key, value)| key.len() + value.len() + 4)
            .sum();
        let extra_size: usize = extra
            .iter()
            .map(|(key, value)| key.len() + value.len() + 4)
            .sum();
        let mut out = Vec::with_capacity(size + extra_size + 2);
        out.push(b'{');
        let kept = self
            .members
            .iter()
            .filter(|(key, _)| !without.contains(&key.as_ref()))
            .map(|(key, value)| (key.as_ref(), value.as_ref()));
        for (key, value) in kept.chain(extra.iter().copied()) {
            if out.len() > 1 {
                out.push(b',');
            }
            write_string(&mut out, key);
            out.push(b':');
            out.extend_from_slice(value.as_bytes());
        }
        out.push(b'}');
        out
    }

    /// The whole object as text.
    pub(crate) fn to_text(&self) -> String {
        String::from_utf8(self.write(&[], &[]))
            .expect("members are UTF-8 and so is what joins them")
    }
}

fn write_string(out: &mut Vec<u8>, text: &str) {
    serde_json::to_writer(out, text).expect("writing a string to memory does not fail");
}

impl<'de: 'a, 'a> Deserialize<'de> for RawObject<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Members)
    }
}

#[derive(serde::Deserialize)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

struct Members;

impl<'de> Visitor<'de> for Members {
    type Value = RawObject<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut members = Vec::with_capacity(16);
        while let Some(Key(key)) = map.next_key()? {
            let value: &RawValue = map.next_value()?;
            members.push((key, Cow::Borrowed(value.get())));
        }
        Ok(RawObject { members })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    #[test]
    fn keeps_order_spelling_and_unknown_members() {
        let text = br#"{"b": 1.50e1, "a\n": [1, 2 ,{"x":null}], "b2": "\u00e9"}"#;
        let object = RawObject::parse(text).unwrap();
        assert_eq!(
            object.to_text(),
            r#"{"b":1.50e1,"a\n":[1, 2 ,{"x":null}],"b2":"\u00e9"}"#
        );
    }

    #[test]
    fn set_replaces_every_duplicate_and_get_takes_the_last() {
        let mut object = RawObject::parse(br#"{"a":1,"b":2,"a":3}"#).unwrap();
        assert_eq!(object.get("a"), Some("3"));
        object.set("a", "4");
        object.set("c", "5");
        assert_eq!(object.to_text(), r#"{"a":4,"b":2,"c":5}"#);
        object.remove("b");
        assert_eq!(object.write(&["a"], &[("d", "6")]), br#"{"c":5,"d":6}"#);
    }

    #[test]
    fn refuses_what_is_not_one_object() {
        for bad in [
            &b""[..],
            b"[]",
            b"1",
            b"{",
            b"{}{}",
            b"{\"a\":}",
            b"{\"a\":1,}",
            b"{\"a\":\"\xff\"}",
        ] {
            assert!(RawObject::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn deep_nesting_costs_no_stack() {
        let depth = 200_000;
        let text = format!("{{\"a\":{}{}}}", "[".repeat(depth), "]".repeat(depth));
        let object = RawObject::parse(text.as_bytes()).unwrap();
        assert_eq!(object.get("a").map(str::len), Some(2 * depth));
    }

    proptest! {
        #[test]
        fn rewriting_means_the_same(pairs in prop::collection::vec((".{0,8}", ".{0,12}"), 0..8)) {
            let map: serde_json::Map<String, Value> =
                pairs.into_iter().map(|(key, value)| (key, Value::String(value))).collect();
            let text = Value::Object(map).to_string();
            let object = RawObject::parse(text.as_bytes()).unwrap();
            let again: Value = serde_json::from_str(&object.to_text()).unwrap();
            prop_assert_eq!(again, serde_json::from_str::<Value>(&text).unwrap());
        }
    }
}
