//! Where NIXL is looked for, and which of its plug-ins is asked for. Pure but for look-ups of the environment.

use std::ffi::{CStr, OsString};
use std::path::{Path, PathBuf};

/// Names the library's path; without it the system's library path is searched for [`NAME`].
pub(super) const LIBRARY_VARIABLE: &str = "BATON_NIXL_LIBRARY";

/// The library's file.
pub(super) const NAME: &str = "libnixl_capi.so";

/// Chooses the plug-in.
pub(super) const PLUGIN_VARIABLE: &str = "TRTLLM_NIXL_KVCACHE_BACKEND";

/// Where NIXL itself looks for plug-ins, before the folder `plugins` beside its library.
const PLUGIN_FOLDER_VARIABLE: &str = "NIXL_PLUGIN_DIR";

/// Which of NIXL's plug-ins moves the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Plugin {
    Ucx,
    Libfabric,
}

impl Plugin {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Ucx => "UCX",
            Self::Libfabric => "LIBFABRIC",
        }
    }

    pub(super) const fn c_name(self) -> &'static CStr {
        match self {
            Self::Ucx => c"UCX",
            Self::Libfabric => c"LIBFABRIC",
        }
    }

    /// Its number on the wire.
    pub(super) const fn number(self) -> u8 {
        match self {
            Self::Ucx => 0,
            Self::Libfabric => 1,
        }
    }

    pub(super) fn of_number(number: u8) -> Option<Self> {
        let known = [Self::Ucx, Self::Libfabric];
        known.into_iter().find(|plugin| plugin.number() == number)
    }

    /// What the environment's value asks for; the error says what is wrong with it. Nothing is UCX.
    fn parse(value: &str) -> Result<Self, String> {
        let value = value.trim();
        let known = [Self::Ucx, Self::Libfabric];
        if value.is_empty() {
            return Ok(Self::Ucx);
        }
        known
            .into_iter()
            .find(|plugin| plugin.name().eq_ignore_ascii_case(value))
            .ok_or_else(|| format!("`{value}` is neither UCX nor LIBFABRIC"))
    }

    /// What this process's environment asks for.
    pub(super) fn asked_for() -> Result<Self, String> {
        let value = std::env::var_os(PLUGIN_VARIABLE).unwrap_or_default();
        Self::parse(&value.to_string_lossy())
    }

    /// Its file, where NIXL would look for it.
    pub(super) fn file(self, library: &Path) -> PathBuf {
        self.file_in(std::env::var_os(PLUGIN_FOLDER_VARIABLE), library)
    }

    fn file_in(self, folder: Option<OsString>, library: &Path) -> PathBuf {
        let beside = || library.parent().map(|parent| parent.join("plugins"));
        let folder = folder
            .filter(|folder| !folder.is_empty())
            .map(PathBuf::from)
            .or_else(beside)
            .unwrap_or_default();
        folder.join(format!("libplugin_{}.so", self.name()))
    }
}

/// The library's path, or its bare name for the system to find.
pub(super) fn library() -> PathBuf {
    library_of(std::env::var_os(LIBRARY_VARIABLE))
}

fn library_of(named: Option<OsString>) -> PathBuf {
    let named = named.filter(|named| !named.is_empty());
    named.map_or_else(|| PathBuf::from(NAME), PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_is_the_one_that_is_named_or_the_systems() {
        assert_eq!(library_of(Some("/n/x.so".into())), Path::new("/n/x.so"));
        assert_eq!(library_of(Some("".into())), Path::new(NAME));
        assert_eq!(library_of(None), Path::new(NAME));
    }

    #[test]
    fn a_plugin_is_named_in_any_case_and_is_ucx_by_default() {
        assert_eq!(Plugin::parse(""), Ok(Plugin::Ucx));
        assert_eq!(Plugin::parse(" ucx "), Ok(Plugin::Ucx));
        assert_eq!(Plugin::parse("LibFabric"), Ok(Plugin::Libfabric));
        let refused = Plugin::parse("mooncake").unwrap_err();
        assert_eq!(refused, "`mooncake` is neither UCX nor LIBFABRIC");
    }

    #[test]
    fn a_plugin_lies_in_the_named_folder_or_beside_the_library() {
        let library = Path::new("/opt/nixl/libnixl_capi.so");
        let beside = Path::new("/opt/nixl/plugins/libplugin_UCX.so");
        assert_eq!(Plugin::Ucx.file_in(None, library), beside);
        assert_eq!(Plugin::Ucx.file_in(Some("".into()), library), beside);
        let named = Plugin::Libfabric.file_in(Some("/p".into()), library);
        assert_eq!(named, Path::new("/p/libplugin_LIBFABRIC.so"));
    }
}
