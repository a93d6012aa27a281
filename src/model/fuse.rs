//! Joins operations that devices run as one, and puts those that may come in either order into the cheaper one: an affine map and the
//! function of single values around it, a normalization and the residual sum around it; ReLU and max pooling.
//!
//! Layers emit what they do one by one. Where an affine map is followed at once by a function of its values, the two become one
//! operation; so do, in the backward, the gradient of an affine map's input and the slope of the function before it. A sum that
//! is normalized next is taken by the normalization as it reads; and in the backward, what reaches the sum past the
//! normalization is added by it as it writes. ReLU before max pooling is taken after it, of as many values as there are windows.
//! Numbers do not change (but for the sign of a zero); memory is saved where nothing else asks for what lay between.

use crate::backend::ops::{
    ActivationBackward, ActivationForward, ActivationKind, Add, FusedActivation, FusedSlope, LayerNormBackward,
    LayerNormForward, LinearBackward, LinearForward, MaxPoolBackward, MaxPoolForward, RmsNormBackward, RmsNormForward,
    RowSum,
};
use crate::backend::{Act, Backend, Op, Param, Use};

/// A program's operations, and how many of them are forward and loss.
pub(super) struct Operations<B: Backend> {
    pub ops: Vec<Box<dyn Op<B>>>,
    pub forward: usize,
    /// Activations that hold no more than another one by now: each, and that other.
    pub shrunk: Vec<(Act, Act)>,
}

impl<B: Backend> Operations<B> {
    /// The same operations, joined where they can be. `kept` tells which of them are read
    /// after the program.
    pub fn fused(mut self, kept: impl Fn(Act) -> bool) -> Self {
        for at in 0..self.ops.len().saturating_sub(1) {
            if at + 1 != self.forward {
                self.pool_first(at, &kept);
            }
        }
        let mut at = 0;
        while at + 1 < self.ops.len() {
            // What runs a part of a program may stop where the backward starts, so nothing is joined across.
            if at + 1 != self.forward && self.join(at, &kept) {
                let second = at + 1;
                drop(self.ops.remove(second));
                self.forward -= usize::from(second < self.forward);
            }
            at += 1;
        }
        self
    }

    /// Puts what the operation at `at` and the next do into the first; tells whether it could.
    fn join(&mut self, at: usize, kept: &impl Fn(Act) -> bool) -> bool {
        self.join_forward(at, kept) || self.join_backward(at, kept) || self.join_sum(at) || self.join_residual(at, kept)
    }

