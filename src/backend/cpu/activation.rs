//! Functions of single values, and SwiGLU.

use rayon::prelude::*;

use super::Cpu;
use super::parallel::{apply_in_place, apply_to_rows, map, map2, rows_in_piece, update, vectorize};
use crate::backend::ops::{
    Activation, ActivationBackward, ActivationForward, ActivationKind, SwigluBackward, SwigluForward,
};
use crate::backend::{Memory, StepContext, disjoint};
use crate::error::Result;
use crate::real::Real;

/// `1 / (1 + e^-x)`.
#[inline(always)]
fn sigmoid<R: Real>(x: R) -> R {
    R::one() / (R::one() + (-x).exp_lane())
}

/// `2 sqrt(2 / pi)` and the cubic's coefficient, of the tanh form of GELU.
const GELU_SCALE: f64 = 1.595_769_121_605_730_8;
const GELU_CUBIC: f64 = 0.044715;

/// `x / 2 (1 + tanh(u)) = x sigmoid(2 u)`.
#[inline(always)]
fn gelu_tanh<R: Real>(x: R) -> R {
    let cubic = R::from_f64(GELU_SCALE * GELU_CUBIC);
    let double_inner = x * (x * x).mul_add(cubic, R::from_f64(GELU_SCALE));
    x / (R::one() + (-double_inner).exp_lane())
}

/// `s + x s (1 - s) 2 u'` with `s = sigmoid(2 u)`; `s (1 - s)` from `e^-|2 u|`, where nothing cancels.
#[inline(always)]
fn gelu_tanh_slope<R: Real>(x: R) -> R {
    let cubic = R::from_f64(GELU_SCALE * GELU_CUBIC);
    let squared = x * x;
    let double_inner = x * squared.mul_add(cubic, R::from_f64(GELU_SCALE));
    let inner_slope = squared.mul_add(R::from_f64(3.0) * cubic, R::from_f64(GELU_SCALE));
    let e = (-double_inner.abs()).exp_lane();
    let r = R::one() / (R::one() + e);
    let s = if double_inner < R::zero() { e * r } else { r };
    (x * inner_slope * r).mul_add(e * r, s)
}

#[inline(always)]
fn gelu<R: Real>(x: R) -> R {
    R::from_f64(0.5) * x * (R::one() + (x * R::from_f64(std::f64::consts::FRAC_1_SQRT_2)).erf())
}

#[inline(always)]
fn gelu_slope<R: Real>(x: R) -> R {
    let cumulative = R::from_f64(0.5) * (R::one() + (x * R::from_f64(std::f64::consts::FRAC_1_SQRT_2)).erf());
    let density = R::from_f64(0.398_942_280_401_432_7) * (R::from_f64(-0.5) * x * x).exp_lane();
    x.mul_add(density, cumulative)
}

#[inline(always)]
fn silu_slope<R: Real>(x: R) -> R {
    let s = sigmoid(x);
    s * (R::one() + x * (R::one() - s))
}

/// `max(x, 0)`, NaN where x is one.
#[inline(always)]
pub(super) fn relu<R: Real>(x: R) -> R {
    if x < R::zero() { R::zero() } else { x }
}

/// d where x is above 0, and 0 elsewhere.
#[inline(always)]
pub(super) fn relu_slope<R: Real>(x: R, d: R) -> R {
    if x > R::zero() { d } else { R::zero() }
}

#[inline(always)]
fn silu<R: Real>(x: R) -> R {
    x * sigmoid(x)
}

/// `d f'(x)` of each function.
mod backward {
    pub(super) use super::relu_slope as relu;
    use super::{gelu_slope, gelu_tanh_slope, silu_slope};
    use crate::real::Real;

    #[inline(always)]
    pub fn gelu_tanh<R: Real>(x: R, d: R) -> R {
        d * gelu_tanh_slope(x)
    }

    #[inline(always)]
    pub fn gelu<R: Real>(x: R, d: R) -> R {
        d * gelu_slope(x)
    }

    #[inline(always)]
    pub fn silu<R: Real>(x: R, d: R) -> R {
        d * silu_slope(x)
    }

    #[inline(always)]
    pub fn sigmoid<R: Real>(x: R, d: R) -> R {
        let s = super::sigmoid(x);
        d * s * (R::one() - s)
    }

    #[inline(always)]
    pub fn tanh<R: Real>(x: R, d: R) -> R {
        let t = x.tanh_lane();
        d * (R::one() - t * t)
    }
}

