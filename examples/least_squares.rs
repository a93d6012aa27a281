//! Least squares as in the source text: theta minimizes `|X theta - y|^2 / m` by full-batch gradient descent from zero, with
//! Warpstep's update on plain buffers.
//!
//!     cargo run --release --example least_squares

use warpstep::Result;
use warpstep::backend::cpu::update;
use warpstep::optim::{OptimizerOptions, Rule, StepParams, UpdatePlan};
use warpstep::plan::{ParamLayout, ParamSpec};

fn main() -> Result<()> {
    let x = [[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]];
    let y = [1.0, 3.0, 5.0];
    let layout = ParamLayout::new(&[ParamSpec { name: "theta".into(), shape: vec![2] }])?;
    let options = OptimizerOptions::new(Rule::Sgd, 0.01);
    let plan = UpdatePlan::new(&options, &layout)?;
    let mut theta = vec![0f64; layout.padded_len()];
    let mut gradient = vec![0f64; layout.padded_len()];
    for step in 1..=1000 {
        // 2 / m X' (X theta - y)
        gradient[..2].fill(0.0);
        for (row, target) in x.iter().zip(y) {
            let residual = row[0] * theta[0] + row[1] * theta[1] - target;
            for i in 0..2 {
                gradient[i] += 2.0 / y.len() as f64 * row[i] * residual;
            }
        }
        let params = StepParams { learning_rate: options.learning_rate, step, divisor: 1.0, zero_gradients: false };
        update(&mut theta, &mut gradient, &mut [], &plan, &params)?;
    }
    println!("theta = [{:.6}, {:.6}]", theta[0], theta[1]);
    Ok(())
}
