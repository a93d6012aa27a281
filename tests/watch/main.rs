//! Processes find each other, and see each other fail: real processes of this program, which starts itself again as the ranks.

#[path = "../common/mod.rs"]
mod common;
mod cut;
mod faults;
mod meet;
#[path = "../common/network.rs"]
mod network;
mod rank;
mod team;
