//! Packed weights, rounded or not, and products with them: `out[m, n] = sum over k of a[m, k] w[n, k]`.
//!
//! A [`Weight`] is a matrix (rows N, columns K: a linear layer as checkpoints store it) in panels of 16 interleaved
//! rows ([`panel`]), in its own format and size. There are two ways to multiply: with f32 (or bf16) activations by
//! decoding panels into cache ([`float`]), and with activations rounded to 8 bits by integer arithmetic on the codes
//! ([`int8`]). Either way a row's result depends neither on the other rows nor on threads.

#[cfg(target_arch = "x86_64")]
mod decode_x86;
mod float;
mod int8;
#[cfg(target_arch = "x86_64")]
mod int8_x86;
mod nf4;
mod panel;
#[cfg(target_arch = "x86_64")]
mod single_x86;
mod unpack;
#[cfg(target_arch = "x86_64")]
mod unpack_x86;

use crate::matmul::pack::Lanes;
use crate::matmul::tile::PANEL;
use crate::matmul::{self, Out, Product, check_float, check_out};
use crate::mem::Ptr;
use crate::{AlignedBytes, Context, Cpu, Error, Memory, Pages, Precision, View};
use sparsam_dtype::{DType, codec};

/// Matrices of at least this many bytes are packed by several threads: starting one costs as much as packing some
/// 100 KB.
const PARALLEL_BYTES: usize = 2 << 20;

/// An immutable matrix in packed form.
#[derive(Clone)]
pub struct Weight {
    dtype: DType,
    rows: usize,
    cols: usize,
    data: AlignedBytes,
    /// What the blocks of an NF4 matrix share; empty otherwise.
    shared: nf4::Shared,
}

impl std::fmt::Debug for Weight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Weight({} {} x {})", self.dtype, self.rows, self.cols)
    }
}

impl Weight {
    /// Packs `rows` x `cols` elements of `dtype` (any float or block format), row after row in `bytes`.
    ///
    /// Takes as many bytes as the matrix itself, rows rounded up to a multiple of 16.
    ///
    /// # Errors
    /// [`Error::Shape`] if the type cannot be decoded, a row is no whole number of blocks, or `bytes` has another
    /// length than the matrix.
    pub fn pack(dtype: DType, rows: usize, cols: usize, bytes: &[u8]) -> Result<Weight, Error> {
        Weight::pack_with(AlignedBytes::zeroed, dtype, rows, cols, bytes)
    }

    /// [`Weight::pack`] into memory from `pages`, which many weights may share.
    ///
    /// # Errors
    /// As [`Weight::pack`].
    pub fn pack_in(
        pages: &mut Pages,
        dtype: DType,
        rows: usize,
        cols: usize,
        bytes: &[u8],
    ) -> Result<Weight, Error> {
        Weight::pack_with(|len| pages.zeroed(len), dtype, rows, cols, bytes)
    }

    fn pack_with(
        zeroed: impl FnOnce(usize) -> AlignedBytes,
        dtype: DType,
        rows: usize,
        cols: usize,
        bytes: &[u8],
    ) -> Result<Weight, Error> {
        let refuse = |what: String| Err(Error::Shape { op: "weight", what });
        if dtype == DType::NF4 {
            return nf4::pack(zeroed, rows, cols, bytes);
        }
        if dtype.is_state() || !codec::can_decode(dtype) {
            return refuse(format!("{dtype} holds no weights; pass a float or block type"));
        }
        let Some(row_bytes) = dtype.bytes_for(cols) else {
            return refuse(format!(
                "rows of {cols} are no whole number of {dtype} blocks of {}",
                dtype.block_len()
            ));
        };
        if row_bytes.checked_mul(rows) != Some(bytes.len()) {
            let have = bytes.len();
            return refuse(format!(
                "{rows} rows of {cols} {dtype} take {rows} x {row_bytes} bytes, not {have}"
            ));
        }
        let mut data = AlignedBytes::default();
        if !bytes.is_empty() {
            let panel = cols.div_ceil(panel::group_len(dtype)) * panel::group_bytes(dtype) * PANEL;
            let panels = rows.div_ceil(PANEL);
            data = zeroed(panels * panel);
            // Whole panels to each thread.
            let threads = match bytes.len() {
                PARALLEL_BYTES.. => std::thread::available_parallelism().map_or(1, |n| n.get()),
                _ => 1,
            };
            let each = panels.div_ceil(threads);
            let pack = |to: &mut [u8], from: &[u8]| {
                for (panel, rows) in to.chunks_mut(panel).zip(from.chunks(PANEL * row_bytes)) {
                    panel::interleave(dtype, rows, row_bytes, panel);
                }
            };
            let parts = data.bytes_mut().chunks_mut(each * panel).zip(bytes.chunks(each * PANEL * row_bytes));
            if threads == 1 {
                parts.for_each(|(to, from)| pack(to, from));
            } else {
                std::thread::scope(|s| {
                    for (to, from) in parts {
                        s.spawn(move || pack(to, from));
                    }
                });
            }
        }
        Ok(Weight { dtype, rows, cols, data, shared: nf4::Shared::default() })
    }

