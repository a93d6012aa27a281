//! Residual networks (He et al. 2016): the ImageNet form of 18 and 34 layers, and the CIFAR forms of 6 n + 2.

use super::{Fit, check, recomputed};
use crate::backend::Backend;
use crate::backend::ops::ActivationKind;
use crate::error::Result;
use crate::model::Init;
use crate::model::layers::{
    Activation, AveragePool2d, BatchNorm, Conv2d, Flatten, Linear, MaxPool2d, Residual, Sequential, Window,
};

/// How a residual network begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResNetStem {
    /// 7 x 7 at stride 2, then 3 x 3 max pooling at stride 2.
    Imagenet,
    /// 3 x 3 at stride 1.
    Cifar,
}

/// `preset = "resnet"`: basic blocks of two 3 x 3 convolutions. Convolutions start normal by fan out (He et al. 2015), as
/// torchvision's, the output layer as PyTorch's linear.
#[derive(Clone, Debug, PartialEq)]
pub struct ResNetOptions {
    /// `model.stem`: `"imagenet"` or `"cifar"` (default).
    pub stem: ResNetStem,
    /// `model.blocks`: blocks of each stage. `model.depth = 18` or 34 gives ImageNet's, 20, 32, 44, 56 or 110 CIFAR's.
    pub blocks: Vec<usize>,
    /// `model.channels`: width of each stage.
    pub channels: Vec<usize>,
    /// `model.zero_init_residual`: the last norm of each block starts at 0 (default false).
    pub zero_init_residual: bool,
    /// `model.recompute`: whether blocks keep their input alone, and compute the rest again in the backward (default false).
    pub recompute: bool,
}

impl Default for ResNetOptions {
    fn default() -> Self {
        ResNetOptions {
            stem: ResNetStem::Cifar,
            blocks: vec![3, 3, 3],
            channels: vec![16, 32, 64],
            zero_init_residual: false,
            recompute: false,
        }
    }
}

impl ResNetOptions {
    /// The published form of this depth; none for other depths.
    pub fn of_depth(depth: usize) -> Option<Self> {
        let imagenet = |blocks: [usize; 4]| ResNetOptions {
            stem: ResNetStem::Imagenet,
            blocks: blocks.to_vec(),
            channels: vec![64, 128, 256, 512],
            zero_init_residual: false,
            recompute: false,
        };
        match depth {
            18 => Some(imagenet([2, 2, 2, 2])),
            34 => Some(imagenet([3, 4, 6, 3])),
            _ if depth >= 8 && depth % 6 == 2 => {
                Some(ResNetOptions { blocks: vec![(depth - 2) / 6; 3], ..Self::default() })
            }
            _ => None,
        }
    }

    /// Parameters under torchvision's names: `conv1.weight`, `bn1.weight`, `layer1.0.conv1.weight`, ..,
    /// `layer2.0.downsample.0.weight`, .., `fc.weight`.
    ///
    /// # Errors
    /// An option out of its range.
    pub fn build<B: Backend>(&self, fit: &Fit) -> Result<Sequential<B>> {
        let stages = self.channels.len();
        check(
            "blocks",
            self.blocks.len() == stages && stages > 0,
            self.blocks.len(),
            "one number for each of model.channels",
        )?;
        check("blocks", self.blocks.iter().all(|&n| n > 0), "0", "numbers of 1 or more")?;
        check("channels", self.channels.iter().all(|&n| n > 0), "0", "numbers of 1 or more")?;
        let first = self.channels[0];
        let mut net = Sequential::new();
        match self.stem {
            ResNetStem::Imagenet => net.push("conv1", Box::new(convolution(first, 7, 2))),
            ResNetStem::Cifar => net.push("conv1", Box::new(convolution(first, 3, 1))),
        }
        net = net.then("bn1", BatchNorm::new()).then("relu", Activation::new(ActivationKind::Relu));
        if self.stem == ResNetStem::Imagenet {
            let window = Window { kernel: [3, 3], stride: [2, 2], padding: [1, 1] };
            net.push("maxpool", Box::new(MaxPool2d::new(window)));
        }
        let mut inputs = first;
        for (stage, (&blocks, &channels)) in self.blocks.iter().zip(&self.channels).enumerate() {
            let mut layer = Sequential::new();
            for block in 0..blocks {
                let stride = if block == 0 && stage > 0 { 2 } else { 1 };
                layer.push(block.to_string(), recomputed(self.block(inputs, channels, stride), self.recompute));
                inputs = channels;
            }
            net.push(format!("layer{}", stage + 1), Box::new(layer));
        }
        Ok(net
            .then("avgpool", AveragePool2d::new(Window::global()))
            .then("flatten", Flatten::new())
            .then("fc", Linear::new(fit.outputs)))
    }

    fn block<B: Backend>(&self, inputs: usize, channels: usize, stride: usize) -> Sequential<B> {
        let last = if self.zero_init_residual { BatchNorm::new().with_zero_weight() } else { BatchNorm::new() };
        let branch = Sequential::new()
            .then("conv1", convolution(channels, 3, stride))
            .then("bn1", BatchNorm::new())
            .then("relu", Activation::new(ActivationKind::Relu))
            .then("conv2", convolution(channels, 3, 1))
            .then("bn2", last);
        let mut residual = Residual::new("", branch);
        if stride != 1 || inputs != channels {
            let shortcut = Sequential::new().then("0", convolution(channels, 1, stride)).then("1", BatchNorm::new());
            residual = residual.with_shortcut("downsample", shortcut);
        }
        Sequential::new().then("", residual).then("relu2", Activation::new(ActivationKind::Relu))
    }
}

fn convolution(filters: usize, kernel: usize, stride: usize) -> Conv2d {
    Conv2d::new(filters, [kernel; 2])
        .with_stride([stride; 2])
        .with_padding([kernel / 2; 2])
        .without_bias()
        .with_init(Init::kaiming_normal(filters * kernel * kernel))
}
