//! GPTQ's packed layout in safetensors, as AutoGPTQ, GPTQModel, transformers and vLLM read it.
//!
//! A linear layer (out, in) is four tensors, in and out exchanged: `qweight` I32 (in * bits / 32, out), the codes of a column
//! as one bit string, lowest bits first; `qzeros` I32 (groups, out * bits / 32), zeros less one, packed along the row; `scales`
//! F16 (groups, out); `g_idx` I32 (in), the group of each input. Weight = `scale * (code - zero)`.
//!
//! [`pack`] writes the four, [`unpack`] reads them back. Which tensors belong together and what `quantize_config.json` says
//! is the caller's part; [`Settings`] holds what is needed of it.

use sparsam_dtype::codec::blocks::{self, Scales};
use sparsam_dtype::{DType, f16};

/// What `quantize_config.json` says of all layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Bits of a code: 2, 3, 4 or 8.
    pub bits: u32,
    /// Inputs that share scale and zero; `None`: all (-1 in the file).
    pub group: Option<usize>,
    /// Zeros are stored as they are (`checkpoint_format` `gptq_v2`), not less one.
    pub whole_zeros: bool,
}

/// The bytes of the four tensors, and the shapes of the first three.
#[derive(Clone, Debug, PartialEq)]
pub struct Packed {
    /// I32 (in * bits / 32, out).
    pub qweight: Vec<u8>,
    /// I32 (groups, out * bits / 32).
    pub qzeros: Vec<u8>,
    /// F16 (groups, out).
    pub scales: Vec<u8>,
    /// I32 (in).
    pub g_idx: Vec<u8>,
    /// Number of groups.
    pub groups: usize,
}

/// A layer out of its packing.
#[derive(Clone, Debug, PartialEq)]
pub struct Unpacked {
    /// (out, in).
    pub codes: Vec<u8>,
    /// (groups, out).
    pub scales: Vec<f32>,
    /// (groups, out).
    pub zeros: Vec<u8>,
    /// (in): the group of each input.
    pub g_idx: Vec<usize>,
}

/// What contradicts itself in a packed layer; `problem` continues "tensor NAME ..".
pub type Problem = String;

/// Puts `n` codes, `code(i)` each, into 32-bit words, lowest bits first.
fn put_bits(n: usize, bits: u32, code: impl Fn(usize) -> u8) -> Vec<u32> {
    let mut words = vec![0u32; n * bits as usize / 32];
    for i in 0..n {
        let (at, shift) = (i * bits as usize / 32, (i * bits as usize % 32) as u32);
        let value = u64::from(code(i)) << shift;
        words[at] |= value as u32;
        if shift + bits > 32 {
            words[at + 1] |= (value >> 32) as u32;
        }
    }
    words
}

/// Code `i` of a string of words.
fn get_bits(words: impl Fn(usize) -> u32, bits: u32, i: usize) -> u8 {
    let (at, shift) = (i * bits as usize / 32, (i * bits as usize % 32) as u32);
    let mut value = u64::from(words(at));
    if shift + bits > 32 {
        value |= u64::from(words(at + 1)) << 32;
    }
    (value >> shift & ((1 << bits) - 1)) as u8
}

/// Packs codes (n_out, n_in) with scales and zeros (n_out, groups) of consecutive groups.
///
/// # Panics
/// If lengths contradict each other, or `n_in` or `n_out` is no multiple of 32: the layout has whole words only.
pub fn pack(settings: &Settings, n_in: usize, codes: &[u8], scales: &[f32], zeros: &[u8]) -> Packed {
    let (bits, group) = (settings.bits, settings.group.unwrap_or(n_in));
    let (n_out, groups) = (codes.len() / n_in, n_in.div_ceil(group));
    assert!(n_in.is_multiple_of(32) && n_out.is_multiple_of(32), "{n_out} x {n_in}: whole words of codes");
    assert_eq!((scales.len(), zeros.len()), (n_out * groups, n_out * groups), "a scale and a zero a group");
    let mut qweight = vec![0u32; n_in * bits as usize / 32 * n_out];
    for o in 0..n_out {
        let words = put_bits(n_in, bits, |i| codes[o * n_in + i]);
        words.into_iter().enumerate().for_each(|(w, word)| qweight[w * n_out + o] = word);
    }
    let mask = ((1u32 << bits) - 1) as u8;
    let less = u8::from(!settings.whole_zeros);
    let qzeros =
        (0..groups).flat_map(|g| put_bits(n_out, bits, |o| zeros[o * groups + g].wrapping_sub(less) & mask));
    let scales = (0..groups).flat_map(|g| (0..n_out).map(move |o| f16::from_f32(scales[o * groups + g])));
    Packed {
        qweight: qweight.into_iter().flat_map(u32::to_le_bytes).collect(),
        qzeros: qzeros.flat_map(u32::to_le_bytes).collect(),
        scales: scales.flat_map(|s| s.to_le_bytes()).collect(),
        g_idx: (0..n_in).flat_map(|i| ((i / group) as i32).to_le_bytes()).collect(),
        groups,
    }
}

