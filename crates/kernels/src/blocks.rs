//! Copies between F32 and block formats: `out = decode(src)`, `out = encode(src)`.
//!
//! What an optimiser does with states in 8 bits, twice a step ([`codec::dynamic`]): there a number `x` of a block with the
//! largest magnitude `s` has the code `c` whose value is nearest to `x / s`. The reference finds it by halving the table; here
//! the leading bits of `x / s` name a bucket so narrow that at most one of the points half way between two values lies in
//! it, so one look and one comparison tell the code. Other formats go through the codec itself.
//!
//! Both directions read or write 5 bytes a number; the roof is the bandwidth, encoding takes about 3 ns a number and
//! thread (a division, a look, a comparison).

use crate::{Context, Error, Memory, View};
use sparsam_dtype::codec::{self, dynamic};
use sparsam_dtype::{DType, codec::dynamic::BLOCK};
use std::sync::LazyLock;

/// Elements of a task: about 50 us of work against 0.5 us to enter a region.
const TASK: usize = 16 * 1024;

/// Copies between contiguous views of one shape, one of them F32, the other in a block format.
pub(crate) fn copy(ctx: &Context, mem: &mut Memory, out: &View, src: &View) -> Result<(), Error> {
    let (dtype, encodes) = match (out.dtype, src.dtype) {
        (to, DType::F32) => (to, true),
        (DType::F32, from) => (from, false),
        _ => {
            return Err(Error::View { want: "F32 on the other side of blocks", view: Box::new(src.clone()) });
        }
    };
    if let Some(bad) = [out, src].into_iter().find(|v| !v.layout.is_contiguous()) {
        return Err(Error::View { want: "blocks row after row", view: Box::new(bad.clone()) });
    }
    if dtype == DType::NF4 {
        let view = Box::new(if encodes { out } else { src }.clone());
        return Err(Error::View { want: "blocks that share nothing", view });
    }
    let (outs, ins) = mem.resolve_blocks(&[out], &[src])?;
    let (to, from) = (outs[0], ins[0]);
    let n = out.layout.numel();
    let per_task = TASK.next_multiple_of(dtype.block_len());
    let task = |t: usize| {
        let (first, last) = (t * per_task, ((t + 1) * per_task).min(n));
        let bytes = |elements: usize| elements / dtype.block_len() * dtype.block_bytes();
        let (at, len) = (bytes(first), bytes(last - first));
        // SAFETY: `resolve_blocks` checked that both views lie in their slabs, in whole blocks, and do not overlap; they are
        // contiguous, so tasks write disjoint bytes. F32 views are aligned: slabs and offsets are.
        unsafe {
            if encodes {
                let x = std::slice::from_raw_parts(from.get().cast::<f32>().add(first), last - first);
                encode(dtype, x, std::slice::from_raw_parts_mut(to.get().add(at), len));
            } else {
                let x = std::slice::from_raw_parts_mut(to.get().cast::<f32>().add(first), last - first);
                decode(dtype, std::slice::from_raw_parts(from.get().add(at), len), x);
            }
        }
    };
    match n.div_ceil(per_task) {
        0 => {}
        1 => task(0),
        tasks => ctx.pool().run(tasks, task),
    }
    Ok(())
}

fn decode(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    codec::decode(dtype, bytes, out).expect("whole blocks, as checked");
}

fn encode(dtype: DType, x: &[f32], out: &mut [u8]) {
    let codes = match dtype {
        DType::DYN8S => &*SIGNED,
        DType::DYN8U => &*UNSIGNED,
        _ => return codec::encode(dtype, x, out).expect("whole blocks, as checked"),
    };
    for (x, block) in x.as_chunks::<BLOCK>().0.iter().zip(out.as_chunks_mut::<{ dynamic::BYTES }>().0) {
        codes.encode(x, block);
    }
}

static SIGNED: LazyLock<Codes> = LazyLock::new(|| Codes::new(dynamic::signed()));
static UNSIGNED: LazyLock<Codes> = LazyLock::new(|| Codes::new(dynamic::unsigned()));

/// Magnitudes from here on have buckets: below lies no point half way between two values but those around 0.
const LOW: u32 = 0x3400_0000; // 2^-23; the smallest such point is 1.6e-7
/// Bits of a magnitude that its bucket does not see: 2^8 buckets for each power of two.
const UNSEEN: u32 = 15;
/// Buckets of one sign, up to that of 1.
const BUCKETS: usize = ((0x3f80_0000 - LOW) >> UNSEEN) as usize + 1;

/// How numbers from -1 to 1 find their codes.
struct Codes {
    /// The largest number that still takes this code, not the next.
    ends: [f32; 256],
    /// The code of the smallest number in each bucket, those of positive numbers first: 12 KB, which stay in L1.
    first: [u8; 2 * BUCKETS],
    /// The code of 0.
    zero: u8,
}

impl Codes {
    fn new(values: &[f32; 256]) -> Codes {
        let ends = std::array::from_fn(|i| {
            let Some(next) = values.get(i + 1) else { return f32::INFINITY };
            // Half way, but for how the differences to both are rounded.
            let mut end = (values[i] + next) / 2.0;
            while usize::from(dynamic::nearest(values, end)) > i {
                end = end.next_down();
            }
            while usize::from(dynamic::nearest(values, end.next_up())) <= i {
                end = end.next_up();
            }
            end
        });
        let edge = |k: usize| f32::from_bits(LOW + ((k as u32) << UNSEEN));
        let first = std::array::from_fn(|i| {
            let smallest = match i.checked_sub(BUCKETS) {
                None if i == 0 => 0.0,
                None => edge(i),
                Some(k) => -edge(k + 1).next_down(),
            };
            dynamic::nearest(values, smallest)
        });
        Codes { ends, first, zero: dynamic::nearest(values, 0.0) }
    }

