//! What srun says. A batch script, and a shell of salloc, have most of Slurm's variables too, but are no rank.

use super::variables::{Variables, wrong};
use super::{Found, Launcher, Names};
use crate::error::Result;

/// Slurm numbers its own steps (batch script, interactive shell, ..) from here on.
const FIRST_OWN_STEP: u64 = 0xffff_fff0;

/// This process as a task of a step; none outside of one.
pub(super) fn read(vars: &Variables<'_>) -> Result<Option<Found>> {
    let step = vars.text("SLURM_STEP_ID").and_then(|step| step.parse::<u64>().ok());
    if step.is_none_or(|step| step >= FIRST_OWN_STEP) || !vars.has("SLURM_PROCID") {
        return Ok(None);
    }
    let size = if vars.has("SLURM_STEP_NUM_TASKS") { "SLURM_STEP_NUM_TASKS" } else { "SLURM_NTASKS" };
    let names = Names {
        how: Launcher::Slurm,
        rank: "SLURM_PROCID",
        size,
        local_rank: "SLURM_LOCALID",
        // No variable of Slurm has this number alone.
        local_size: "WARPSTEP_LOCAL_WORLD_SIZE",
    };
    let Some(mut found) = names.read(vars)? else { return Ok(None) };
    if let Some(tasks) = tasks_here(vars)? {
        found.local_size = tasks.clamp(found.local_rank + 1, found.size);
    }
    Ok(Some(found))
}

/// Tasks of this machine, as `4(x2),3` says for three machines.
fn tasks_here(vars: &Variables<'_>) -> Result<Option<usize>> {
    let name = "SLURM_STEP_TASKS_PER_NODE";
    let (Some(list), Some(node)) = (vars.text(name), vars.number("SLURM_NODEID")?) else { return Ok(None) };
    let mut first = 0;
    for entry in list.split(',') {
        let (tasks, times) = match entry.strip_suffix(')').and_then(|entry| entry.split_once("(x")) {
            Some((tasks, times)) => (tasks, times),
            None => (entry, "1"),
        };
        let (Ok(tasks), Ok(times)) = (tasks.parse::<usize>(), times.parse::<usize>()) else {
            return Err(wrong(name, &format!("{list:?}"), "numbers of tasks, such as 4(x2),3"));
        };
        first += times;
        if node < first {
            return Ok(Some(tasks));
        }
    }
    Ok(None)
}

/// The machine of rank 0.
pub(super) fn first_host(vars: &Variables<'_>) -> Result<Option<String>> {
    for name in ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"] {
        if let Some(list) = vars.text(name) {
            let expected = "a list of machines, such as node[01-04,7],other";
            return first_of(&list).map(Some).ok_or_else(|| wrong(name, &format!("{list:?}"), expected));
        }
    }
    Ok(None)
}

/// The first name of a list: `node01` of `node[01-04,7],other`, `rack1n3` of `rack[1-2]n[3-4]`.
fn first_of(list: &str) -> Option<String> {
    let mut name = String::new();
    let mut rest = list;
    while let Some(at) = rest.find(['[', ',']) {
        name.push_str(&rest[..at]);
        if rest[at..].starts_with(',') {
            rest = "";
            break;
        }
        let (inside, after) = rest[at + 1..].split_once(']')?;
        name.push_str(inside.split([',', '-']).next()?);
        rest = after;
    }
    name.push_str(rest);
    (!name.is_empty() && !name.contains([']', ' '])).then_some(name)
}
