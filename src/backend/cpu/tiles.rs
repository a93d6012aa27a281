//! Products in tiles whose sums stay in registers, for processors with vectors of 16 values of f32 (AVX-512).
//!
//! Every value is one sum in the order of the inner dimension, by fused multiplications and additions: the bits of the library's.

use std::arch::x86_64::{
    __m512, __mmask16, _MM_HINT_T0, _mm_prefetch, _mm512_add_ps, _mm512_castpd_ps, _mm512_castps_pd, _mm512_fmadd_ps,
    _mm512_loadu_ps, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_shuffle_f32x4, _mm512_store_ps, _mm512_unpackhi_pd, _mm512_unpackhi_ps, _mm512_unpacklo_pd,
    _mm512_unpacklo_ps,
};

/// Values of a vector.
const LANES: usize = 16;

/// Columns of a panel: two vectors. With twelve rows there are 24 sums, and of 32 registers two hold the right factor's values.
const WIDTH: usize = 2 * LANES;

/// Rows of a tile.
const ROWS: usize = 12;

/// From so many rows on it pays to copy a panel of the right factor where its rows lie so far apart that few sets of the caches hold
/// them all: where their distance is a multiple of [`CROWDED`] values.
const COPY_FROM: usize = 4 * ROWS;
const CROWDED: isize = 256;

/// From so many rows on it pays to turn a right factor on its side: of a few columns, and of more. From such an inner dimension on it pays
/// to write the product by panels: the library's are wider.
const FEW_COLUMNS: usize = 2 * WIDTH;
const FEW_TURNED_FROM: usize = 8;
const TURNED_FROM: usize = 96;
const DEEP_FROM: usize = 96;

/// Up to so many values of the left factor each panel meets them in the second-level cache; beyond, the library's blocks serve better.
const LARGEST: usize = 128 << 10;

/// Rows of a packed panel that are brought to the first-level cache ahead.
const AHEAD: usize = 8;

/// A matrix by the place of its first value, and the distances of its rows and of its columns.
#[derive(Clone, Copy)]
pub(super) struct Place<P> {
    pub start: P,
    pub strides: [isize; 2],
}

/// `c = a b`, or `c += a b` with `accumulate`: `[m, k] x [k, n] -> [m, n]`.
pub(super) struct Product {
    /// m, k and n.
    pub sizes: [usize; 3],
    pub c: Place<*mut f32>,
    pub a: Place<*const f32>,
    pub b: Place<*const f32>,
    pub accumulate: bool,
}

/// Some columns of a right factor, whose rows lie `stride` apart.
struct Panel {
    first: usize,
    start: *const f32,
    stride: isize,
    /// Which values of the last vector there are.
    last: __mmask16,
    /// From a row to what is to be read later than it.
    ahead: usize,
}

/// The first values of a vector, at most all.
fn first(values: usize) -> __mmask16 {
    __mmask16::MAX.checked_shr((LANES.saturating_sub(values)) as u32).unwrap_or(0)
}

/// Whether this processor has what tiles take.
pub(super) fn can_run() -> bool {
    is_x86_feature_detected!("avx512f")
}

impl Product {
    /// Whether this product is better done here than in the library, on this processor. Its bits are the same.
    pub fn is_for(&self) -> bool {
        let [m, k, n] = self.sizes;
        let rows = match self.b.strides[1] {
            1 => 4,
            _ if n <= FEW_COLUMNS => FEW_TURNED_FROM,
            _ => TURNED_FROM,
        };
        m >= rows && n >= LANES / 2 && k >= DEEP_FROM && m * k <= LARGEST && can_run()
    }

    /// Values of memory that [`Self::run`] is given.
    pub fn memory(&self) -> usize {
        self.sizes[1] * WIDTH
    }

