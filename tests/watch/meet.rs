//! Processes find each other, and nobody else.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use super::common::free_port;
use warpstep::Error;
use warpstep::parallel::rendezvous::{Endpoint, Listener, Rendezvous};
use warpstep::parallel::world::{Launcher, World, host_name};

const LONG: Duration = Duration::from_secs(30);

fn world(rank: usize, size: usize) -> World {
    World {
        rank,
        size,
        local_rank: rank,
        local_size: size,
        host: "here".into(),
        how: Launcher::Warpstep,
        rendezvous: None,
        run: "a run".into(),
        timeout: None,
    }
}

fn here(port: u16) -> Endpoint {
    Endpoint::new("127.0.0.1", port)
}

/// What all exchange: every rank's bytes at rank 0, rank 0's in all.
fn exchange(mut rendezvous: Rendezvous) -> (Vec<Vec<u8>>, Vec<u8>) {
    let rank = rendezvous.rank();
    let all = rendezvous.gather(&vec![rank as u8; 3 * rank]).unwrap();
    let mut bytes = if rank == 0 { (0..128).collect() } else { Vec::new() };
    rendezvous.broadcast(&mut bytes).unwrap();
    rendezvous.barrier().unwrap();
    (all, bytes)
}

#[test]
fn one_that_is_not_ready_is_told_to_all_others_before_they_go_on() {
    for failing in [vec![], vec![0], vec![2, 1]] {
        let at = here(free_port());
        let ranks: Vec<_> = (0..3)
            .map(|rank| {
                let (at, failed) = (at.clone(), failing.contains(&rank));
                thread::spawn(move || {
                    let mut rendezvous = Rendezvous::join(&world(rank, 3), &at, LONG).unwrap();
                    let error = failed.then(|| Error::Device(format!("no NCCL on {rank}")));
                    rendezvous.all_ready(error.as_ref())
                })
            })
            .collect();
        for (rank, found) in ranks.into_iter().map(|thread| thread.join().unwrap()).enumerate() {
            match (failing.iter().min(), found) {
                (Some(_), Ok(())) => assert!(failing.contains(&rank), "rank {rank} does not know of it"),
                (Some(first), Err(error)) => {
                    assert_eq!(error.to_string(), format!("rank {first}: no NCCL on {first}"));
                    assert_eq!(error.exit_code(), 2);
                    assert!(!failing.contains(&rank));
                }
                (None, found) => found.unwrap(),
            }
        }
    }
}

#[test]
fn four_ranks_meet_in_any_order_and_exchange_bytes_over_ipv4_ipv6_and_by_name() {
    for host in ["127.0.0.1", "::1", "[::1]", "localhost"] {
        let port = free_port();
        if host.contains(':') && std::net::TcpListener::bind("[::1]:0").is_err() {
            println!("skipped: no IPv6 here");
            continue;
        }
        let at = Endpoint::new(host, port);
        let ranks: Vec<_> = [3, 1, 2, 0]
            .map(|rank| {
                let at = at.clone();
                thread::spawn(move || {
                    // Rank 0 comes last, so that the others must try again.
                    thread::sleep(Duration::from_millis(if rank == 0 { 150 } else { 10 * rank as u64 }));
                    (rank, exchange(Rendezvous::join(&world(rank, 4), &at, LONG).unwrap()))
                })
            })
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect();
        for (rank, (all, bytes)) in ranks {
            let expected = if rank == 0 { vec![vec![], vec![1; 3], vec![2; 6], vec![3; 9]] } else { Vec::new() };
            assert_eq!(all, expected, "rank {rank}");
            assert_eq!(bytes, (0..128).collect::<Vec<u8>>(), "rank {rank}");
        }
    }
}

#[test]
fn rank_0_may_listen_at_any_port_of_its_machine_and_tell_the_others_which() {
    let host = host_name();
    if std::net::ToSocketAddrs::to_socket_addrs(&(host.as_str(), 0)).is_err() {
        println!("skipped: the name of this machine has no address");
        return;
    }
    let listener = Listener::open(&Endpoint::new(&host, 0)).unwrap();
    // As MPI would carry it.
    let told = Endpoint::new(&host, listener.port().unwrap()).to_string();
    let rank_one =
        thread::spawn(move || exchange(Rendezvous::join(&world(1, 2), &told.parse().unwrap(), LONG).unwrap()));
    exchange(Rendezvous::host(&world(0, 2), listener, LONG).unwrap());
    assert_eq!(rank_one.join().unwrap().1.len(), 128);
}

/// Rank 0 of a world of 2, at a port of its own; and rank 1 of it, to let it go on.
fn open(timeout: Duration) -> (Endpoint, thread::JoinHandle<warpstep::Result<Rendezvous>>) {
    let listener = Listener::open(&here(0)).unwrap();
    let at = here(listener.port().unwrap());
    (at, thread::spawn(move || Rendezvous::host(&world(0, 2), listener, timeout)))
}

