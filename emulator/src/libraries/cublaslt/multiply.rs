//! The product itself, and what its epilogue does.

use super::super::values::{Type, product, read, write};
use super::Layout;
use super::plan::{Function, Plan, Vector};
use crate::fault::Fault;

/// Values that a matrix spans, from its first to its last.
fn span(layout: &Layout) -> usize {
    if layout.rows * layout.columns == 0 { 0 } else { (layout.columns - 1) * layout.stride + layout.rows }
}

/// Reads a matrix column by column: what lies between the columns need not be written.
fn matrix(ty: Type, address: u64, layout: &Layout) -> Result<Vec<f32>, Fault> {
    if layout.stride == layout.rows {
        return read(ty, address, span(layout));
    }
    let mut out = vec![0.0; span(layout)];
    for column in 0..layout.columns {
        let at = column * layout.stride;
        let values = read(ty, address + (at * ty.bytes()) as u64, layout.rows)?;
        out[at..at + layout.rows].copy_from_slice(&values);
    }
    Ok(out)
}

pub(in crate::libraries) fn tf32(values: &mut [f32]) {
    for value in values.iter_mut().filter(|value| value.is_finite()) {
        *value = f32::from_bits(value.to_bits().wrapping_add(0x1000) & !0x1fff);
    }
}

/// GELU in its tanh form (Hendrycks and Gimpel 2016), and its slope, rounded once.
fn gelu(x: f32) -> f32 {
    let (x, inner) = gelu_inner(x);
    (0.5 * x * (1.0 + inner.tanh())) as f32
}

fn gelu_slope(x: f32) -> f64 {
    let (x, inner) = gelu_inner(x);
    let tanh = inner.tanh();
    let slope = GELU_SCALE * (1.0 + 3.0 * GELU_CUBIC * x * x);
    0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * slope
}

/// sqrt(2 / pi), and the cubic's coefficient.
const GELU_SCALE: f64 = std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2;
const GELU_CUBIC: f64 = 0.044715;

fn gelu_inner(x: f32) -> (f64, f64) {
    let x = f64::from(x);
    (x, GELU_SCALE * (x + GELU_CUBIC * x * x * x))
}

/// Sums over k of a matrix `[k, len]` with the strides of its rows and columns, one after the other.
fn sums_over_k(values: &[f32], [of_k, of_len]: [usize; 2], [k, len]: [usize; 2]) -> Vec<f32> {
    (0..len).map(|i| (0..k).map(|p| values[p * of_k + i * of_len]).sum()).collect()
}

/// `[m, n]`, k in `parts` parts whose sums are added in their order.
fn in_parts(plan: &Plan, left: (&[f32], [usize; 2]), right: (&[f32], [usize; 2]), parts: usize) -> Vec<f32> {
    let [m, k, n] = plan.size;
    let mut out = vec![0.0; m * n];
    let length = k.div_ceil(parts).max(1);
    for (number, start) in (0..k).step_by(length).enumerate() {
        let size = [m, length.min(k - start), n];
        let part = product(size, (&left.0[start * left.1[1]..], left.1), (&right.0[start * right.1[0]..], right.1));
        if number == 0 {
            out = part;
        } else {
            out.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
    }
    out
}

pub(super) fn multiply(
    plan: &Plan,
    [a, b, c, d]: [u64; 4],
    [alpha, beta]: [f32; 2],
    parts: usize,
) -> Result<(), Fault> {
    let [m, k, n] = plan.size;
    let [input, output] = plan.types;
    let [a_layout, b_layout, c_layout, d_layout] = &plan.layouts;
    let (mut left, mut right) = (matrix(input, a, a_layout)?, matrix(input, b, b_layout)?);
    let strides = |layout: &Layout, transposed: bool| {
        if transposed { [layout.stride, 1] } else { [1, layout.stride] }
    };
    let [left_transposed, right_transposed] = plan.operation.transposed;
    let (left_strides, right_strides) = (strides(a_layout, left_transposed), strides(b_layout, right_transposed));
    // Sums of inputs are not scaled, and not rounded to tf32.
    let mut sums = match plan.epilogue.vector {
        Vector::SumsOfA => sums_over_k(&left, [left_strides[1], left_strides[0]], [k, m]),
        Vector::SumsOfB => sums_over_k(&right, right_strides, [k, n]),
        Vector::SumsOfD => vec![0.0; m],
        Vector::None | Vector::Bias => Vec::new(),
    };
    if plan.is_tf32() {
        tf32(&mut left);
        tf32(&mut right);
    }
    let mut out = in_parts(plan, (&left, left_strides), (&right, right_strides), parts);
    out.iter_mut().for_each(|value| *value *= alpha);
    let vector = plan.operation.bias;
    let bias = match plan.epilogue.vector {
        Vector::Bias => Some(read(output, vector, m)?),
        _ => None,
    };
    let place = |start: u64, column: usize, stride: usize| start + (column * stride * output.bytes()) as u64;
    for column in 0..n {
        let values = &mut out[column * m..(column + 1) * m];
        if beta != 0.0 {
            let old = read(output, place(c, column, c_layout.stride), m)?;
            values.iter_mut().zip(&old).for_each(|(value, old)| *value += beta * old);
        }
        if let Some(bias) = &bias {
            values.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
        }
        let aux = place(plan.operation.aux, column, plan.operation.aux_stride as usize);
        match plan.epilogue.function {
            Function::None => {}
            Function::Relu => values.iter_mut().for_each(|value| *value = if *value < 0.0 { 0.0 } else { *value }),
            Function::Gelu => {
                if plan.epilogue.aux {
                    write(output, aux, values)?;
                }
                values.iter_mut().for_each(|value| *value = gelu(*value));
            }
            Function::GeluSlope => {
                let before = read(output, aux, m)?;
                values
                    .iter_mut()
                    .zip(before)
                    .for_each(|(value, x)| *value = (f64::from(*value) * gelu_slope(x)) as f32);
            }
        }
        if plan.epilogue.vector == Vector::SumsOfD {
            sums.iter_mut().zip(&*values).for_each(|(sum, value)| *sum += value);
        }
        write(output, place(d, column, d_layout.stride), values)?;
    }
    if sums.is_empty() { Ok(()) } else { write(output, vector, &sums) }
}
