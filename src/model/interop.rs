//! Weights of other programs: Hugging Face's GPT-2 in our names and layout, and back.
//!
//! Hugging Face keeps GPT-2's linear weights as `Conv1D`, `[inputs, outputs]`; ours are `[outputs, inputs]`, as
//! `torch.nn.Linear`'s and nanoGPT's. Its files come with the prefix `transformer.` (a whole language model) or without (the
//! bare network), some with buffers that are no weights (`attn.bias`, the causal mask; `attn.masked_bias`), and with or
//! without `lm_head.weight`, which equals the token table where it is tied.

use std::collections::BTreeMap;
use std::path::Path;

use super::presets::GptOptions;
use crate::error::{Error, Result};

/// A tensor on the host.
#[derive(Clone, Debug, PartialEq)]
pub struct HostTensor {
    /// Its shape, outermost first.
    pub shape: Vec<usize>,
    /// Its values.
    pub values: Vec<f32>,
}

/// Tensors by name.
pub type TensorMap = BTreeMap<String, HostTensor>;

const PREFIX: &str = "transformer.";
const TOKENS: &str = "transformer.wte.weight";
const HEAD: &str = "lm_head.weight";

/// The linear layers of a block, whose weights Hugging Face keeps the other way round.
const LINEAR: [&str; 4] = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"];

impl HostTensor {
    /// A matrix the other way round.
    ///
    /// # Errors
    /// It is no matrix; `name` and `path` say where it stood.
    fn transposed(&self, name: &str, path: &Path) -> Result<Self> {
        let &[rows, columns] = self.shape.as_slice() else {
            let problem = format!("expected a matrix at `{name}`, found shape {:?}", self.shape);
            return Err(Error::checkpoint(path, problem));
        };
        let values = (0..columns).flat_map(|c| (0..rows).map(move |r| self.values[r * columns + c])).collect();
        Ok(HostTensor { shape: vec![columns, rows], values })
    }
}

fn is_linear_weight(name: &str) -> bool {
    name.strip_suffix(".weight").is_some_and(|name| LINEAR.iter().any(|linear| name.ends_with(linear)))
}

/// The parts of `transformer.h.N.REST`: N and REST.
fn block_part(name: &str) -> Option<(usize, &str)> {
    let (number, rest) = name.strip_prefix("transformer.h.")?.split_once('.')?;
    Some((number.parse().ok()?, rest))
}

/// Whether these are weights of GPT-2 as Hugging Face lays them out: without the prefix, or with `c_attn` as `[width, 3 width]`.
/// Of ours `c_attn` has more rows than `width`, however few heads keys and values have; `c_fc` can be square.
pub fn is_hugging_face_gpt2(tensors: &TensorMap) -> bool {
    let find = |name: &str| tensors.get(name).or_else(|| tensors.get(&name[PREFIX.len()..]));
    let Some(first) = find("transformer.h.0.attn.c_attn.weight") else { return false };
    let Some(norm) = find("transformer.h.0.ln_1.weight") else { return false };
    tensors.contains_key(&TOKENS[PREFIX.len()..]) || (first.shape.len() == 2 && first.shape[..1] == norm.shape)
}

/// Hugging Face's GPT-2 in our names and layout. `path` is the file, for errors.
///
/// The head is left out where it equals the token table: the model's is tied.
///
/// # Errors
/// A linear weight that is no matrix.
pub fn from_hugging_face_gpt2(tensors: TensorMap, path: &Path) -> Result<TensorMap> {
    let mut ours = TensorMap::new();
    for (name, tensor) in tensors {
        if name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias") {
            continue;
        }
        let name = if name.starts_with(PREFIX) || name == HEAD { name } else { format!("{PREFIX}{name}") };
        let tensor = if is_linear_weight(&name) { tensor.transposed(&name, path)? } else { tensor };
        ours.insert(name, tensor);
    }
    if ours.get(HEAD).is_some_and(|head| ours.get(TOKENS) == Some(head)) {
        ours.remove(HEAD);
    }
    Ok(ours)
}

/// Our GPT-2 in Hugging Face's layout, under the names of a whole language model, a tied head left out as theirs is.
/// `path` is the file, for errors.
///
/// # Errors
/// A tensor that GPT-2 has not, such as SwiGLU's or a model's without biases.
pub fn to_hugging_face_gpt2(tensors: TensorMap, path: &Path) -> Result<TensorMap> {
    gpt2_options(&tensors, path)?;
    let mut theirs = TensorMap::new();
    for (name, tensor) in tensors {
        let tensor = if is_linear_weight(&name) { tensor.transposed(&name, path)? } else { tensor };
        theirs.insert(name, tensor);
    }
    Ok(theirs)
}