/// Calls `$run` with the function of `$kind`, so that each is compiled into its loop.
macro_rules! with_function {
    ($kind:expr, $run:ident($($args:expr),*)) => {
        match $kind {
            ActivationKind::Relu => $run($($args,)* relu),
            ActivationKind::GeluTanh => $run($($args,)* gelu_tanh),
            ActivationKind::Gelu => $run($($args,)* gelu),
            ActivationKind::Silu => $run($($args,)* silu),
            ActivationKind::Sigmoid => $run($($args,)* sigmoid),
            ActivationKind::Tanh => $run($($args,)* R::tanh_lane),
        }
    };
}

/// As [`with_function`], with the gradient's function.
macro_rules! with_slope {
    ($kind:expr, $run:ident($($args:expr),*)) => {
        match $kind {
            ActivationKind::Relu => $run($($args,)* backward::relu),
            ActivationKind::GeluTanh => $run($($args,)* backward::gelu_tanh),
            ActivationKind::Gelu => $run($($args,)* backward::gelu),
            ActivationKind::Silu => $run($($args,)* backward::silu),
            ActivationKind::Sigmoid => $run($($args,)* backward::sigmoid),
            ActivationKind::Tanh => $run($($args,)* backward::tanh),
        }
    };
}

/// `u += b` and `y = f(u)`, row by row of `width`; u is `kept`, or y itself where none is kept.
pub(super) fn add_and_apply<R: Real>(
    kind: ActivationKind,
    y: &mut [R],
    kept: Option<&mut [R]>,
    bias: Option<&[R]>,
    width: usize,
) {
    match kept {
        Some(kept) => with_function!(kind, apply_to_rows(y, kept, bias, width)),
        None => with_function!(kind, apply_in_place(y, bias, width)),
    }
}

/// `d = d f'(x)`, value by value.
pub(super) fn multiply_by_slope<R: Real>(kind: ActivationKind, d: &mut [R], x: &[R]) {
    with_slope!(kind, update(d, x));
}

impl<R: Real> Activation for Cpu<R> {
    fn activation_forward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &ActivationForward,
        _: &StepContext,
    ) -> Result<()> {
        let activations = &mut *memory.activations;
        let ranges = [activations.range(args.x), activations.range(args.y)];
        let [x, y] = disjoint(&mut activations.values, ranges, "activation")?;
        with_function!(args.kind, map(y, x));
        Ok(())
    }

    fn activation_backward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &ActivationBackward,
        _: &StepContext,
    ) -> Result<()> {
        let activations = &mut *memory.activations;
        let ranges = [activations.range(args.x), activations.range(args.dy), activations.range(args.dx)];
        let [x, dy, dx] = disjoint(&mut activations.values, ranges, "activation")?;
        with_slope!(args.kind, map2(dx, x, dy));
        Ok(())
    }

    fn swiglu_forward(&self, memory: &mut Memory<'_, Self>, args: &SwigluForward, _: &StepContext) -> Result<()> {
        let activations = &mut *memory.activations;
        let ranges = [activations.range(args.x), activations.range(args.y)];
        let [x, y] = disjoint(&mut activations.values, ranges, "swiglu")?;
        let width = args.width.max(1);
        let rows = rows_in_piece(width);
        y.par_chunks_mut(rows * width).zip(x.par_chunks(rows * 2 * width)).for_each(|(y, x)| {
            vectorize(
                #[inline(always)]
                || {
                    for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(2 * width)) {
                        let (gate, up) = x.split_at(width);
                        for ((y, &g), &u) in y.iter_mut().zip(gate).zip(up) {
                            *y = g * sigmoid(g) * u;
                        }
                    }
                },
            );
        });
        Ok(())
    }

    fn swiglu_backward(&self, memory: &mut Memory<'_, Self>, args: &SwigluBackward, _: &StepContext) -> Result<()> {
        let activations = &mut *memory.activations;
        let ranges = [activations.range(args.x), activations.range(args.dy), activations.range(args.dx)];
        let [x, dy, dx] = disjoint(&mut activations.values, ranges, "swiglu")?;
        let width = args.width.max(1);
        let rows = rows_in_piece(width);
        let pieces = dx.par_chunks_mut(rows * 2 * width).zip(x.par_chunks(rows * 2 * width));
        pieces.zip(dy.par_chunks(rows * width)).for_each(|((dx, x), dy)| {
            vectorize(
                #[inline(always)]
                || {
                    let lines = dx.chunks_exact_mut(2 * width).zip(x.chunks_exact(2 * width));
                    for ((dx, x), dy) in lines.zip(dy.chunks_exact(width)) {
                        let (gate, up) = x.split_at(width);
                        let (dgate, dup) = dx.split_at_mut(width);
                        for i in 0..width {
                            dup[i] = dy[i] * gate[i] * sigmoid(gate[i]);
                            dgate[i] = dy[i] * up[i] * silu_slope(gate[i]);
                        }
                    }
                },
            );
        });
        Ok(())
    }
}
