//! Where the ranks of a communicator meet: a thread of the process that asked for the unique id. Collectives begin when every
//! rank has asked for the same one; what does not agree fails for all, with both named.

use std::collections::{HashMap, VecDeque};
use std::io::BufReader;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::reduce;
use super::wire::{Failure, Header, Kind, Message, failure, status};

/// How long one who connects may take to say who they are.
const GREETING: Duration = Duration::from_secs(10);

/// A call that waits for the other ranks.
struct Asked {
    id: u64,
    header: Header,
    data: Vec<u8>,
}

#[derive(Default)]
struct State {
    /// Connections by rank.
    members: Vec<Option<TcpStream>>,
    devices: Vec<u32>,
    joined: usize,
    collectives: Vec<VecDeque<Asked>>,
    /// By sender and receiver.
    sends: HashMap<(u32, u32), VecDeque<Asked>>,
    receives: HashMap<(u32, u32), VecDeque<Asked>>,
    /// Ranks that are done.
    left: Vec<bool>,
    failed: Option<Failure>,
}

/// Opens a hub; gives its port.
pub(super) fn open(token: [u8; 16]) -> std::io::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = listener.local_addr()?.port();
    let state: Arc<Mutex<State>> = Arc::default();
    std::thread::Builder::new().name("nccl hub".to_owned()).spawn(move || {
        for connection in listener.incoming().flatten() {
            if let Some((rank, from)) = greet(&state, token, connection) {
                let served = Arc::clone(&state);
                // A rank whose thread cannot be started finds its connection closed.
                drop(std::thread::Builder::new().spawn(move || serve(&served, rank, from)));
            }
            let state = lock(&state);
            if state.failed.is_some() || state.joined == state.members.len() && state.joined > 0 {
                return;
            }
        }
    })?;
    Ok(port)
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes in who connects, if they know the id.
fn greet(state: &Mutex<State>, token: [u8; 16], connection: TcpStream) -> Option<(u32, BufReader<TcpStream>)> {
    connection.set_nodelay(true).ok()?;
    connection.set_read_timeout(Some(GREETING)).ok()?;
    let mut out = connection.try_clone().ok()?;
    let mut from = BufReader::new(connection);
    let Ok(Message::Hello { rank, ranks, device, token: given }) = Message::receive(&mut from) else { return None };
    if given != token {
        return None;
    }
    out.set_read_timeout(None).ok()?;
    if let Err(refused) = lock(state).join(rank, ranks, device, &out) {
        // Who is gone needs no answer.
        drop(Message::Failed(refused).send(&mut out));
        return None;
    }
    Some((rank, from))
}

/// One rank's connection, to its end.
fn serve(state: &Mutex<State>, rank: u32, mut from: BufReader<TcpStream>) {
    loop {
        let message = Message::receive(&mut from);
        let mut state = lock(state);
        match message {
            Ok(Message::Work { id, header, data }) => state.ask(rank, Asked { id, header, data }),
            Ok(Message::Goodbye) => {
                state.leave(rank);
                return;
            }
            Ok(_) => {
                state.fail(failure(status::REMOTE_ERROR, format!("rank {rank} aborted")));
                return;
            }
            Err(_) => {
                state.fail(failure(status::REMOTE_ERROR, format!("the connection of rank {rank} broke")));
                return;
            }
        }
    }
}

impl State {
    fn join(&mut self, rank: u32, ranks: u32, device: u32, connection: &TcpStream) -> Result<(), Failure> {
        if let Some(failed) = &self.failed {
            return Err(failed.clone());
        }
        if self.members.is_empty() {
            let len = ranks as usize;
            self.members.resize_with(len, || None);
            self.collectives.resize_with(len, VecDeque::new);
            self.left = vec![false; len];
            self.devices = vec![u32::MAX; len];
        }
        let refused = if ranks as usize != self.members.len() {
            failure(
                status::INVALID_ARGUMENT,
                format!("rank {rank} joins {ranks} ranks, the others {}", self.members.len()),
            )
        } else if self.members[rank as usize].is_some() {
            failure(status::INVALID_USAGE, format!("two ranks are number {rank}"))
        } else if let Some(other) = self.devices.iter().position(|&other| other == device) {
            failure(status::INVALID_USAGE, format!("duplicate GPU: ranks {other} and {rank} both use device {device}"))
        } else {
            self.members[rank as usize] = connection.try_clone().ok();
            self.devices[rank as usize] = device;
            self.joined += 1;
            if self.joined == self.members.len() {
                self.members.iter_mut().flatten().for_each(|member| drop(Message::Welcome.send(member)));
            }
            return Ok(());
        };
        self.fail(refused.clone());
        Err(refused)
    }