/// The options of the GPT-2 whose weights, in our layout, these are. Heads are taken to be 64 wide, as in every size that
/// was published; a file does not say.
///
/// # Errors
/// A tensor that is missing, left over, or of a shape that does not fit the others.
pub fn gpt2_options(tensors: &TensorMap, path: &Path) -> Result<GptOptions> {
    let wrong = |problem: String| Err(Error::checkpoint(path, format!("is no GPT-2: {problem}")));
    let matrix = |name: &str| match tensors.get(name).map(|t| t.shape.as_slice()) {
        Some(&[rows, columns]) => Ok([rows, columns]),
        Some(shape) => Err(Error::checkpoint(path, format!("expected a matrix at `{name}`, found shape {shape:?}"))),
        None => Err(Error::checkpoint(path, format!("is no GPT-2: expected tensor `{name}`, found none"))),
    };
    let [vocabulary, width] = matrix(TOKENS)?;
    let [context, _] = matrix("transformer.wpe.weight")?;
    let [hidden, _] = matrix("transformer.h.0.mlp.c_fc.weight")?;
    let layers = tensors.keys().filter_map(|name| block_part(name)).map(|(n, _)| n + 1).max().unwrap_or(0);
    let block: [(&str, Vec<usize>); 12] = [
        ("ln_1.weight", vec![width]),
        ("ln_1.bias", vec![width]),
        ("attn.c_attn.weight", vec![3 * width, width]),
        ("attn.c_attn.bias", vec![3 * width]),
        ("attn.c_proj.weight", vec![width, width]),
        ("attn.c_proj.bias", vec![width]),
        ("ln_2.weight", vec![width]),
        ("ln_2.bias", vec![width]),
        ("mlp.c_fc.weight", vec![hidden, width]),
        ("mlp.c_fc.bias", vec![hidden]),
        ("mlp.c_proj.weight", vec![width, hidden]),
        ("mlp.c_proj.bias", vec![width]),
    ];
    let mut expected: BTreeMap<String, Vec<usize>> = (0..layers)
        .flat_map(|n| block.iter().map(move |(rest, shape)| (format!("transformer.h.{n}.{rest}"), shape.clone())))
        .collect();
    expected.insert(TOKENS.into(), vec![vocabulary, width]);
    expected.insert("transformer.wpe.weight".into(), vec![context, width]);
    expected.insert("transformer.ln_f.weight".into(), vec![width]);
    expected.insert("transformer.ln_f.bias".into(), vec![width]);
    for (name, shape) in &expected {
        match tensors.get(name) {
            None => return wrong(format!("expected tensor `{name}` {shape:?}, found none")),
            Some(tensor) if tensor.shape != *shape => {
                return wrong(format!("expected `{name}` of shape {shape:?}, found {:?}", tensor.shape));
            }
            Some(_) => {}
        }
    }
    if let Some(name) = tensors.keys().find(|name| *name != HEAD && !expected.contains_key(*name)) {
        return wrong(format!("found tensor `{name}`, which GPT-2 has not"));
    }
    Ok(GptOptions {
        layers,
        heads: (width / 64).max(1),
        width,
        hidden: Some(hidden),
        context: Some(context),
        vocabulary: Some(vocabulary),
        bias: true,
        tied: !tensors.contains_key(HEAD),
        ..GptOptions::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(shape: &[usize], start: usize) -> HostTensor {
        let len: usize = shape.iter().product();
        HostTensor { shape: shape.to_vec(), values: (start..start + len).map(|v| v as f32).collect() }
    }

    /// A GPT-2 of one block, 4 wide, 5 tokens, 3 positions, as Hugging Face writes it.
    fn theirs(prefix: &str) -> TensorMap {
        let shapes: [(&str, &[usize]); 16] = [
            ("wte.weight", &[5, 4]),
            ("wpe.weight", &[3, 4]),
            ("h.0.ln_1.weight", &[4]),
            ("h.0.ln_1.bias", &[4]),
            ("h.0.attn.c_attn.weight", &[4, 12]),
            ("h.0.attn.c_attn.bias", &[12]),
            ("h.0.attn.c_proj.weight", &[4, 4]),
            ("h.0.attn.c_proj.bias", &[4]),
            ("h.0.ln_2.weight", &[4]),
            ("h.0.ln_2.bias", &[4]),
            ("h.0.mlp.c_fc.weight", &[4, 16]),
            ("h.0.mlp.c_fc.bias", &[16]),
            ("h.0.mlp.c_proj.weight", &[16, 4]),
            ("h.0.mlp.c_proj.bias", &[4]),
            ("ln_f.weight", &[4]),
            ("ln_f.bias", &[4]),
        ];
        shapes
            .iter()
            .enumerate()
            .map(|(i, (name, shape))| (format!("{prefix}{name}"), tensor(shape, 100 * i)))
            .collect()
    }

    #[test]
    fn hugging_face_weights_come_back_as_they_went() {
        let path = Path::new("model.safetensors");
        for prefix in ["", PREFIX] {
            assert!(is_hugging_face_gpt2(&theirs(prefix)));
            let ours = from_hugging_face_gpt2(theirs(prefix), path).unwrap();
            assert!(!is_hugging_face_gpt2(&ours));
            assert_eq!(ours["transformer.h.0.attn.c_attn.weight"].shape, [12, 4]);
            assert_eq!(ours["transformer.h.0.mlp.c_fc.weight"].values[..2], [1000.0, 1016.0]);
            assert_eq!(to_hugging_face_gpt2(ours, path).unwrap(), theirs(PREFIX));
        }
    }

    #[test]
    fn ours_are_not_taken_for_theirs_where_hidden_is_as_wide_as_the_model() {
        let path = Path::new("model.safetensors");
        let mut file = theirs(PREFIX);
        for (name, shape) in [("mlp.c_fc.weight", &[4, 4][..]), ("mlp.c_fc.bias", &[4]), ("mlp.c_proj.weight", &[4, 4])]
        {
            file.insert(format!("transformer.h.0.{name}"), tensor(shape, 0));
        }
        assert!(is_hugging_face_gpt2(&file));
        let ours = from_hugging_face_gpt2(file.clone(), path).unwrap();
        assert!(!is_hugging_face_gpt2(&ours));
        assert_eq!(gpt2_options(&ours, path).unwrap().hidden, Some(4));
        assert_eq!(to_hugging_face_gpt2(ours, path).unwrap(), file);
    }

    #[test]
    fn masks_and_tied_heads_are_left_out() {
        let path = Path::new("model.safetensors");
        let mut file = theirs("");
        file.insert("h.0.attn.bias".into(), tensor(&[1, 1, 3, 3], 0));
        file.insert("h.0.attn.masked_bias".into(), tensor(&[], 0));
        file.insert(HEAD.into(), file["wte.weight"].clone());
        let ours = from_hugging_face_gpt2(file.clone(), path).unwrap();
        assert_eq!(ours, from_hugging_face_gpt2(theirs(""), path).unwrap());
        let options = gpt2_options(&ours, path).unwrap();
        assert_eq!((options.layers, options.width, options.context, options.vocabulary), (1, 4, Some(3), Some(5)));
        assert!(options.tied);
        file.insert(HEAD.into(), tensor(&[5, 4], 7));
        assert!(!gpt2_options(&from_hugging_face_gpt2(file, path).unwrap(), path).unwrap().tied);
    }

    #[test]
    fn weights_that_are_no_gpt2_s_are_refused_by_name() {
        let path = Path::new("model.safetensors");
        let refused = |change: fn(&mut TensorMap)| {
            let mut ours = from_hugging_face_gpt2(theirs(""), path).unwrap();
            change(&mut ours);
            gpt2_options(&ours, path).unwrap_err().to_string()
        };
        assert_eq!(
            refused(|t| drop(t.remove("transformer.ln_f.bias"))),
            "model.safetensors: is no GPT-2: expected tensor `transformer.ln_f.bias` [4], found none"
        );
        assert!(refused(|t| drop(t.insert("transformer.h.0.extra".into(), tensor(&[1], 0)))).contains("h.0.extra"));
        assert!(refused(|t| drop(t.insert("transformer.ln_f.weight".into(), tensor(&[3], 0)))).contains("[4]"));
        assert!(refused(|t| drop(t.insert(TOKENS.into(), tensor(&[3], 0)))).contains("matrix"));
    }
}
