//! Variables that a native library knows by another name than the scripts of our users: the process starts itself again,
//! in place, with both names set. Its children inherit them.
//!
//! A library reads the environment of its process, and a process may not change its own once it has threads. So it does
//! nothing where nothing is missing, which is nearly always.

use std::convert::Infallible;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::Context;

/// The name in scripts, and the one that the library reads.
const ALIASES: &[(&str, &str)] = &[("NIXL_PLUGINS_DIR", "NIXL_PLUGIN_DIR")];

/// Returns when the environment is complete. Called before anything has been started.
///
/// # Errors
/// When the process cannot start itself again.
pub(crate) fn complete() -> anyhow::Result<()> {
    let missing = missing(|name| std::env::var_os(name).filter(|value| !value.is_empty()));
    if missing.is_empty() {
        return Ok(());
    }
    match start_again(missing)? {}
}

fn start_again(variables: Vec<(&'static str, OsString)>) -> anyhow::Result<Infallible> {
    let own = std::env::current_exe().context("cannot find this program's file")?;
    let mut words = std::env::args_os();
    let mut command = Command::new(&own);
    if let Some(name) = words.next() {
        command.arg0(name);
    }
    let error = command.args(words).envs(variables).exec();
    Err(error).with_context(|| format!("cannot start {} again", own.display()))
}

/// What must be added to the environment.
fn missing(value: impl Fn(&str) -> Option<OsString>) -> Vec<(&'static str, OsString)> {
    let aliases = ALIASES.iter().filter(|(_, read)| value(read).is_none());
    aliases
        .filter_map(|(given, read)| Some((*read, value(given)?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_given_and_not_known_by_its_name_is_added() {
        let of = |known: &'static [(&str, &str)]| {
            missing(move |name| {
                let found = known.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| OsString::from(value))
            })
        };
        assert_eq!(of(&[]), []);
        let added = [("NIXL_PLUGIN_DIR", OsString::from("/p"))];
        assert_eq!(of(&[("NIXL_PLUGINS_DIR", "/p")]), added);
        let both = &[("NIXL_PLUGINS_DIR", "/p"), ("NIXL_PLUGIN_DIR", "/q")];
        assert_eq!(of(both), []);
    }
}
