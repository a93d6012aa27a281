//! A rank whose network is cut.

use super::network::{NEAR, Network};
use super::rank::{HOST, STEP};
use super::team::Team;

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
        team.start(command, 4, NEAR, 29_501);
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
            return;
        }
    }
}