    /// The format of its elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Rows: outputs of the layer.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns: inputs of the layer.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes of memory that it holds.
    pub fn bytes(&self) -> usize {
        self.data.len() + self.shared.bytes()
    }

    fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    fn panel_bytes(&self) -> usize {
        self.cols.div_ceil(panel::group_len(self.dtype)) * panel::group_bytes(self.dtype) * PANEL
    }

    /// The bytes of a panel from column `k0`, the first of a group, to the end of all panels.
    fn panel_from(&self, panel: usize, k0: usize) -> &[u8] {
        debug_assert!(k0.is_multiple_of(panel::group_len(self.dtype)));
        let skip = k0 / panel::group_len(self.dtype) * panel::group_bytes(self.dtype) * PANEL;
        &self.data.bytes()[panel * self.panel_bytes() + skip..]
    }

    /// Decodes the whole rows from `first` on that fill `out`: [`codec::decode`]'s numbers, bit for bit.
    ///
    /// # Errors
    /// [`Error::Shape`] if `out` is no whole number of rows or reaches past the last one.
    pub fn decode_rows(&self, first: usize, out: &mut [f32]) -> Result<(), Error> {
        let n = out.len().checked_div(self.cols).unwrap_or(0);
        if n * self.cols != out.len() || first.checked_add(n).is_none_or(|end| end > self.rows) {
            let what = format!("{} numbers from row {first} on of {self:?}", out.len());
            return Err(Error::Shape { op: "decode_rows", what });
        }
        for (row, out) in (first..).zip(out.chunks_mut(self.cols.max(1))) {
            self.decode_row(row, out);
        }
        Ok(())
    }

    /// Decodes a row that there is.
    fn decode_row(&self, row: usize, out: &mut [f32]) {
        match self.dtype {
            DType::NF4 => nf4::decode_row(self, row, out),
            other => panel::decode_row(other, self.panel_from(row / PANEL, 0), row % PANEL, out),
        }
    }

    /// Decodes `kc` columns from `k0`, the first of a group, of all rows of a panel into `[kc][16]`.
    fn decode_panel(&self, cpu: Cpu, panel: usize, k0: usize, kc: usize, out: &mut [f32]) {
        match self.dtype {
            DType::NF4 => nf4::decode(self, cpu, panel, k0, &mut out[..kc * PANEL]),
            other => panel::decode(cpu, other, self.panel_from(panel, k0), kc, out),
        }
    }
}

/// One weight and where its product goes.
struct Target<'a> {
    weight: &'a Weight,
    out: Out,
}

fn matrix(v: &View) -> Result<[usize; 2], Error> {
    <[usize; 2]>::try_from(v.layout.shape.as_slice())
        .map_err(|_| Error::View { want: "a matrix", view: Box::new(v.clone()) })
}

fn rows_of(p: Ptr, v: &View) -> Lanes {
    Lanes { ptr: p.0, dtype: v.dtype, lane: v.layout.strides[0], k: v.layout.strides[1] }
}

fn out_of(p: Ptr, v: &View) -> Out {
    Out { ptr: p, rs: v.layout.strides[0], cs: v.layout.strides[1] }
}

