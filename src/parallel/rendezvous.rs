//! How processes find each other, and exchange the few bytes that an engine needs to begin: NCCL's id, host names.
//!
//! Rank 0 listens, the others connect, and all go on when all have come. Then every process makes the same calls in the same order.
//! What is not of this run is told so and sent away: a stranger's bytes, another version, another world size, a rank that has
//! come already.

mod frame;
mod hello;

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::str::FromStr;
use std::time::{Duration, Instant};

use super::world::World;
use crate::error::{Error, Result};
pub(super) use frame::{HEADER, Tag, header, parse_header};

/// First and longest pause between two tries to reach rank 0.
const PAUSES: [Duration; 2] = [Duration::from_millis(20), Duration::from_secs(1)];

/// A host and a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// A name, an IPv4 address, or an IPv6 address without brackets.
    pub host: String,
    /// The port.
    pub port: u16,
}

impl Endpoint {
    /// With or without the brackets of an IPv6 address.
    pub fn new(host: &str, port: u16) -> Self {
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        Endpoint { host: bare.to_owned(), port }
    }

    fn resolve(&self) -> io::Result<Vec<SocketAddr>> {
        let found: Vec<SocketAddr> = (self.host.as_str(), self.port).to_socket_addrs()?.collect();
        if found.is_empty() { Err(io::Error::other("the name has no address")) } else { Ok(found) }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl FromStr for Endpoint {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parsed = text.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)));
        match parsed {
            Some((host, port)) if !host.is_empty() => Ok(Endpoint::new(host, port)),
            _ => Err(Error::Network(format!("address: found {text:?}, expected HOST:PORT"))),
        }
    }
}

/// Rank 0's open door.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
}

impl Listener {
    /// Opens it. Port 0 is any free one. A literal address, and `localhost`, is listened at alone; any other name means all
    /// addresses of this machine, since it may be that of a service before it, or stand for loopback on the machine itself.
    ///
    /// # Errors
    /// A port that is taken, or an address that is not this machine's.
    pub fn open(at: &Endpoint) -> Result<Self> {
        let literal = at.host == "localhost" || at.host.parse::<std::net::IpAddr>().is_ok();
        let bound = if literal { TcpListener::bind((at.host.as_str(), at.port)) } else { everywhere(at.port) };
        let socket = bound.map_err(|e| {
            Error::Network(format!("rank 0 cannot listen at {at}: {e}; free the port, or set another by WARPSTEP_PORT"))
        })?;
        Ok(Listener { socket })
    }

    /// Opens it at any free port of all addresses of this machine, for others that are told the [port](Listener::port).
    ///
    /// # Errors
    /// The system's own.
    pub fn anywhere() -> Result<Self> {
        let socket = everywhere(0).map_err(|e| Error::Network(format!("rank 0 cannot listen: {e}")))?;
        Ok(Listener { socket })
    }

    /// The port that it is at.
    ///
    /// # Errors
    /// The system's own.
    pub fn port(&self) -> Result<u16> {
        let address = self.socket.local_addr();
        Ok(address.map_err(|e| Error::Network(format!("rank 0 cannot tell where it listens: {e}")))?.port())
    }
}

/// Listens at a port of all addresses of this machine.
fn everywhere(port: u16) -> std::io::Result<TcpListener> {
    // Without IPv6 the second is what there is.
    TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)))
}

/// Connected processes: rank 0 with every other one.
#[derive(Debug)]
pub struct Rendezvous {
    rank: usize,
    size: usize,
    timeout: Duration,
    /// By rank, on rank 0; that to rank 0, on any other.
    links: Vec<Option<TcpStream>>,
}

impl Rendezvous {
    /// Meets all others at this address, where rank 0 listens. Waits until all have come, at most `timeout`.
    ///
    /// # Errors
    /// A door that cannot be opened or reached, ranks that did not come, or a rank 0 of another run.
    pub fn join(world: &World, at: &Endpoint, timeout: Duration) -> Result<Self> {
        if world.rank == 0 {
            return Rendezvous::host(world, Listener::open(at)?, timeout);
        }
        let deadline = Instant::now() + timeout;
        let mut pause = PAUSES[0];
        loop {
            match hello::knock(world, at, deadline) {
                Ok(stream) => {
                    let links = std::iter::once(Some(stream)).collect();
                    return Ok(Rendezvous { rank: world.rank, size: world.size, timeout, links });
                }
                Err(hello::Refusal::Final(error)) => return Err(error),
                Err(hello::Refusal::Again(error)) if Instant::now() + pause >= deadline => {
                    return Err(Error::Network(format!(
                        "rank {} did not reach rank 0 at {at} within {}: {error}; is it running, and can this host reach it?",
                        world.rank,
                        seconds(timeout)
                    )));
                }
                Err(hello::Refusal::Again(_)) => std::thread::sleep(pause),
            }
            pause = (pause * 2).min(PAUSES[1]);
        }
    }

