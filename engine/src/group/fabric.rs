//! From the connections over which ranks have met to the fabric that the instance asked for.

use std::time::Duration;

use super::GroupError;
use crate::collective::Collective;
use crate::collective::mpi::{MpiError, MpiOptions, MpiWorld};
use crate::collective::tcp::TcpGroup;
use crate::ranks::Fabric;

/// What moves the bytes of a group that has met. For MPI, all ranks of the world take part, those of other instances
/// too: the instances of one world start together.
///
/// # Errors
/// When MPI is asked for and cannot be used, or a rank is lost.
pub fn on_fabric(
    met: TcpGroup,
    fabric: Fabric,
    join_timeout: Duration,
    peer_timeout: Duration,
) -> Result<Box<dyn Collective>, GroupError> {
    match fabric {
        Fabric::Tcp => Ok(Box::new(met)),
        Fabric::Mpi => over_mpi(met, join_timeout, peer_timeout),
    }
}

/// For a rank that is an instance by itself: where the fabric is MPI, it must take part in the world's start.
///
/// # Errors
/// When MPI is asked for and cannot be used.
pub fn stand_aside(
    fabric: Fabric,
    join_timeout: Duration,
    peer_timeout: Duration,
) -> Result<(), GroupError> {
    if fabric == Fabric::Mpi {
        let world = MpiWorld::open(MpiOptions {
            size_min: 1,
            join_timeout,
            peer_timeout,
        })?;
        world.group(None, 0)?;
        world.open_mail()?;
    }
    Ok(())
}

fn over_mpi(
    mut met: TcpGroup,
    join_timeout: Duration,
    peer_timeout: Duration,
) -> Result<Box<dyn Collective>, GroupError> {
    let world = MpiWorld::open(MpiOptions {
        size_min: met.size(),
        join_timeout,
        peer_timeout,
    })?;
    // The leader's place in the world tells the instances apart.
    let mut colour = place(world.rank())?.to_le_bytes().to_vec();
    met.broadcast(&mut colour)?;
    let colour = <[u8; 4]>::try_from(&colour[..])
        .map(u32::from_le_bytes)
        .map_err(|_| MpiError::Split(format!("the leader's place has {} bytes", colour.len())))?;
    let group = world
        .group(Some(colour), place(met.rank())?)?
        .ok_or_else(|| MpiError::Split("this rank has got no group".to_owned()))?;
    world.open_mail()?;
    if (group.rank(), group.size()) != (met.rank(), met.size()) {
        return Err(GroupError::Mpi(MpiError::Split(format!(
            "this is rank {} of {} in MPI and rank {} of {} in its instance",
            group.rank(),
            group.size(),
            met.rank(),
            met.size()
        ))));
    }
    if met.rank() == 0 {
        let (library, ranks) = (world.library(), world.size());
        tracing::info!(library, world_ranks = ranks, "the ranks talk over MPI");
    }
    Ok(Box::new(group))
}

fn place(rank: usize) -> Result<u32, MpiError> {
    u32::try_from(rank).map_err(|_| MpiError::Split(format!("{rank} is no rank")))
}
