//! A connection between two watches, which never blocks.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::beat::Beat;
use super::failure::Failure;
use crate::parallel::rendezvous::{HEADER, Tag, header, parse_header};

/// Unsent bytes above which no more heartbeats are queued: the other side does not read.
const BACKLOG: usize = 16 << 10;

/// What watches say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum Message {
    /// I live.
    Beat(Beat),
    /// I end, and all is well; rank 0 answers with the same.
    Goodbye,
    /// I fail by an error of my own.
    Error { text: String, step: u64 },
    /// Rank 0: this one said goodbye.
    Ended(usize),
    /// Rank 0: all stop.
    Failed(Failure),
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Loss {
    /// The process at its other end did.
    Closed,
    /// The network did.
    Cut,
}

#[derive(Debug)]
pub(super) struct Link {
    stream: TcpStream,
    unsent: Vec<u8>,
    unread: Vec<u8>,
}

impl Link {
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Link { stream, unsent: Vec::new(), unread: Vec::new() })
    }

    /// Sends as much as the system takes, and keeps the rest. What cannot be sent shows when the connection is read.
    pub fn send(&mut self, message: &Message) {
        if matches!(message, Message::Beat(_)) && self.unsent.len() > BACKLOG {
            return;
        }
        let Ok(bytes) = serde_json::to_vec(message) else { return };
        let Ok(header) = header(Tag::Watch, bytes.len()) else { return };
        self.unsent.extend_from_slice(&header);
        self.unsent.extend_from_slice(&bytes);
        self.flush();
    }

    pub fn flush(&mut self) {
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(sent) if sent > 0 => drop(self.unsent.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => return,
            }
        }
    }

    /// Says that nothing more will come from this side.
    pub fn finish(&mut self) {
        self.flush();
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// All that has come, and whether the connection is at its end.
    pub fn receive(&mut self) -> (Vec<Message>, Option<Loss>) {
        let mut buffer = [0; 4096];
        let loss = loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => break Some(Loss::Closed),
                Ok(bytes) => self.unread.extend_from_slice(&buffer[..bytes]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break None,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Some(loss_of(&error)),
            }
        };
        let mut messages = Vec::new();
        loop {
            match self.take() {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => return (messages, loss),
                // Who sends what nobody understands is of no more use than who is gone.
                Err(_) => return (messages, Some(Loss::Closed)),
            }
        }
    }

    fn take(&mut self) -> io::Result<Option<Message>> {
        let Some((head, rest)) = self.unread.split_first_chunk::<HEADER>() else { return Ok(None) };
        let (_, len) = parse_header(*head)?;
        let Some(bytes) = rest.get(..len) else { return Ok(None) };
        let message = serde_json::from_slice(bytes)?;
        self.unread.drain(..HEADER + len);
        Ok(Some(message))
    }

    /// What [`wait`] is to look for.
    pub fn interest(&self) -> libc::pollfd {
        let events = if self.unsent.is_empty() { libc::POLLIN } else { libc::POLLIN | libc::POLLOUT };
        libc::pollfd { fd: self.stream.as_raw_fd(), events, revents: 0 }
    }
}

fn loss_of(error: &io::Error) -> Loss {
    match error.kind() {
        io::ErrorKind::TimedOut | io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => Loss::Cut,
        _ => Loss::Closed,
    }
}

/// Waits until something can be read or written, at most this long.
pub(super) fn wait(interests: &mut [libc::pollfd], time: Duration) {
    let milliseconds = time.as_millis().clamp(1, 60_000) as libc::c_int;
    // SAFETY: the pointer and the length are those of one slice of initialized values. An error, such as a signal that came
    // meanwhile, is a wait that ended early: whoever waits looks at everything afterwards anyway.
    unsafe { libc::poll(interests.as_mut_ptr(), interests.len() as libc::nfds_t, milliseconds) };
}
