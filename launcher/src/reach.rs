//! The addresses by which other machines reach this one.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};

use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;

/// An address outside every private network (TEST-NET-3, RFC 5737): the route to it is the default route.
const ELSEWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(203, 0, 113, 1)), 9);

/// This machine's IPv4 addresses but the loopback's, the likeliest first: the default route's, then the interfaces'
/// order.
pub(crate) fn addresses() -> Vec<IpAddr> {
    let mut found: Vec<IpAddr> = default_route().into_iter().collect();
    let interfaces = getifaddrs().into_iter().flatten();
    let usable = interfaces.filter(|interface| {
        interface.flags.contains(InterfaceFlags::IFF_UP)
            && !interface.flags.contains(InterfaceFlags::IFF_LOOPBACK)
    });
    for interface in usable {
        let address = interface.address.as_ref();
        let v4 = address.and_then(|address| address.as_sockaddr_in().map(|v4| v4.ip()));
        if let Some(ip) = v4.map(IpAddr::V4)
            && !found.contains(&ip)
        {
            found.push(ip);
        }
    }
    found
}

/// The likeliest of [`addresses`].
pub(crate) fn likeliest() -> Option<IpAddr> {
    addresses().into_iter().next()
}

/// The address that packets to elsewhere would carry. None are sent: a UDP socket's connecting only asks for the route.
fn default_route() -> Option<IpAddr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect(ELSEWHERE).ok()?;
    let ip = socket.local_addr().ok()?.ip();
    (!ip.is_unspecified() && !ip.is_loopback()).then_some(ip)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_address_is_a_loopback_or_stands_twice() {
        let mut found = addresses();
        assert!(
            found
                .iter()
                .all(|ip| !ip.is_loopback() && !ip.is_unspecified())
        );
        let count = found.len();
        found.sort_unstable();
        found.dedup();
        assert_eq!(found.len(), count);
    }
}
