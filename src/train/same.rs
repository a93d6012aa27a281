//! The proof, every so many steps, that all processes hold the same parameters.

use super::streamed::{self, Streamed};
use crate::backend::{Arena, Backend};
use crate::error::{Error, Result};
use crate::parallel::{Collective, gather};

/// Compares a hash of each parameter tensor over all processes.
///
/// # Errors
/// A tensor that differs: its name, and the ranks that hold another than most do. A device or a process that failed.
pub fn same_parameters<B: Backend>(
    collective: &dyn Collective,
    backend: &B,
    arena: &Arena<B>,
    step: u64,
) -> Result<()> {
    let parameters = streamed::parameters(backend, arena);
    let mut hashes = Vec::with_capacity(32 * parameters.len());
    for tensor in &parameters {
        hashes.extend(tensor.hash()?.as_bytes());
    }
    let all = gather(collective, &hashes)?;
    for (number, name) in parameters.iter().map(Streamed::name).enumerate() {
        let of: Vec<&[u8]> =
            all.iter().map(|rank| rank.get(32 * number..32 * (number + 1)).unwrap_or_default()).collect();
        if let Some(ranks) = others(&of) {
            let list: Vec<String> = ranks.iter().map(ToString::to_string).collect();
            let problem = format!(
                "after step {step} the parameter `{name}` of rank {} has other bits than that of the other ranks: a process \
                 computes wrongly, its memory is damaged, or its device is of another kind than theirs; go on from the last checkpoint \
                 before with --resume, on other hardware; under Muon, devices may be of several kinds with parallel.shard = \
                 \"optimizer\"",
                list.join(", ")
            );
            // All know it, and one says it.
            return Err(match collective.rank() {
                0 => Error::Training(problem),
                _ => Error::Peer { rank: 0, problem, exit_code: 1 },
            });
        }
    }
    Ok(())
}

/// The ranks whose hash is not that which most have, or the first of those that as many have; none where all have the same.
fn others(hashes: &[&[u8]]) -> Option<Vec<usize>> {
    let count = |hash: &[u8]| hashes.iter().filter(|other| **other == hash).count();
    let most = hashes.iter().map(|hash| count(hash)).max()?;
    let usual = *hashes.iter().find(|hash| count(hash) == most)?;
    let ranks: Vec<usize> = (0..hashes.len()).filter(|&rank| hashes[rank] != usual).collect();
    (!ranks.is_empty()).then_some(ranks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rank_that_differs_is_the_one_that_few_agree_with() {
        assert_eq!(others(&[b"a", b"a", b"a"]), None);
        assert_eq!(others(&[b"b", b"a", b"a"]), Some(vec![0]));
        assert_eq!(others(&[b"a", b"a", b"b", b"c"]), Some(vec![2, 3]));
        assert_eq!(others(&[b"a", b"b"]), Some(vec![1]));
    }
}