    fn find<T: 'static>(&self, at: usize) -> Option<&T> {
        self.ops[at].as_any()?.downcast_ref()
    }

    /// The operations that name an activation.
    fn users(&self, act: Act) -> Vec<usize> {
        self.naming(Use::Activation(act))
    }

    fn naming(&self, what: Use) -> Vec<usize> {
        let names = |op: &dyn Op<B>| {
            let mut found = false;
            op.uses(&mut |used| found |= used == what);
            found
        };
        (0..self.ops.len()).filter(|&at| names(self.ops[at].as_ref())).collect()
    }

    /// `y = relu(x)` and `p = the largest y of each window`, where nothing else reads y, become `y = the largest x of each window` and
    /// `p = relu(y)`, and their backwards change places too. No function but ReLU: another may make two values equal that were not,
    /// of which the first would have the gradient.
    fn pool_first(&mut self, at: usize, kept: &impl Fn(Act) -> bool) {
        let (Some(relu), Some(pool)) = (self.find::<ActivationForward>(at), self.find::<MaxPoolForward>(at + 1)) else {
            return;
        };
        let (relu, pool) = (relu.clone(), pool.clone());
        let ActivationForward { x, y, .. } = relu;
        if relu.kind != ActivationKind::Relu || pool.x != y || kept(y) || self.users(y) != [at, at + 1] {
            return;
        }
        let Some(windows) = pool.geometry.output().map(|[rows, columns]| pool.geometry.planes * rows * columns) else {
            return;
        };
        let positions = self.naming(Use::Indices(pool.positions));
        match positions.iter().filter(|&&op| op != at + 1).collect::<Vec<_>>()[..] {
            [] => {}
            [&second] => {
                let Some((back, slope)) = self.slope_of_pooled(second, x, kept) else { return };
                let (between, dx) = (back.dx, slope.dx);
                // ReLU's value has the slopes of what it was given.
                let before = ActivationBackward { x: pool.y, dy: back.dy, dx: between, len: windows, ..slope };
                self.ops[second] = Box::new(before);
                self.ops[second + 1] = Box::new(MaxPoolBackward { dy: between, dx, ..back });
                self.shrunk.push((between, pool.y));
            }
            _ => return,
        }
        self.shrunk.push((y, pool.y));
        self.ops[at + 1] = Box::new(ActivationForward { x: y, y: pool.y, len: windows, ..relu });
        self.ops[at] = Box::new(MaxPoolForward { x, y, ..pool });
    }

    /// The backward of max pooling at `at` and that of ReLU of x next to it, where nothing else reads what lies between.
    fn slope_of_pooled(
        &self,
        at: usize,
        x: Act,
        kept: &impl Fn(Act) -> bool,
    ) -> Option<(MaxPoolBackward, ActivationBackward)> {
        let back = self.find::<MaxPoolBackward>(at)?;
        let slope = self.ops.get(at + 1).and_then(|_| self.find::<ActivationBackward>(at + 1))?;
        let fits = slope.kind == ActivationKind::Relu && slope.x == x && slope.dy == back.dx && at + 1 != self.forward;
        let only = !kept(back.dx) && self.users(back.dx) == [at, at + 1];
        (fits && only).then(|| (back.clone(), slope.clone()))
    }

    /// `u = x W^T + b` and `y = f(u)`.
    fn join_forward(&mut self, at: usize, kept: &impl Fn(Act) -> bool) -> bool {
        let (Some(linear), Some(activation)) = (self.find::<LinearForward>(at), self.find::<ActivationForward>(at + 1))
        else {
            return false;
        };
        if linear.activation.is_some() || activation.x != linear.y || activation.len != linear.rows * linear.outputs {
            return false;
        }
        let (u, y, kind, weight) = (linear.y, activation.y, activation.kind, linear.weight);
        let others: Vec<usize> = self.users(u).into_iter().filter(|&user| user > at + 1).collect();
        let mut needed = kept(u) || !others.is_empty();
        // ReLU's value has the slopes of what it was given: its backward then needs nothing more than the next layer's does.
        if let (ActivationKind::Relu, false, &[only]) = (kind, kept(u), others.as_slice())
            && let Some(backward) =
                self.find::<ActivationBackward>(only).filter(|b| b.x == u && b.dy != u && b.kind == kind)
        {
            let backward = ActivationBackward { x: y, ..backward.clone() };
            self.ops[only] = Box::new(backward);
            needed = false;
        }
        // What is computed again for a backward keeps u there: kept the first time too, both are one operation, with the same bits.
        needed |= kind != ActivationKind::Relu && self.is_computed_again(at, weight);
        let fused = FusedActivation { kind, kept: needed.then_some(u) };
        let Some(linear) = self.find::<LinearForward>(at) else { return false };
        self.ops[at] = Box::new(LinearForward { y, activation: Some(fused), ..linear.clone() });
        true
    }

    /// Whether another product than that at `at` has this weight.
    fn is_computed_again(&self, at: usize, weight: Param) -> bool {
        (0..self.ops.len())
            .any(|other| other != at && self.find::<LinearForward>(other).is_some_and(|linear| linear.weight == weight))
    }

    /// `dy = dz W` and `du = dy f'(u)`, where nothing else reads dy.
    fn join_backward(&mut self, at: usize, kept: &impl Fn(Act) -> bool) -> bool {
        let (Some(linear), Some(activation)) =
            (self.find::<LinearBackward>(at), self.find::<ActivationBackward>(at + 1))
        else {
            return false;
        };
        let Some(dy) = linear.dx.filter(|&dx| dx == activation.dy) else { return false };
        let fits = linear.slope.is_none() && activation.len == linear.rows * linear.inputs;
        if !fits || kept(dy) || self.users(dy) != [at, at + 1] {
            return false;
        }
        let slope = FusedSlope { kind: activation.kind, of: activation.x };
        let fused = LinearBackward { dx: Some(activation.dx), slope: Some(slope), ..linear.clone() };
        self.ops[at] = Box::new(fused);
        true
    }

    /// `x = a + b` and `y = norm(x)`; x is left all the same.
    fn join_sum(&mut self, at: usize) -> bool {
        let Some(&Add { a, b, y: x, .. }) = self.find::<Add>(at) else { return false };
        let sum = Some(RowSum { other: b, sum: x });
        let layer_norm = self.find::<LayerNormForward>(at + 1).filter(|norm| norm.x == x && norm.sum.is_none());
        let rms_norm = self.find::<RmsNormForward>(at + 1).filter(|norm| norm.x == x && norm.sum.is_none());
        let fused: Box<dyn Op<B>> = match (layer_norm, rms_norm) {
            (Some(norm), _) => Box::new(LayerNormForward { x: a, sum, ..norm.clone() }),
            (_, Some(norm)) => Box::new(RmsNormForward { x: a, sum, ..norm.clone() }),
            _ => return false,
        };
        self.ops[at] = fused;
        true
    }

    /// `d = gradient of norm(x)` and `dx = d + residual`, where nothing else reads d.
    fn join_residual(&mut self, at: usize, kept: &impl Fn(Act) -> bool) -> bool {
        let Some(&Add { a, b, y, .. }) = self.find::<Add>(at + 1) else { return false };
        let layer_norm = self.find::<LayerNormBackward>(at).filter(|norm| norm.residual.is_none());
        let rms_norm = self.find::<RmsNormBackward>(at).filter(|norm| norm.residual.is_none());
        let (d, dy) = match (layer_norm, rms_norm) {
            (Some(norm), _) => (norm.dx, norm.dy),
            (_, Some(norm)) => (norm.dx, norm.dy),
            _ => return false,
        };
        let past = if d == Some(a) { b } else { a };
        // An operation does not take one activation twice, and what is gone cannot be read.
        let joins = d.is_some_and(|d| (d == a || d == b) && !kept(d) && self.users(d) == [at, at + 1]);
        if !joins || past == dy || Some(past) == d {
            return false;
        }
        let (dx, residual) = (Some(y), Some(past));
        let fused: Box<dyn Op<B>> = match (layer_norm, rms_norm) {
            (Some(norm), _) => Box::new(LayerNormBackward { dx, residual, ..norm.clone() }),
            (_, Some(norm)) => Box::new(RmsNormBackward { dx, residual, ..norm.clone() }),
            _ => return false,
        };
        self.ops[at] = fused;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::backend::{Memory, StepContext};
    use crate::error::Result;
    use crate::model::layers::{Activation, MaxPool2d, Sequential, Window};
    use crate::model::probe::{Alone, Probe};
    use crate::model::{Input, Layer, Mode, Planner, Tensor};
    use crate::random::{Philox, Purpose};

    /// An operation that is left where it is, as one of an own layer's is.
    struct Opaque<O>(O);

    impl<O: Op<Cpu<f32>>> Op<Cpu<f32>> for Opaque<O> {
        fn name(&self) -> &'static str {
            self.0.name()
        }
        fn uses(&self, visit: &mut dyn FnMut(Use)) {
            self.0.uses(visit);
        }
        fn flops(&self) -> u64 {
            self.0.flops()
        }
        fn run(&self, backend: &Cpu<f32>, memory: &mut Memory<'_, Cpu<f32>>, step: &StepContext) -> Result<()> {
            self.0.run(backend, memory, step)
        }
    }

    /// ReLU of such operations.
    #[derive(Default)]
    struct Apart(Option<Act>);

    impl Layer<Cpu<f32>> for Apart {
        fn kind(&self) -> &'static str {
            "apart"
        }
        fn forward(&mut self, planner: &mut Planner<'_, Cpu<f32>>, x: Tensor) -> Result<Tensor> {
            let act = x.real("apart")?;
            let (y, output) = planner.tensor(&x.shape, true);
            planner.emit(Opaque(ActivationForward { x: act, y, kind: ActivationKind::Relu, len: x.len() }));
            self.0 = Some(act);
            Ok(output)
        }
        fn backward(&mut self, planner: &mut Planner<'_, Cpu<f32>>, dy: Tensor) -> Result<Option<Tensor>> {
            let (dx, tensor) = planner.tensor(&dy.shape, true);
            let (x, kind) = (self.0.unwrap(), ActivationKind::Relu);
            planner.emit(Opaque(ActivationBackward { x, dy: dy.real("apart")?, dx, kind, len: dy.len() }));
            Ok(Some(tensor))
        }
    }

    fn names(layer: &mut dyn Layer<Cpu<f32>>, input: &Input, mode: Mode) -> Vec<&'static str> {
        Alone::plan(layer, input, 2, mode).unwrap().program.ops.iter().map(|op| op.name()).collect()
    }

    #[test]
    fn relu_is_taken_after_max_pooling_with_the_same_values_and_gradients() {
        let input = Input::Real(vec![3, 9, 9]);
        let tiled = Window::tiled([2, 2]);
        let overlapping = Window { kernel: [3, 3], stride: [2, 1], padding: [1, 1] };
        for window in [tiled, overlapping] {
            let relu = || Activation::new(ActivationKind::Relu);
            let joined = || Sequential::new().then("0", relu()).then("1", MaxPool2d::new(window));
            let apart = || Sequential::new().then("0", Apart::default()).then("1", MaxPool2d::new(window));
            let forward = ["max_pool_forward", "activation_forward"];
            assert_eq!(names(&mut joined(), &input, Mode::Inference), forward);
            let all = [forward, ["activation_backward", "max_pool_backward"]].concat();
            assert_eq!(names(&mut joined(), &input, Mode::Training), all);
            assert_eq!(names(&mut apart(), &input, Mode::Training)[0], "activation_forward");

            // Equal values, windows without a value above 0, and values that are no numbers.
            let seed = std::time::UNIX_EPOCH.elapsed().map_or(0, |time| time.as_nanos() as u64);
            println!("seed {seed}");
            let stream = Philox::new(seed, Purpose::Sampling, 0);
            let draw = |at: u64| (stream.normal(at) as f32 * 2.0 - 1.0).round() * 0.5 + 0.0;
            let x: Vec<f32> = (0..2 * 3 * 81).map(|at| if at % 97 == 5 { f32::NAN } else { draw(at) }).collect();
            let found = [true, false].map(|joins| {
                let layer = if joins { joined() } else { apart() };
                let mut probe = Probe::<f32>::new(layer, &input, 2, Mode::Training, 1).unwrap();
                let dy: Vec<f32> = (0..probe.output_shape().iter().product::<usize>() as u64)
                    .map(|at| stream.normal(1000 + at) as f32)
                    .collect();
                probe.set_input(&x).unwrap();
                probe.run(&dy).unwrap();
                let bits = |values: &[f32]| values.iter().map(|value| (value + 0.0).to_bits()).collect::<Vec<_>>();
                [bits(probe.output()), bits(probe.input_gradient().unwrap())]
            });
            assert_eq!(found[0], found[1], "{window:?}");
            let values = found[0][0].iter().map(|&bits| f32::from_bits(bits));
            assert!(
                values.clone().any(f32::is_nan) && values.clone().any(|y| y == 0.0) && values.clone().any(|y| y > 0.0)
            );
        }
    }

    #[test]
    fn another_function_or_a_value_that_is_read_elsewhere_stays_before_max_pooling() {
        let input = Input::Real(vec![1, 4, 4]);
        let pool = || MaxPool2d::new(Window::tiled([2, 2]));
        let mut tanh = Sequential::new().then("0", Activation::new(ActivationKind::Tanh)).then("1", pool());
        assert_eq!(names(&mut tanh, &input, Mode::Inference), ["activation_forward", "max_pool_forward"]);
        /// ReLU, pooled; what ReLU gives is kept.
        struct Kept(Activation, MaxPool2d);
        impl Layer<Cpu<f32>> for Kept {
            fn kind(&self) -> &'static str {
                "kept"
            }
            fn forward(&mut self, planner: &mut Planner<'_, Cpu<f32>>, x: Tensor) -> Result<Tensor> {
                let y = self.0.forward(planner, x)?;
                planner.keep(y.real("kept")?);
                self.1.forward(planner, y)
            }
            fn backward(&mut self, planner: &mut Planner<'_, Cpu<f32>>, dy: Tensor) -> Result<Option<Tensor>> {
                let dy = self.1.backward(planner, dy)?.expect("a gradient");
                self.0.backward(planner, dy)
            }
        }
        let mut kept = Kept(Activation::new(ActivationKind::Relu), pool());
        assert_eq!(names(&mut kept, &input, Mode::Inference), ["activation_forward", "max_pool_forward"]);
    }
}
