//! Whether memory that UCX says it has mapped from a peer really is, from its first byte to its last. Pure but for one
//! file.
//!
//! UCX computes the place from an address that the peer gave, and checks nothing; so the system is asked. Only a
//! mapping that is shared with others and begins where UCX says is taken for the peer's.

use std::ptr::NonNull;

/// The kernel's list of what is mapped.
const MAPS: &str = "/proc/self/maps";

/// The place, if all of it is one shared mapping that begins there.
pub(super) fn whole(start: *mut u8, bytes: usize) -> Option<NonNull<u8>> {
    let maps = std::fs::read_to_string(MAPS).ok()?;
    is_whole(&maps, start.addr(), bytes).then(|| NonNull::new(start))?
}

fn is_whole(maps: &str, start: usize, bytes: usize) -> bool {
    maps.lines().any(|line| {
        let mut fields = line.split_ascii_whitespace();
        let (Some(range), Some(access)) = (fields.next(), fields.next()) else {
            return false;
        };
        let range = range.split_once('-').and_then(|(from, to)| {
            let parsed = |text| usize::from_str_radix(text, 16).ok();
            Some(parsed(from)?..parsed(to)?)
        });
        let shared = access.starts_with('r') && access.ends_with('s');
        shared && range.is_some_and(|range| range.start == start && range.len() >= bytes)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
7f0000000000-7f0000400000 rw-s 00000000 00:01 32769                      /SYSV00000000 (deleted)
7f0000400000-7f0000500000 rw-p 00000000 00:00 0
7f0000600000-7f0000700000 -w-s 00000000 00:01 7                          /dev/shm/x
nonsense
";

    #[test]
    fn only_one_shared_mapping_from_its_beginning_will_do() {
        let at = 0x7f00_0000_0000;
        assert!(is_whole(MAPS, at, 0x40_0000));
        assert!(is_whole(MAPS, at, 1));
        assert!(!is_whole(MAPS, at, 0x40_0001), "longer than it is");
        assert!(!is_whole(MAPS, at + 0x1000, 1), "in the middle");
        assert!(!is_whole(MAPS, at + 0x40_0000, 1), "private");
        assert!(!is_whole(MAPS, at + 0x60_0000, 1), "not readable");
        assert!(!is_whole("", at, 1));
    }
}
