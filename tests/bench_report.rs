//! The page of a benchmark: whole, by itself, with every figure and every reason in it.

use std::collections::BTreeMap;

use warpstep::bench::report::{page, write};
use warpstep::bench::results::{FORMAT, Figure, Floor, Limits, Machine, PeerFigure, Results, Spread, Work};
use warpstep::random::{Philox, Purpose};

fn about(median: f64) -> Spread {
    Spread { count: 40, min: 0.95 * median, lower_quartile: 0.98 * median, median, upper_quartile: 1.03 * median }
}

fn figure(suite: &str, name: &str, seconds: f64) -> Figure {
    let amount = (128.0, "sample".to_owned());
    Figure { suite: suite.into(), name: name.into(), seconds: about(seconds), amount, ..Figure::default() }
}

/// What a run on a CPU leaves, with one of everything that a page has to show.
fn results() -> Results {
    let floor = |seconds, what: &str| Some(Floor { seconds, what: what.into(), doubt: None });
    let moved = |name: &str, bytes: f64, seconds| Figure {
        bytes: Some(bytes),
        amount: (bytes, "byte".into()),
        ..figure("device", name, seconds)
    };
    let computed = |suite: &str, name: &str, bytes: f64, flops: f64, seconds| Figure {
        bytes: Some(bytes),
        flops: Some(flops),
        floor: floor(flops / 2.3e11, "this run's fastest product, 230 GFLOP/s in f32"),
        ..figure(suite, name, seconds)
    };
    let mut figures = vec![
        moved("copy/16MiB_L3", 3.3e7, 6e-4),
        moved("copy/memory", 1.0e9, 0.047),
        moved("read/memory", 1.0e9, 0.04),
        computed("device", "product/2048x2048x2048/f32", 5e7, 1.72e10, 0.0747),
        computed("device", "product/128x784x256/f32", 1.3e6, 5.1e7, 2.9e-4),
        Figure {
            bytes: Some(1.2e9),
            floor: floor(0.0564, "24 bytes a parameter at the speed of a copy taken in turn with it, 21.3 GB/s"),
            memory_bytes: Some(800 << 20),
            ..figure("update", "momentum+global_norm/50M/f32", 0.06)
        },
        Figure {
            refused: Some("not enough memory: 30.0 GB".into()),
            seconds: Spread::default(),
            ..figure("update", "adamw/1558M/f32", 1.0)
        },
        Figure {
            refused: Some("spread too wide: quartiles 61 % of the median apart".into()),
            ..computed("kernel", "layer_norm/768x128/f32", 8e5, 6e5, 4e-5)
        },
        computed("kernel", "attention/12x4x64x32/f32", 1.6e6, 2.5e7, 3e-4),
        computed("kernel", "gelu_tanh/768x512/f32", 3.1e6, 3.9e6, 2e-4),
        computed("kernel", "softmax/768x65/f32", 4e5, 2.5e5, 3e-5),
        computed("kernel", "embedding/768x128/f32", 8e5, 1e5, 4.5e-5),
    ];
    figures.push(Figure {
        flops: Some(1.8e8),
        floor: floor(7.9e-4, "its 0.180 GFLOP at this run's fastest product, 230 GFLOP/s in f32"),
        parts: BTreeMap::from([
            ("forward".to_owned(), 0.3),
            ("backward".to_owned(), 0.55),
            ("update".to_owned(), 0.15),
        ]),
        memory_bytes: Some(5 << 20),
        work: Some(Work { name: "mlp".into(), parameters: 235_146, ..Work::default() }),
        ..figure("step", "mlp", 0.00099)
    });
    let peer = |work: &str, peer: &str, ratio: f64| PeerFigure {
        peer: peer.into(),
        version: "2.15.0".into(),
        work: Work {
            name: work.into(),
            parameters: 235_146,
            inputs: vec![128, 784],
            precision: "tf32".into(),
            ..Work::default()
        },
        theirs: about(ratio * 1e-3),
        ours: about(1e-3),
        ratio: Spread { count: 5, ..about(ratio) },
        refused: None,
    };
    let missing = |work: &str, name: &str, why: &str| PeerFigure {
        peer: name.into(),
        work: Work { name: work.into(), precision: "tf32".into(), ..Work::default() },
        refused: Some(why.into()),
        ..PeerFigure::default()
    };
    Results {
        format: FORMAT,
        version: "0.1.0".into(),
        command: "bench --peers --html a<b>.html".into(),
        date: "2026-11-25T07:00:00Z".into(),
        machine: Machine {
            device: "CPU <2 threads>".into(),
            facts: BTreeMap::from([("memory".to_owned(), "24 GiB & more".to_owned())]),
            notes: vec!["other programs took 40 % of the processor".into()],
            limits: Vec::new(),
        },
        figures,
        peers: vec![
            peer("mlp", "PyTorch eager", 2.05),
            peer("mlp", "PyTorch compiled", 1.6),
            missing("mlp", "PyTorch graphed", "CUDA graphs need a GPU"),
            peer("mlp", "JAX", 0.82),
            missing(
                "mlp",
                "candle",
                "not built: run benches/peers/build-rust, or name the program in WARPSTEP_RUST_PEERS",
            ),
            peer("gpt_cpu", "PyTorch eager", 2.31),
            PeerFigure { refused: Some("spread too wide: quartiles 40 % apart".into()), ..peer("gpt_cpu", "JAX", 1.4) },
        ],
    }
}

