//! What an operation is: named arguments, the memory it touches, its cost, and the backend method that runs it.

use std::any::Any;

use super::Backend;
use super::memory::{Act, Grad, Indices, Memory, Param, State};
use crate::error::Result;

/// What differs from one run of a program to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepContext {
    /// The run's seed, the key of every random number.
    pub seed: u64,
    /// Number of micro-batches seen so far: positions dropout in its stream.
    pub micro_step: u64,
    /// Which part of the micro-batch this is, all parts being as large: positions dropout within the micro-batch.
    pub part: u64,
    /// Whether gradients are added to what earlier micro-batches left.
    pub accumulate: bool,
}

impl StepContext {
    /// Whether the write of `grad` overwrites (`=`) or adds (`+=`).
    pub fn overwrites(&self, grad: Grad) -> bool {
        grad.first && !self.accumulate
    }
}

/// One thing that an operation touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// An activation, read or written.
    Activation(Act),
    /// Whole numbers, read or written.
    Indices(Indices),
    /// A parameter, read.
    Parameter(Param),
    /// A parameter's gradient, written.
    Gradient(Grad),
    /// A kept tensor, read or written.
    State(State),
}

/// An operation of a program.
pub trait Op<B: Backend>: Send + Sync {
    /// Its name, as profiles and errors give it.
    fn name(&self) -> &'static str;
    /// Tells `visit` of everything it touches.
    fn uses(&self, visit: &mut dyn FnMut(Use));
    /// Floating-point operations (a multiplication and an addition are two).
    fn flops(&self) -> u64;
    /// Those of them that compute again what a forward did not keep: work that its model does not ask for.
    fn repeated_flops(&self) -> u64 {
        0
    }
    /// How many values of what `used` names it must move, where these are not all of it once: a part, or all of it read and
    /// written.
    fn moved(&self, _: Use) -> Option<usize> {
        None
    }
    /// Itself, where it may be joined with its neighbours when a program is planned. Own operations are left as they are.
    fn as_any(&self) -> Option<&dyn Any> {
        None
    }
    /// Runs it.
    ///
    /// # Errors
    /// What the backend reports.
    fn run(&self, backend: &B, memory: &mut Memory<'_, B>, step: &StepContext) -> Result<()>;
}

/// A field of an operation's arguments: tells what memory it names.
pub trait Operand {
    /// Tells `visit` of the memory that this names; numbers and options name none.
    fn uses(&self, visit: &mut dyn FnMut(Use));
}

macro_rules! memory_operand {
    ($($ty:ty => $use:ident),*) => {$(
        impl Operand for $ty {
            fn uses(&self, visit: &mut dyn FnMut(Use)) {
                visit(Use::$use(*self));
            }
        }
    )*};
}
memory_operand!(Act => Activation, Indices => Indices, Param => Parameter, Grad => Gradient, State => State);

impl<T: Operand> Operand for Option<T> {
    fn uses(&self, visit: &mut dyn FnMut(Use)) {
        if let Some(operand) = self {
            operand.uses(visit);
        }
    }
}

impl<T: Operand> Operand for Vec<T> {
    fn uses(&self, visit: &mut dyn FnMut(Use)) {
        self.iter().for_each(|operand| operand.uses(visit));
    }
}

/// Declares plain values as operands that name no memory.
macro_rules! plain_operand {
    ($($ty:ty),* $(,)?) => {$(
        impl $crate::backend::op::Operand for $ty {
            fn uses(&self, _: &mut dyn FnMut($crate::backend::op::Use)) {}
        }
    )*};
}
plain_operand!(usize, u32, i32, f64, bool);
pub(crate) use plain_operand;

/// Declares an operation: an argument struct, and the backend method that runs it. `moved` gives [`Op::moved`] of some of its
/// fields.
macro_rules! op {
    (
        $(#[$meta:meta])*
        $name:ident => $method:ident {
            $($(#[$field_meta:meta])* $field:ident: $ty:ty,)*
        }
        flops($args:ident) $flops:expr
        $(; repeated $repeated:expr)?
        $(; moved { $($part:ident: $values:expr),* })?
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug)]
        pub struct $name {
            $($(#[$field_meta])* pub $field: $ty,)*
        }

        impl<B: $crate::backend::Backend> $crate::backend::op::Op<B> for $name {
            fn name(&self) -> &'static str {
                stringify!($method)
            }
            fn uses(&self, visit: &mut dyn FnMut($crate::backend::op::Use)) {
                $($crate::backend::op::Operand::uses(&self.$field, visit);)*
            }
            fn flops(&self) -> u64 {
                let $args = self;
                ($flops) as u64
            }
            $(fn repeated_flops(&self) -> u64 {
                let $args = self;
                ($repeated) as u64
            })?
            $(fn moved(&self, used: $crate::backend::op::Use) -> Option<usize> {
                #[allow(unused_variables, reason = "a number that stands by itself")]
                let $args = self;
                $(
                    let mut named = false;
                    $crate::backend::op::Operand::uses(&self.$part, &mut |part| named |= part == used);
                    if named {
                        return $values;
                    }
                )*
                None
            })?
            fn as_any(&self) -> Option<&dyn std::any::Any> {
                Some(self)
            }
            fn run(
                &self,
                backend: &B,
                memory: &mut $crate::backend::Memory<'_, B>,
                step: &$crate::backend::StepContext,
            ) -> $crate::error::Result<()> {
                backend.$method(memory, self, step)
            }
        }
    };
}
pub(crate) use op;
