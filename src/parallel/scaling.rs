//! What a step would take on many devices, from a few figures of each: arithmetic alone, told in docs/scaling.md.

mod hardware;

pub use hardware::{GPUS, Hardware, Links};

use super::options::Shard;

/// A step of one process, as one device makes it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Step {
    /// Seconds of a micro-batch's forward.
    pub forward: f64,
    /// Seconds of a micro-batch's backward.
    pub backward: f64,
    /// Seconds of the update of all parameters.
    pub update: f64,
    /// Passes: micro-batches, or of each the parts that a process takes one by one.
    pub passes: f64,
    /// How often gradients that are not kept are summed over processes.
    pub sums: f64,
    /// Bytes of all gradients as they are sent.
    pub gradient_bytes: f64,
    /// Bytes of all parameters as they are gathered.
    pub parameter_bytes: f64,
    /// Bytes of gradients that are sent together.
    pub bucket_bytes: f64,
    /// Whether gradients are summed while the backward goes on.
    pub sums_beside: bool,
    /// Whether parameters are gathered while the program goes on.
    pub gathers_beside: bool,
}

/// Something that processes send one another in a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Traffic {
    /// What it is: `all-reduce of gradients`.
    pub what: &'static str,
    /// How often a step.
    pub times: f64,
    /// Bytes that each process sends, and receives, in a step.
    pub bytes: f64,
    /// Seconds of a step that it takes by itself.
    pub seconds: f64,
    /// Of them those that nothing else goes on in.
    pub exposed: f64,
}

/// A step of all processes.
#[derive(Clone, Debug, PartialEq)]
pub struct Prediction {
    /// Seconds of the whole step.
    pub seconds: f64,
    /// Seconds of forward and backward.
    pub compute: f64,
    /// Seconds of the update.
    pub update: f64,
    /// What is sent.
    pub traffic: Vec<Traffic>,
}

impl Prediction {
    /// Seconds of the step in which processes only wait for one another.
    pub fn exposed(&self) -> f64 {
        self.traffic.iter().map(|traffic| traffic.exposed).sum()
    }
}

/// The kinds of collective, by what each process sends of `bytes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    AllReduce,
    ReduceScatter,
    AllGather,
}

impl Kind {
    /// How often each byte goes around.
    fn rounds(self) -> f64 {
        match self {
            Kind::AllReduce => 2.0,
            Kind::ReduceScatter | Kind::AllGather => 1.0,
        }
    }
}

/// Bytes that each of `world` processes sends at least in a collective over `bytes`: those of a ring.
fn sent(kind: Kind, bytes: f64, world: f64) -> f64 {
    kind.rounds() * (world - 1.0) / world * bytes
}

/// Seconds of a collective over `bytes` in `messages` pieces: within each node first, between nodes with what each process then
/// holds, and a latency for each step of the way.
fn seconds(kind: Kind, bytes: f64, messages: f64, links: &Links) -> f64 {
    let (within, nodes) = (links.per_node as f64, links.nodes as f64);
    let inside = sent(kind, bytes, within) / links.node_bandwidth;
    let between = sent(kind, bytes / within, nodes) / links.network_bandwidth;
    let hops =
        kind.rounds() * (within.log2().ceil() * links.node_latency + nodes.log2().ceil() * links.network_latency);
    inside + between + messages * hops
}