/// Tags that close what others opened, attributes in their quotes: what is wrong with a page, if anything is.
fn fault(page: &str) -> Option<String> {
    let mut open: Vec<&str> = Vec::new();
    let mut rest = page.strip_prefix("<!doctype html>")?;
    while let Some(start) = rest.find('<') {
        if rest[..start].contains('>') {
            return Some(format!("a stray > in {:?}", &rest[..start]));
        }
        let end = start + rest[start..].find('>')?;
        let tag = &rest[start + 1..end];
        let name = tag.trim_start_matches('/').split([' ', '/', '\n']).next()?;
        if tag.matches('"').count() % 2 != 0 {
            return Some(format!("an open quote in <{tag}>"));
        }
        if tag.starts_with('/') {
            if open.pop() != Some(name) {
                return Some(format!("<{tag}> closes nothing"));
            }
        } else if !tag.ends_with('/') && name != "meta" {
            open.push(name);
        }
        rest = &rest[end + 1..];
        if name == "style" && !tag.starts_with('/') {
            rest = &rest[rest.find("</style>")?..];
        }
    }
    (!open.is_empty()).then(|| format!("left open: {open:?}"))
}

#[test]
fn the_page_is_well_formed_and_asks_for_nothing_from_elsewhere() {
    let page = page(&results()).unwrap();
    assert_eq!(fault(&page), None);
    assert!(!page.contains("a<b>") && page.contains("a&lt;b&gt;.html"));
    for outside in ["http://", "https://", "src=", "href=", "@import", "url(", "<script"] {
        assert!(!page.replace("http://www.w3.org/2000/svg", "").contains(outside), "{outside}");
    }
}

#[test]
fn the_page_shows_every_figure_every_peer_and_every_reason() {
    let results = results();
    let page = page(&results).unwrap();
    let mut expected: Vec<String> = results.figures.iter().map(|f| format!("<th>{}</th>", f.name)).collect();
    expected.extend(results.figures.iter().filter_map(|f| f.floor.as_ref()).map(|f| f.what.clone()));
    expected.extend(results.peers.iter().map(|p| format!("<td>{}</td>", p.peer)));
    let reasons = results.figures.iter().map(|f| &f.refused).chain(results.peers.iter().map(|p| &p.refused));
    expected.extend(reasons.flatten().map(|why| format!("refused: {why}")));
    for also in [
        "0.1.0",
        "24 GiB &amp; more",
        "other programs took 40 %",
        "forward 30 %",
        "2.05 (2.01 to 2.11), 5 turns",
        "235,146 parameters",
        "<th>mlp/tf32</th>",
    ] {
        expected.push(also.to_owned());
    }
    for text in expected {
        assert!(page.contains(&text), "{text}");
    }
    // Beside its rows, the heading above its bars.
    assert_eq!(page.matches("mlp/tf32").count(), page.matches("<th>mlp/tf32</th>").count() + 1);
    let pictures = page.matches("<svg").count();
    assert_eq!(pictures, 3, "bars against peers, the roofline, bars against floors");
}