    fn encode(&self, x: &[f32; BLOCK], block: &mut [u8; dynamic::BYTES]) {
        let scale = dynamic::scale(x);
        let (head, codes) = block.split_first_chunk_mut().expect("a block begins with its scale");
        *head = scale.to_le_bytes();
        if scale.is_nan() || scale == 0.0 {
            return codes.fill(self.zero);
        }
        for (code, &x) in codes.iter_mut().zip(x) {
            let v = x / scale;
            let bits = v.to_bits();
            let bucket = ((bits & 0x7fff_ffff).max(LOW) - LOW) >> UNSEEN;
            let at = (bucket as usize).min(BUCKETS - 1) + (bits >> 31) as usize * BUCKETS;
            let first = self.first[at];
            *code = first + u8::from(v > self.ends[usize::from(first)]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cpu;

    /// Numbers of all magnitudes, and those around each point where codes change.
    fn numbers(values: &[f32; 256], sign: bool) -> Vec<f32> {
        let mut x = vec![];
        for pair in values.windows(2) {
            let middle = ((f64::from(pair[0]) + f64::from(pair[1])) / 2.0) as f32;
            let [mut down, mut up] = [middle; 2];
            for _ in 0..3 {
                (down, up) = (down.next_down(), up.next_up());
                x.extend([down, middle, up]);
            }
            x.extend([pair[0], pair[1]]);
        }
        let mut state = 7u32;
        for i in 0..20_000 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let unit = state as f32 / u32::MAX as f32;
            let negative = sign && i % 2 == 1;
            x.push(unit.powi(i % 9) * if negative { -1.0 } else { 1.0 });
        }
        x
    }

    #[test]
    fn one_look_finds_the_nearest_code() {
        for (dtype, values, sign) in
            [(DType::DYN8S, dynamic::signed(), true), (DType::DYN8U, dynamic::unsigned(), false)]
        {
            // Blocks whose largest is 1, and others that divide with a rest.
            for scale in [1.0, 0.3, 7e-6, 1e-41, 3e38] {
                let mut x: Vec<f32> = vec![];
                for some in numbers(values, sign).chunks(255) {
                    x.push(scale);
                    x.extend(some.iter().map(|v| v * scale));
                }
                x.resize(x.len().next_multiple_of(256), 0.0);
                let mut want = vec![0; dtype.bytes_for(x.len()).unwrap()];
                codec::encode(dtype, &x, &mut want).unwrap();
                let mut got = vec![1; want.len()];
                encode(dtype, &x, &mut got);
                let differs = got.iter().zip(&want).position(|(a, b)| a != b);
                assert_eq!(differs, None, "{dtype}, scale {scale}");
            }
        }
    }

    #[test]
    fn blocks_without_finite_numbers_are_none() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = [1.0; 256];
            x[100] = bad;
            for dtype in [DType::DYN8S, DType::DYN8U] {
                let (mut ours, mut codecs) = ([0; 260], [0; 260]);
                encode(dtype, &x, &mut ours);
                codec::encode(dtype, &x, &mut codecs).unwrap();
                let mut y = [0.0; 256];
                decode(dtype, &ours, &mut y);
                assert!(ours == codecs && y.iter().all(|v| v.is_nan()), "{dtype}");
            }
        }
    }

    #[test]
    fn copies_encode_and_decode_on_any_number_of_threads() {
        for (dtype, blocks) in
            [(DType::DYN8S, 0), (DType::DYN8S, 1), (DType::DYN8U, 64), (DType::DYN8U, 65), (DType::Q8_0, 700)]
        {
            let n = blocks * dtype.block_len();
            let x: Vec<f32> = (0..n).map(|i| ((i * 7919 % 1009) as f32 / 37.0).powi(3)).collect();
            let mut want = vec![0; dtype.bytes_for(n).unwrap()];
            codec::encode(dtype, &x, &mut want).unwrap();
            let mut decoded = vec![0.0; n];
            codec::decode(dtype, &want, &mut decoded).unwrap();
            for threads in [1, 3] {
                let ctx = Context::new(threads, Cpu::detect());
                let mut mem = Memory::new();
                let (a, b) = (mem.add_owned(4 * n), mem.add_owned(want.len()));
                mem.bytes_mut(a).unwrap().copy_from_slice(bytemuck::cast_slice(&x));
                let plain = View::contiguous(a, DType::F32, &[n]);
                let rounded = View::contiguous(b, dtype, &[n]);
                copy(&ctx, &mut mem, &rounded, &plain).unwrap();
                assert!(mem.bytes(b) == want, "{dtype}, {threads} threads");
                copy(&ctx, &mut mem, &plain, &rounded).unwrap();
                assert!(mem.f32(&plain).unwrap() == decoded, "{dtype}, {threads} threads");
            }
        }
        let ctx = Context::new(1, Cpu::detect());
        let mut mem = Memory::new();
        let (a, b) = (mem.add_owned(4096), mem.add_owned(520));
        let turned = View::contiguous(a, DType::F32, &[256, 2]);
        let turned = View { layout: turned.layout.permute(&[1, 0]), ..turned };
        let rounded = View::contiguous(b, DType::DYN8S, &[2, 256]);
        assert!(matches!(copy(&ctx, &mut mem, &rounded, &turned), Err(Error::View { .. })));
        let other = View::contiguous(a, DType::DYN8U, &[2, 256]);
        assert!(matches!(copy(&ctx, &mut mem, &rounded, &other), Err(Error::View { .. })));
    }
}
