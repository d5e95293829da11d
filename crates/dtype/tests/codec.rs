//! The codec held to llama.cpp's `gguf` package, and to what it says of bad input.

use proptest::prelude::*;
use sparsam_dtype::codec::{CodecError, can_decode, can_encode, decode, dynamic, encode};
use sparsam_dtype::{DType, f16};

/// A golden file of `scripts/goldens/formats_codec.py`: the number of blocks, and what follows.
fn golden(name: &str) -> (usize, Vec<u8>) {
    let path = format!("{}/tests/golden/{name}.bin", env!("CARGO_MANIFEST_DIR"));
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let n = u32::from_le_bytes(bytes[..4].try_into().unwrap());
    (n as usize, bytes[4..].to_vec())
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

#[test]
fn decodes_bit_for_bit_as_the_gguf_package() {
    use DType::*;
    for dtype in [F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_XS] {
        let (n, file) = golden(&format!("decode_{dtype}"));
        let (blocks, values) = file.split_at(n * dtype.block_bytes());
        let want = floats(values);
        assert!(n > 0 && want.len() == n * dtype.block_len(), "{dtype}: the golden file's length");
        let mut got = vec![0.0; want.len()];
        decode(dtype, blocks, &mut got).unwrap();
        for (i, (g, w)) in got.iter().zip(&want).enumerate() {
            assert_eq!(g.to_bits(), w.to_bits(), "{dtype}, element {i}: {g} instead of {w}");
        }
    }
}

#[test]
fn encodes_to_the_bytes_of_the_gguf_package() {
    use DType::*;
    for dtype in [F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0] {
        let (n, file) = golden(&format!("encode_{dtype}"));
        let (values, want) = file.split_at(n * dtype.block_len() * 4);
        let mut got = vec![0; n * dtype.block_bytes()];
        assert!(n > 0 && want.len() == got.len(), "{dtype}: the golden file's length");
        encode(dtype, &floats(values), &mut got).unwrap();
        for (i, (g, w)) in got.chunks(dtype.block_bytes()).zip(want.chunks(dtype.block_bytes())).enumerate() {
            assert_eq!(g, w, "{dtype}, block {i}");
        }
    }
}

/// The weights of `scripts/goldens/nf4.py`.
fn nf4_weights(n: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = |i: usize| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let u = f64::from(state) / 2f64.powi(31) - 1.0;
        let scale = (i / 64 * 37 % 64 + 1) as f64 / 64.0;
        ((u * u * u * scale * 4096.0).floor() / 4096.0) as f32
    };
    (0..n).map(&mut next).collect()
}

#[test]
fn nf4_is_that_of_bitsandbytes_bit_for_bit() {
    let (n, file) = golden("nf4");
    let (want, rest) = file.split_at(DType::NF4.bytes_for(n).unwrap());
    let (table, rest) = rest.split_at(1024);
    let (start, hash) = rest.split_at(256);
    assert!(n == 64 * 300 && hash.len() == 8);
    let bits = |x: &[f32]| x.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    for (i, (ours, theirs)) in dynamic::signed().iter().zip(floats(table)).enumerate() {
        assert_eq!(ours.to_bits(), theirs.to_bits(), "number {i} of the dynamic type: {ours}, {theirs}");
    }
    let mut got = vec![0; want.len()];
    encode(DType::NF4, &nf4_weights(n), &mut got).unwrap();
    let differs = got.iter().zip(want).position(|(a, b)| a != b);
    assert_eq!(differs, None, "the first byte that differs, of {}", got.len());
    let mut decoded = vec![0.0; n];
    decode(DType::NF4, &got, &mut decoded).unwrap();
    assert_eq!(bits(&decoded[..64]), start);
    assert_eq!(fnv(&bits(&decoded)), hash);
}

/// 64 bits of FNV-1a.
fn fnv(bytes: &[u8]) -> [u8; 8] {
    let add = |h: u64, b: &u8| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01B3);
    bytes.iter().fold(0xCBF2_9CE4_8422_2325, add).to_le_bytes()
}

