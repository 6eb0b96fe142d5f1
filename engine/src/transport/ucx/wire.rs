//! Which of UCX's wires an endpoint really has, from the text that UCX prints of it. Pure.
//!
//! The text is for people and changes between versions; what is not understood is called unknown.

/// The transports and devices of an endpoint's lanes, each once, in UCX's order; empty when none was found.
fn lanes(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    for line in text.lines() {
        // "#   lane[0]:  3:sysv/memory.0 md[2]   -> md[2]/sysv/sysdev[255] am am_bw#0"
        let Some((_, lane)) = line.split_once("lane[") else {
            continue;
        };
        let Some(name) = lane
            .split_ascii_whitespace()
            .nth(1)
            .and_then(|resource| resource.split_once(':'))
            .map(|(_, name)| name)
        else {
            continue;
        };
        // The path's number, at the end, says nothing.
        let name = name.rsplit_once('.').map_or(name, |(name, _)| name);
        if !found.contains(&name) {
            found.push(name);
        }
    }
    found
}

/// Whether every lane is TCP, over which UCX reads memory by messages, as far as the text is understood.
pub(super) fn is_tcp_alone(text: Option<&str>) -> bool {
    let lanes = text.map(lanes).unwrap_or_default();
    !lanes.is_empty() && lanes.iter().all(|lane| lane.starts_with("tcp/"))
}

/// The lanes in words.
pub(super) fn described(text: Option<&str>) -> String {
    let lanes = text.map(lanes).unwrap_or_default();
    if lanes.is_empty() {
        return "unknown".to_owned();
    }
    lanes.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT_1_13: &str = "#
# UCP endpoint \n#
#               peer: <no debug data>
#                 lane[0]:  3:sysv/memory.0 md[2]           -> md[2]/sysv/sysdev[255] am am_bw#0 keepalive
#                 lane[1]:  4:posix/memory.0 md[3]          -> md[3]/posix/sysdev[255]
#
#                  put[0]: 0..<short>..4294967296..<bcopy>..(inf)
";

    const TEXT_1_22: &str = "# UCP endpoint
#                 lane[0]:  2:tcp/lo.0 md[1]                -> md[1]/tcp/sysdev[255] seg 4294967295 am keepalive wireup
#                 lane[1]:  2:tcp/lo.1 md[1]                -> md[1]/tcp/sysdev[255] seg 4294967295 am
";

    #[test]
    fn lanes_are_named_once() {
        assert_eq!(described(Some(TEXT_1_13)), "sysv/memory, posix/memory");
        assert_eq!(described(Some(TEXT_1_22)), "tcp/lo");
    }

    #[test]
    fn tcp_is_told_from_other_wires() {
        assert!(is_tcp_alone(Some(TEXT_1_22)));
        let mixed = TEXT_1_13.replace("4:posix/memory.0", "4:tcp/lo.0");
        for other in [TEXT_1_13, &mixed, "", "# lane[0]: gone"] {
            assert!(!is_tcp_alone(Some(other)), "{other}");
        }
        assert!(!is_tcp_alone(None));
    }

    #[test]
    fn what_is_not_understood_is_unknown() {
        assert_eq!(described(None), "unknown");
        assert_eq!(described(Some("")), "unknown");
        assert_eq!(described(Some("# lane[0]: gone")), "unknown");
    }
}
