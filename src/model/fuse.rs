//! Joins operations that devices run as one: an affine map and the function of single values around it.
//!
//! Layers emit what they do one by one. Where an affine map is followed at once by a function of its values, the two become one
//! operation; so do, in the backward, the gradient of an affine map's input and the slope of the function before it. Numbers
//! do not change; memory is saved where nothing else asks for what lay between.

use crate::backend::ops::{
    ActivationBackward, ActivationForward, ActivationKind, FusedActivation, FusedSlope, LinearBackward, LinearForward,
};
use crate::backend::{Act, Backend, Op, Use};

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
            if at + 1 != self.forward && (self.join_forward(at, &kept) || self.join_backward(at, &kept)) {
                let second = at + 1;
                drop(self.ops.remove(second));
                self.forward -= usize::from(second < self.forward);
            }
            at += 1;
        }
        self
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
        let (u, y, kind) = (linear.y, activation.y, activation.kind);
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
        let fused = FusedActivation { kind, kept: needed.then_some(u) };
        let Some(linear) = self.find::<LinearForward>(at) else { return false };
        self.ops[at] = Box::new(LinearForward { y, activation: Some(fused), ..linear.clone() });
        true
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
}
