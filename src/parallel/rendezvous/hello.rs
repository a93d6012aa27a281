//! The first words on a connection: who one is, and whether one is wanted.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use super::{Endpoint, Tag, frame, seconds};
use crate::error::{Error, Result};
use crate::parallel::world::World;

/// What both sides begin with.
const MAGIC: [u8; 8] = *b"WARPSTEP";
/// Version of all that is said on these connections.
const VERSION: u16 = 1;
/// How long a visitor may take to say who it is.
const INTRODUCTION: Duration = Duration::from_secs(5);
/// How long one of several addresses of a name is tried.
const ADDRESS: Duration = Duration::from_secs(5);
/// Pause between two looks at the door.
const GLANCE: Duration = Duration::from_millis(5);
/// Visitors that were sent away, of whom an error tells at most.
const REMEMBERED: usize = 4;

/// Who one says one is.
#[derive(Debug)]
struct Hello {
    rank: u32,
    size: u32,
    run: String,
}

impl Hello {
    fn write(&self, stream: &mut TcpStream) -> io::Result<()> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&self.rank.to_le_bytes());
        bytes.extend_from_slice(&self.size.to_le_bytes());
        let run = &self.run.as_bytes()[..self.run.len().min(usize::from(u16::MAX))];
        bytes.extend_from_slice(&(run.len() as u16).to_le_bytes());
        bytes.extend_from_slice(run);
        stream.write_all(&bytes)
    }

    /// What a visitor says; a sentence where it is none of ours.
    fn read(stream: &mut TcpStream) -> std::result::Result<Self, String> {
        let mut magic = [0; 8];
        // Byte by byte as far as they are right: a stranger may say less than we would.
        for (at, byte) in magic.iter_mut().enumerate() {
            match stream.read(std::slice::from_mut(byte)) {
                Ok(1) if *byte == MAGIC[at] => {}
                Ok(1) => return Err("it does not speak Warpstep's protocol".into()),
                Ok(_) | Err(_) => return Err("it said nothing".into()),
            }
        }
        let short = |_| "it broke off".to_owned();
        let mut number = [0; 2];
        stream.read_exact(&mut number).map_err(short)?;
        let version = u16::from_le_bytes(number);
        if version != VERSION {
            return Err(format!(
                "it speaks version {version} of the rendezvous, rank 0 speaks {VERSION}; start every rank with the same Warpstep"
            ));
        }
        let mut fixed = [0; 10];
        stream.read_exact(&mut fixed).map_err(short)?;
        let [r0, r1, r2, r3, s0, s1, s2, s3, l0, l1] = fixed;
        let mut run = vec![0; usize::from(u16::from_le_bytes([l0, l1]))];
        stream.read_exact(&mut run).map_err(short)?;
        Ok(Hello {
            rank: u32::from_le_bytes([r0, r1, r2, r3]),
            size: u32::from_le_bytes([s0, s1, s2, s3]),
            run: String::from_utf8_lossy(&run).into_owned(),
        })
    }
}

/// Why rank 0 was not joined.
pub(super) enum Refusal {
    /// It may be there later.
    Again(io::Error),
    /// It will not have us.
    Final(Error),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Refusal::Again(error)
    }
}

/// A rank other than 0 introduces itself, and waits until all have come.
pub(super) fn knock(world: &World, at: &Endpoint, deadline: Instant) -> std::result::Result<TcpStream, Refusal> {
    let mut stream = connect(at, deadline)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(left(deadline)))?;
    let hello = Hello { rank: world.rank as u32, size: world.size as u32, run: world.run.clone() };
    hello.write(&mut stream)?;
    let mut magic = [0; 8];
    stream.read_exact(&mut magic).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Refusal::Final(Error::Network(format!(
            "rank {}: rank 0 at {at} is there, but other ranks have not come in time; their own output says why",
            world.rank
        ))),
        _ => Refusal::Again(error),
    })?;
    if magic != MAGIC {
        return Err(Refusal::Final(Error::Network(format!(
            "what answers at {at} is not rank 0 of a Warpstep run; expected it there: is the port another program's? Set another \
             by WARPSTEP_PORT"
        ))));
    }
    match frame::read(&mut stream)? {
        (Tag::Welcome, _) => Ok(stream),
        (_, why) => Err(Refusal::Final(Error::Network(format!(
            "rank 0 at {at} refused rank {} of {}: {}",
            world.rank,
            world.size,
            String::from_utf8_lossy(&why)
        )))),
    }
}