    /// Multiplies, with memory that starts at a multiple of 64 bytes.
    ///
    /// # Safety
    /// The processor has AVX-512. All values of the matrices can be read, those of c written too; c overlaps neither factor. The rows
    /// of c lie in one piece each, and so do b's rows or its columns.
    ///
    /// # Panics
    /// Too little memory, or of another alignment.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn run(&self, memory: &mut [f32]) {
        let [m, k, n] = self.sizes;
        assert!(memory.len() >= self.memory() && memory.as_ptr().addr().is_multiple_of(64), "memory of a panel");
        let packed = memory.as_mut_ptr();
        let [stride, beside] = self.b.strides;
        for column in (0..n).step_by(WIDTH) {
            let width = (n - column).min(WIDTH);
            let start = self.b.start.wrapping_offset(column as isize * beside);
            let is_whole = width.is_multiple_of(LANES);
            let in_place = beside == 1 && is_whole && (m < COPY_FROM || stride % CROWDED != 0);
            // SAFETY: these are k rows of b's columns from `column` on, and the memory has as many rows of WIDTH values.
            unsafe {
                if beside != 1 {
                    pack_turned(packed, start, beside, [k, width]);
                } else if !in_place {
                    pack(packed, start, stride, [k, width]);
                }
            }
            let last = if is_whole { __mmask16::MAX } else { first(width % LANES) };
            let panel = if in_place {
                Panel { first: column, start, stride, last, ahead: WIDTH }
            } else {
                Panel { first: column, start: packed, stride: WIDTH as isize, last, ahead: AHEAD * WIDTH }
            };
            // SAFETY: a packed panel has whole vectors, and one in place has no other columns than whole ones.
            unsafe { if width > LANES { self.panel::<2>(&panel) } else { self.panel::<1>(&panel) } }
        }
    }

    /// All rows of a panel.
    ///
    /// # Safety
    /// That of [`Self::run`]; the panel has k rows of `VECTORS` vectors.
    #[target_feature(enable = "avx512f")]
    unsafe fn panel<const VECTORS: usize>(&self, panel: &Panel) {
        let (mut row, end) = (0, self.sizes[0]);
        // SAFETY: no row is beyond the last.
        unsafe {
            while end - row >= ROWS {
                self.tile::<ROWS, VECTORS>(row, panel);
                row += ROWS;
            }
            if end - row >= 8 {
                self.tile::<8, VECTORS>(row, panel);
                row += 8;
            }
            if end - row >= 4 {
                self.tile::<4, VECTORS>(row, panel);
                row += 4;
            }
            while row < end {
                self.tile::<1, VECTORS>(row, panel);
                row += 1;
            }
        }
    }

    /// `ROWS` rows from `row` on.
    ///
    /// # Safety
    /// That of [`Self::panel`]; there are so many rows.
    #[target_feature(enable = "avx512f")]
    unsafe fn tile<const ROWS: usize, const VECTORS: usize>(&self, row: usize, panel: &Panel) {
        let ([across, along], stride) = (self.a.strides, self.c.strides[0]);
        // SAFETY: rows `row` to `row + ROWS` of a and c, columns of c from `first` on, and rows of the panel, are there. Prefetching
        // may name any address.
        unsafe {
            let c = self.c.start.offset(row as isize * stride).add(panel.first);
            for r in 0..ROWS {
                for v in 0..VECTORS {
                    let line = c.wrapping_offset(r as isize * stride).wrapping_add(v * LANES);
                    _mm_prefetch::<_MM_HINT_T0>(line.cast());
                }
            }
            let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
            let (mut a, mut b) = (self.a.start.offset(row as isize * across), panel.start);
            for _ in 0..self.sizes[1] {
                let mut right = [_mm512_setzero_ps(); VECTORS];
                for (v, right) in right.iter_mut().enumerate() {
                    *right = _mm512_loadu_ps(b.add(v * LANES));
                    _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(panel.ahead + v * LANES).cast());
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let left = _mm512_set1_ps(*a.offset(r as isize * across));
                    for (sum, right) in sums.iter_mut().zip(right) {
                        *sum = _mm512_fmadd_ps(left, right, *sum);
                    }
                }
                (a, b) = (a.wrapping_offset(along), b.wrapping_offset(panel.stride));
            }
            for (r, sums) in sums.into_iter().enumerate() {
                for (v, mut sum) in sums.into_iter().enumerate() {
                    let to = c.offset(r as isize * stride).add(v * LANES);
                    let there = if v + 1 == VECTORS { panel.last } else { __mmask16::MAX };
                    if self.accumulate {
                        sum = _mm512_add_ps(_mm512_maskz_loadu_ps(there, to), sum);
                    }
                    _mm512_mask_storeu_ps(to, there, sum);
                }
            }
        }
    }
}