/// The numbers of `scripts/goldens/dynamic.py`.
fn state_numbers(n: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = |i: usize| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let u = f64::from(state) / 2f64.powi(31) - 1.0;
        let x = u * u * u * if i.is_multiple_of(3) { u * u } else { 1.0 };
        (x * 2f64.powi(-((i / 256) as i32))) as f32
    };
    (0..n).map(&mut next).collect()
}

#[test]
fn states_in_8_bits_are_those_of_bitsandbytes_bit_for_bit() {
    let (blocks, file) = golden("dynamic");
    let n = 256 * blocks;
    let x = state_numbers(n);
    let squares: Vec<f32> = x.iter().map(|x| x * x).collect();
    let (tables, rest) = file.split_at(2048);
    let (both, hashes) = rest.split_at(2 * blocks * 260);
    assert!(blocks == 24 && hashes.len() == 16);
    let cases = [(DType::DYN8S, dynamic::signed(), &x), (DType::DYN8U, dynamic::unsigned(), &squares)];
    for (i, (dtype, table, x)) in cases.into_iter().enumerate() {
        for (ours, theirs) in table.iter().zip(floats(&tables[1024 * i..][..1024])) {
            assert_eq!(ours.to_bits(), theirs.to_bits(), "{dtype}: {ours} instead of {theirs}");
        }
        let want = &both[i * blocks * 260..][..blocks * 260];
        let mut got = vec![0; want.len()];
        encode(dtype, x, &mut got).unwrap();
        let differs = got.iter().zip(want).position(|(a, b)| a != b);
        assert_eq!(differs, None, "{dtype}: the first byte that differs, of {}", got.len());
        let mut decoded = vec![0.0; n];
        decode(dtype, &got, &mut decoded).unwrap();
        let bytes: Vec<u8> = decoded.iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(fnv(&bytes), hashes[8 * i..][..8], "{dtype}");
    }
}

/// The package has no decoder for the two activation formats: one block each, by hand.
#[test]
fn decodes_the_activation_formats() {
    let mut block = vec![0u8; 36];
    block[..2].copy_from_slice(&f16::from_f32(0.25).to_le_bytes());
    block[2..4].copy_from_slice(&f16::from_f32(99.0).to_le_bytes());
    block[4] = 4;
    block[35] = -128i8 as u8;
    let mut out = [f32::NAN; 32];
    decode(DType::Q8_1, &block, &mut out).unwrap();
    assert_eq!((out[0], out[1], out[31]), (1.0, 0.0, -32.0));

    let mut block = vec![0u8; 292];
    block[..4].copy_from_slice(&0.5f32.to_le_bytes());
    block[4 + 7] = -3i8 as u8;
    block[4 + 255] = 127;
    block[260..].fill(0xFF); // group sums: not read
    let mut out = [f32::NAN; 256];
    decode(DType::Q8_K, &block, &mut out).unwrap();
    assert_eq!((out[7], out[8], out[255]), (-1.5, 0.0, 63.5));
}

#[test]
fn says_what_is_wrong() {
    let mut out = [0.0; 32];
    let check = |r: Result<(), CodecError>, parts: &[&str]| {
        let said = r.unwrap_err().to_string();
        assert!(parts.iter().all(|p| said.contains(p)), "{said:?} lacks one of {parts:?}");
    };
    check(decode(DType::Q4_0, &[0; 17], &mut out), &["32 elements of Q4_0", "18 bytes", "17 were given"]);
    check(
        decode(DType::Q4_0, &[0; 18], &mut out[..31]),
        &["31 elements", "Q4_0 blocks of 32", "pad the row"],
    );
    check(decode(DType::I32, &[0; 128], &mut out), &["I32 is an integer type"]);
    check(encode(DType::F16, &out, &mut [0; 63]), &["take 64 bytes"]);
    check(encode(DType::U8, &out, &mut [0; 32]), &["U8 is an integer type", "choose a float type"]);
}

