//! The points of a curve: smoothed, thinned, cut where a figure is missing.

/// Points of a curve at most; longer ones keep the least and the greatest of each stretch.
pub(super) const POINTS: usize = 1200;

/// Figures beyond this are drawn as missing: a scale that held them would show nothing else.
const HUGE: f64 = 1e30;

/// Whether a point can be drawn.
pub(super) fn drawable(point: &(f64, f64)) -> bool {
    point.0.is_finite() && point.1.is_finite() && point.0.abs() < HUGE && point.1.abs() < HUGE
}

/// The least and the greatest; none where there is no value.
pub(super) fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    (low <= high).then_some((low, high))
}

/// The stretches of a curve between points that cannot be drawn, with at most about [`POINTS`] points in all.
pub(super) fn stretches(points: &[(f64, f64)]) -> Vec<Vec<(f64, f64)>> {
    let width = points.len().div_ceil(POINTS / 2).max(1);
    points
        .split(|point| !drawable(point))
        .filter(|stretch| !stretch.is_empty())
        .map(|stretch| if points.len() > POINTS { thinned(stretch, width) } else { stretch.to_vec() })
        .collect()
}

/// Of every `width` points the least and the greatest, in their order.
fn thinned(points: &[(f64, f64)], width: usize) -> Vec<(f64, f64)> {
    let mut kept = Vec::new();
    for part in points.chunks(width) {
        let least = part.iter().enumerate().min_by(|a, b| a.1.1.total_cmp(&b.1.1)).map_or(0, |(i, _)| i);
        let greatest = part.iter().enumerate().max_by(|a, b| a.1.1.total_cmp(&b.1.1)).map_or(0, |(i, _)| i);
        kept.push(part[least.min(greatest)]);
        if least != greatest {
            kept.push(part[least.max(greatest)]);
        }
    }
    kept
}

/// The mean over a window about each point, a twentieth of the curve wide: narrower towards the start, which stays as steep
/// as it was, and cut at the end. What cannot be drawn stays out of the means and stays as it is.
pub(super) fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut sums = vec![(0.0, 0usize)];
    for point in points {
        let (sum, count) = sums.last().copied().unwrap_or_default();
        sums.push(if drawable(point) { (sum + point.1, count + 1) } else { (sum, count) });
    }
    let widest = points.len() / 40;
    let mean = |i: usize| {
        let half = widest.min(i / 2);
        let (from, to) = (sums[i - half], sums[(i + half + 1).min(points.len())]);
        (to.0 - from.0) / (to.1 - from.1).max(1) as f64
    };
    points.iter().enumerate().map(|(i, point)| if drawable(point) { (point.0, mean(i)) } else { *point }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thinning_keeps_the_extremes() {
        let points: Vec<(f64, f64)> = (0..100_000).map(|i| (f64::from(i), f64::from((i * 7919) % 1000))).collect();
        let kept = stretches(&points);
        assert_eq!(kept.len(), 1);
        assert!(kept[0].len() <= POINTS + 2);
        assert_eq!(range(kept[0].iter().map(|p| p.1)), Some((0.0, 999.0)));
    }

    #[test]
    fn a_figure_that_is_missing_leaves_a_gap() {
        let points = [(0.0, 1.0), (1.0, 2.0), (2.0, f64::NAN), (3.0, 3.0), (4.0, f64::INFINITY)];
        assert_eq!(stretches(&points), [vec![(0.0, 1.0), (1.0, 2.0)], vec![(3.0, 3.0)]]);
    }

    #[test]
    fn smoothing_keeps_the_start_the_gaps_and_a_straight_line() {
        let mut points: Vec<(f64, f64)> = (0..400).map(|i| (f64::from(i), 2.0 * f64::from(i))).collect();
        for (one, other) in smoothed(&points)[..390].iter().zip(&points) {
            assert!((one.1 - other.1).abs() < 1e-9, "{one:?} {other:?}");
        }
        points[200].1 = f64::NAN;
        let smooth = smoothed(&points);
        assert!(smooth[200].1.is_nan() && smooth[199].1.is_finite());
        assert_eq!(smooth[0], points[0]);
    }

    #[test]
    fn smoothing_quiets_the_end_too() {
        let points: Vec<(f64, f64)> = (0..400).map(|i| (f64::from(i), f64::from(i % 2))).collect();
        for (_, y) in &smoothed(&points)[100..] {
            assert!((y - 0.5).abs() < 0.1, "{y}");
        }
    }
}