/// Packs `[k, width]` values whose rows lie in one piece, `stride` apart, into rows of [`WIDTH`], with zeros beyond.
///
/// # Safety
/// The values can be read, and k rows written, each to a multiple of 64 bytes.
#[target_feature(enable = "avx512f")]
unsafe fn pack(to: *mut f32, from: *const f32, stride: isize, [k, width]: [usize; 2]) {
    let [low, high] = [first(width), first(width.saturating_sub(LANES))];
    for row in 0..k {
        // SAFETY: the row is there; what a mask leaves out is not accessed.
        unsafe {
            let (from, to) = (from.offset(row as isize * stride), to.add(row * WIDTH));
            _mm512_store_ps(to, _mm512_maskz_loadu_ps(low, from));
            _mm512_store_ps(to.add(LANES), _mm512_maskz_loadu_ps(high, from.wrapping_add(LANES)));
        }
    }
}

/// The same of values whose columns lie in one piece, `stride` apart.
///
/// # Safety
/// That of [`pack`].
#[target_feature(enable = "avx512f")]
unsafe fn pack_turned(to: *mut f32, from: *const f32, stride: isize, [k, width]: [usize; 2]) {
    for column in (0..WIDTH).step_by(LANES) {
        let columns = width.saturating_sub(column).min(LANES);
        for row in (0..k).step_by(LANES) {
            let mut block = [_mm512_setzero_ps(); LANES];
            for (i, line) in block[..columns].iter_mut().enumerate() {
                // SAFETY: the column is there; what a mask leaves out is not accessed.
                unsafe {
                    let from = from.offset((column + i) as isize * stride).add(row);
                    *line = _mm512_maskz_loadu_ps(first(k - row), from);
                }
            }
            for (line, row) in turned(block).into_iter().zip(row..k) {
                // SAFETY: row `row` is there, and this half of it.
                unsafe { _mm512_store_ps(to.add(row * WIDTH + column), line) };
            }
        }
    }
}

/// A block of 16 by 16, on its side: pairs of rows are interleaved by value, then by pair, and quarters are put together twice.
#[target_feature(enable = "avx512f")]
fn turned(mut rows: [__m512; LANES]) -> [__m512; LANES] {
    let mut next = rows;
    for i in 0..8 {
        next[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
        next[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
    }
    for i in (0..LANES).step_by(4) {
        let (a, b) = (_mm512_castps_pd(next[i]), _mm512_castps_pd(next[i + 1]));
        let (c, d) = (_mm512_castps_pd(next[i + 2]), _mm512_castps_pd(next[i + 3]));
        rows[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
        rows[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
        rows[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
        rows[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
    // Row 4 i + q holds, for each quarter, column 4 quarter + q of rows 4 i to 4 i + 3.
    for i in 0..4 {
        for half in [0, 8] {
            next[half + i] = _mm512_shuffle_f32x4::<0b10_00_10_00>(rows[half + i], rows[half + 4 + i]);
            next[half + 4 + i] = _mm512_shuffle_f32x4::<0b11_01_11_01>(rows[half + i], rows[half + 4 + i]);
        }
    }
    for i in 0..8 {
        rows[i] = _mm512_shuffle_f32x4::<0b10_00_10_00>(next[i], next[8 + i]);
        rows[8 + i] = _mm512_shuffle_f32x4::<0b11_01_11_01>(next[i], next[8 + i]);
    }
    rows
}