/// Computes `outs[i]` (M, N_i) f32 = `a` (M, K) times the transpose of `ws[i]` (N_i, K), for several weights over
/// one activation: it is rounded (or packed) once, and all panels are shared out in one parallel region.
///
/// `a` is F32, F16 or BF16. [`Precision::Int8`] holds for the formats that have integer kernels; the others in the
/// same call get f32 activations.
///
/// # Errors
/// [`Error::Shape`] for shapes that do not fit, [`Error::View`] for other element types or an output that holds
/// one element twice, and what [`Memory`] finds wrong with the views.
pub fn matmul(
    ctx: &Context,
    mem: &mut Memory,
    outs: &[&View],
    a: &View,
    ws: &[&Weight],
    precision: Precision,
) -> Result<(), Error> {
    let (po, pa) = mem.resolve_slices(outs, &[a], false)?;
    check_float(a)?;
    let [m, k] = matrix(a)?;
    if outs.len() != ws.len() {
        let what = format!("{} outputs for {} weights", outs.len(), ws.len());
        return Err(Error::Shape { op: "weight::matmul", what });
    }
    let mut targets = Vec::with_capacity(ws.len());
    for ((out, &ptr), &weight) in outs.iter().zip(&po).zip(ws) {
        check_out(out)?;
        if matrix(out)? != [m, weight.rows] || weight.cols != k {
            let what = format!("({m}, {k}) times the transpose of {weight:?} into {:?}", out.layout.shape);
            return Err(Error::Shape { op: "weight::matmul", what });
        }
        targets.push(Target { weight, out: out_of(ptr, out) });
    }
    if m == 0 {
        return Ok(());
    }
    if k == 0 {
        targets.iter().for_each(|t| matmul::clear(t.out, m, t.weight.rows));
        return Ok(());
    }
    let (tiles, packing) = matmul::choose(ctx, precision);
    let a = rows_of(pa[0], a);
    let integer = |t: &Target| precision == Precision::Int8 && int8::Format::of(t.weight.dtype).is_some();
    let (rounded, plain): (Vec<Target>, Vec<Target>) = targets.into_iter().partition(integer);
    if !rounded.is_empty() {
        int8::run(ctx, &rounded, a, m, k);
    }
    if !plain.is_empty() {
        let float = float::Float { pool: ctx.pool(), cpu: ctx.cpu(), tiles, packing, a, m, k };
        float.run(&plain);
    }
    Ok(())
}

/// Computes `out` (M, K) f32 = `a` (M, N) times `w` (N, K): the gradient towards a layer's activations.
///
/// [`Precision::Int8`] means f32 here.
///
/// # Errors
/// As [`matmul()`].
pub fn matmul_t(
    ctx: &Context,
    mem: &mut Memory,
    out: &View,
    a: &View,
    w: &Weight,
    precision: Precision,
) -> Result<(), Error> {
    let ([po], [pa]) = mem.resolve([out], [a], false)?;
    check_float(a)?;
    check_out(out)?;
    let [m, n] = matrix(a)?;
    if n != w.rows || matrix(out)? != [m, w.cols] {
        let what = format!("({m}, {n}) times {w:?} into {:?}", out.layout.shape);
        return Err(Error::Shape { op: "weight::matmul_t", what });
    }
    let (tiles, packing) = matmul::choose(ctx, precision);
    let (a, out) = (rows_of(pa, a), out_of(po, out));
    let b = float::Transposed { weight: w, cpu: ctx.cpu() };
    matmul::product(ctx.pool(), &Product { m, n: w.cols, k: n, out, a, b, add: false }, &tiles, packing);
    Ok(())
}

/// Decodes row `rows[i]` of `w` into row `i` of `out` (R, K) f32; `rows` is (R) I32: the lookup of embeddings.
///
/// # Errors
/// [`Error::Shape`] for shapes that do not fit and for a row that `w` does not have; views as [`matmul()`].
pub fn gather(ctx: &Context, mem: &mut Memory, out: &View, rows: &View, w: &Weight) -> Result<(), Error> {
    let ([po], [pr]) = mem.resolve([out], [rows], false)?;
    check_out(out)?;
    if rows.dtype != DType::I32 {
        return Err(Error::View { want: "I32 rows", view: Box::new(rows.clone()) });
    }
    let [r, k] = matrix(out)?;
    if rows.layout.shape != [r] || k != w.cols {
        let what = format!("rows {:?} of {w:?} into {:?}", rows.layout.shape, out.layout.shape);
        return Err(Error::Shape { op: "weight::gather", what });
    }
    let stride = rows.layout.strides[0];
    let mut wanted = Vec::with_capacity(r);
    for i in 0..r {
        // SAFETY: the view has `r` elements of 4 bytes, within its slab; slabs and offsets are multiples of 4.
        let row = unsafe { *pr.0.cast::<i32>().add(i * stride) };
        match usize::try_from(row) {
            Ok(row) if row < w.rows => wanted.push(row),
            _ => {
                let what = format!("row {row} (entry {i}) of {w:?}");
                return Err(Error::Shape { op: "weight::gather", what });
            }
        }
    }
    let out = out_of(po, out);
    let per_task = 16;
    matmul::tasks(ctx.pool(), r * k > matmul::SERIAL / 8, r.div_ceil(per_task), |t| {
        let mut buffer = vec![0.0; k];
        for i in t * per_task..r.min((t + 1) * per_task) {
            w.decode_row(wanted[i], &mut buffer);
            for (j, &v) in buffer.iter().enumerate() {
                // SAFETY: the output has `r` x `k` elements, each its own; row `i` belongs to this task.
                unsafe { *out.at(i, j) = v };
            }
        }
    });
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests;
