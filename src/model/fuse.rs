//! Joins operations that devices run as one: an affine map and the function of single values around it, a normalization and
//! the residual sum around it.
//!
//! Layers emit what they do one by one. Where an affine map is followed at once by a function of its values, the two become one
//! operation; so do, in the backward, the gradient of an affine map's input and the slope of the function before it. A sum that
//! is normalized next is taken by the normalization as it reads; and in the backward, what reaches the sum past the
//! normalization is added by it as it writes. Numbers do not change; memory is saved where nothing else asks for what lay
//! between.

use crate::backend::ops::{
    ActivationBackward, ActivationForward, ActivationKind, Add, FusedActivation, FusedSlope, LayerNormBackward,
    LayerNormForward, LinearBackward, LinearForward, RmsNormBackward, RmsNormForward, RowSum,
};
use crate::backend::{Act, Backend, Op, Param, Use};

/// A program's operations, and how many of them are forward and loss.
pub(super) struct Operations<B: Backend> {
    pub ops: Vec<Box<dyn Op<B>>>,
    pub forward: usize,
}

impl<B: Backend> Operations<B> {
    /// The same operations, joined where they can be. `kept` tells which of them are read
    /// after the program.
    pub fn fused(mut self, kept: impl Fn(Act) -> bool) -> Self {
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
        let names = |op: &dyn Op<B>| {
            let mut found = false;
            op.uses(&mut |used| found |= used == Use::Activation(act));
            found
        };
        (0..self.ops.len()).filter(|&at| names(self.ops[at].as_ref())).collect()
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
