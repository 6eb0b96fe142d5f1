//! The variables that are looked at: a value, so that recorded environments are as good as the process's own.

use std::collections::BTreeMap;

use super::RankError;

/// A sorted set of environment variables.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Environment {
    variables: BTreeMap<String, String>,
}

/// A number and the variable that it comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Named {
    pub(super) name: &'static str,
    pub(super) value: u32,
}

impl Named {
    /// The size beside a rank when no variable gives one: 1 for rank 0, as existing launch scripts have it.
    pub(super) fn world_of_one(
        self,
        wanted: &'static [&'static str],
        hint: &'static str,
    ) -> Result<Self, RankError> {
        if self.value == 0 {
            return Ok(Self {
                name: wanted[0],
                value: 1,
            });
        }
        Err(RankError::NoSize {
            rank_name: self.name,
            rank: self.value,
            wanted,
            hint,
        })
    }
}

impl Environment {
    /// The process's own variables. What is not UTF-8 is none of the launchers' doing and is kept with replacements.
    pub(crate) fn of_process() -> Self {
        let lossy = |text: std::ffi::OsString| text.to_string_lossy().into_owned();
        let own = std::env::vars_os().map(|(name, value)| (lossy(name), lossy(value)));
        Self {
            variables: own.collect(),
        }
    }

    /// Variables from elsewhere.
    #[cfg(test)]
    pub(crate) fn from_pairs<N: Into<String>, V: Into<String>>(
        pairs: impl IntoIterator<Item = (N, V)>,
    ) -> Self {
        let pairs = pairs
            .into_iter()
            .map(|(name, value)| (name.into(), value.into()));
        Self {
            variables: pairs.collect(),
        }
    }

    /// A variable's value without white space around it; an empty one is as good as none.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        let value = self.variables.get(name)?.trim();
        (!value.is_empty()).then_some(value)
    }

    /// Whether a variable is there at all, empty or not.
    pub(crate) fn is_set(&self, name: &str) -> bool {
        self.variables.contains_key(name)
    }

    pub(super) fn text(&self, name: &str) -> Option<String> {
        self.get(name).map(str::to_owned)
    }

    /// The first of several names that is set.
    pub(super) fn first(&self, names: &[&'static str]) -> Option<(&'static str, &str)> {
        names
            .iter()
            .find_map(|name| self.get(name).map(|value| (*name, value)))
    }

    pub(super) fn has_prefix(&self, prefix: &str) -> bool {
        let from = self.variables.range(prefix.to_owned()..);
        from.take_while(|(name, _)| name.starts_with(prefix))
            .any(|(_, value)| !value.trim().is_empty())
    }

    /// The number in the first of several variables that is set.
    pub(super) fn number(&self, names: &[&'static str]) -> Result<Option<Named>, RankError> {
        let Some((name, value)) = self.first(names) else {
            return Ok(None);
        };
        match value.parse() {
            Ok(value) => Ok(Some(Named { name, value })),
            Err(_) => Err(RankError::NotANumber {
                name,
                value: value.to_owned(),
            }),
        }
    }
}
