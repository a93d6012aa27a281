use super::*;

struct Classes {
    rows: usize,
    classes: usize,
    label_smoothing: f64,
}

impl Case for Classes {
    fn run<B: Backend>(&self, mut bed: Bed<B>, draw: &Draw) -> Vec<Vec<f64>> {
        let Classes { rows, classes, label_smoothing } = *self;
        let mut targets = whole(draw.seed, 1, rows, classes as u64);
        targets.iter_mut().step_by(3).for_each(|target| *target = -100);
        let (logits, targets) = (bed.real(&draw.normal(0, rows * classes)), bed.whole(&targets));
        let (metrics, gradient) = (bed.empty_statistic(METRICS), bed.empty(rows * classes));
        let dlogits = Some(gradient);
        let op = CrossEntropy { logits, targets, metrics, dlogits, rows, classes, label_smoothing, ignore_index: -100 };
        let ran = bed.run(&op).unwrap();
        let alone = bed.run(&CrossEntropy { dlogits: None, ..op }).unwrap();
        let [found, without] = [&ran, &alone].map(|ran| ran.get_statistic(metrics)[..METRICS].to_vec());
        // Counts are exact, whatever the type.
        assert_eq!(found[2..], without[2..]);
        vec![found[..2].to_vec(), found[2..].to_vec(), without[..2].to_vec(), ran.get(gradient)]
    }
}

#[test]
fn cross_entropy_and_its_gradient() {
    let cases: Vec<_> =
        [(1, 1), (2, 2), (9, 10), (700, 10), (3, 32), (600, 31), (5, 33), (17, 65), (550, 64), (5, 1025), (3, 3001)]
            .into_iter()
            .flat_map(|(rows, classes)| [0.0, 0.1].map(|label_smoothing| Classes { rows, classes, label_smoothing }))
            .collect();
    in_all_types("cross-entropy", &cases);
}

struct Pointwise(usize);

impl Case for Pointwise {
    fn run<B: Backend>(&self, mut bed: Bed<B>, draw: &Draw) -> Vec<Vec<f64>> {
        let len = self.0;
        let targets: Vec<f64> = whole(draw.seed, 1, len, 5).iter().map(|&t| f64::from(t) / 4.0).collect();
        let (x, target) = (bed.real(&draw.normal(0, len)), bed.real(&targets));
        let (metrics, gradient) = (bed.empty_statistic(METRICS), bed.empty(len));
        let d = Some(gradient);
        let squares = MeanSquaredError { prediction: x, target, metrics, dprediction: d, len };
        let squares = bed.run(&squares).unwrap();
        let binary = bed.run(&BinaryCrossEntropy { logits: x, target, metrics, dlogits: d, len }).unwrap();
        [squares, binary]
            .iter()
            .flat_map(|ran| [ran.get_statistic(metrics)[..METRICS].to_vec(), ran.get(gradient)])
            .collect()
    }
}

#[test]
fn losses_over_single_values() {
    in_all_types("pointwise loss", &[1, 15, 300, 70_001].map(Pointwise));
}
