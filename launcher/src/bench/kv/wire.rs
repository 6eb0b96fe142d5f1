//! What a transport's bytes go over, in words: whoever reads a rate must see what it is the rate of.

use std::net::SocketAddr;

use crate::reach;

/// Names the wire to a transceiver's endpoint.
pub(super) fn describe(transport: &str, endpoint: &str) -> String {
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
        assert_eq!(
            describe("tcp", "127.0.0.1:4000"),
            "tcp to 127.0.0.1:4000 over lo"
        );
        assert_eq!(describe("shm", "somewhere"), "shm to somewhere");
    }
}
