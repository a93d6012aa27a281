//! The algorithms that the emulated library has. They differ in what they ask for and, where they split k, in the order of sums:
//! another algorithm gives other bits, as on a GPU.

use super::{Candidate, plan::Plan, status};

/// A kind of algorithm.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    number: u64,
    /// k is split into so many parts, whose sums meet in the workspace.
    pub parts: usize,
    /// Bytes that matrices and their columns are multiples of.
    alignment: usize,
}

/// Best first.
pub const ALGORITHMS: [Kind; 4] = [
    Kind { number: 0, parts: 1, alignment: 16 },
    Kind { number: 1, parts: 1, alignment: 2 },
    Kind { number: 2, parts: 2, alignment: 16 },
    Kind { number: 3, parts: 4, alignment: 2 },
];

/// `CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE`: how sums of parts meet here.
const SCHEME_COMPUTE_TYPE: u32 = 2;
/// Every scheme.
const SCHEMES: u32 = 7;

/// Limits of the choice of an algorithm.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub workspace: usize,
    /// Schemes of reduction that are allowed.
    pub schemes: u32,
    /// Bytes that A, B, C and D are multiples of.
    pub alignments: [u32; 4],
}

impl Default for Limits {
    fn default() -> Self {
        Limits { workspace: 0, schemes: SCHEMES, alignments: [256; 4] }
    }
}

/// Opaque to callers: where it came from, and its number.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Algorithm {
    data: [u64; 8],
}

/// Marks algorithms that came from here.
const MARK: u64 = 0x5741_5250;

impl Algorithm {
    pub fn kind(&self) -> Result<&'static Kind, i32> {
        let known = self.data[0] == MARK && self.data[2..].iter().all(|&word| word == 0);
        ALGORITHMS.iter().find(|kind| known && kind.number == self.data[1]).ok_or(status::INVALID_VALUE)
    }
}

impl Kind {
    /// Bytes that sums of parts take.
    pub fn workspace(&self, plan: &Plan) -> usize {
        let [m, _, n] = plan.size;
        if self.parts == 1 { 0 } else { self.parts * m * n * size_of::<f32>() }
    }

    /// Whether columns start where the algorithm wants them.
    pub fn rows_fit(&self, plan: &Plan) -> bool {
        let aligned = |(stride, bytes): (usize, usize)| (stride * bytes).is_multiple_of(self.alignment);
        plan.strides_and_bytes().into_iter().all(aligned)
    }

    pub fn addresses_fit(&self, addresses: [u64; 4]) -> bool {
        addresses.iter().all(|address| address.is_multiple_of(self.alignment as u64))
    }

    pub fn fits(&self, plan: &Plan, limits: &Limits) -> bool {
        self.rows_fit(plan)
            && limits.alignments.iter().all(|&alignment| alignment as usize >= self.alignment)
            && self.workspace(plan) <= limits.workspace
            && (self.parts == 1 || limits.schemes & SCHEME_COMPUTE_TYPE != 0)
            && self.parts <= plan.size[1].max(1)
    }

    pub fn candidate(&self, plan: &Plan, state: i32) -> Candidate {
        let algorithm = Algorithm { data: [MARK, self.number, 0, 0, 0, 0, 0, 0] };
        Candidate { algorithm, workspace: self.workspace(plan), state, waves: 1.0, reserved: [0; 4] }
    }
}
