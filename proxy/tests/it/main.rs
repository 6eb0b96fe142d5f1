//! The whole proxy over real sockets, between a client and scripted workers.

#[cfg(test)]
mod client;
#[cfg(test)]
mod disconnects;
#[cfg(test)]
mod discovery;
#[cfg(test)]
mod endpoints;
#[cfg(test)]
mod flow;
#[cfg(test)]
mod harness;
#[cfg(test)]
mod introduce;
#[cfg(test)]
mod limits;
#[cfg(test)]
mod mock;
#[cfg(test)]
mod prefetch;
#[cfg(test)]
mod retries;
#[cfg(test)]
mod startup;
#[cfg(test)]
mod streams;
