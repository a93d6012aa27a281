//! Environment variables of every launcher.

use std::collections::HashMap;
use std::time::Duration;

use warpstep::parallel::world::{Launcher, World};

/// `A=1 B=2`.
fn read(variables: &str) -> warpstep::Result<World> {
    let pairs: HashMap<&str, &str> = variables.split_whitespace().map(|pair| pair.split_once('=').unwrap()).collect();
    World::read("here", &|name| pairs.get(name).map(|value| (*value).to_owned()))
}

/// Launcher, rank, size, local rank, local size, rendezvous.
fn brief(variables: &str) -> (Launcher, [usize; 4], String) {
    let world = read(variables).unwrap_or_else(|error| panic!("{variables}: {error}"));
    assert_eq!(world.host, "here");
    let numbers = [world.rank, world.size, world.local_rank, world.local_size];
    (world.how, numbers, world.rendezvous.map_or("none".into(), |at| at.to_string()))
}

const TORCHRUN: &str = "RANK=5 WORLD_SIZE=8 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4 MASTER_ADDR=node1 MASTER_PORT=29500 \
     TORCHELASTIC_RUN_ID=none TORCHELASTIC_RESTART_COUNT=0";
const STEP: &str = "SLURM_JOB_ID=4711 SLURM_STEP_ID=0 SLURM_PROCID=5 SLURM_LOCALID=1 SLURM_NODEID=1 SLURM_STEP_NUM_TASKS=7 \
     SLURM_NTASKS=64 SLURM_STEP_TASKS_PER_NODE=4,3 SLURM_STEP_NODELIST=gpu[07-08] SLURM_JOB_NODELIST=gpu[07-08]";

#[test]
fn every_launcher_is_understood() {
    use Launcher::{Alone, Kubernetes, Mpich, OpenMpi, Slurm, Torchrun, Warpstep};
    let table: &[(&str, Launcher, [usize; 4], &str)] = &[
        ("", Alone, [0, 1, 0, 1], "none"),
        ("PATH=/bin HOME=/", Alone, [0, 1, 0, 1], "none"),
        (
            "WARPSTEP_RANK=1 WARPSTEP_WORLD_SIZE=2 WARPSTEP_LOCAL_RANK=1 WARPSTEP_LOCAL_WORLD_SIZE=2 WARPSTEP_ADDRESS=127.0.0.1 \
             WARPSTEP_PORT=4000",
            Warpstep,
            [1, 2, 1, 2],
            "127.0.0.1:4000",
        ),
        (TORCHRUN, Torchrun, [5, 8, 1, 4], "node1:29501"),
        ("RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1", Torchrun, [0, 1, 0, 1], "none"),
        (
            "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=fd00::1 MASTER_PORT=1 WARPSTEP_PORT=77",
            Torchrun,
            [1, 2, 1, 2],
            "[fd00::1]:77",
        ),
        (
            "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2",
            OpenMpi,
            [3, 4, 1, 2],
            "none",
        ),
        (
            "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 MASTER_ADDR=node1 MASTER_PORT=29500",
            OpenMpi,
            [3, 4, 0, 1],
            "node1:29501",
        ),
        ("PMI_RANK=2 PMI_SIZE=3 MPI_LOCALRANKID=0 MPI_LOCALNRANKS=1", Mpich, [2, 3, 0, 1], "none"),
        (
            "PMI_RANK=2 PMI_SIZE=3 MPI_LOCALRANKID=2 MPI_LOCALNRANKS=3 WARPSTEP_ADDRESS=[::1] WARPSTEP_PORT=9",
            Mpich,
            [2, 3, 2, 3],
            "[::1]:9",
        ),
        (
            "RANK=1 WORLD_SIZE=3 MASTER_ADDR=job-master-0 MASTER_PORT=23456",
            Kubernetes,
            [1, 3, 0, 1],
            "job-master-0:23457",
        ),
        (
            "JOB_COMPLETION_INDEX=2 WORLD_SIZE=3 MASTER_ADDR=job-0.service MASTER_PORT=23456",
            Kubernetes,
            [2, 3, 0, 1],
            "job-0.service:23457",
        ),
        ("JOB_COMPLETION_INDEX=2", Alone, [0, 1, 0, 1], "none"),
        ("RANK= WORLD_SIZE=", Alone, [0, 1, 0, 1], "none"),
    ];
    for (variables, how, numbers, rendezvous) in table {
        assert_eq!(brief(variables), (*how, *numbers, (*rendezvous).to_owned()), "{variables}");
    }
    let (how, numbers, at) = brief(STEP);
    assert_eq!((how, numbers), (Slurm, [5, 7, 1, 3]));
    let port: u16 = at.strip_prefix("gpu07:").unwrap().parse().unwrap();
    assert!((20_000..30_000).contains(&port), "{port}");
}