#[test]
fn a_stranger_is_sent_away_and_the_ranks_meet_all_the_same() {
    let (at, rank_zero) = open(LONG);
    let mut mute = TcpStream::connect((at.host.as_str(), at.port)).unwrap();
    let mut stranger = TcpStream::connect((at.host.as_str(), at.port)).unwrap();
    stranger.write_all(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    stranger.read_to_end(&mut answer).unwrap();
    assert!(String::from_utf8_lossy(&answer).contains("does not speak Warpstep's protocol"), "{answer:?}");
    let rank_one = Rendezvous::join(&world(1, 2), &at, LONG).unwrap();
    let rank_zero = thread::spawn(|| exchange(rank_zero.join().unwrap().unwrap()));
    assert_eq!(exchange(rank_one).1.len(), 128);
    rank_zero.join().unwrap();
    let _ = mute.write_all(b"WARP");
}

#[test]
fn a_rank_of_another_world_run_or_number_is_told_why_and_rank_0_tells_whom_it_refused() {
    let (at, rank_zero) = open(Duration::from_secs(1));
    let told = |world: World| Rendezvous::join(&world, &at, LONG).unwrap_err().to_string();
    let size = told(world(1, 3));
    assert!(size.contains("rank 1 was started in a world of 3, rank 0 in one of 2"), "{size}");
    let run = told(World { run: "another".into(), ..world(1, 2) });
    assert!(run.contains("rank 1 is of run \"another\", rank 0 of run \"a run\""), "{run}");
    let number = told(World { rank: 5, ..world(1, 2) });
    assert!(number.contains("found rank 5, expected one from 1 to 1"), "{number}");
    let error = rank_zero.join().unwrap().unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("rank 1 of 2 has not come within 1 s"), "{text}");
    assert!(text.contains("was refused: rank 1 was started in a world of 3"), "{text}");
    assert_eq!(error.exit_code(), 1);
}

#[test]
fn a_rank_that_comes_twice_is_refused_but_may_come_again_where_the_first_went() {
    let listener = Listener::open(&here(0)).unwrap();
    let at = here(listener.port().unwrap());
    let rank_zero = thread::spawn(move || Rendezvous::host(&world(0, 3), listener, LONG));
    // It gives up before all have come, and hangs up.
    let gave_up = Rendezvous::join(&world(1, 3), &at, Duration::from_millis(200)).unwrap_err().to_string();
    assert!(gave_up.contains("other ranks have not come in time"), "{gave_up}");
    // Of two that come, whichever is later.
    let (answer, answers) = channel();
    for _ in 0..2 {
        let (at, answer) = (at.clone(), answer.clone());
        thread::spawn(move || answer.send(Rendezvous::join(&world(1, 3), &at, LONG)));
    }
    let refused = answers.recv().unwrap().unwrap_err().to_string();
    assert!(refused.contains("rank 1 has come already"), "{refused}");
    Rendezvous::join(&world(2, 3), &at, LONG).unwrap();
    assert_eq!(answers.recv().unwrap().unwrap().rank(), 1);
    assert_eq!(rank_zero.join().unwrap().unwrap().size(), 3);
}

#[test]
fn what_is_not_there_and_what_is_something_else_are_told_apart() {
    let nobody = here(free_port());
    let absent = Rendezvous::join(&world(1, 2), &nobody, Duration::from_millis(300)).unwrap_err().to_string();
    assert!(absent.contains(&format!("rank 1 did not reach rank 0 at {nobody} within 0.3 s")), "{absent}");
    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let at = here(other.local_addr().unwrap().port());
    let program = thread::spawn(move || {
        let (mut stream, _) = other.accept().unwrap();
        stream.write_all(b"220 mail.example ESMTP\r\n").unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let error = Rendezvous::join(&world(1, 2), &at, LONG).unwrap_err().to_string();
    assert!(error.contains("is not rank 0 of a Warpstep run") && error.contains("WARPSTEP_PORT"), "{error}");
    program.join().unwrap();
}

#[test]
fn a_port_that_is_taken_is_told_with_a_way_out() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let at = here(taken.local_addr().unwrap().port());
    let error = Rendezvous::join(&world(0, 2), &at, LONG).unwrap_err().to_string();
    assert!(error.contains(&format!("cannot listen at {at}")) && error.contains("WARPSTEP_PORT"), "{error}");
}

#[test]
fn a_rank_that_goes_away_and_one_in_another_call_are_named() {
    let meet = || {
        let (at, rank_zero) = open(LONG);
        let rank_one = Rendezvous::join(&world(1, 2), &at, LONG).unwrap();
        (rank_zero.join().unwrap().unwrap(), rank_one)
    };
    let (mut rank_zero, rank_one) = meet();
    drop(rank_one);
    let gone = rank_zero.barrier().unwrap_err().to_string();
    assert!(gone.contains("rank 1 ended before all had begun"), "{gone}");
    let (mut rank_zero, mut rank_one) = meet();
    rank_one.gather(b"bytes").unwrap();
    let other = rank_zero.barrier().unwrap_err().to_string();
    assert!(other.contains("expected Barrier of rank 1, found Gather"), "{other}");
}

#[test]
fn an_address_is_the_same_after_it_was_written_and_read() {
    for at in [Endpoint::new("node-1.cluster", 29501), Endpoint::new("10.0.0.3", 1), Endpoint::new("fd00::17", 65535)] {
        assert_eq!(at.to_string().parse::<Endpoint>().unwrap(), at);
    }
    assert_eq!("[fd00::17]:7".parse::<Endpoint>().unwrap().host, "fd00::17");
    for wrong in ["", ":7", "host", "host:", "host:70000"] {
        assert!(wrong.parse::<Endpoint>().is_err(), "{wrong}");
    }
}
