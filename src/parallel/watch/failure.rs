//! What went wrong with which rank, as one sentence.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::parallel::rendezvous::seconds;

/// Ranks that a sentence names at most.
const MOST: usize = 8;

/// Why ranks are no longer of use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cause {
    /// The process ended without a goodbye.
    Died,
    /// No sign of life for so long: it hangs, or its network is cut.
    Silent(Duration),
    /// It lives, but has not moved for so long while others wait for it.
    Stuck(Duration),
    /// Every rank waits for the others, and none has moved for so long.
    Deadlock(Duration),
    /// Its own error.
    Error(String),
}

/// A rank and its machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Named {
    /// The rank.
    pub rank: usize,
    /// Its machine.
    pub host: String,
}

/// A failure that all ranks stop for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Whose.
    pub ranks: Vec<Named>,
    /// Why.
    pub cause: Cause,
    /// The last step that was done.
    pub step: u64,
    /// How many others stop.
    pub others: usize,
}

impl Failure {
    /// `rank 2 on host node7 died after step 1841; 3 other ranks stopped`, and the advice where there is one.
    pub fn sentence(&self, advice: &str) -> String {
        let (many, step) = (self.ranks.len() > 1, self.step);
        let who = self.who();
        let what = match &self.cause {
            Cause::Died => format!("{who} died after step {step}"),
            Cause::Silent(time) => {
                let why = if many { "they hang, or their network is cut" } else { "it hangs, or its network is cut" };
                format!("{who} gave no sign of life for {} after step {step}: {why}", seconds(*time))
            }
            Cause::Stuck(time) => {
                let (verb, them) = if many { ("are", "them") } else { ("is", "it") };
                let time = seconds(*time);
                format!("{who} {verb} stuck after step {step}: others have waited for {them} for {time}")
            }
            Cause::Deadlock(time) => format!(
                "{who} have waited for each other for {} after step {step}: the network of their data may be cut",
                seconds(*time)
            ),
            Cause::Error(text) => format!("{who} failed after step {step}: {}", one_line(text)),
        };
        let mut sentence = match self.others {
            0 => what,
            1 => format!("{what}; 1 other rank stopped"),
            others => format!("{what}; {others} other ranks stopped"),
        };
        if !advice.is_empty() {
            sentence.push_str("; ");
            sentence.push_str(advice);
        }
        sentence
    }

    /// `rank 2 on host node7`, `ranks 2 on host node7 and 5 on host node8`.
    fn who(&self) -> String {
        let name = |named: &Named| format!("{} on host {}", named.rank, named.host);
        match self.ranks.as_slice() {
            [one] => format!("rank {}", name(one)),
            some if some.len() <= MOST => {
                let names: Vec<String> = some.iter().map(name).collect();
                let (last, first) = names.split_last().map_or(("", &[][..]), |(last, first)| (last.as_str(), first));
                format!("ranks {} and {last}", first.join(", "))
            }
            many => {
                let names: Vec<String> = many.iter().take(MOST).map(name).collect();
                format!("ranks {} and {} more", names.join(", "), many.len() - MOST)
            }
        }
    }
}

fn one_line(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.join(" ")
}