/// The step of `links`'s processes, each of which makes `step` by itself.
pub fn predict(step: &Step, shard: Shard, links: &Links) -> Prediction {
    let world = links.world() as f64;
    let compute = step.passes * (step.forward + step.backward);
    let update = if shard == Shard::None { step.update } else { step.update / world };
    let mut traffic = Vec::new();
    if links.world() > 1 {
        let buckets = (step.gradient_bytes / step.bucket_bytes).ceil().max(1.0);
        let last = step.gradient_bytes.min(step.bucket_bytes);
        let beside = |goes_on: bool, seconds: f64| if goes_on { seconds } else { 0.0 };
        // Gradients go out bucket by bucket while the backward of the last pass goes on; the last one has nothing beside it.
        let reduce = |what, kind, times: f64| {
            let once = seconds(kind, step.gradient_bytes, buckets, links);
            let rest = seconds(kind, last, 1.0, links);
            let exposed = rest.max(once - beside(step.sums_beside, step.backward));
            let bytes = times * sent(kind, step.gradient_bytes, world);
            Traffic { what, times, bytes, seconds: times * once, exposed: times * exposed }
        };
        // Parameters are gathered a layer ahead of where they are needed.
        let gather = |what, times: f64, hidden: f64| {
            let once = seconds(Kind::AllGather, step.parameter_bytes, buckets, links);
            let bytes = times * sent(Kind::AllGather, step.parameter_bytes, world);
            Traffic { what, times, bytes, seconds: times * once, exposed: times * (once - hidden).max(0.0) }
        };
        match shard {
            Shard::None => traffic.push(reduce("all-reduce of gradients", Kind::AllReduce, 1.0)),
            Shard::Optimizer => {
                traffic.push(reduce("reduce-scatter of gradients", Kind::ReduceScatter, 1.0));
                traffic.push(gather("all-gather of parameters, after the update", 1.0, 0.0));
            }
            Shard::Gradients => {
                traffic.push(reduce("reduce-scatter of gradients", Kind::ReduceScatter, step.sums));
                traffic.push(gather("all-gather of parameters, after the update", 1.0, 0.0));
            }
            Shard::Parameters => {
                let [forward, backward] = [step.forward, step.backward].map(|s| beside(step.gathers_beside, s));
                traffic.push(reduce("reduce-scatter of gradients", Kind::ReduceScatter, step.sums));
                traffic.push(gather("all-gather of parameters, for the forward", step.passes, forward));
                traffic.push(gather("all-gather of parameters, for the backward", step.passes, backward));
            }
        }
    }
    let exposed: f64 = traffic.iter().map(|traffic| traffic.exposed).sum();
    Prediction { seconds: compute + update + exposed, compute, update, traffic }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn links(per_node: usize, nodes: usize) -> Links {
        Links {
            per_node,
            nodes,
            node_bandwidth: 400e9,
            node_latency: 5e-6,
            network_bandwidth: 50e9,
            network_latency: 10e-6,
        }
    }

    const STEP: Step = Step {
        forward: 0.03,
        backward: 0.06,
        update: 0.001,
        passes: 1.0,
        sums: 1.0,
        gradient_bytes: 500e6,
        parameter_bytes: 250e6,
        bucket_bytes: 16e6,
        sums_beside: true,
        gathers_beside: true,
    };

    #[test]
    fn one_process_sends_nothing_and_takes_what_its_parts_take() {
        for shard in [Shard::None, Shard::Optimizer, Shard::Gradients, Shard::Parameters] {
            let found = predict(&STEP, shard, &links(1, 1));
            assert!(found.traffic.is_empty());
            assert!((found.seconds - 0.091).abs() < 1e-12, "{}", found.seconds);
        }
    }

    #[test]
    fn bytes_sent_are_those_of_a_ring() {
        let found = predict(&STEP, Shard::None, &links(8, 2));
        assert_eq!(found.traffic[0].bytes, 2.0 * 15.0 / 16.0 * 500e6);
        let found = predict(&STEP, Shard::Optimizer, &links(4, 1));
        assert_eq!(found.traffic[0].bytes, 0.75 * 500e6);
        assert_eq!(found.traffic[1].bytes, 0.75 * 250e6);
        let found = predict(&Step { passes: 3.0, sums: 3.0, ..STEP }, Shard::Parameters, &links(4, 1));
        assert_eq!(found.traffic.iter().map(|t| t.bytes).sum::<f64>(), 3.0 * 0.75 * (500e6 + 2.0 * 250e6));
    }

    #[test]
    fn what_the_backward_hides_is_not_waited_for_and_what_it_cannot_is() {
        let fast = predict(&STEP, Shard::None, &links(8, 1));
        let last = seconds(Kind::AllReduce, 16e6, 1.0, &links(8, 1));
        assert_eq!(fast.exposed(), last);
        let slow = Links { network_bandwidth: 0.1e9, ..links(1, 2) };
        let found = predict(&STEP, Shard::None, &slow);
        let all = seconds(Kind::AllReduce, 500e6, 32.0, &slow);
        assert!((found.exposed() - (all - 0.06)).abs() < 1e-12);
        assert!((found.seconds - (0.091 + all - 0.06)).abs() < 1e-12);
    }

    #[test]
    fn what_does_not_go_on_beside_is_waited_for_whole() {
        let waits = Step { sums_beside: false, gathers_beside: false, ..STEP };
        for shard in [Shard::None, Shard::Optimizer, Shard::Gradients, Shard::Parameters] {
            let found = predict(&waits, shard, &links(8, 1));
            assert!(found.traffic.iter().all(|traffic| traffic.exposed == traffic.seconds), "{found:?}");
        }
    }

    #[test]
    fn a_sharded_update_is_as_many_times_shorter() {
        let found = predict(&STEP, Shard::Optimizer, &links(4, 2));
        assert_eq!(found.update, 0.001 / 8.0);
        assert_eq!(predict(&STEP, Shard::None, &links(4, 2)).update, 0.001);
    }
}