/// Unpacks a layer of `n_in` inputs. `g_idx` may be missing: groups are then consecutive.
///
/// # Errors
/// What contradicts itself: lengths, or a group that has no scale.
pub fn unpack(
    settings: &Settings,
    n_in: usize,
    qweight: &[u8],
    qzeros: &[u8],
    scales: &[u8],
    g_idx: Option<&[u8]>,
) -> Result<Unpacked, Problem> {
    let bits = settings.bits as usize;
    if n_in == 0 || !n_in.is_multiple_of(32) {
        return Err(format!("has {n_in} inputs, which are no whole words of codes"));
    }
    let n_out = qweight.len() / 4 * 32 / (n_in * bits);
    if n_out == 0 || n_out * n_in * bits / 8 != qweight.len() || !n_out.is_multiple_of(32) {
        return Err(format!(
            "has {} bytes, which are no layer of {n_in} inputs at {bits} bits",
            qweight.len()
        ));
    }
    let groups = scales.len() / 2 / n_out;
    let (want_scales, want_zeros) = (groups * n_out * 2, groups * n_out * bits / 8);
    if groups == 0 || scales.len() != want_scales || qzeros.len() != want_zeros {
        return Err(format!(
            "has {n_out} outputs, but {} bytes of scales and {} of zeros do not make groups of these",
            scales.len(),
            qzeros.len()
        ));
    }
    let word = |bytes: &[u8], i: usize| {
        u32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
    };
    let group = settings.group.unwrap_or(n_in);
    let g_idx: Vec<usize> = match g_idx {
        None => (0..n_in).map(|i| i / group).collect(),
        Some(bytes) if bytes.len() == 4 * n_in => (0..n_in).map(|i| word(bytes, i) as usize).collect(),
        Some(bytes) => return Err(format!("has a g_idx of {} bytes for {n_in} inputs", bytes.len())),
    };
    if let Some(g) = g_idx.iter().find(|&&g| g >= groups) {
        return Err(format!("puts an input into group {g}, but has {groups} groups"));
    }
    let mut codes = vec![0u8; n_out * n_in];
    for o in 0..n_out {
        for i in 0..n_in {
            codes[o * n_in + i] = get_bits(|w| word(qweight, w * n_out + o), settings.bits, i);
        }
    }
    let (row, more) = (n_out * bits / 32, u8::from(!settings.whole_zeros));
    let mask = ((1u32 << bits) - 1) as u8;
    let zeros = (0..groups).flat_map(|g| {
        (0..n_out)
            .map(move |o| get_bits(|w| word(qzeros, g * row + w), settings.bits, o).wrapping_add(more) & mask)
    });
    let zeros = zeros.collect();
    let scales = scales.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect();
    Ok(Unpacked { codes, scales, zeros, g_idx })
}

impl Unpacked {
    /// Type and bytes of the matrix (out, in) as this project stores it: a block format where one holds exactly these
    /// numbers (symmetric codes of 4 or 8 bits in consecutive groups of whole blocks), otherwise F16.
    pub fn stored(&self, settings: &Settings) -> (DType, Vec<u8>) {
        let n_in = self.g_idx.len();
        let n_out = self.codes.len() / n_in;
        let group = settings.group.unwrap_or(n_in);
        let consecutive = self.g_idx.iter().enumerate().all(|(i, &g)| g == i / group);
        let middle = self.zeros.iter().all(|&z| u32::from(z) == 1 << (settings.bits - 1));
        let dtype = match settings.bits {
            4 => DType::Q4_0,
            8 => DType::Q8_0,
            _ => DType::F16,
        };
        // A code of 0 at 8 bits is -128, which Q8_0's bytes can say but its levels do not count.
        let least = if dtype == DType::Q8_0 { 1 } else { 0 };
        if dtype == DType::F16
            || !consecutive
            || !middle
            || !group.is_multiple_of(32)
            || self.codes.iter().any(|&c| c < least)
        {
            return (DType::F16, self.values().iter().flat_map(|v| v.to_le_bytes()).collect());
        }
        let size = dtype.block_bytes();
        let mut bytes = vec![0; self.codes.len() / 32 * size];
        for (b, (out, codes)) in bytes.chunks_mut(size).zip(self.codes.chunks(32)).enumerate() {
            let (o, i) = (b * 32 / n_in, b * 32 % n_in);
            let (mut scales, mins) = ([0; 16], [0; 16]);
            scales[0] = 1;
            let d = self.scales[i / group * n_out + o];
            let codes: Vec<u8> = codes.iter().map(|c| c - least).collect();
            blocks::pack(dtype, &Scales { d, dmin: 0.0, scales, mins }, &codes, out);
        }
        (dtype, bytes)
    }

    /// The weights (out, in) as F16, which is how they are multiplied elsewhere: `scale * (code - zero)`, rounded once.
    pub fn values(&self) -> Vec<f16> {
        let n_in = self.g_idx.len();
        let n_out = self.codes.len() / n_in;
        let mut out = Vec::with_capacity(self.codes.len());
        for o in 0..n_out {
            for (i, &g) in self.g_idx.iter().enumerate() {
                let at = g * n_out + o;
                let code = i32::from(self.codes[o * n_in + i]) - i32::from(self.zeros[at]);
                out.push(f16::from_f32(self.scales[at] * code as f32));
            }
        }
        out
    }
}
