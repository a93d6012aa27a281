//! An own layer in an own model: `y = x * scale`, a trained factor for each feature, its gradient checked against finite
//! differences and then trained.
//!
//!     cargo run --release --example own_layer

use warpstep::Result;
use warpstep::backend::cpu::Cpu;
use warpstep::backend::{Act, Backend, Grad, Memory, Op, Param, StepContext, Use, disjoint};
use warpstep::data::{Batch, Inputs, Targets};
use warpstep::model::layers::{Linear, Sequential};
use warpstep::model::{Init, Input, Layer, Loss, Mode, Model, Planner, Probe, Tensor};
use warpstep::optim::{MomentumForm, OptimizerOptions, Rule};
use warpstep::random::{Philox, Purpose};
use warpstep::real::Real;
use warpstep::train::step::{Trainer, TrainerParts};

/// The layer: a parameter `scale` of one factor a feature.
#[derive(Default)]
struct Scale {
    saved: Option<(Act, Param)>,
}

/// Forward: `y = x * scale`, `=`. All are `[rows, width]` but for the scale, `[width]`.
struct ScaleForward {
    x: Act,
    scale: Param,
    y: Act,
    len: usize,
}

/// Backward: `dx = dy * scale`, `=`; `dscale = sum over rows of dy * x`, `=` where the step says so, else `+=`.
struct ScaleBackward {
    x: Act,
    dy: Act,
    scale: Param,
    dx: Act,
    dscale: Grad,
    len: usize,
}

impl<R: Real> Op<Cpu<R>> for ScaleForward {
    fn name(&self) -> &'static str {
        "scale_forward"
    }
    fn uses(&self, visit: &mut dyn FnMut(Use)) {
        [Use::Activation(self.x), Use::Parameter(self.scale), Use::Activation(self.y)].into_iter().for_each(visit);
    }
    fn flops(&self) -> u64 {
        self.len as u64
    }
    fn run(&self, _: &Cpu<R>, memory: &mut Memory<'_, Cpu<R>>, _: &StepContext) -> Result<()> {
        let ranges = [memory.activations.range(self.x), memory.activations.range(self.y)];
        let scale = &memory.arena.parameters[memory.arena.range(self.scale)];
        let [x, y] = disjoint(&mut memory.activations.values, ranges, "scale")?;
        for (y, x) in y.chunks_exact_mut(scale.len()).zip(x.chunks_exact(scale.len())) {
            y.iter_mut().zip(x).zip(scale).for_each(|((y, &x), &s)| *y = x * s);
        }
        Ok(())
    }
}

impl<R: Real> Op<Cpu<R>> for ScaleBackward {
    fn name(&self) -> &'static str {
        "scale_backward"
    }
    fn uses(&self, visit: &mut dyn FnMut(Use)) {
        let acts = [self.x, self.dy, self.dx].map(Use::Activation);
        acts.into_iter().chain([Use::Parameter(self.scale), Use::Gradient(self.dscale)]).for_each(visit);
    }
    fn flops(&self) -> u64 {
        3 * self.len as u64
    }
    fn run(&self, _: &Cpu<R>, memory: &mut Memory<'_, Cpu<R>>, step: &StepContext) -> Result<()> {
        let ranges = [self.x, self.dy, self.dx].map(|act| memory.activations.range(act));
        let (of_scale, of_gradient) = (memory.arena.range(self.scale), memory.arena.gradient_range(self.dscale.param));
        let [x, dy, dx] = disjoint(&mut memory.activations.values, ranges, "scale")?;
        let (scale, dscale) = (&memory.arena.parameters[of_scale], &mut memory.arena.gradients[of_gradient]);
        if step.overwrites(self.dscale) {
            dscale.fill(R::zero());
        }
        let width = scale.len();
        for ((dx, x), dy) in dx.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(dy.chunks_exact(width)) {
            for i in 0..width {
                dx[i] = dy[i] * scale[i];
                dscale[i] += dy[i] * x[i];
            }
        }
        Ok(())
    }
}

impl<R: Real> Layer<Cpu<R>> for Scale {
    fn kind(&self) -> &'static str {
        "scale"
    }

    fn forward(&mut self, planner: &mut Planner<'_, Cpu<R>>, x: Tensor) -> Result<Tensor> {
        let scale = planner.parameter("scale", &[x.width()], Init::Constant(1.0))?;
        let (y, output) = planner.tensor(&x.shape, true);
        let act = x.real("scale")?;
        planner.emit(ScaleForward { x: act, scale, y, len: x.len() });
        self.saved = Some((act, scale));
        Ok(output)
    }

    fn backward(&mut self, planner: &mut Planner<'_, Cpu<R>>, dy: Tensor) -> Result<Option<Tensor>> {
        let Some((x, scale)) = self.saved.take() else { return Ok(None) };
        let (dx, tensor) = planner.tensor(&dy.shape, true);
        let dscale = planner.gradient(scale);
        planner.emit(ScaleBackward { x, dy: dy.real("scale")?, scale, dx, dscale, len: dy.len() });
        Ok(Some(tensor))
    }
}

fn main() -> Result<()> {
    // 1. The layer alone, in f64: are its gradients right?
    let mut probe = Probe::<f64>::new(Scale::default(), &Input::Real(vec![5]), 4, Mode::Training, 1)?;
    let stream = Philox::new(1, Purpose::Sampling, 0);
    probe.set_input(&(0..20).map(|i| stream.normal(i)).collect::<Vec<_>>())?;
    let check = probe.check_gradients(1, 100)?;
    println!("worst relative error of a gradient: {:.1e} ({})", check.worst().1, check.worst().0);

    // 2. In a model, trained: y = 3 x0 - 2 x2.
    let layers = Sequential::new().then("scale", Scale::default()).then("out", Linear::new(1));
    let optimizer = OptimizerOptions::new(
        Rule::Momentum { form: MomentumForm::Pytorch, momentum: 0.9, dampening: 0.0, nesterov: false, gamma: 1.0 },
        0.02,
    );
    let mut trainer = Trainer::new(TrainerParts {
        backend: Cpu::<f32>::new(),
        model: Model::new(Box::new(layers), Loss::MeanSquaredError),
        input: Input::Real(vec![3]),
        batch_size: 32,
        accumulate: 1,
        optimizer: &optimizer,
        ema: None,
        seed: 1,
    })?;
    println!("{}", trainer.backend().description());
    for step in 0..=300u64 {
        let x: Vec<f32> = (0..96).map(|i| stream.normal(100 + 96 * step + i) as f32).collect();
        let y = x.chunks_exact(3).map(|x| 3.0 * x[0] - 2.0 * x[2]).collect();
        let batch = Batch { inputs: Inputs::Real(x), targets: Targets::Real(y), samples: 32 };
        let loss = trainer.step(&[batch], optimizer.learning_rate)?.loss;
        if step % 100 == 0 {
            println!("step {step:>3}  loss {loss:.2e}");
        }
    }
    Ok(())
}