#[test]
fn the_first_launcher_in_order_counts() {
    let pmi = "PMI_RANK=5 PMI_SIZE=7";
    let mpirun =
        "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=0 OMPI_COMM_WORLD_LOCAL_SIZE=2";
    assert_eq!(brief(&format!("{TORCHRUN} {STEP}")).0, Launcher::Torchrun, "torchrun on every node of a step");
    assert_eq!(brief(&format!("{mpirun} {STEP}")).0, Launcher::OpenMpi, "mpirun within a job");
    assert_eq!(brief(&format!("{mpirun} {STEP}")).1, [0, 2, 0, 2]);
    let pod = "RANK=1 WORLD_SIZE=3 MASTER_ADDR=a MASTER_PORT=1";
    assert_eq!(brief(&format!("{mpirun} {pod}")).0, Launcher::OpenMpi, "mpirun within a pod");
    assert_eq!(brief(&format!("{pmi} {STEP}")).0, Launcher::Slurm, "srun --mpi=pmi2 says both");
    assert_eq!(
        brief(&format!("PMI_RANK=1 PMI_SIZE=2 {STEP}")).0,
        Launcher::Mpich,
        "mpiexec that srun starts once a node"
    );
    let ours = "WARPSTEP_RANK=0 WARPSTEP_WORLD_SIZE=2 WARPSTEP_ADDRESS=127.0.0.1 WARPSTEP_PORT=1";
    assert_eq!(brief(&format!("{ours} {TORCHRUN} {STEP} {mpirun}")).0, Launcher::Warpstep);
}

#[test]
fn slurm_counts_within_a_step_alone_and_its_lists_are_read() {
    let batch = "SLURM_JOB_ID=4711 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=4 SLURM_JOB_NODELIST=gnode[10,20,25,37]";
    assert_eq!(brief(batch).0, Launcher::Alone, "a batch script is no rank");
    for own_step in ["4294967291", "4294967290"] {
        assert_eq!(brief(&format!("{batch} SLURM_STEP_ID={own_step}")).0, Launcher::Alone);
    }
    let step = |list: &str| {
        brief(&format!("SLURM_JOB_ID=7 SLURM_STEP_ID=1 SLURM_PROCID=1 SLURM_NTASKS=2 SLURM_JOB_NODELIST={list}"))
    };
    for (list, first) in [
        ("one", "one"),
        ("one,two", "one"),
        ("gnode[10,20,25,37]", "gnode10"),
        ("node[007-128],other", "node007"),
        ("rack[1-2]n[3-4]", "rack1n3"),
        ("rack[4]-gpu,other[1-2]", "rack4-gpu"),
    ] {
        assert!(step(list).2.starts_with(&format!("{first}:2")), "{list}: {:?}", step(list));
    }
    let here = |tasks: &str, node: usize| {
        let more = format!("SLURM_NODEID={node} SLURM_STEP_TASKS_PER_NODE={tasks} SLURM_JOB_NODELIST=a");
        brief(&format!("SLURM_JOB_ID=7 SLURM_STEP_ID=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_STEP_NUM_TASKS=32 {more}"))
            .1[3]
    };
    assert_eq!([here("8(x4)", 3), here("8(x2),4(x3)", 1), here("8(x2),4(x3)", 2), here("2,3", 1)], [8, 8, 4, 3]);
    // Two steps of one job meet at ports of their own.
    assert_ne!(brief(STEP).2, brief(&STEP.replace("STEP_ID=0", "STEP_ID=1")).2);
}

