//! What a run file asked of a model, and errors of its shapes in the run file's words: the key, what was found, what was
//! expected, what to do.

use super::layers::TOO_FEW;
use super::presets::{Goal, LayerOptions};
use crate::error::{Error, Result};

/// What a run file made a model of.
#[derive(Clone, Debug)]
pub(super) enum Made {
    /// `model.preset`.
    Preset {
        name: &'static str,
        /// Whether it takes `[channels, height, width]`.
        pictures: bool,
    },
    /// `[[model.layers]]`.
    Layers {
        /// Number of the last.
        last: usize,
        /// Whether that is `linear`.
        linear: bool,
    },
}

impl Made {
    pub(super) fn of_layers(list: &[LayerOptions]) -> Self {
        let linear = matches!(list.last(), Some(LayerOptions::Linear { .. }));
        Made::Layers { last: list.len().saturating_sub(1), linear }
    }
}

/// What a run file asked for.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub made: Made,
    /// What is to be told of a sample.
    pub goal: Goal,
    /// Outputs a sample, or a token where the next one is told.
    pub outputs: usize,
}

impl Asked {
    /// Checks what the first layer is given: `shape`, samples first.
    ///
    /// # Errors
    /// A preset of pictures, and other inputs.
    pub(super) fn check_input(&self, shape: &[usize]) -> Result<()> {
        match &self.made {
            Made::Preset { name, pictures: true } if shape.len() != 4 => Err(Error::config(
                "model.preset",
                format!(
                    "found \"{name}\", which takes pictures [channels, height, width], with inputs of shape {:?}; expected \
                     \"mlp\" for them, or, for a csv table whose rows are pictures, data.shape",
                    shape.get(1..).unwrap_or_default()
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Checks the model's output `shape`, samples first, for an input of `input`.
    ///
    /// # Errors
    /// A list of layers whose output does not fit the targets.
    pub(super) fn check_output(&self, input: &[usize], shape: &[usize]) -> Result<()> {
        let Made::Layers { last, linear } = self.made else { return Ok(()) };
        let (outputs, width) = (self.outputs, shape.last().copied().unwrap_or(0));
        let place = format!("model.layers[{last}]");
        let found = shape.get(1..).unwrap_or_default();
        if self.goal == Goal::NextToken {
            // A vocabulary may be filled up to a rounder number.
            return match shape {
                [_, time, width] if input.get(1) == Some(time) && *width >= outputs => Ok(()),
                [_, time, _] if input.get(1) == Some(time) => Err(self.wrong_width(place, width, linear)),
                _ => Err(Error::config(
                    place,
                    format!(
                        "found an output of shape {found:?} a sample, expected {:?}, {}; leave out what joins the tokens, such \
                         as flatten or mean_over_time",
                        [input.get(1).copied().unwrap_or(0), outputs],
                        self.meaning()
                    ),
                )),
            };
        }
        match shape {
            [_, width] if *width == outputs => Ok(()),
            [_, width] => Err(self.wrong_width(place, *width, linear)),
            _ => {
                let join = match found {
                    [_, _] => "{ kind = \"mean_over_time\" } or { kind = \"flatten\" }",
                    _ => "{ kind = \"flatten\" }",
                };
                Err(Error::config(
                    place,
                    format!(
                        "found an output of shape {found:?} a sample, expected [{outputs}], {}; put {join} before the last \
                         linear layer",
                        self.meaning()
                    ),
                ))
            }
        }
    }

    fn wrong_width(&self, place: String, width: usize, linear: bool) -> Error {
        let (outputs, meaning) = (self.outputs, self.meaning());
        if linear {
            let problem =
                format!("found {width}, expected {outputs}, {meaning}; set outputs = {outputs}, or leave it out");
            return Error::config(format!("{place}.outputs"), problem);
        }
        let problem = format!(
            "found an output of {width} values, expected {outputs}, {meaning}; end with {{ kind = \"linear\" }}"
        );
        Error::config(place, problem)
    }

    /// What the outputs are.
    fn meaning(&self) -> &'static str {
        match self.goal {
            Goal::Classes(classes) if classes == self.outputs => "one for each class of the data",
            Goal::Classes(_) => "the logit of the second of two classes",
            Goal::Values(_) => "one for each target column of the data",
            Goal::NextToken => "one for each token of the vocabulary",
        }
    }

    /// The error of a layer whose place among the model's names is `scope`.
    pub(super) fn told(&self, scope: &[String], error: Error) -> Error {
        let Error::Shape { operation, expected, found } = error else { return error };
        match &self.made {
            Made::Preset { name, pictures } => {
                let path: Vec<&str> = scope.iter().map(String::as_str).filter(|name| !name.is_empty()).collect();
                let advice = match expected.as_str() {
                    TOO_FEW => MORE_SAMPLES,
                    _ if *pictures => "; expected fewer model.channels, or larger pictures",
                    _ => "",
                };
                let layer = if path.is_empty() { operation } else { format!("{} ({operation})", path.join(".")) };
                Error::config(
                    "model.preset",
                    format!("found \"{name}\", whose layer {layer} takes {expected}, with {found}{advice}"),
                )
            }
            Made::Layers { .. } => {
                let advice = advice(&operation, &expected);
                Error::config(key(scope), format!("{operation} takes {expected}, found {found}{advice}"))
            }
        }
    }
}

/// The run file's key of the layer at `scope`.
fn key(scope: &[String]) -> String {
    let mut key = String::from("model.layers");
    let mut within = true;
    for name in scope.iter().filter(|name| !name.is_empty()) {
        match (within, name.as_str()) {
            (true, number) if number.parse::<usize>().is_ok() => key += &format!("[{number}]"),
            (false, "layers" | "shortcut") => key += &format!(".{name}"),
            // Names within a layer are no keys.
            _ => break,
        }
        within = !within;
    }
    key
}

/// What to do where batch norm is given [`TOO_FEW`] values.
const MORE_SAMPLES: &str = "; set a larger data.batch_size, or, with run.reproducible = true, fewer parallel.parts: each part of a batch is \
                       normalized by itself";

/// What to do about a layer of a list that is given what it does not take.
fn advice(operation: &str, expected: &str) -> &'static str {
    match operation {
        _ if expected.starts_with("[batch, channels, height") => {
            "; it takes pictures: data of them, or a csv table with data.shape = [channels, height, width]"
        }
        _ if expected.starts_with("[batch, time") => "; put { kind = \"embedding\" } before it, and no flatten",
        "conv2d" if expected.contains("groups") => "; set groups to a number that divides both",
        "conv2d" | "max_pool2d" | "average_pool2d" => "; set a smaller kernel, or more padding",
        "residual" => "; give it a shortcut with layers that change the shape alike",
        "batch_norm" if expected == TOO_FEW => MORE_SAMPLES,
        "self_attention" => "; set heads to a number that divides the width",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::super::presets::{
        AudioCnnOptions, CnnOptions, Fit, LinearOptions, LossKind, MlpOptions, ModelOptions, Preset, ResNetOptions,
    };
    use super::super::{Input, Mode, layers::Window};
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::backend::ops::ActivationKind;

    fn options(preset: Preset) -> ModelOptions {
        ModelOptions { preset, loss: None, label_smoothing: 0.0 }
    }

    fn fit(goal: Goal, tokens: Option<[usize; 2]>) -> Fit {
        let [vocabulary, context] = [0, 1].map(|i| tokens.map(|tokens| tokens[i]));
        Fit { vocabulary, context, goal, padding: None, outputs: 0 }
    }

    /// Plans the model for two samples.
    fn plan(options: &ModelOptions, fit: &Fit, input: &Input) -> Result<()> {
        options.build::<Cpu<f32>>(fit)?.plan(input, 2, Mode::Training).map(|_| ())
    }

    /// The error that must come: at this key, with all of these parts.
    fn refused(options: &ModelOptions, fit: &Fit, input: &Input, key: &str, parts: &[&str]) {
        match plan(options, fit, input) {
            Err(Error::Config { place, problem }) => {
                assert_eq!(place, key, "{problem}");
                assert!(parts.iter().all(|part| problem.contains(part)), "expected {parts:?} in: {problem}");
            }
            other => panic!("expected an error at {key}, found {other:?}"),
        }
    }

    fn linear(outputs: Option<usize>) -> LayerOptions {
        LayerOptions::Linear { outputs, bias: true }
    }

    fn convolution(filters: usize, kernel: usize, groups: usize) -> LayerOptions {
        LayerOptions::Conv2d { filters, kernel: [kernel; 2], stride: [1; 2], padding: [0; 2], groups, bias: true }
    }

    fn picture() -> Input {
        Input::Real(vec![1, 8, 8])
    }

    #[test]
    fn a_residual_branch_may_be_empty_or_compute_nothing() {
        let residual = |layers: Vec<LayerOptions>, shortcut: Vec<LayerOptions>| {
            let residual = LayerOptions::Residual { layers, shortcut, recompute: false };
            options(Preset::Layers(vec![linear(Some(4)), residual, linear(None)]))
        };
        let dropout = || LayerOptions::Dropout { probability: 0.5 };
        let fit = fit(Goal::Values(1), None);
        for model in [
            residual(vec![], vec![]),
            residual(vec![dropout()], vec![]),
            residual(vec![LayerOptions::Flatten], vec![]),
            residual(vec![], vec![linear(Some(4))]),
            residual(vec![dropout()], vec![dropout()]),
        ] {
            plan(&model, &fit, &Input::Real(vec![4])).unwrap();
        }
    }

    #[test]
    fn a_batch_norm_of_too_few_values_tells_of_the_parts_of_a_batch() {
        let norm = LayerOptions::BatchNorm { epsilon: 1e-5, momentum: 0.1 };
        let layers = options(Preset::Layers(vec![norm, linear(None)]));
        let mlp = options(Preset::Mlp(MlpOptions { batch_norm: true, ..MlpOptions::default() }));
        for (model, key) in [(layers, "model.layers[0]"), (mlp, "model.preset")] {
            match model.build::<Cpu<f32>>(&fit(Goal::Values(1), None)).unwrap().plan(
                &Input::Real(vec![4]),
                1,
                Mode::Training,
            ) {
                Err(Error::Config { place, problem }) => {
                    assert_eq!(place, key);
                    assert!(problem.contains("data.batch_size") && problem.contains("parallel.parts"), "{problem}");
                }
                other => panic!("expected an error, found {:?}", other.map(|_| ())),
            }
        }
    }

    #[test]
    fn label_smoothing_is_refused_with_every_loss_that_takes_none() {
        let smooth = |preset, loss| ModelOptions { preset, loss, label_smoothing: 0.1 };
        let input = Input::Real(vec![4]);
        let mlp = || Preset::Mlp(MlpOptions::default());
        for (model, goal) in [
            (smooth(mlp(), None), Goal::Values(1)),
            (smooth(mlp(), Some(LossKind::BinaryCrossEntropy)), Goal::Classes(2)),
            (smooth(Preset::Logistic(LinearOptions::default()), None), Goal::Classes(2)),
        ] {
            let parts = ["found 0.1", "leave the key out", "model.loss = \"cross_entropy\""];
            refused(&model, &fit(goal, None), &input, "model.label_smoothing", &parts);
        }
        plan(&smooth(mlp(), None), &fit(Goal::Classes(2), None), &input).unwrap();
    }

    #[test]
    fn a_preset_that_does_not_fit_the_inputs_is_told_at_its_key() {
        let classes = fit(Goal::Classes(10), None);
        let pictures = [
            Preset::Cnn(CnnOptions::default()),
            Preset::ResNet(ResNetOptions::default()),
            Preset::AudioCnn(AudioCnnOptions::default()),
        ];
        for preset in pictures {
            let (name, options) = (preset.name(), options(preset));
            refused(&options, &classes, &Input::Real(vec![64]), "model.preset", &[name, "[64]", "mlp", "data.shape"]);
            let text = fit(Goal::Classes(2), Some([50, 7]));
            refused(&options, &text, &Input::Tokens(7), "model.preset", &[name, "tokens", "text_cnn"]);
            let text = fit(Goal::NextToken, Some([50, 7]));
            refused(&options, &text, &Input::Tokens(7), "model.preset", &[name, "tokens", "\"gpt\""]);
            plan(&options, &classes, &picture()).unwrap();
        }
        let small = [&["\"cnn\"", "features.", "model.channels"][..]].concat();
        refused(
            &options(Preset::Cnn(CnnOptions::default())),
            &classes,
            &Input::Real(vec![1, 3, 3]),
            "model.preset",
            &small,
        );
        let text = fit(Goal::Classes(2), Some([50, 7]));
        for preset in [
            Preset::Linear(LinearOptions::default()),
            Preset::Logistic(LinearOptions::default()),
            Preset::Mlp(MlpOptions::default()),
        ] {
            let name = preset.name();
            refused(&options(preset), &text, &Input::Tokens(7), "model.preset", &[name, "tokens", "text_encoder"]);
        }
    }

    #[test]
    fn an_output_that_does_not_fit_the_targets_is_told_at_its_layer() {
        let classes = fit(Goal::Classes(10), None);
        let of = |layers: &[LayerOptions]| options(Preset::Layers(layers.to_vec()));
        let flatten = LayerOptions::Flatten;
        for width in [7, 11] {
            let wrong = of(&[flatten.clone(), linear(Some(width))]);
            let told = [&format!("found {width}, expected 10"), "each class", "set outputs = 10, or leave it out"];
            refused(&wrong, &classes, &picture(), "model.layers[1].outputs", &told);
        }
        let told = ["found an output of shape [1, 8, 10] a sample, expected [10]", "{ kind = \"flatten\" }"];
        refused(&of(&[linear(None)]), &classes, &picture(), "model.layers[0]", &told);
        let wrong = of(&[flatten.clone(), LayerOptions::Activation(ActivationKind::Relu)]);
        refused(&wrong, &classes, &picture(), "model.layers[1]", &["64 values, expected 10", "{ kind = \"linear\" }"]);
        refused(
            &of(&[flatten.clone(), linear(Some(2))]),
            &fit(Goal::Values(1), None),
            &picture(),
            "model.layers[1].outputs",
            &["found 2, expected 1", "target column"],
        );
        let mut binary = of(&[flatten.clone(), linear(Some(2))]);
        binary.loss = Some(LossKind::BinaryCrossEntropy);
        let two = fit(Goal::Classes(2), None);
        refused(&binary, &two, &picture(), "model.layers[1].outputs", &["expected 1", "the logit"]);
        for outputs in [None, Some(10)] {
            plan(&of(&[flatten.clone(), linear(outputs)]), &classes, &picture()).unwrap();
        }
        let text = fit(Goal::NextToken, Some([50, 7]));
        let next = |outputs| of(&[LayerOptions::Embedding { width: 4 }, linear(outputs)]);
        refused(&next(Some(49)), &text, &Input::Tokens(7), "model.layers[1].outputs", &["found 49, expected 50"]);
        for outputs in [None, Some(64)] {
            plan(&next(outputs), &text, &Input::Tokens(7)).unwrap();
        }
        let joined = of(&[LayerOptions::Embedding { width: 4 }, LayerOptions::MeanOverTime, linear(None)]);
        refused(&joined, &text, &Input::Tokens(7), "model.layers[2]", &["[50]", "[7, 50]", "mean_over_time"]);
        let text = fit(Goal::Classes(3), Some([50, 7]));
        refused(&next(None), &text, &Input::Tokens(7), "model.layers[1]", &["[7, 3]", "{ kind = \"mean_over_time\" }"]);
    }

    #[test]
    fn a_layer_that_does_not_fit_is_told_at_its_key() {
        let classes = fit(Goal::Classes(10), None);
        let of = |layers: &[LayerOptions]| options(Preset::Layers(layers.to_vec()));
        let flat = Input::Real(vec![64]);
        let whole = Window::global();
        refused(&of(&[convolution(4, 3, 1)]), &classes, &flat, "model.layers[0]", &["conv2d", "[2, 64]", "data.shape"]);
        refused(
            &of(&[LayerOptions::MaxPool2d(whole)]),
            &classes,
            &flat,
            "model.layers[0]",
            &["max_pool2d", "data.shape"],
        );
        let large = of(&[convolution(4, 3, 1), convolution(4, 9, 1)]);
        refused(&large, &classes, &picture(), "model.layers[1]", &["[9, 9]", "6 x 6", "smaller kernel"]);
        refused(&of(&[convolution(4, 3, 3)]), &classes, &picture(), "model.layers[0]", &["3 groups", "set groups"]);
        refused(&of(&[LayerOptions::MeanOverTime]), &classes, &flat, "model.layers[0]", &["{ kind = \"embedding\" }"]);
        refused(
            &of(&[LayerOptions::Embedding { width: 4 }]),
            &classes,
            &flat,
            "model.layers[0].kind",
            &["real values"],
        );
        let residual = |layers: &[LayerOptions], shortcut: &[LayerOptions]| LayerOptions::Residual {
            layers: layers.to_vec(),
            shortcut: shortcut.to_vec(),
            recompute: false,
        };
        let other = of(&[residual(&[linear(Some(3))], &[])]);
        refused(&other, &classes, &flat, "model.layers[0]", &["residual", "[2, 64]", "shortcut"]);
        let within = of(&[linear(Some(9)), residual(&[linear(Some(3)), convolution(4, 3, 1)], &[])]);
        refused(&within, &classes, &flat, "model.layers[1].layers[1]", &["conv2d", "[2, 3]"]);
        let within = of(&[residual(&[linear(Some(3))], &[convolution(4, 3, 1)])]);
        refused(&within, &classes, &flat, "model.layers[0].shortcut[0]", &["conv2d", "[2, 64]"]);
        let text = fit(Goal::NextToken, Some([50, 7]));
        let attention =
            LayerOptions::Attention { heads: 3, kv_heads: None, causal: true, bias: true, dropout: 0.0, rotary: false };
        let heads = of(&[LayerOptions::Embedding { width: 4 }, attention]);
        refused(&heads, &text, &Input::Tokens(7), "model.layers[1]", &["heads"]);
    }

    #[test]
    fn a_loss_that_does_not_fit_is_told_with_those_that_do() {
        let mut options = options(Preset::Mlp(MlpOptions::default()));
        options.loss = Some(LossKind::MeanSquaredError);
        let told = ["found \"mean_squared_error\"", "targets of 10 classes; expected \"cross_entropy\""];
        refused(&options, &fit(Goal::Classes(10), None), &picture(), "model.loss", &told);
        options.loss = Some(LossKind::CrossEntropy);
        let told = ["found \"cross_entropy\"", "1 real value a sample; expected \"mean_squared_error\""];
        refused(&options, &fit(Goal::Values(1), None), &picture(), "model.loss", &told);
    }

    #[test]
    fn a_batch_or_a_layer_too_large_to_count_is_refused() {
        let mut model =
            options(Preset::Mlp(MlpOptions::default())).build::<Cpu<f32>>(&fit(Goal::Classes(10), None)).unwrap();
        for batch in [1 << 35, usize::MAX / 2, usize::MAX] {
            let error = model.plan(&picture(), batch, Mode::Training).map(|_| ()).unwrap_err().to_string();
            assert!(error.starts_with(&format!("data.batch_size: found {batch}, of which inputs")), "{error}");
        }
        let error = model.plan(&picture(), 1 << 33, Mode::Training).map(|_| ()).unwrap_err().to_string();
        assert!(error.starts_with("data.batch_size: found 8589934592, of which the output of 0"), "{error}");
        model.plan(&picture(), 1 << 31, Mode::Training).unwrap();
        let wide = options(Preset::Mlp(MlpOptions { hidden: vec![usize::MAX / 2], ..MlpOptions::default() }));
        refused(
            &wide,
            &fit(Goal::Classes(10), None),
            &picture(),
            "model.preset",
            &["mlp", "a parameter of", "0.weight"],
        );
    }
}
