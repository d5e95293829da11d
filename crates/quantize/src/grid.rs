//! What weights are rounded to: a grid of values for each group of a row.

use sparsam_dtype::DType;
use sparsam_dtype::codec::blocks::{self, Format, Levels, Scales};

/// The values that weights may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grid {
    /// A block format of GGUF.
    Block(DType),
    /// Whole-number codes with an f16 scale and a whole zero point for each group: GPTQ's layout.
    Plain(Plain),
}

/// Codes from 0 to `2^bits - 1`; element = `scale * (code - zero)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plain {
    /// 2 to 8.
    pub bits: u32,
    /// Consecutive elements of a row that share scale and zero; the row's length for whole rows.
    pub group: usize,
    /// The zero is the middle code, `2^(bits - 1)`.
    pub symmetric: bool,
}

impl Grid {
    /// Levels, groups and blocks.
    ///
    /// # Panics
    /// If a block grid's type is no format of weights.
    pub fn format(&self) -> Format {
        match *self {
            Grid::Block(dtype) => blocks::format(dtype).expect("a block format of weights"),
            Grid::Plain(Plain { bits, group, symmetric }) => Format {
                levels: Levels::Whole { lo: 0, hi: (1 << bits) - 1 },
                group,
                block: group,
                has_min: !symmetric,
            },
        }
    }

    /// The scales of one row, block after block: those with the least squared error to the nearest codes that a search
    /// finds, where the error of element `i` counts `importance[i]` times.
    pub fn fit(&self, row: &[f32], importance: &[f32]) -> Vec<Scales> {
        let block = self.format().block;
        let parts = row.chunks(block).zip(importance.chunks(block));
        match *self {
            Grid::Block(dtype) => parts.map(|(x, w)| blocks::fit(dtype, x, w)).collect(),
            Grid::Plain(plain) => parts.map(|(x, w)| plain.fit(x, w)).collect(),
        }
    }
}

impl Plain {
    /// Cuts that are tried: the range shrunk by up to 40% in steps of 2%.
    const TRIALS: usize = 21;

    /// Scale and zero of a group.
    fn fit(&self, x: &[f32], importance: &[f32]) -> Scales {
        let top = ((1u32 << self.bits) - 1) as f32;
        let (lo, hi) = x.iter().fold((0.0f32, 0.0f32), |(lo, hi), &v| (lo.min(v), hi.max(v)));
        let (lo, hi) = if self.symmetric { (-hi.max(-lo), hi.max(-lo)) } else { (lo, hi) };
        let (mut best, mut least) = (self.scales(0.0, 0.0), f32::INFINITY);
        if hi <= lo {
            return best;
        }
        for trial in 0..Self::TRIALS {
            let cut = 1.0 - 0.02 * trial as f32;
            let scale = blocks::stored((hi - lo) * cut / top);
            if scale == 0.0 {
                break;
            }
            let zero = match self.symmetric {
                true => (top + 1.0) / 2.0,
                false => (-lo * cut / scale).round().clamp(0.0, top),
            };
            let error: f32 = x
                .iter()
                .zip(importance)
                .map(|(v, w)| {
                    let q = (v / scale + zero).round().clamp(0.0, top);
                    w * (v - scale * (q - zero)).powi(2)
                })
                .sum();
            if error < least {
                (best, least) = (self.scales(scale, zero), error);
            }
        }
        best
    }

    /// Groups of a row of `cols`.
    pub fn groups(&self, cols: usize) -> usize {
        cols.div_ceil(self.group)
    }

