//! Functions of single values, and SwiGLU.

use rayon::prelude::*;

use super::Cpu;
use super::parallel::{map, map2, rows_in_piece, vectorize};
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
        match args.kind {
            ActivationKind::Relu => map(
                y,
                x,
                #[inline(always)]
                |x| if x < R::zero() { R::zero() } else { x },
            ),
            ActivationKind::GeluTanh => map(y, x, gelu_tanh),
            ActivationKind::Gelu => map(y, x, gelu),
            ActivationKind::Silu => map(
                y,
                x,
                #[inline(always)]
                |x| x * sigmoid(x),
            ),
            ActivationKind::Sigmoid => map(y, x, sigmoid),
            ActivationKind::Tanh => map(y, x, R::tanh_lane),
        }
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
        match args.kind {
            ActivationKind::Relu => {
                map2(
                    dx,
                    x,
                    dy,
                    #[inline(always)]
                    |x, d| if x > R::zero() { d } else { R::zero() },
                );
            }
            ActivationKind::GeluTanh => map2(
                dx,
                x,
                dy,
                #[inline(always)]
                |x, d| d * gelu_tanh_slope(x),
            ),
            ActivationKind::Gelu => map2(
                dx,
                x,
                dy,
                #[inline(always)]
                |x, d| d * gelu_slope(x),
            ),
            ActivationKind::Silu => map2(
                dx,
                x,
                dy,
                #[inline(always)]
                |x, d| d * silu_slope(x),
            ),
            ActivationKind::Sigmoid => map2(
                dx,
                x,
                dy,
                #[inline(always)]
                |x, d| {
                    let s = sigmoid(x);
                    d * s * (R::one() - s)
                },
            ),
            ActivationKind::Tanh => map2(
                dx,
                x,
                dy,
                #[inline(always)]
                |x, d| {
                    let t = x.tanh_lane();
                    d * (R::one() - t * t)
                },
            ),
        }
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
