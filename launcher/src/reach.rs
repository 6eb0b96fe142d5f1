//! The addresses by which other machines reach this one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

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

/// The interface that packets to this address leave by, with its speed where the system knows it.
pub(crate) fn interface_towards(peer: SocketAddr) -> Option<String> {
    let own: Vec<_> = getifaddrs().into_iter().flatten().collect();
    let named = |ip: IpAddr| {
        let mine = own.iter().find(|interface| {
            let address = interface.address.as_ref();
            let v4 = address.and_then(|a| a.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip())));
            let v6 = address.and_then(|a| a.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())));
            v4.or(v6) == Some(ip)
        });
        mine.map(|interface| interface.interface_name.clone())
    };
    // What this machine sends to itself never leaves it, whichever of its addresses is used.
    if named(peer.ip()).is_some() {
        return Some("lo".to_owned());
    }
    let any: IpAddr = match peer {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(peer).ok()?;
    let name = named(socket.local_addr().ok()?.ip())?;
    let speed = std::fs::read_to_string(format!("/sys/class/net/{name}/speed")).ok();
    match speed.and_then(|text| text.trim().parse::<u32>().ok()) {
        Some(megabits @ 1..) => Some(format!("{name} ({megabits} Mbit/s)")),
        Some(0) | None => Some(name),
    }
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
