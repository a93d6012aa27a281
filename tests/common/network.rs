//! Two machines that a test makes of this one, as far as networks go: two network namespaces, joined by a pair of virtual cards.

#![allow(dead_code)] // each test file uses a part of it

use std::process::Command;

/// The address of the near side.
pub const NEAR: &str = "10.77.0.1";
/// The address of the far side.
pub const FAR: &str = "10.77.0.2";
/// Both.
pub const BOTH: &str = "10.77.0.0/24";

/// Two namespaces. What runs in them ends with them.
pub struct Network {
    /// The name of one.
    pub near: String,
    /// The name of the other.
    pub far: String,
}

impl Network {
    /// None, and a line that says so, where this user may not make them. `number` is its own among those of this process.
    pub fn new(number: u32) -> Option<Self> {
        let id = std::process::id();
        let network = Network { near: format!("warpstep-{id}-{number}a"), far: format!("warpstep-{id}-{number}b") };
        let (near, far) = (network.near.as_str(), network.far.as_str());
        let (near_address, far_address) = (format!("{NEAR}/24"), format!("{FAR}/24"));
        let made = ip(&["netns", "add", near])
            && ip(&["netns", "add", far])
            && ip(&["-n", near, "link", "add", "card0", "type", "veth", "peer", "name", "card1", "netns", far])
            && ip(&["-n", near, "addr", "add", &near_address, "dev", "card0"])
            && ip(&["-n", far, "addr", "add", &far_address, "dev", "card1"])
            && ip(&["-n", near, "link", "set", "lo", "up"])
            && ip(&["-n", far, "link", "set", "lo", "up"])
            && ip(&["-n", near, "link", "set", "card0", "up"])
            && ip(&["-n", far, "link", "set", "card1", "up"]);
        if !made {
            println!("skipped: network namespaces cannot be made here (root, and the `ip` command, can)");
        }
        made.then_some(network)
    }

    /// Switches off the card of one side.
    pub fn cut(&self, side: &str) {
        let card = if side == self.near { "card0" } else { "card1" };
        assert!(ip(&["-n", side, "link", "set", card, "down"]));
    }

    /// How often both sides send again what nobody acknowledges, until they give a connection up.
    pub fn send_again(&self, times: u32) {
        for side in [&self.near, &self.far] {
            let set = format!("echo {times} > /proc/sys/net/ipv4/tcp_retries2");
            assert!(ip(&["netns", "exec", side, "sh", "-c", &set]));
        }
    }

    /// What runs on both sides.
    pub fn processes(&self) -> Vec<i32> {
        let of = |side: &str| Command::new("ip").args(["netns", "pids", side]).output().map(|output| output.stdout);
        let sides = [of(&self.near), of(&self.far)].map(Result::unwrap_or_default).concat();
        String::from_utf8_lossy(&sides).split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for pid in self.processes() {
            // SAFETY: a signal to a process of a namespace that is this test's alone.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        ip(&["netns", "del", &self.near]);
        ip(&["netns", "del", &self.far]);
    }
}

fn ip(arguments: &[&str]) -> bool {
    Command::new("ip").args(arguments).output().is_ok_and(|output| output.status.success())
}
