//! `warpstep bench --peers`.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;

use crate::bench::peers::{NAMES, Places, Scripts, Settings, run};
use crate::bench::place::{Place, Precision};
use crate::bench::results::PeerFigure;
use crate::bench::{peers, unit};

/// Options about peers.
#[derive(Debug, Args)]
pub(crate) struct Peers {
    /// Run the same work in PyTorch, JAX, candle and burn in turn with ours, and tell the ratios
    #[arg(long)]
    peers: bool,
    /// Run this peer alone (may be given several times): pytorch-eager, pytorch-compiled, pytorch-graphed, jax, candle, burn
    /// or llm.c
    #[arg(long = "peer", value_name = "NAME", value_parser = NAMES)]
    only: Vec<String>,
    /// The binary of llm.c (train_gpt2cu), to be compared with on GPUs
    #[arg(long, value_name = "PATH")]
    llm_c: Option<PathBuf>,
}

impl Peers {
    /// Whether peers are to be run.
    pub(crate) fn asked(&self) -> bool {
        self.peers || !self.only.is_empty() || self.llm_c.is_some()
    }

    /// Which of these works, of those that peers do: all of them where none is named.
    pub(crate) fn works<'a>(named: &[&'a str]) -> Vec<&'a str> {
        let common = |name: &&str| unit::NAMES.contains(name);
        if named.is_empty() { unit::NAMES.to_vec() } else { named.iter().copied().filter(common).collect() }
    }

    /// Runs each peer in turn with our own work, and writes each ratio as it is found. `seconds` count for each side.
    ///
    /// # Errors
    /// What our own work reports, or what the operating system refuses.
    pub(crate) fn run(
        &self,
        works: &[&str],
        place: Place,
        precision: Precision,
        seconds: f64,
        out: &mut dyn Write,
    ) -> anyhow::Result<Vec<PeerFigure>> {
        let scripts = Scripts::write()?;
        let places = Places::find(self.llm_c.clone());
        let settings = Settings::new(seconds);
        let mut found = Vec::new();
        for (i, work) in works.iter().enumerate() {
            let mut ours = unit::unit(work, place, precision)?;
            for name in self.names(work) {
                let peer = places.peer(name, &ours.work(), &scripts)?;
                let figure = run(&peer, ours.as_mut(), &settings)?;
                if i == 0 && found.is_empty() {
                    writeln!(out, "{}", peers::heading())?;
                }
                writeln!(out, "{}", peers::line(&figure))?;
                out.flush()?;
                found.push(figure);
            }
        }
        Ok(found)
    }

    /// The peers to run for a work. llm.c does one alone, and is named elsewhere only where it was asked for.
    fn names(&self, work: &str) -> Vec<&str> {
        if !self.only.is_empty() {
            return self.only.iter().map(String::as_str).collect();
        }
        NAMES.into_iter().filter(|name| *name != "llm.c" || work == "gpt2").collect()
    }
}