#[test]
fn each_precision_that_is_drawn_has_its_own_roof_whatever_figures_were_taken() {
    let limits = |precision: &str, product| Limits {
        precision: precision.into(),
        copy: 1e12,
        in_place: 2e12,
        product,
        ..Limits::default()
    };
    let computed = |name: &str| Figure { bytes: Some(1e9), flops: Some(1e12), ..figure("kernel", name, 0.01) };
    let mut results = Results { figures: vec![computed("linear/f32"), computed("linear/bf16")], ..results() };
    results.machine.limits = vec![limits("f32", 5e13), limits("tf32", 4e14), limits("bf16", 8e14)];
    let page = page(&results).unwrap();
    for text in ["fastest product in f32, 50 TFLOP/s", "fastest product in bf16, 800 TFLOP/s", "memory, 2000.0 GB/s"] {
        assert_eq!(page.matches(text).count(), 1, "{text}");
    }
    assert!(!page.contains("fastest product in tf32"), "nothing was taken in it");
    // A point is told as a share of its own roof: 1e14 operations a second of 5e13 and of 8e14.
    assert!(page.contains("<td>200 %</td>") && page.contains("<td>12 %</td>"), "{page}");
    let read: Results = serde_json::from_str(&serde_json::to_string(&results).unwrap()).unwrap();
    assert_eq!(read, results);
}

#[test]
fn a_page_without_peers_floors_or_roofs_still_lists_its_figures() {
    let bare = Results { peers: Vec::new(), figures: vec![figure("data", "idx", 1.0)], ..results() };
    let page = page(&bare).unwrap();
    assert_eq!(fault(&page), None);
    assert!(page.contains("<th>idx</th>") && !page.contains("<svg"));
    let empty = Results { figures: Vec::new(), ..bare };
    assert_eq!(fault(&warpstep::bench::report::page(&empty).unwrap()), None);
}

#[test]
fn any_figures_can_be_drawn() {
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().subsec_nanos();
    println!("seed {seed}");
    let stream = Philox::new(u64::from(seed), Purpose::Sampling, 0);
    let mut count = 0;
    let mut value = || {
        count += 1;
        let odd = [0.0, f64::NAN, f64::INFINITY, 1e-300, 1e300, -1.0];
        match stream.below(2 * count, 4) {
            0 => odd[stream.below(2 * count + 1, odd.len() as u64) as usize],
            _ => 10f64.powf(f64::from(stream.uniform(2 * count + 1)) * 24.0 - 12.0),
        }
    };
    for round in 0..20 {
        let mut results = results();
        for figure in &mut results.figures {
            let (median, seconds) = (value(), value());
            figure.seconds = Spread { count: 5, min: median, lower_quartile: value(), median, upper_quartile: value() };
            (figure.bytes, figure.flops) = (Some(value()), Some(value()));
            figure.floor = Some(Floor { seconds, what: String::new(), doubt: None });
        }
        for peer in &mut results.peers {
            peer.ratio =
                Spread { count: 3, min: value(), lower_quartile: value(), median: value(), upper_quartile: value() };
        }
        assert_eq!(fault(&page(&results).unwrap()), None, "round {round}");
    }
}

#[test]
fn the_page_is_written_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bench.html");
    write(&results(), &path).unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), page(&results()).unwrap());
    assert_eq!(write(&results(), &folder.path().join("no/folder.html")).unwrap_err().exit_code(), 2);
}
