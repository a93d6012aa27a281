//! Functions of single values, and SwiGLU.

use warpstep::backend::cpu::Cpu;
use warpstep::backend::ops::*;
use warpstep::real::Real;

use crate::*;

/// `f(x)` and `f'(x)` by the book.
fn plain<R: Real>(kind: ActivationKind, x: R) -> (R, R) {
    let c = R::from_f64;
    let (one, half) = (R::one(), c(0.5));
    let sigmoid = one / (one + (-x).exp());
    match kind {
        ActivationKind::Relu => (x.max(R::zero()), if x > R::zero() { one } else { R::zero() }),
        ActivationKind::GeluTanh => {
            let scale = c((2.0 / std::f64::consts::PI).sqrt());
            let t = (scale * (x + c(0.044715) * x * x * x)).tanh();
            let slope = scale * (one + c(3.0 * 0.044715) * x * x);
            (half * x * (one + t), half * (one + t) + half * x * (one - t * t) * slope)
        }
        ActivationKind::Gelu => {
            let cumulative = half * (one + (x * c(std::f64::consts::FRAC_1_SQRT_2)).erf());
            let density = c((2.0 * std::f64::consts::PI).sqrt().recip()) * (-half * x * x).exp();
            (x * cumulative, cumulative + x * density)
        }
        ActivationKind::Silu => (x * sigmoid, sigmoid * (one + x * (one - sigmoid))),
        ActivationKind::Sigmoid => (sigmoid, sigmoid * (one - sigmoid)),
        ActivationKind::Tanh => (x.tanh(), one - x.tanh() * x.tanh()),
    }
}

fn reference<R: Real>(kind: ActivationKind, x: &[f64], dy: &[f64]) -> Vec<Vec<f64>> {
    let values: Vec<_> = cast::<R>(x).into_iter().map(|x| plain(kind, x)).collect();
    let dx: Vec<R> = values.iter().zip(cast::<R>(dy)).map(|(v, d)| d * v.1).collect();
    vec![wide(&values.iter().map(|v| v.0).collect::<Vec<R>>()), wide(&dx)]
}

#[test]
fn functions_of_single_values_are_what_the_book_says() {
    use ActivationKind::*;
    let seed = fresh_seed();
    for kind in [Relu, GeluTanh, Gelu, Silu, Sigmoid, Tanh] {
        for len in [0, 1, 15, 16, 17, 40_001] {
            let x: Vec<f64> = normal(seed, 0, len).iter().map(|x| f64::from((3.0 * x) as f32)).collect();
            let dy = normal(seed, 1, len);
            let what = format!("{kind:?} of {len} values");
            let found = same_bits(&what, || {
                let mut bed = Bed::<Cpu<f32>>::cpu();
                let (x, dy) = (bed.real(&x), bed.real(&dy));
                let (y, dx) = (bed.empty(len), bed.empty(len));
                let forward = bed.run(&ActivationForward { x, y, kind, len }).unwrap();
                let backward = bed.run(&ActivationBackward { x, dy, dx, kind, len }).unwrap();
                vec![forward.get(y), backward.get(dx)]
            });
            judge(&what, &found, &reference::<f32>(kind, &x, &dy), &reference::<f64>(kind, &x, &dy));
        }
    }
}

#[test]
fn large_values_neither_overflow_nor_vanish() {
    use ActivationKind::*;
    let x = [-1e4, -200.0, -90.0, -20.0, 0.0, 20.0, 90.0, 200.0, 1e4];
    let dy = [1.0; 9];
    for kind in [Relu, GeluTanh, Gelu, Silu, Sigmoid, Tanh] {
        let mut bed = Bed::<Cpu<f32>>::cpu();
        let (at, d, y, dx) = (bed.real(&x), bed.real(&dy), bed.empty(9), bed.empty(9));
        let found = vec![
            bed.run(&ActivationForward { x: at, y, kind, len: 9 }).unwrap().get(y),
            bed.run(&ActivationBackward { x: at, dy: d, dx, kind, len: 9 }).unwrap().get(dx),
        ];
        let reference = reference::<f64>(kind, &x, &dy);
        judge(&format!("{kind:?}"), &found, &reference, &reference);
    }
}

fn swiglu_reference<R: Real>(x: &[f64], dy: &[f64], rows: usize, width: usize) -> Vec<Vec<f64>> {
    let (x, dy) = (cast::<R>(x), cast::<R>(dy));
    let (mut y, mut dx) = (vec![R::zero(); rows * width], vec![R::zero(); 2 * rows * width]);
    for row in 0..rows {
        for i in 0..width {
            let (gate, up) = (row * 2 * width + i, row * 2 * width + width + i);
            let (f, slope) = plain(ActivationKind::Silu, x[gate]);
            let at = row * width + i;
            y[at] = f * x[up];
            dx[gate] = dy[at] * x[up] * slope;
            dx[up] = dy[at] * f;
        }
    }
    vec![wide(&y), wide(&dx)]
}

#[test]
fn swiglu_is_what_the_paper_says() {
    let seed = fresh_seed();
    for (rows, width) in [(1, 1), (3, 5), (7, 16), (130, 129)] {
        let (x, dy) = (normal(seed, 0, 2 * rows * width), normal(seed, 1, rows * width));
        let what = format!("swiglu [{rows}, {width}]");
        let found = same_bits(&what, || {
            let mut bed = Bed::<Cpu<f32>>::cpu();
            let (x, dy) = (bed.real(&x), bed.real(&dy));
            let (y, dx) = (bed.empty(rows * width), bed.empty(2 * rows * width));
            let forward = bed.run(&SwigluForward { x, y, rows, width }).unwrap();
            let backward = bed.run(&SwigluBackward { x, dy, dx, rows, width }).unwrap();
            vec![forward.get(y), backward.get(dx)]
        });
        let (plain, exact) =
            (swiglu_reference::<f32>(&x, &dy, rows, width), swiglu_reference::<f64>(&x, &dy, rows, width));
        judge(&what, &found, &plain, &exact);
    }
}
