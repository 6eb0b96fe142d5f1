//! Where the plug-in is looked for. Pure but for two look-ups of the process's own.

use std::ffi::OsString;
use std::path::PathBuf;

/// The plug-in's file.
pub(super) const NAME: &str = "libbaton_mpi.so";

/// Names the plug-in's path; then nothing else is tried.
pub(super) const VARIABLE: &str = "BATON_MPI_PLUGIN";

/// The places, in order; the last is the system's library path.
pub(super) fn places() -> Vec<PathBuf> {
    let beside = std::env::current_exe().ok();
    places_of(std::env::var_os(VARIABLE), beside)
}

fn places_of(named: Option<OsString>, executable: Option<PathBuf>) -> Vec<PathBuf> {
    if let Some(named) = named.filter(|named| !named.is_empty()) {
        return vec![PathBuf::from(named)];
    }
    let beside = executable.and_then(|path| Some(path.parent()?.join(NAME)));
    beside.into_iter().chain([PathBuf::from(NAME)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_named_is_the_only_place() {
        let executable = || Some(PathBuf::from("/opt/baton/bin/baton"));
        assert_eq!(
            places_of(Some("/site/mpi.so".into()), executable()),
            [PathBuf::from("/site/mpi.so")]
        );
        let usual = [
            PathBuf::from("/opt/baton/bin/libbaton_mpi.so"),
            PathBuf::from("libbaton_mpi.so"),
        ];
        assert_eq!(places_of(None, executable()), usual);
        assert_eq!(places_of(Some("".into()), executable()), usual);
        assert_eq!(places_of(None, None), usual[1..]);
    }
}
