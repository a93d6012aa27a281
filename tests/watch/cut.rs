//! A rank whose network is cut: two network namespaces, joined by a pair of virtual cards of which one is switched off.

use std::process::Command;

use super::rank::{HOST, STEP};
use super::team::Team;

/// Two namespaces, removed at the end.
struct Network {
    near: String,
    far: String,
}

impl Network {
    /// None where this user may not make them.
    fn new(number: u32) -> Option<Self> {
        let id = std::process::id();
        let network = Network { near: format!("warpstep-{id}-{number}a"), far: format!("warpstep-{id}-{number}b") };
        let (near, far) = (network.near.as_str(), network.far.as_str());
        let made = ip(&["netns", "add", near])
            && ip(&["netns", "add", far])
            && ip(&["-n", near, "link", "add", "card0", "type", "veth", "peer", "name", "card1", "netns", far])
            && ip(&["-n", near, "addr", "add", "10.77.0.1/24", "dev", "card0"])
            && ip(&["-n", far, "addr", "add", "10.77.0.2/24", "dev", "card1"])
            && ip(&["-n", near, "link", "set", "lo", "up"])
            && ip(&["-n", near, "link", "set", "card0", "up"])
            && ip(&["-n", far, "link", "set", "card1", "up"]);
        made.then_some(network)
    }

    /// Switches off the card of one side.
    fn cut(&self, side: &str) {
        let card = if side == self.near { "card0" } else { "card1" };
        assert!(ip(&["-n", side, "link", "set", card, "down"]));
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        ip(&["netns", "del", &self.near]);
        ip(&["netns", "del", &self.far]);
    }
}

fn ip(arguments: &[&str]) -> bool {
    Command::new("ip").args(arguments).output().is_ok_and(|output| output.status.success())
}

/// Ranks 0, 1 and 3 on one machine, rank 2 on another; that one loses its network, or in every other try the first. None where
/// this cannot be tried.
fn one_try(number: u32) -> Option<()> {
    let network = Network::new(number)?;
    // Both sides see the same, so that nothing below asks which it was.
    let cut = if number.is_multiple_of(2) { &network.far } else { &network.near };
    let mut team = Team::new("cut", 2);
    for rank in 0..4 {
        let (space, host) = if rank == 2 { (&network.far, "far") } else { (&network.near, "near") };
        let mut command = team.command(&["ip", "netns", "exec", space]);
        command.env(HOST, host).env("WARPSTEP_TIMEOUT", "1.6");
        team.start(command, 4, "10.77.0.1", 29_501);
    }
    team.wait_until_ready();
    network.cut(cut);
    let ends = team.ends();
    let silent = |rank: usize, host: &str, others: &str| {
        format!(
            "error: rank {rank} on host {host} gave no sign of life for 1.2 s after step {STEP}: it hangs, or its network is cut; \
             {others} stopped; go on with --resume\n"
        )
    };
    for (rank, end) in ends.iter().enumerate() {
        assert_eq!(end.code, Some(1), "{ends:#?}");
        let expected = match rank {
            0 => silent(2, "far", "3 other ranks"),
            // Alone on its side, it cannot know that it is the one.
            2 => silent(0, "near", "3 other ranks"),
            _ => String::new(),
        };
        assert_eq!(end.stderr, expected, "rank {rank}: {ends:#?}");
    }
    Some(())
}

#[test]
fn a_rank_without_network_ends_all_ten_times_of_ten() {
    for some in [0..5, 5..10] {
        let tried: Vec<Option<()>> = std::thread::scope(|scope| {
            let tries: Vec<_> = some.map(|number| scope.spawn(move || one_try(number))).collect();
            tries.into_iter().map(|one| one.join().unwrap()).collect()
        });
        if tried.contains(&None) {
            println!("skipped: network namespaces cannot be made here (root, and the `ip` command, can)");
            return;
        }
    }
}