    /// What [`Rounded::bytes`] wrote of a matrix (rows, cols): a byte a code, an f32 scale a group, a byte a zero. `None` if
    /// the length is another.
    pub fn read(self, bytes: &[u8], rows: usize, cols: usize) -> Option<Rounded> {
        let (n, groups) = (rows * cols, rows * self.groups(cols));
        if bytes.len() != n + 5 * groups {
            return None;
        }
        let (codes, rest) = bytes.split_at(n);
        let (scales, zeros) = rest.split_at(4 * groups);
        let scales = scales.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
        let scales = scales.zip(zeros).map(|(s, &z)| self.scales(s, z.into())).collect();
        Some(Rounded { grid: Grid::Plain(self), rows, cols, codes: codes.to_vec(), scales })
    }

    /// A zero is a minimum of `zero` scales.
    fn scales(&self, scale: f32, zero: f32) -> Scales {
        let (mut scales, mut mins) = ([0; 16], [0; 16]);
        scales[0] = 1;
        mins[0] = zero as u8;
        Scales { d: scale, dmin: scale, scales, mins }
    }
}

/// A matrix on a grid.
#[derive(Clone, Debug, PartialEq)]
pub struct Rounded {
    /// The grid.
    pub grid: Grid,
    /// Outputs of the layer.
    pub rows: usize,
    /// Inputs of the layer.
    pub cols: usize,
    /// One a weight, row-major.
    pub codes: Vec<u8>,
    /// One a block, row-major.
    pub scales: Vec<Scales>,
}

impl Rounded {
    /// Row `r` of the values that the codes stand for, into `out`.
    pub fn row(&self, r: usize, out: &mut [f32]) {
        let per_row = self.cols.div_ceil(self.grid.format().block);
        let (codes, scales) =
            (&self.codes[r * self.cols..][..self.cols], &self.scales[r * per_row..][..per_row]);
        decode(&self.grid.format(), codes, scales, out);
    }

    /// All values, row-major.
    pub fn values(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        out.chunks_mut(self.cols).enumerate().for_each(|(r, row)| self.row(r, row));
        out
    }

    /// The bytes of a block format, row after row; of plain groups those that [`Plain::read`] takes.
    pub fn bytes(&self) -> Vec<u8> {
        let dtype = match self.grid {
            Grid::Block(dtype) => dtype,
            Grid::Plain(_) => {
                let scales = self.scales.iter().flat_map(|s| s.d.to_le_bytes());
                let zeros = self.scales.iter().map(|s| s.mins[0]);
                return self.codes.iter().copied().chain(scales).chain(zeros).collect();
            }
        };
        let n = dtype.block_len();
        let mut out = vec![0; self.scales.len() * dtype.block_bytes()];
        let blocks = out.chunks_mut(dtype.block_bytes()).zip(self.codes.chunks(n)).zip(&self.scales);
        blocks.for_each(|((out, codes), scales)| blocks::pack(dtype, scales, codes, out));
        out
    }

    /// Of plain groups: scales and zeros, (rows, groups) each.
    pub fn scales_and_zeros(&self) -> (Vec<f32>, Vec<u8>) {
        self.scales.iter().map(|s| (s.d, s.mins[0])).unzip()
    }
}

/// The values of a row of codes.
pub(crate) fn decode(format: &Format, codes: &[u8], scales: &[Scales], out: &mut [f32]) {
    let groups = codes.chunks(format.group).zip(out.chunks_mut(format.group)).enumerate();
    for (g, (codes, out)) in groups {
        let (scale, min) = group(format, scales, g);
        for (o, &c) in out.iter_mut().zip(codes) {
            *o = scale * format.levels.level(c) - min;
        }
    }
}

/// Scale and minimum of group `g` of a row.
#[inline]
pub(crate) fn group(format: &Format, scales: &[Scales], g: usize) -> (f32, f32) {
    let per_block = format.block / format.group;
    scales[g / per_block].group(g % per_block)
}

/// The code whose value is nearest to `v`.
#[inline]
pub(crate) fn nearest(levels: Levels, (scale, min): (f32, f32), v: f32) -> u8 {
    // A scale of 0 has one value only; any code says it.
    levels.nearest(if scale == 0.0 { 0.0 } else { (v + min) / scale })
}