#[test]
fn what_is_incomplete_or_contradicts_itself_is_one_error_that_names_the_variable() {
    let master = "MASTER_ADDR=a MASTER_PORT=1";
    for (variables, name, what) in [
        ("RANK=1", "WORLD_SIZE", "is not set, but RANK is"),
        ("WORLD_SIZE=2", "RANK", "is not set, but WORLD_SIZE is"),
        ("LOCAL_RANK=0 WORLD_SIZE=2", "RANK", "is not set"),
        ("RANK=2 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", "RANK", "found 2, expected a number below WORLD_SIZE = 2"),
        ("RANK=one WORLD_SIZE=2", "RANK", "found \"one\", expected a whole number"),
        ("RANK=-1 WORLD_SIZE=2", "RANK", "found \"-1\""),
        ("RANK=0 WORLD_SIZE=0", "WORLD_SIZE", "found 0, expected 1 or more"),
        ("RANK=0 WORLD_SIZE=99999999999", "WORLD_SIZE", "found \"99999999999\""),
        (
            "RANK=0 WORLD_SIZE=4 LOCAL_RANK=2 LOCAL_WORLD_SIZE=2",
            "LOCAL_RANK",
            "expected a number below LOCAL_WORLD_SIZE = 2",
        ),
        ("RANK=0 WORLD_SIZE=4 LOCAL_RANK=0 LOCAL_WORLD_SIZE=8", "LOCAL_WORLD_SIZE", "from 1 to WORLD_SIZE = 4"),
        ("RANK=0 WORLD_SIZE=2 MASTER_PORT=1", "MASTER_ADDR", "is not set, but Kubernetes started several"),
        ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=a", "MASTER_PORT", "is not set"),
        ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=65535", "MASTER_PORT", "a port that has one after it"),
        ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=0", "MASTER_PORT", "expected a port from 1 to 65535"),
        ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=a WARPSTEP_PORT=x", "WARPSTEP_PORT", "found \"x\""),
        ("WARPSTEP_RANK=0", "WARPSTEP_WORLD_SIZE", "is not set"),
        ("OMPI_COMM_WORLD_RANK=0", "OMPI_COMM_WORLD_SIZE", "is not set"),
        ("PMI_SIZE=2", "PMI_RANK", "is not set"),
        ("PMI_RANK=2 PMI_SIZE=2", "PMI_RANK", "below PMI_SIZE = 2"),
        ("SLURM_STEP_ID=0 SLURM_PROCID=1", "SLURM_NTASKS", "is not set"),
        ("SLURM_STEP_ID=0 SLURM_PROCID=3 SLURM_NTASKS=2", "SLURM_PROCID", "below SLURM_NTASKS = 2"),
        (
            "SLURM_JOB_ID=1 SLURM_STEP_ID=0 SLURM_PROCID=1 SLURM_NTASKS=2 SLURM_JOB_NODELIST=a[1",
            "SLURM_JOB_NODELIST",
            "found \"a[1\"",
        ),
        ("WARPSTEP_TIMEOUT=soon", "WARPSTEP_TIMEOUT", "expected seconds"),
        ("WARPSTEP_TIMEOUT=-3", "WARPSTEP_TIMEOUT", "expected seconds"),
    ] {
        let error = read(variables).expect_err(variables);
        let text = error.to_string();
        assert!(
            text.starts_with(&format!("environment variable {name}: ")) && text.contains(what),
            "{variables}: {text}"
        );
        assert_eq!(error.exit_code(), 2, "{variables}");
    }
    assert_eq!(read(&format!("{master} WARPSTEP_TIMEOUT=2.5")).unwrap().timeout, Some(Duration::from_millis(2500)));
}

#[test]
fn runs_at_one_address_have_names_of_their_own() {
    let name = |variables: &str| read(variables).unwrap().run;
    assert_ne!(name(TORCHRUN), name(&TORCHRUN.replace("COUNT=0", "COUNT=1")), "before and after a restart");
    assert_ne!(name(STEP), name(&STEP.replace("4711", "4712")));
    assert_eq!(name(&format!("{STEP} WARPSTEP_RUN=mine")), "mine");
}
