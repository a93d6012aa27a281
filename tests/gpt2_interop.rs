//! Hugging Face's GPT-2 weights give Hugging Face's logits (tests/fixtures/gpt2, made by scripts/fixtures/gpt2.py).

use std::path::Path;

use warpstep::backend::cpu::Cpu;
use warpstep::backend::{Backend, Memory, StepContext};
use warpstep::model::interop::{from_hugging_face_gpt2, gpt2_options, is_hugging_face_gpt2, to_hugging_face_gpt2};
use warpstep::model::{Input, Mode, Value};
use warpstep::train::tensors::{self, Origin};

#[test]
fn hugging_face_weights_give_hugging_face_s_logits() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gpt2");
    let path = folder.join("model.safetensors");
    let theirs = tensors::read(&path).unwrap();
    assert!(is_hugging_face_gpt2(&theirs));
    let mut weights = from_hugging_face_gpt2(theirs.clone(), &path).unwrap();
    assert_eq!(to_hugging_face_gpt2(weights.clone(), &path).unwrap(), theirs, "writing gives what was read");
    let reference = tensors::read(&folder.join("reference.safetensors")).unwrap();
    let (tokens, logits) = (&reference["tokens"], &reference["logits"]);
    let [batch, time] = tokens.shape[..] else { panic!("tokens of shape {:?}", tokens.shape) };

    let mut options = gpt2_options(&weights, &path).unwrap();
    options.heads = 4;
    let vocabulary = options.vocabulary.unwrap();
    let backend = Cpu::<f32>::new();
    let mut model = options.build::<Cpu<f32>>(vocabulary, time).unwrap();
    let program = model.plan(&Input::Tokens(time), batch, Mode::Inference).unwrap();
    assert_eq!(program.output_shape, logits.shape);
    let mut arena = model.arena(&backend, 0, 0).unwrap();
    let layout = arena.layout.clone();
    tensors::upload(&backend, &mut arena.parameters, &layout, "", &mut weights, Origin::of_run(&path)).unwrap();
    tensors::nothing_left(&weights, Origin::of_run(&path)).unwrap();
    let mut activations = program.activations(&backend).unwrap();
    let Value::Tokens(input) = program.input else { panic!("a GPT takes tokens") };
    let whole: Vec<i32> = tokens.values.iter().map(|&t| t as i32).collect();
    let start = activations.index_range(input).start;
    backend.upload(&mut activations.indices, start, &whole).unwrap();
    let mut memory = Memory { arena: &mut arena, activations: &mut activations };
    backend.run(&program.ops, &mut memory, &StepContext::default()).unwrap();
    let found = &activations.values[activations.range(program.output)];
    let worst = found.iter().zip(&logits.values).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!("largest difference of a logit: {worst:e}");
    assert!(worst < 1e-4, "largest difference of a logit: {worst:e}");
}