#[test]
fn tables_of_what_can_be_done_are_true() {
    for dtype in DType::ALL {
        let n = dtype.block_len();
        let mut bytes = vec![0; dtype.bytes_for(n).unwrap()];
        let mut x = vec![0.0; n];
        assert_eq!(decode(dtype, &bytes, &mut x).is_ok(), can_decode(dtype), "{dtype}");
        assert_eq!(encode(dtype, &x, &mut bytes).is_ok(), can_encode(dtype), "{dtype}");
        assert_eq!(decode(dtype, &[], &mut []).is_ok(), can_decode(dtype), "{dtype}: no elements");
    }
}

/// The root mean square of `x`, in f64.
fn rms(x: impl ExactSizeIterator<Item = f32>) -> f64 {
    let n = x.len() as f64;
    (x.map(|v| f64::from(v).powi(2)).sum::<f64>() / n).sqrt()
}

/// The bound for each format and each kind of weights is the error of llama.cpp's own encoder on the same numbers,
/// measured by `scripts/goldens/formats_encode_error.py`. Where that has no search either, the codes are the same and
/// so is the error, but for the order of sums.
#[test]
fn encoding_errs_no_more_than_llama_cpp() {
    let (n, file) = golden("weights");
    let x = floats(&file);
    assert_eq!(x.len(), n * 256);
    let table = include_str!("golden/encode_error.txt");
    let mut lines = 0;
    for line in table.lines().filter(|l| !l.starts_with('#')) {
        let mut words = line.split(' ');
        let (kind, first, blocks) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
        let (first, blocks): (usize, usize) = (first.parse().unwrap(), blocks.parse().unwrap());
        let dtype = DType::from_name(words.next().unwrap()).unwrap();
        let theirs: f64 = words.next().unwrap().parse().unwrap();
        let x = &x[first * 256..(first + blocks) * 256];
        let mut bytes = vec![0; dtype.bytes_for(x.len()).unwrap()];
        encode(dtype, x, &mut bytes).unwrap();
        let mut y = vec![0.0; x.len()];
        decode(dtype, &bytes, &mut y).unwrap();
        let ours = rms(x.iter().zip(&y).map(|(a, b)| a - b)) / rms(x.iter().copied());
        println!("{kind} {dtype}: {ours:.6}, llama.cpp {theirs:.6}, {:.4}", ours / theirs);
        assert!(
            ours <= theirs * 1.0001,
            "{dtype} on {kind} weights: {ours} of their size, llama.cpp {theirs}"
        );
        lines += 1;
    }
    assert!(lines >= 48, "{lines} lines in the table");
}

