//! A product whose shapes, types and epilogue fit together.

use super::super::values::Type;
use super::{AS_OUTPUT, EPILOGUE_DEFAULT, Layout, Operation, status};

const COMPUTE_32F: i32 = 68;
const COMPUTE_32F_FAST_TF32: i32 = 77;

/// What an epilogue does to the values on their way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Function {
    None,
    Relu,
    Gelu,
    /// Multiplies by GELU's slope at the auxiliary matrix.
    GeluSlope,
}

/// What the vector of an epilogue is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vector {
    None,
    /// Added to every column.
    Bias,
    /// Takes the sums of D over its columns, of A over its columns, or of B over its rows.
    SumsOfD,
    SumsOfA,
    SumsOfB,
}

/// An epilogue, decoded.
#[derive(Clone, Copy, Debug)]
pub struct Epilogue {
    pub function: Function,
    pub vector: Vector,
    /// Whether there is an auxiliary matrix: what GELU was given, written by it and read by its slope.
    pub aux: bool,
}

impl Epilogue {
    fn decode(number: i32) -> Result<Self, i32> {
        let (function, vector, aux) = match number {
            EPILOGUE_DEFAULT => (Function::None, Vector::None, false),
            2 => (Function::Relu, Vector::None, false),
            4 => (Function::None, Vector::Bias, false),
            6 => (Function::Relu, Vector::Bias, false),
            32 => (Function::Gelu, Vector::None, false),
            36 => (Function::Gelu, Vector::Bias, false),
            160 => (Function::Gelu, Vector::None, true),
            164 => (Function::Gelu, Vector::Bias, true),
            192 => (Function::GeluSlope, Vector::None, true),
            208 => (Function::GeluSlope, Vector::SumsOfD, true),
            256 => (Function::None, Vector::SumsOfA, false),
            512 => (Function::None, Vector::SumsOfB, false),
            _ => return Err(status::NOT_SUPPORTED),
        };
        Ok(Epilogue { function, vector, aux })
    }
}

/// A product that can be done.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub operation: Operation,
    /// Of A, B, C and D.
    pub layouts: [Layout; 4],
    /// Of the inputs, and of C, D and what epilogues read and write.
    pub types: [Type; 2],
    /// m, k, n.
    pub size: [usize; 3],
    pub epilogue: Epilogue,
}

impl Plan {
    pub fn new(operation: Operation, layouts: [Layout; 4]) -> Result<Self, i32> {
        let [a, b, c, d] = layouts;
        let shape = |layout: Layout, transposed| {
            if transposed { (layout.columns, layout.rows) } else { (layout.rows, layout.columns) }
        };
        let ((m, k), (inner, n)) = (shape(a, operation.transposed[0]), shape(b, operation.transposed[1]));
        // An empty product is none: seen of the library's heuristics on a GPU.
        if m == 0 || k == 0 || n == 0 {
            return Err(status::INVALID_VALUE);
        }
        if inner != k || (d.rows, d.columns) != (m, n) || (c.rows, c.columns) != (m, n) {
            return Err(status::INVALID_VALUE);
        }
        let types = layouts.map(|layout| Type::from_cuda(layout.ty));
        let [Some(left), Some(right), Some(added), Some(out)] = types else { return Err(status::NOT_SUPPORTED) };
        let compute = match operation.compute {
            COMPUTE_32F => true,
            COMPUTE_32F_FAST_TF32 => left == Type::F32,
            _ => false,
        };
        let known = compute
            && left == right
            && added == out
            && (out == left || out == Type::F32)
            && operation.scale == 0
            && (operation.bias_type == AS_OUTPUT || Type::from_cuda(operation.bias_type) == Some(out));
        if !known {
            return Err(status::NOT_SUPPORTED);
        }
        let plan = Plan {
            operation,
            layouts,
            types: [left, out],
            size: [m, k, n],
            epilogue: Epilogue::decode(operation.epilogue)?,
        };
        plan.check_epilogue()?;
        Ok(plan)
    }

    fn check_epilogue(&self) -> Result<(), i32> {
        let Operation { aux, aux_type, aux_stride, transposed, .. } = self.operation;
        if self.epilogue.aux {
            let as_output = aux_type == AS_OUTPUT || Type::from_cuda(aux_type) == Some(self.types[1]);
            // In elements: a multiple of 8, and no two columns overlap.
            if !as_output || aux_stride < self.size[0] as i64 || aux_stride % 8 != 0 {
                return Err(status::INVALID_VALUE);
            }
            // The address tells the heuristic what it may rely on.
            if !aux.is_multiple_of(16) {
                return Err(status::NOT_SUPPORTED);
            }
        }
        match (self.epilogue.vector, transposed) {
            (Vector::SumsOfA, [true, _]) | (Vector::SumsOfB, [_, false]) => Err(status::NOT_SUPPORTED),
            _ => Ok(()),
        }
    }

    /// What only the product itself asks, not the choice of its algorithm.
    pub fn check_addresses(&self, addresses: [u64; 4]) -> Result<(), i32> {
        let Operation { bias, aux, .. } = self.operation;
        let [input, output] = self.types.map(|ty| ty.bytes() as u64);
        if addresses.contains(&0) {
            return Err(status::INVALID_VALUE);
        }
        if self.epilogue.aux && aux == 0 {
            return Err(if self.epilogue.function == Function::Gelu {
                status::NOT_SUPPORTED
            } else {
                status::INVALID_VALUE
            });
        }
        if self.epilogue.vector != Vector::None && bias == 0 {
            return Err(status::INVALID_VALUE);
        }
        let [a, b, c, d] = addresses;
        let aligned = [(a, input), (b, input), (c, output), (d, output), (bias, output)];
        if aligned.iter().any(|(address, bytes)| !address.is_multiple_of(*bytes)) {
            return Err(status::NOT_SUPPORTED);
        }
        Ok(())
    }

    pub fn is_tf32(&self) -> bool {
        self.operation.compute == COMPUTE_32F_FAST_TF32
    }

    /// Values from column to column, and bytes of a value, of each matrix.
    pub fn strides_and_bytes(&self) -> [(usize, usize); 4] {
        let [input, output] = self.types.map(Type::bytes);
        let [a, b, c, d] = self.layouts.map(|layout| layout.stride);
        [(a, input), (b, input), (c, output), (d, output)]
    }
}