    /// Rank 0's part of [`Rendezvous::join`], at a door that is open already.
    ///
    /// # Errors
    /// Ranks that did not come; those that were sent away meanwhile are named.
    pub fn host(world: &World, listener: Listener, timeout: Duration) -> Result<Self> {
        let links = hello::welcome(world, &listener.socket, timeout)?;
        Ok(Rendezvous { rank: 0, size: world.size, timeout, links })
    }

    /// The number of this process.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many processes there are.
    pub fn size(&self) -> usize {
        self.size
    }

    /// `bytes = rank 0's`.
    ///
    /// # Errors
    /// A process that is gone, silent for the timeout, or in another call.
    pub fn broadcast(&mut self, bytes: &mut Vec<u8>) -> Result<()> {
        if self.rank > 0 {
            *bytes = self.receive(0, Tag::Broadcast)?;
            return Ok(());
        }
        (1..self.size).try_for_each(|rank| self.send(rank, Tag::Broadcast, bytes))
    }

    /// The bytes of every process by rank, on rank 0; nothing on any other.
    ///
    /// # Errors
    /// A process that is gone, silent for the timeout, or in another call.
    pub fn gather(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        if self.rank > 0 {
            self.send(0, Tag::Gather, bytes)?;
            return Ok(Vec::new());
        }
        let mut all = vec![bytes.to_vec()];
        for rank in 1..self.size {
            all.push(self.receive(rank, Tag::Gather)?);
        }
        Ok(all)
    }

    /// Hears from every process whether it is ready; `failed` is why this one is not.
    ///
    /// # Errors
    /// What the first that is not ready says, in all that are; the others know why they are not. A process that is gone, silent for
    /// the timeout, or in another call.
    pub fn all_ready(&mut self, failed: Option<&Error>) -> Result<()> {
        let all = self.gather(&failed.map_or_else(Vec::new, Error::for_peers))?;
        let first = all.iter().enumerate().find(|(_, told)| !told.is_empty());
        let mut first =
            first.map_or_else(Vec::new, |(rank, told)| [&(rank as u64).to_le_bytes(), told.as_slice()].concat());
        self.broadcast(&mut first)?;
        match first.split_first_chunk() {
            Some((rank, told)) if failed.is_none() => {
                Err(Error::of_peer(usize::try_from(u64::from_le_bytes(*rank)).unwrap_or(usize::MAX), told))
            }
            _ => Ok(()),
        }
    }

    /// Returns when every process has called it.
    ///
    /// # Errors
    /// A process that is gone, silent for the timeout, or in another call.
    pub fn barrier(&mut self) -> Result<()> {
        if self.rank > 0 {
            self.send(0, Tag::Barrier, &[])?;
            return self.receive(0, Tag::Barrier).map(drop);
        }
        (1..self.size).try_for_each(|rank| self.receive(rank, Tag::Barrier).map(drop))?;
        (1..self.size).try_for_each(|rank| self.send(rank, Tag::Barrier, &[]))
    }

    /// The connections, for who goes on with them.
    pub(super) fn into_links(self) -> Vec<Option<TcpStream>> {
        self.links
    }

    fn send(&mut self, rank: usize, tag: Tag, bytes: &[u8]) -> Result<()> {
        let timeout = self.timeout;
        let link = self.link(rank)?;
        frame::write(link, tag, bytes).map_err(|e| lost(rank, timeout, &e))
    }

    fn receive(&mut self, rank: usize, tag: Tag) -> Result<Vec<u8>> {
        let timeout = self.timeout;
        let link = self.link(rank)?;
        let (found, bytes) = frame::read(link).map_err(|e| lost(rank, timeout, &e))?;
        if found == tag {
            return Ok(bytes);
        }
        Err(Error::Network(format!("rendezvous: expected {tag:?} of rank {rank}, found {found:?}")))
    }

    fn link(&mut self, rank: usize) -> Result<&mut TcpStream> {
        let link = self.links.get_mut(rank).and_then(Option::as_mut);
        let link = link.ok_or_else(|| Error::Network(format!("rendezvous: there is no connection to rank {rank}")))?;
        link.set_read_timeout(Some(self.timeout))
            .and_then(|()| link.set_write_timeout(Some(self.timeout)))
            .map_err(|e| lost(rank, self.timeout, &e))?;
        Ok(link)
    }
}

fn lost(rank: usize, timeout: Duration, error: &io::Error) -> Error {
    Error::Network(match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            format!("rendezvous: rank {rank} was silent for {}", seconds(timeout))
        }
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            format!("rendezvous: rank {rank} ended before all had begun; its own output says why")
        }
        _ => format!("rendezvous: the connection to rank {rank} failed: {error}"),
    })
}

/// `60 s`, `1.5 s`.
pub(super) fn seconds(duration: Duration) -> String {
    format!("{} s", (duration.as_secs_f64() * 10.0).round() / 10.0)
}
