//! What a transport's bytes go over, in words: whoever reads a rate must see what it is the rate of.

use std::net::SocketAddr;

use crate::reach;

/// Names the wire to a transceiver's endpoint; a transport's own words come first.
pub(super) fn describe(transport: &str, endpoint: &str, own: Option<String>) -> String {
    if let Some(own) = own {
        return format!("{transport} over {own}");
    }
    match endpoint.parse::<SocketAddr>() {
        Ok(address) => {
            let interface = reach::interface_towards(address);
            let over = interface.unwrap_or_else(|| "an unknown interface".to_owned());
            format!("{transport} to {address} over {over}")
        }
        Err(_) => format!("{transport} to {endpoint}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_is_called_by_its_name() {
        let named = |transport, endpoint, own| describe(transport, endpoint, own);
        assert_eq!(
            named("tcp", "127.0.0.1:4000", None),
            "tcp to 127.0.0.1:4000 over lo"
        );
        assert_eq!(named("x", "somewhere", None), "x to somewhere");
        let own = Some("rc_mlx5/mlx5_0:1".to_owned());
        assert_eq!(
            named("ucx", "127.0.0.1:4000", own),
            "ucx over rc_mlx5/mlx5_0:1"
        );
    }
}
