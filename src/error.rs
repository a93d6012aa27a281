//! The one error type at Warpstep's public seams.
//!
//! Every variant says what was wrong, where, what was found, what was expected and what to do. The variant decides the
//! process exit code (see [`Error::exit_code`]): 2 when the user's input was wrong, 1 when the run itself failed.

use std::path::PathBuf;

/// `Result` with Warpstep's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong, told so that a user knows what to change.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A run file, an override or a flag that is wrong; `place` names file, line and key.
    #[error("{place}: {problem}")]
    Config {
        /// Where: `run.toml:12: optimizer.rule`, `--set`, or a flag.
        place: String,
        /// What was found, what was expected, what to do.
        problem: String,
    },
    /// A data file that cannot be used; `path` names it, `problem` the place within it.
    #[error("{}: {problem}", path.display())]
    Data {
        /// The file or folder.
        path: PathBuf,
        /// Place within it (line, byte, column), what was found, what was expected.
        problem: String,
    },
    /// A checkpoint that cannot be used.
    #[error("{}: {problem}", path.display())]
    Checkpoint {
        /// The file or folder.
        path: PathBuf,
        /// What was found, what was expected, what to do.
        problem: String,
    },
    /// Shapes that do not fit.
    #[error("{operation}: expected {expected}, found {found}")]
    Shape {
        /// The layer or operation.
        operation: String,
        /// The shape it takes.
        expected: String,
        /// The shape it was given.
        found: String,
    },
    /// The operating system refused something. The sentence has its words: they are no `source` besides, or would be told twice.
    #[error("cannot {action} {}: {cause}", path.display())]
    Io {
        /// A verb: `read`, `create`, `rename`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's own words.
        cause: std::io::Error,
    },
    /// A device that is not there, that lacks something, or that has too little memory for what it was given.
    #[error("{0}")]
    Device(String),
    /// A device that failed at what it was given, or one of its libraries did.
    #[error("{0}")]
    DeviceFailed(String),
    /// The training itself failed: it diverged, or skipped too many steps.
    #[error("{0}")]
    Training(String),
    /// Processes that did not find each other, or lost each other.
    #[error("{0}")]
    Network(String),
    /// What several processes do together failed: one of them, or the network between them.
    #[error("{0}")]
    Collective(String),
    /// Another process of the run failed, and has said why.
    #[error("rank {rank}: {problem}")]
    Peer {
        /// Its number.
        rank: usize,
        /// What it said.
        problem: String,
        /// The exit code that its error asks for.
        exit_code: u8,
    },
}

impl Error {
    /// The process exit code that this error asks for: 2 for wrong input, 1 for a run that failed.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Config { .. } | Error::Data { .. } | Error::Checkpoint { .. } | Error::Shape { .. } => 2,
            Error::Device(_) => 2,
            Error::Io { cause, .. } => match cause.kind() {
                std::io::ErrorKind::NotFound
                | std::io::ErrorKind::AlreadyExists
                | std::io::ErrorKind::IsADirectory
                | std::io::ErrorKind::NotADirectory => 2,
                _ => 1,
            },
            Error::DeviceFailed(_) | Error::Training(_) | Error::Network(_) | Error::Collective(_) => 1,
            Error::Peer { exit_code, .. } => *exit_code,
        }
    }

    /// What other processes are told of it: its exit code, and its words. [`Error::of_peer`] reads it.
    pub(crate) fn for_peers(&self) -> Vec<u8> {
        [&[self.exit_code()], self.to_string().as_bytes()].concat()
    }

    /// A [`Error::Peer`] of what a process of this rank told, which is not empty.
    pub(crate) fn of_peer(rank: usize, told: &[u8]) -> Self {
        let (exit_code, problem) = told.split_first().map_or((1, told), |(code, problem)| (*code, problem));
        Error::Peer { rank, exit_code, problem: String::from_utf8_lossy(problem).into_owned() }
    }

    /// A [`Error::Config`] at `place`.
    pub fn config(place: impl Into<String>, problem: impl Into<String>) -> Self {
        Error::Config { place: place.into(), problem: problem.into() }
    }

    /// A [`Error::Data`] about `path`.
    pub fn data(path: impl Into<PathBuf>, problem: impl Into<String>) -> Self {
        Error::Data { path: path.into(), problem: problem.into() }
    }

    /// A [`Error::Checkpoint`] about `path`.
    pub fn checkpoint(path: impl Into<PathBuf>, problem: impl Into<String>) -> Self {
        Error::Checkpoint { path: path.into(), problem: problem.into() }
    }

    /// A [`Error::Io`]: `action` is a verb, as in `cannot read FILE`.
    pub fn io(action: &'static str, path: impl Into<PathBuf>, cause: std::io::Error) -> Self {
        Error::Io { action, path: path.into(), cause }
    }

    /// A [`Error::Shape`].
    pub fn shape(operation: impl Into<String>, expected: impl Into<String>, found: impl Into<String>) -> Self {
        Error::Shape { operation: operation.into(), expected: expected.into(), found: found.into() }
    }
}
