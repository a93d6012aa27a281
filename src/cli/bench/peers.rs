//! `warpstep bench --peers`.

use std::path::PathBuf;

use clap::Args;

use crate::bench::interrupt;
use crate::bench::peers::{NAMES, Places, Scripts, Settings, heading, line, run};
use crate::bench::place::{Place, Precision};
use crate::bench::results::PeerFigure;
use crate::bench::run::Request;
use crate::bench::unit::{self, STEPS};
use crate::error::Result;
use crate::tell::tell as warn;

/// Seconds of each side, for a work and a peer.
const USUAL_SECONDS: f64 = 5.0;

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
    /// Runs each peer, where any is asked for, in turn with our own work, and tells each ratio as it is found; `keep` is given those of
    /// a work once all are there.
    ///
    /// # Errors
    /// What our own work reports, or what the operating system refuses.
    pub(crate) fn run(
        &self,
        request: &Request,
        tell: &mut dyn FnMut(&str) -> Result<()>,
        keep: &mut dyn FnMut(Vec<PeerFigure>) -> Result<()>,
    ) -> Result<()> {
        if !self.are_asked_for() {
            return Ok(());
        }
        let (works, without) = (request.works(), request.without_peers());
        if !without.is_empty() {
            warn(format_args!(
                "peers: none does the work of {}; they do {}, and of update momentum+global_norm and adamw+global_norm",
                without.join(", "),
                STEPS.map(|name| format!("step/{name}")).join(", ")
            ));
        }
        if works.is_empty() {
            return Ok(());
        }
        let scripts = Scripts::write()?;
        let places = Places::find(self.llm_c.clone());
        let settings = Settings::new(request.seconds.unwrap_or(USUAL_SECONDS));
        tell(&heading())?;
        for work in works {
            for precision in precisions(request, &work) {
                if interrupt::caught().is_some() {
                    return Ok(());
                }
                let mut ours = unit::unit(&work, request.place, precision)?;
                let mut found = Vec::new();
                for name in self.names(&work) {
                    let peer = places.peer(name, &ours.work(), &scripts)?;
                    let figure = run(&peer, ours.as_mut(), &settings)?;
                    tell(&line(&figure))?;
                    found.push(figure);
                }
                keep(found)?;
            }
        }
        Ok(())
    }

    /// Whether any is.
    pub(crate) fn are_asked_for(&self) -> bool {
        self.peers || !self.only.is_empty() || self.llm_c.is_some()
    }

    /// The peers to run for a work. llm.c does one alone, and is named elsewhere only where it was asked for.
    fn names(&self, work: &str) -> Vec<&str> {
        if !self.only.is_empty() {
            return self.only.iter().map(String::as_str).collect();
        }
        NAMES.into_iter().filter(|name| *name != "llm.c" || work == "gpt2").collect()
    }
}

/// The precisions that a work is compared in: those that are asked for, or the one that it is trained in.
fn precisions(request: &Request, work: &str) -> Vec<Precision> {
    match request.place {
        _ if !request.precisions.is_empty() => request.precisions.clone(),
        Place::Cpu => vec![Precision::F32],
        Place::Cuda(_) if matches!(work, "resnet18" | "gpt2") => vec![Precision::Bf16],
        Place::Cuda(_) => vec![Precision::Tf32],
    }
}
