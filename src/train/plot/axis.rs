//! An axis: where its ticks stand, how they are written, and where a value lies between two pixels.

/// Decades of a logarithmic axis that get a tick each; where there are more, some are left out.
const DECADES: i32 = 6;
/// Letters of a label that fit beside an axis.
const LABEL: usize = 8;

/// A range of values over a range of pixels.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Axis {
    low: f64,
    high: f64,
    logarithmic: bool,
    /// Values with a tick, and what is written at it.
    pub ticks: Vec<(f64, String)>,
}

impl Axis {
    /// From `low` to `high` with `count` ticks at most; `whole` where only whole numbers get one. Logarithmic only where
    /// `low` is above 0.
    pub fn new(low: f64, high: f64, logarithmic: bool, whole: bool, count: usize) -> Self {
        // A margin below the smallest of values can be 0.
        let logarithmic = logarithmic && low > 0.0 && high.is_finite();
        let ticks = if logarithmic { logarithmic_ticks(low, high) } else { Vec::new() };
        let ticks = if ticks.len() > 1 { ticks } else { linear_ticks(low, high, whole, count) };
        Axis { low, high, logarithmic, ticks }
    }

    /// Whether what is written at the ticks differs, and fits beside the axis.
    pub fn is_legible(&self) -> bool {
        let distinct = self.ticks.windows(2).all(|pair| pair[0].1 != pair[1].1);
        self.logarithmic || (distinct && self.ticks.iter().all(|(_, label)| label.len() <= LABEL))
    }

    /// Where `value` lies: 0 at the low end, 1 at the high end; never beyond.
    pub fn share(&self, value: f64) -> f64 {
        let place = |v: f64| if self.logarithmic { v.max(f64::MIN_POSITIVE).log10() } else { v };
        let (low, high) = (place(self.low), place(self.high));
        let share = (place(value) - low) / (high - low);
        if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.5 }
    }
}

fn linear_ticks(low: f64, high: f64, whole: bool, count: usize) -> Vec<(f64, String)> {
    let rough = (high - low) / count.max(1) as f64;
    let power = 10f64.powf(rough.log10().floor());
    let factor = [1.0, 2.0, 5.0].into_iter().find(|f| f * power >= rough * 0.999).unwrap_or(10.0);
    let step = if whole { (factor * power).max(1.0) } else { factor * power };
    let first = (low / step).ceil();
    if !(step.is_finite() && step > 0.0 && first.is_finite()) {
        return Vec::new();
    }
    let values: Vec<f64> =
        (0..=count).map(|i| (first + i as f64) * step).take_while(|v| *v <= high + 1e-9 * step).collect();
    let largest = values.iter().fold(0f64, |most, v| most.max(v.abs()));
    values.into_iter().map(|value| (value, tick(value, step, largest))).collect()
}

/// Powers of 10 with, where these are few, their doubles and fivefolds.
fn logarithmic_ticks(low: f64, high: f64) -> Vec<(f64, String)> {
    let (first, last) = (low.log10().floor() as i32, high.log10().ceil() as i32);
    let stride = ((last - first) / DECADES).max(1);
    let factors: &[f64] = match high.log10() - low.log10() {
        decades if decades < 2.2 => &[1.0, 2.0, 5.0],
        decades if decades < 3.5 => &[1.0, 3.0],
        _ => &[1.0],
    };
    (first..=last)
        .step_by(stride as usize)
        .flat_map(|exponent| factors.iter().map(move |factor| factor * 10f64.powi(exponent)))
        .filter(|value| (low..=high).contains(value))
        .map(|value| (value, tick(value, value, value)))
        .collect()
}

/// A value of an axis whose ticks lie `step` apart and reach `largest`: `1500`, `0.25`, `3e-4`, `20k`, `2M`.
fn tick(value: f64, step: f64, largest: f64) -> String {
    let decimals = |step: f64| (-step.log10() - 1e-9).ceil().clamp(0.0, 6.0) as usize;
    if value.abs() < 1e-9 * step {
        "0".to_owned()
    } else if !(2e-3..1e9).contains(&largest) {
        let digits = (value.abs().log10() + 1e-9).floor() - (step.log10() + 1e-9).floor();
        format!("{value:.*e}", digits.clamp(0.0, 3.0) as usize).replace(".0e", "e")
    } else if largest >= 1e6 {
        format!("{:.*}M", decimals(step / 1e6), value / 1e6)
    } else if largest >= 1e4 {
        format!("{:.*}k", decimals(step / 1e3), value / 1e3)
    } else {
        format!("{value:.*}", decimals(step))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(low: f64, high: f64, logarithmic: bool) -> Vec<String> {
        Axis::new(low, high, logarithmic, false, 5).ticks.into_iter().map(|t| t.1).collect()
    }

    #[test]
    fn ticks_stand_at_round_figures_and_are_written_alike() {
        assert_eq!(labels(0.0, 1.0, false), ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(labels(0.0, 1e-3, false), ["0", "2e-4", "4e-4", "6e-4", "8e-4", "1e-3"]);
        assert_eq!(labels(5e3, 52e3, false), ["10k", "20k", "30k", "40k", "50k"]);
        assert_eq!(labels(0.01, 1.0, true), ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1"]);
        assert_eq!(labels(1e-4, 1e2, true), ["1e-4", "1e-3", "0.01", "0.1", "1", "10", "100"]);
    }

    #[test]
    fn a_logarithmic_axis_from_zero_is_linear() {
        assert_eq!(Axis::new(0.0, 1e16, true, false, 5), Axis::new(0.0, 1e16, false, false, 5));
    }

    #[test]
    fn steps_get_whole_ticks_only() {
        let ticks = Axis::new(1.0, 3.0, false, true, 6).ticks;
        assert_eq!(ticks.iter().map(|t| t.0).collect::<Vec<_>>(), [1.0, 2.0, 3.0]);
    }
}