fn connect(at: &Endpoint, deadline: Instant) -> io::Result<TcpStream> {
    let mut last = io::Error::other("the name has no address");
    for address in at.resolve()? {
        match TcpStream::connect_timeout(&address, left(deadline).min(ADDRESS)) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Never 0, which would mean for ever.
fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
}

type Visitor = (TcpStream, SocketAddr, std::result::Result<Hello, String>);

/// Rank 0 waits for all others; what comes besides is told why it is not wanted, and waited for no longer.
pub(super) fn welcome(world: &World, door: &TcpListener, timeout: Duration) -> Result<Vec<Option<TcpStream>>> {
    let failed = |e: io::Error| Error::Network(format!("rank 0 cannot await the other ranks: {e}"));
    door.set_nonblocking(true).map_err(failed)?;
    let deadline = Instant::now() + timeout;
    let mut here: BTreeMap<u32, (TcpStream, SocketAddr)> = BTreeMap::new();
    let mut refused = Vec::new();
    let (sender, introduced) = channel();
    while here.len() + 1 < world.size {
        match door.accept() {
            Ok((stream, from)) => introduce(stream, from, &sender),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(GLANCE),
            // The visitor went away between knocking and being let in.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => return Err(failed(error)),
        }
        while let Ok((stream, from, hello)) = introduced.try_recv() {
            match hello.and_then(|hello| admit(world, &here, hello)) {
                Ok(rank) => drop(here.insert(rank, (stream, from))),
                Err(why) => {
                    refused.push(format!("a visitor from {from} was refused: {why}"));
                    send_away(stream, why);
                }
            }
        }
        if Instant::now() >= deadline {
            return Err(missing(world, &here, &refused, timeout));
        }
    }
    let mut links = vec![None];
    for (rank, (mut stream, _)) in here {
        let lost = |e: io::Error| Error::Network(format!("rank {rank} went away while the others came: {e}"));
        stream.write_all(&MAGIC).map_err(lost)?;
        frame::write(&mut stream, Tag::Welcome, &[]).map_err(lost)?;
        links.push(Some(stream));
    }
    Ok(links)
}

/// Hears a visitor out beside the door, which others must not find blocked by it.
fn introduce(mut stream: TcpStream, from: SocketAddr, done: &Sender<Visitor>) {
    let done = done.clone();
    let listen = move || {
        let hello = stream
            .set_nonblocking(false)
            .and_then(|()| stream.set_nodelay(true))
            .and_then(|()| stream.set_read_timeout(Some(INTRODUCTION)))
            .and_then(|()| stream.set_write_timeout(Some(INTRODUCTION)))
            .map_err(|e| e.to_string())
            .and_then(|()| Hello::read(&mut stream));
        // Rank 0 may have given up meanwhile.
        let _ = done.send((stream, from, hello));
    };
    // Without a thread the visitor is not heard, and tries again.
    let _ = std::thread::Builder::new().name("warpstep-hello".into()).spawn(listen);
}

/// The visitor's rank, or why it is not wanted.
fn admit(
    world: &World,
    here: &BTreeMap<u32, (TcpStream, SocketAddr)>,
    hello: Hello,
) -> std::result::Result<u32, String> {
    let Hello { rank, size, run } = hello;
    if size as usize != world.size {
        return Err(format!("rank {rank} was started in a world of {size}, rank 0 in one of {}", world.size));
    }
    if run != world.run {
        return Err(format!("rank {rank} is of run {run:?}, rank 0 of run {:?}", world.run));
    }
    if rank == 0 || rank as usize >= world.size {
        return Err(format!("found rank {rank}, expected one from 1 to {}", world.size - 1));
    }
    match here.get(&rank) {
        Some((first, from)) if !is_gone(first) => Err(format!("rank {rank} has come already, from {from}")),
        _ => Ok(rank),
    }
}

/// Whether the other side has hung up.
fn is_gone(stream: &TcpStream) -> bool {
    let look = stream.set_nonblocking(true).and_then(|()| stream.peek(&mut [0]));
    let gone = match look {
        Ok(bytes) => bytes == 0,
        Err(error) => error.kind() != io::ErrorKind::WouldBlock,
    };
    gone || stream.set_nonblocking(false).is_err()
}

/// Whoever it is gets the reason, in words that a person can read. Beside the door, as [`introduce`].
fn send_away(mut stream: TcpStream, why: String) {
    let tell = move || {
        let _ = stream.write_all(&MAGIC).and_then(|()| frame::write(&mut stream, Tag::Refused, why.as_bytes()));
        let _ = stream.write_all(b"\n").and_then(|()| stream.shutdown(std::net::Shutdown::Write));
        // What it still sends is read, or the answer would be lost with the connection.
        let _ = io::copy(&mut stream.take(1 << 16), &mut io::sink());
    };
    let _ = std::thread::Builder::new().name("warpstep-hello".into()).spawn(tell);
}

fn missing(
    world: &World,
    here: &BTreeMap<u32, (TcpStream, SocketAddr)>,
    refused: &[String],
    timeout: Duration,
) -> Error {
    let missing: Vec<String> =
        (1..world.size as u32).filter(|rank| !here.contains_key(rank)).map(|rank| rank.to_string()).collect();
    let (noun, verb) = if missing.len() == 1 { ("rank", "has") } else { ("ranks", "have") };
    let mut text = format!(
        "{noun} {} of {} {verb} not come within {}; do they run, and can they reach this host?",
        missing.join(", "),
        world.size,
        seconds(timeout)
    );
    for refused in refused.iter().take(REMEMBERED) {
        text.push_str("; ");
        text.push_str(refused);
    }
    Error::Network(text)
}
