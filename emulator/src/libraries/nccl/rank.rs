//! A rank's end of a communicator: calls go to the hub, a thread takes what comes back.

use std::collections::HashMap;
use std::io::BufReader;
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::reduce;
use super::wire::{Failure, Header, Message, failure, status};
use crate::memory::Memory;

/// How long a call waits for the other ranks before it fails: far longer than any test, so that none hangs for ever.
const PATIENCE: Duration = Duration::from_secs(300);

/// What has come from the hub.
#[derive(Default)]
struct Inbox {
    welcome: bool,
    done: HashMap<u64, Vec<u8>>,
    failed: Option<Failure>,
}

/// A communicator, as one rank holds it.
pub(super) struct Comm {
    pub rank: u32,
    pub ranks: u32,
    pub device: u32,
    out: Mutex<TcpStream>,
    /// To close the connection while a call waits.
    control: TcpStream,
    inbox: Arc<(Mutex<Inbox>, Condvar)>,
    next: AtomicU64,
    /// Factors of operations that multiply first: number, type, value.
    pub factors: Mutex<HashMap<i32, (u8, Vec<u8>)>>,
}

/// A call whose arguments were found right.
#[derive(Clone, Debug)]
pub(super) struct Ask {
    pub header: Header,
    /// What is sent: address and bytes.
    pub from: (u64, usize),
    /// Where what comes back belongs.
    pub to: (u64, usize),
    /// Multiplies what is sent.
    pub factor: Option<Vec<u8>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Comm {
    /// Joins the ranks of a hub, and waits until all have.
    pub fn join(
        port: u16,
        token: [u8; 16],
        rank: u32,
        ranks: u32,
        device: u32,
        unique: u32,
    ) -> Result<Arc<Comm>, Failure> {
        let broken = |error: std::io::Error| {
            failure(status::SYSTEM_ERROR, format!("rank {rank} does not reach who made the unique id: {error}"))
        };
        let connection = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).map_err(broken)?;
        connection.set_nodelay(true).map_err(broken)?;
        let mut out = connection.try_clone().map_err(broken)?;
        let control = connection.try_clone().map_err(broken)?;
        let inbox: Arc<(Mutex<Inbox>, Condvar)> = Arc::default();
        let filled = Arc::clone(&inbox);
        std::thread::Builder::new()
            .name(format!("nccl rank {rank}"))
            .spawn(move || read(connection, &filled))
            .map_err(broken)?;
        Message::Hello { rank, ranks, device: unique, token }.send(&mut out).map_err(broken)?;
        let comm = Comm {
            rank,
            ranks,
            device,
            out: Mutex::new(out),
            control,
            inbox,
            next: AtomicU64::new(0),
            factors: Mutex::default(),
        };
        comm.wait("the other ranks", |inbox| inbox.welcome.then_some(()))?;
        Ok(Arc::new(comm))
    }

    fn wait<T>(&self, what: &str, mut found: impl FnMut(&mut Inbox) -> Option<T>) -> Result<T, Failure> {
        let (inbox, changed) = &*self.inbox;
        let mut inbox = lock(inbox);
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = found(&mut inbox) {
                return Ok(found);
            }
            if let Some(failed) = &inbox.failed {
                return Err(failed.clone());
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let text = format!("rank {} waited {} s for {what}", self.rank, PATIENCE.as_secs());
                return Err(failure(status::INTERNAL_ERROR, text));
            }
            inbox = changed.wait_timeout(inbox, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// What went wrong, if anything did.
    pub fn failed(&self) -> Option<Failure> {
        lock(&self.inbox.0).failed.clone()
    }

    fn fail(&self, failed: Failure) -> Failure {
        let (inbox, changed) = &*self.inbox;
        let failed = lock(inbox).failed.get_or_insert(failed).clone();
        changed.notify_all();
        failed
    }

    fn send(&self, message: &Message) -> Result<(), Failure> {
        if let Some(failed) = self.failed() {
            return Err(failed);
        }
        let sent = message.send(&mut *lock(&self.out));
        sent.map_err(|error| self.fail(failure(status::REMOTE_ERROR, format!("the connection broke: {error}"))))
    }

    /// Asks for a call; gives its number.
    pub fn ask(&self, ask: &Ask) -> Result<u64, Failure> {
        let (address, bytes) = ask.from;
        let place = Memory::global()
            .check(address, bytes, false)
            .map_err(|fault| self.fail(failure(status::UNHANDLED_CUDA_ERROR, fault.to_string())))?;
        // SAFETY: `check` found as many bytes; none are read where there are none.
        let mut data =
            if bytes == 0 { Vec::new() } else { unsafe { std::slice::from_raw_parts(place, bytes) }.to_vec() };
        if let Some(factor) = &ask.factor {
            reduce::scale(ask.header.ty, &mut data, factor);
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.send(&Message::Work { id, header: ask.header, data })?;
        Ok(id)
    }

    /// Waits for a call and puts what it gives where it belongs.
    pub fn finish(&self, ask: &Ask, id: u64) -> Result<(), Failure> {
        let data = self.wait(&ask.header.to_string(), |inbox| inbox.done.remove(&id))?;
        let len = data.len().min(ask.to.1);
        let put = Memory::global().copy_in(ask.to.0, &data[..len]);
        put.map_err(|fault| self.fail(failure(status::UNHANDLED_CUDA_ERROR, fault.to_string())))
    }

    /// Leaves, in order or by giving up, which ends what waits anywhere.
    pub fn leave(&self, abort: bool) {
        if abort {
            self.fail(failure(status::REMOTE_ERROR, format!("rank {} aborted", self.rank)));
            // The reader of a connection that is closed tells the hub nothing, so this one does.
            drop(Message::Abort.send(&mut *lock(&self.out)));
        } else {
            drop(self.send(&Message::Goodbye));
        }
        drop(self.control.shutdown(Shutdown::Both));
    }
}

/// Takes what comes, until the connection ends.
fn read(connection: TcpStream, (inbox, changed): &(Mutex<Inbox>, Condvar)) {
    let mut from = BufReader::new(connection);
    loop {
        let message = Message::receive(&mut from);
        let mut inbox = lock(inbox);
        let ended = match message {
            Ok(Message::Welcome) => {
                inbox.welcome = true;
                false
            }
            Ok(Message::Done { id, data }) => {
                inbox.done.insert(id, data);
                false
            }
            Ok(Message::Failed(failed)) => {
                inbox.failed.get_or_insert(failed);
                true
            }
            Ok(_) | Err(_) => {
                inbox
                    .failed
                    .get_or_insert_with(|| failure(status::REMOTE_ERROR, "the connection to the other ranks broke"));
                true
            }
        };
        changed.notify_all();
        if ended {
            return;
        }
    }
}
