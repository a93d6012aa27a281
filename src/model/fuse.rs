//! Joins operations that devices run as one, and puts those that may come in either order into the cheaper one: an affine map and the
//! function of single values around it, a normalization and the residual sum around it, a batch normalization and the sum and ReLU
//! behind it; ReLU and max pooling.
//!
//! Layers emit what they do one by one. Where an affine map is followed at once by a function of its values, the two become one
//! operation; so do, in the backward, the gradient of an affine map's input and the slope of the function before it. A sum that
//! is normalized next is taken by the normalization as it reads; and in the backward, what reaches the sum past the
//! normalization is added by it as it writes. A batch normalization does what follows it as it writes, first a sum, then ReLU,
//! whose slope its backward takes as it reads. Any other ReLU before max pooling is taken after it, of as many values as there are
//! windows. Numbers do not change (but for the sign of a zero, and for what 16 bits between two operations would have rounded away);
//! memory is saved where nothing else asks for what lay between.

use crate::backend::ops::{
    ActivationBackward, ActivationForward, ActivationKind, Add, BatchNormBackward, BatchNormForward,
    BatchNormInference, Epilogue, FusedActivation, FusedSlope, LayerNormBackward, LayerNormForward, LinearBackward,
    LinearForward, MaxPoolBackward, MaxPoolForward, Rectified, RmsNormBackward, RmsNormForward, RowSum,
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
            } else {
                at += 1;
            }
        }
        self
    }

    /// Puts what the operation at `at` and the next do into the first; tells whether it could.
    fn join(&mut self, at: usize, kept: &impl Fn(Act) -> bool) -> bool {
        self.join_forward(at, kept)
            || self.join_backward(at, kept)
            || self.join_sum(at)
            || self.join_residual(at, kept)
            || self.join_epilogue(at, kept)
            || self.join_slope(at, kept)
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
        // A batch normalization takes ReLU along for nothing.
        if at > 0 && self.normalized(at - 1).is_some_and(|(_, normalized, _)| normalized == x) {
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

    /// x, y and the epilogue of the batch normalization at `at`, if one stands there.
    fn normalized(&self, at: usize) -> Option<(Act, Act, Epilogue)> {
        let training = self.find::<BatchNormForward>(at).map(|norm| (norm.x, norm.y, norm.epilogue));
        training.or_else(|| self.find::<BatchNormInference>(at).map(|norm| (norm.x, norm.y, norm.epilogue)))
    }

    /// `n = batch_norm(x)` and `y = n + other`, then `y = relu(n)`, where nothing else reads n.
    fn join_epilogue(&mut self, at: usize, kept: &impl Fn(Act) -> bool) -> bool {
        let Some((x, n, epilogue)) = self.normalized(at).filter(|(_, n, epilogue)| !epilogue.relu && !kept(*n)) else {
            return false;
        };
        let users = self.users(n);
        let (y, epilogue) = if let Some(&Add { a, b, y, .. }) = self.find::<Add>(at + 1) {
            let other = if a == n { b } else { a };
            // An operation does not take one activation twice.
            let fits = (a == n || b == n) && epilogue.residual.is_none() && ![n, x, y].contains(&other);
            if !fits || users != [at, at + 1] {
                return false;
            }
            (y, Epilogue { residual: Some(other), ..epilogue })
        } else if let Some(relu) = self.find::<ActivationForward>(at + 1) {
            if relu.kind != ActivationKind::Relu || relu.x != n || relu.y == n {
                return false;
            }
            let y = relu.y;
            match users.strip_prefix(&[at, at + 1]) {
                Some([]) => {}
                // ReLU's value has the slopes of what it was given.
                Some(&[only]) => {
                    let backward = self.find::<ActivationBackward>(only);
                    let Some(backward) = backward.filter(|b| b.x == n && b.dy != n && b.kind == ActivationKind::Relu)
                    else {
                        return false;
                    };
                    self.ops[only] = Box::new(ActivationBackward { x: y, ..backward.clone() });
                }
                _ => return false,
            }
            (y, Epilogue { relu: true, ..epilogue })
        } else {
            return false;
        };
        let fused: Box<dyn Op<B>> = match (self.find::<BatchNormForward>(at), self.find::<BatchNormInference>(at)) {
            (Some(norm), _) => Box::new(BatchNormForward { y, epilogue, ..norm.clone() }),
            (_, Some(norm)) => Box::new(BatchNormInference { y, epilogue, ..norm.clone() }),
            _ => return false,
        };
        self.ops[at] = fused;
        true
    }

    /// `d = dy relu'(y)` and the gradients of a batch normalization by d.
    fn join_slope(&mut self, at: usize, kept: &impl Fn(Act) -> bool) -> bool {
        let (Some(slope), Some(norm)) = (self.find::<ActivationBackward>(at), self.find::<BatchNormBackward>(at + 1))
        else {
            return false;
        };
        let &ActivationBackward { x: output, dy, dx: d, kind, .. } = slope;
        if kind != ActivationKind::Relu || norm.dy != d || norm.rectified.is_some() {
            return false;
        }
        // What the normalization's own value says need not be read.
        let own = Epilogue { residual: None, relu: true };
        let says =
            |forward: &BatchNormForward| forward.mean == norm.mean && forward.y == output && forward.epilogue == own;
        let known = (0..at).any(|op| self.find::<BatchNormForward>(op).is_some_and(says));
        let gradient = (kept(d) || self.users(d) != [at, at + 1]).then_some(d);
        let rectified = Rectified { output: (!known).then_some(output), gradient };
        // An operation does not take one activation twice.
        let taken = [Some(norm.x), Some(dy), norm.dx, rectified.output, gradient];
        let taken: Vec<Act> = taken.into_iter().flatten().collect();
        if taken.iter().enumerate().any(|(at, act)| taken[..at].contains(act)) {
            return false;
        }
        self.ops[at] = Box::new(BatchNormBackward { dy, rectified: Some(rectified), ..norm.clone() });
        true
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
    use crate::model::layers::{Activation, BatchNorm, Conv2d, MaxPool2d, Residual, Sequential, Window};
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

    fn fresh_seed() -> u64 {
        let seed = std::time::UNIX_EPOCH.elapsed().map_or(0, |time| time.as_nanos() as u64);
        println!("seed {seed}");
        seed
    }

    /// Output, gradient of the input and those of the parameters, of two samples; a zero has one sign.
    fn bits(layer: Sequential<Cpu<f32>>, input: &Input, stream: &Philox, draw: impl Fn(u64) -> f32) -> [Vec<u32>; 3] {
        let mut probe = Probe::<f32>::new(layer, input, 2, Mode::Training, 1).unwrap();
        let Input::Real(shape) = input else { panic!("{input:?}") };
        let x: Vec<f32> = (0..2 * shape.iter().product::<usize>() as u64).map(draw).collect();
        let len = probe.output_shape().iter().product::<usize>() as u64;
        let dy: Vec<f32> = (0..len).map(|at| stream.normal(1000 + at) as f32).collect();
        probe.set_input(&x).unwrap();
        probe.run(&dy).unwrap();
        let bits = |values: &[f32]| values.iter().map(|value| (value + 0.0).to_bits()).collect::<Vec<_>>();
        let names: Vec<String> = probe.parameters().map(|(name, _)| name.to_string()).collect();
        let gradients: Vec<f32> = names.iter().flat_map(|name| probe.gradient(name).unwrap()).copied().collect();
        [bits(probe.output()), bits(probe.input_gradient().unwrap()), bits(&gradients)]
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
            let stream = Philox::new(fresh_seed(), Purpose::Sampling, 0);
            let draw = |at: u64| (stream.normal(at) as f32 * 2.0 - 1.0).round() * 0.5 + 0.0;
            let draw = |at: u64| if at % 97 == 5 { f32::NAN } else { draw(at) };
            let found = [joined(), apart()].map(|layer| bits(layer, &input, &stream, draw));
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

    /// `conv(x)` normalized, and x besides, by a sum that is left where it is.
    struct ApartSum(Sequential<Cpu<f32>>);

    impl Layer<Cpu<f32>> for ApartSum {
        fn kind(&self) -> &'static str {
            "apart_sum"
        }
        fn forward(&mut self, planner: &mut Planner<'_, Cpu<f32>>, x: Tensor) -> Result<Tensor> {
            let branch = self.0.forward(planner, x.clone())?;
            let (y, sum) = planner.tensor(&x.shape, true);
            planner.emit(Opaque(Add { a: branch.real("apart")?, b: x.real("apart")?, y, len: x.len() }));
            Ok(sum)
        }
        fn backward(&mut self, planner: &mut Planner<'_, Cpu<f32>>, dy: Tensor) -> Result<Option<Tensor>> {
            let dx = self.0.backward(planner, dy.clone())?.expect("a gradient");
            let (y, sum) = planner.tensor(&dy.shape, true);
            planner.emit(Add { a: dx.real("apart")?, b: dy.real("apart")?, y, len: dy.len() });
            Ok(Some(sum))
        }
    }

    fn relu() -> Activation {
        Activation::new(ActivationKind::Relu)
    }

    fn branch() -> Sequential<Cpu<f32>> {
        Sequential::new().then("0", Conv2d::new(3, [3; 2]).with_padding([1; 2])).then("1", BatchNorm::new())
    }

    #[test]
    fn batch_normalization_takes_along_the_sum_and_the_relu_behind_it_and_nothing_changes() {
        let input = Input::Real(vec![3, 6, 6]);
        let [forward, backward] = ["batch_norm_forward", "batch_norm_backward"];
        let pair = || Sequential::new().then("0", BatchNorm::new()).then("1", relu());
        assert_eq!(names(&mut pair(), &input, Mode::Training), [forward, backward]);
        assert_eq!(names(&mut pair(), &input, Mode::Inference), ["batch_norm_inference"]);
        // ReLU stays with the normalization, though it could be taken after pooling.
        let pooled = || pair().then("2", MaxPool2d::new(Window::tiled([2, 2])));
        let all = [forward, "max_pool_forward", "max_pool_backward", backward];
        assert_eq!(names(&mut pooled(), &input, Mode::Training), all);
        let summed = || Sequential::new().then("0", Residual::new("", branch())).then("1", relu());
        let all = ["conv2d_forward", forward, backward, "conv2d_backward", "add"];
        assert_eq!(names(&mut summed(), &input, Mode::Training), all);
        assert_eq!(names(&mut summed(), &input, Mode::Inference), ["conv2d_forward", "batch_norm_inference"]);
        // A sum that nothing follows; and one of what is normalized itself, which no operation takes twice.
        let mut plain = Sequential::new().then("0", Residual::new("", branch()));
        assert_eq!(names(&mut plain, &input, Mode::Training), all);
        let mut twice = Sequential::new().then("0", Residual::new("", BatchNorm::new())).then("1", relu());
        let all = [forward, "add", "activation_forward", backward, "add"];
        assert_eq!(names(&mut twice, &input, Mode::Training), all);

        let apart = || Sequential::new().then("0", BatchNorm::new()).then("1", Apart::default());
        let apart_pooled = || apart().then("2", MaxPool2d::new(Window::tiled([2, 2])));
        let apart_sum = || Sequential::new().then("0", ApartSum(branch())).then("1", Apart::default());
        assert_eq!(names(&mut apart_sum(), &input, Mode::Training).len(), 8);
        let stream = Philox::new(fresh_seed(), Purpose::Sampling, 0);
        for [joined, apart] in [[pair(), apart()], [pooled(), apart_pooled()], [summed(), apart_sum()]] {
            let found = [joined, apart].map(|layer| bits(layer, &input, &stream, |at| stream.normal(at) as f32));
            assert_eq!(found[0], found[1]);
            assert!(found[0][0].contains(&0), "a value that ReLU made 0");
        }
    }
}