/// Zeros, equal numbers, tiny and huge ones, a single one: the error stays below a code's step of the largest
/// (and what f16 scales cannot hold).
#[test]
fn odd_blocks_encode() {
    let mut single = [0.0; 256];
    single[100] = -3.0;
    let rows: [(&str, [f32; 256]); 7] = [
        ("zeros", [0.0; 256]),
        ("equal", [0.7; 256]),
        ("equal and negative", [-0.7; 256]),
        ("tiny", std::array::from_fn(|i| 1e-40 * (i as f32 - 100.0))),
        ("large", std::array::from_fn(|i| 1e2 * (i as f32 - 100.0))),
        ("single", single),
        ("one group", std::array::from_fn(|i| if i < 16 { i as f32 } else { 0.0 })),
    ];
    for dtype in DType::ALL.into_iter().filter(|d| d.is_block()) {
        // Of the largest magnitude: the widest gap between values of the format, scales of 4 bits included.
        let bound = match dtype {
            // The widest step of 64 numbers of one sign, and of those that the search lets go over the end.
            DType::Q2_K | DType::S2_64 => 0.35,
            DType::Q3_K | DType::S3_64 => 0.15,
            DType::IQ4_NL | DType::IQ4_XS => 0.13,
            // Half the gap from -1 to -0.696, and a step of the scales' own code.
            DType::NF4 => 0.17,
            _ => 0.07,
        };
        // What has one sign alone takes no numbers of the other.
        let signs = |x: &[f32]| dtype != DType::DYN8U || x.iter().all(|&v| v >= 0.0);
        for (name, x) in rows.iter().filter(|(_, x)| signs(x)) {
            let mut bytes = vec![0; dtype.bytes_for(256).unwrap()];
            encode(dtype, x, &mut bytes).unwrap();
            let mut y = [f32::NAN; 256];
            decode(dtype, &bytes, &mut y).unwrap();
            let largest = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            for (a, b) in x.iter().zip(&y) {
                assert!((a - b).abs() <= bound * largest + 1e-6, "{dtype}, {name}: {a} became {b}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Any bytes decode without a panic: rows come from files.
    #[test]
    fn any_block_decodes(bytes in proptest::collection::vec(any::<u8>(), 292)) {
        for dtype in DType::ALL.into_iter().filter(|&d| can_decode(d)) {
            let mut out = vec![0.0; dtype.block_len()];
            decode(dtype, &bytes[..dtype.bytes_for(out.len()).unwrap()], &mut out).unwrap();
        }
    }

    /// Nearest rounding errs by half a step at most (a whole one where 8-value ranges are cut at 7).
    #[test]
    fn nearest_is_within_a_step(x in proptest::collection::vec(-1.0f32..1.0, 32)) {
        for (dtype, steps) in [(DType::Q4_0, 8.0), (DType::Q4_1, 15.0), (DType::Q5_0, 16.0), (DType::Q5_1, 31.0), (DType::Q8_0, 127.0)] {
            let mut bytes = vec![0; dtype.block_bytes()];
            encode(dtype, &x, &mut bytes).unwrap();
            let mut y = vec![0.0; 32];
            decode(dtype, &bytes, &mut y).unwrap();
            let (lo, hi) = x.iter().fold((0.0f32, 0.0f32), |(a, b), &v| (a.min(v), b.max(v)));
            let reach = if matches!(dtype, DType::Q4_1 | DType::Q5_1) { hi - lo } else { hi.max(-lo) };
            // The scale and the minimum are f16: 2^-11 relative each.
            let bound = reach / steps + 2.0 * reach.max(hi).max(-lo) / 2048.0 + 1e-7;
            for (a, b) in x.iter().zip(&y) {
                prop_assert!((a - b).abs() <= bound, "{dtype}: {a} became {b}, bound {bound}");
            }
        }
    }

    /// Any numbers encode without a panic, NaN and infinities included.
    #[test]
    fn any_numbers_encode(bits in proptest::collection::vec(any::<u32>(), 256)) {
        let x: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        for dtype in DType::ALL.into_iter().filter(|&d| can_encode(d)) {
            encode(dtype, &x, &mut vec![0; dtype.bytes_for(256).unwrap()]).unwrap();
        }
    }

    /// Plain types: a value that the type holds comes back as it was.
    #[test]
    fn plain_types_round_trip(bits in proptest::collection::vec(any::<u16>(), 0..600)) {
        for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
            let x: Vec<f32> = bits.iter().map(|&b| match dtype {
                DType::BF16 => sparsam_dtype::bf16::from_bits(b).to_f32(),
                _ => f16::from_bits(b).to_f32(),
            }).collect();
            let mut bytes = vec![0; dtype.bytes_for(x.len()).unwrap()];
            encode(dtype, &x, &mut bytes).unwrap();
            let mut y = vec![0.0; x.len()];
            decode(dtype, &bytes, &mut y).unwrap();
            for (a, b) in x.iter().zip(&y) {
                prop_assert!(a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan(), "{dtype}: {a} became {b}");
            }
        }
    }
}
