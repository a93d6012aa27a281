//! The arithmetic of a convolution and of its gradients, by definition: a multiplication and an addition in f32 for each tap.

/// Which of `y = x * w`, dx and dw is computed of the other two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Forward,
    Input,
    Weight,
}

/// A tensor of a convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    X,
    W,
    Y,
}

impl Direction {
    /// What is read, in the order of the library's arguments.
    pub fn operands(self) -> [Side; 2] {
        match self {
            Direction::Forward => [Side::X, Side::W],
            Direction::Input => [Side::W, Side::Y],
            Direction::Weight => [Side::X, Side::Y],
        }
    }

    /// What is written.
    pub fn target(self) -> Side {
        match self {
            Direction::Forward => Side::Y,
            Direction::Input => Side::X,
            Direction::Weight => Side::W,
        }
    }
}

/// Sizes of a convolution. Pairs are (height, width).
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    pub batch: usize,
    pub channels: usize,
    pub input: [usize; 2],
    pub filters: usize,
    pub kernel: [usize; 2],
    pub output: [usize; 2],
    pub stride: [usize; 2],
    pub padding: [usize; 2],
    pub groups: usize,
}

impl Geometry {
    /// Values of a tensor.
    pub fn values(&self, side: Side) -> usize {
        let plane = |[h, w]: [usize; 2]| h * w;
        match side {
            Side::X => self.batch * self.channels * plane(self.input),
            Side::W => self.filters * (self.channels / self.groups) * plane(self.kernel),
            Side::Y => self.batch * self.filters * plane(self.output),
        }
    }

    /// Visits every row of outputs with every tap that meets it: where the weight, the first x and the first y lie, and how many
    /// outputs there are, x a stride apart. Samples and filters from number `turn` on, round to it.
    fn rows(&self, turn: usize, mut visit: impl FnMut(usize, usize, usize, usize)) {
        let ([oh, ow], [kh, kw], [height, width]) = (self.output, self.kernel, self.input);
        let (group_channels, group_filters) = (self.channels / self.groups, self.filters / self.groups);
        for n in (0..self.batch).map(|n| (n + turn) % self.batch) {
            for f in (0..self.filters).map(|f| (f + turn) % self.filters) {
                for (c, ky, kx) in (0..group_channels * kh * kw).map(|tap| (tap / (kh * kw), tap / kw % kh, tap % kw)) {
                    let weight = ((f * group_channels + c) * kh + ky) * kw + kx;
                    let plane = n * self.channels + f / group_filters * group_channels + c;
                    // The outputs of a row whose input lies within the picture.
                    let inside =
                        |ox: &usize| (self.padding[1]..width + self.padding[1]).contains(&(ox * self.stride[1] + kx));
                    let Some(first) = (0..ow).find(inside) else { continue };
                    let count = (first..ow).take_while(inside).count();
                    let ix = first * self.stride[1] + kx - self.padding[1];
                    for oy in 0..oh {
                        let Some(iy) = (oy * self.stride[0] + ky).checked_sub(self.padding[0]) else { continue };
                        if iy < height {
                            let y = ((n * self.filters + f) * oh + oy) * ow + first;
                            visit(weight, (plane * height + iy) * width + ix, y, count);
                        }
                    }
                }
            }
        }
    }
}

/// What `direction` computes of its operands.
pub(super) fn convolve(direction: Direction, g: &Geometry, [first, second]: [&[f32]; 2], turn: usize) -> Vec<f32> {
    let mut out = vec![0.0f32; g.values(direction.target())];
    let stride = g.stride[1];
    match direction {
        Direction::Forward => g.rows(turn, |w, x, y, count| {
            let (x, w) = (&first[x..], second[w]);
            out[y..y + count].iter_mut().enumerate().for_each(|(i, out)| *out += x[i * stride] * w);
        }),
        Direction::Input => g.rows(turn, |w, x, y, count| {
            let (w, dy) = (first[w], &second[y..y + count]);
            let out = &mut out[x..];
            dy.iter().enumerate().for_each(|(i, dy)| out[i * stride] += w * dy);
        }),
        Direction::Weight => g.rows(turn, |w, x, y, count| {
            let (x, dy) = (&first[x..], &second[y..y + count]);
            out[w] += dy.iter().enumerate().map(|(i, dy)| x[i * stride] * dy).sum::<f32>();
        }),
    }
    out
}