    /// Ends everything that waits, and all that comes.
    fn fail(&mut self, failed: Failure) {
        if self.failed.is_none() {
            self.members.iter_mut().flatten().for_each(|member| drop(Message::Failed(failed.clone()).send(member)));
            self.failed = Some(failed);
        }
    }

    fn done(&mut self, rank: u32, id: u64, data: Vec<u8>) {
        if let Some(Some(member)) = self.members.get_mut(rank as usize) {
            // A rank that is gone is found by its reader.
            drop(Message::Done { id, data }.send(member));
        }
    }

    fn leave(&mut self, rank: u32) {
        self.left[rank as usize] = true;
        let peers = |(from, to): &(u32, u32)| *from == rank || *to == rank;
        let waits = self.collectives.iter().any(|queue| !queue.is_empty())
            || self.sends.iter().chain(&self.receives).any(|(pair, queue)| peers(pair) && !queue.is_empty());
        if waits {
            self.fail(failure(status::REMOTE_ERROR, format!("rank {rank} left while others wait for it")));
        }
    }

    fn ask(&mut self, rank: u32, asked: Asked) {
        let header = asked.header;
        let collective = !matches!(header.kind, Kind::Send | Kind::Receive);
        let absent = self.left.iter().position(|&left| left).filter(|&at| collective || at as u32 == header.root);
        if let Some(absent) = absent {
            let text = format!("rank {rank} asks for {header}, but rank {absent} has left");
            return self.fail(failure(status::REMOTE_ERROR, text));
        }
        match header.kind {
            Kind::Send => {
                self.sends.entry((rank, header.root)).or_default().push_back(asked);
                self.pass(rank, header.root);
            }
            Kind::Receive => {
                self.receives.entry((header.root, rank)).or_default().push_back(asked);
                self.pass(header.root, rank);
            }
            _ => {
                self.collectives[rank as usize].push_back(asked);
                self.gather();
            }
        }
    }

    /// Passes on what is both sent and received.
    fn pass(&mut self, from: u32, to: u32) {
        let pair = (from, to);
        let (Some(sends), Some(receives)) = (self.sends.get_mut(&pair), self.receives.get_mut(&pair)) else { return };
        if sends.is_empty() || receives.is_empty() {
            return;
        }
        let (Some(send), Some(receive)) = (sends.pop_front(), receives.pop_front()) else { return };
        if (send.header.ty, send.header.count) != (receive.header.ty, receive.header.count) {
            let text =
                format!("rank {from} asks for {}, rank {to} for {}: they do not agree", send.header, receive.header);
            return self.fail(failure(status::INVALID_USAGE, text));
        }
        self.done(from, send.id, Vec::new());
        self.done(to, receive.id, send.data);
    }

    /// Does the collective that all ranks ask for next, if they do.
    fn gather(&mut self) {
        if self.collectives.iter().any(VecDeque::is_empty) {
            return self.compare();
        }
        let asked: Vec<Asked> = self.collectives.iter_mut().filter_map(VecDeque::pop_front).collect();
        if let Some(other) = asked.iter().position(|other| other.header != asked[0].header) {
            return self.disagree((0, asked[0].header), (other, asked[other].header));
        }
        let header = asked[0].header;
        let data: Vec<&[u8]> = asked.iter().map(|asked| asked.data.as_slice()).collect();
        let whole = match header.kind {
            Kind::AllReduce | Kind::ReduceScatter | Kind::Reduce => reduce::reduce(header.ty, header.op, &data),
            Kind::AllGather => data.concat(),
            _ => data[header.root as usize].to_vec(),
        };
        let part = whole.len() / asked.len();
        for (rank, asked) in asked.iter().enumerate() {
            let data = match header.kind {
                Kind::ReduceScatter => whole[rank * part..(rank + 1) * part].to_vec(),
                Kind::Reduce if rank as u32 != header.root => Vec::new(),
                _ => whole.clone(),
            };
            self.done(rank as u32, asked.id, data);
        }
    }

    /// Ranks that already wait for different things will never agree, whatever the others ask for.
    fn compare(&mut self) {
        let mut fronts =
            self.collectives.iter().enumerate().filter_map(|(rank, queue)| Some((rank, queue.front()?.header)));
        let Some(first) = fronts.next() else { return };
        if let Some(other) = fronts.find(|other| other.1 != first.1) {
            self.disagree(first, other);
        }
    }

    fn disagree(&mut self, one: (usize, Header), other: (usize, Header)) {
        let text = format!(
            "rank {} asks for {}, rank {} for {}: they do not agree, which hangs or corrupts on real devices",
            one.0, one.1, other.0, other.1
        );
        self.fail(failure(status::INVALID_USAGE, text));
    }
}
