//! GPTQ's packed layout, held to AutoGPTQ's loops in NumPy (`scripts/goldens/gptq_layout.py`).

use sparsam_dtype::f16;
use sparsam_formats::gptq::{Settings, pack, unpack};

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, n: usize) -> &'a [u8] {
        let (front, rest) = self.0.split_at(n);
        self.0 = rest;
        front
    }
    fn u32(&mut self) -> usize {
        u32::from_le_bytes(self.bytes(4).try_into().unwrap()) as usize
    }
    fn sized(&mut self) -> &'a [u8] {
        let n = self.u32();
        self.bytes(n)
    }
}

#[test]
fn packs_and_unpacks_as_autogptq() {
    let mut r = Reader(include_bytes!("golden/gptq_layout.bin"));
    let cases = r.u32();
    assert_eq!(cases, 5);
    for _ in 0..cases {
        let [bits, group, n_in, n_out] = [(); 4].map(|()| r.u32());
        let groups = n_in / group;
        let codes = r.bytes(n_in * n_out);
        let scales: Vec<f32> =
            r.bytes(4 * groups * n_out).as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let zeros = r.bytes(groups * n_out);
        let [qweight, qzeros, packed_scales, g_idx] = [(); 4].map(|()| r.sized());
        let weights = r.bytes(2 * n_in * n_out);
        let what = format!("{bits} bits, groups of {group}, {n_out} x {n_in}");

        let settings = Settings { bits: bits as u32, group: Some(group), whole_zeros: false };
        let packed = pack(&settings, n_in, codes, &scales, zeros);
        assert_eq!(packed.qweight, qweight, "{what}: qweight");
        assert_eq!(packed.qzeros, qzeros, "{what}: qzeros");
        assert_eq!(packed.scales, packed_scales, "{what}: scales");
        assert_eq!((&packed.g_idx[..], packed.groups), (g_idx, groups), "{what}: g_idx");

        for g_idx in [Some(g_idx), None] {
            let got = unpack(&settings, n_in, qweight, qzeros, packed_scales, g_idx).unwrap();
            assert_eq!(got.codes, codes, "{what}: codes");
            let values: Vec<u8> = got.values().iter().flat_map(|v: &f16| v.to_le_bytes()).collect();
            assert_eq!(values, weights, "{what}: weights");
        }
    }
}

#[test]
fn contradictions_are_said() {
    let s = Settings { bits: 4, group: Some(32), whole_zeros: false };
    let good = pack(&s, 64, &[3; 64 * 32], &[0.1; 64], &[8; 64]);
    let try_one = |n_in: usize, qweight: &[u8], qzeros: &[u8], scales: &[u8], g_idx: Option<&[u8]>| {
        unpack(&s, n_in, qweight, qzeros, scales, g_idx).unwrap_err()
    };
    let (w, z, c, g) = (&good.qweight[..], &good.qzeros[..], &good.scales[..], &good.g_idx[..]);
    assert!(try_one(60, w, z, c, Some(g)).contains("60 inputs"));
    assert!(try_one(64, &w[4..], z, c, Some(g)).contains("no layer of 64 inputs at 4 bits"));
    assert!(try_one(64, w, &z[4..], c, Some(g)).contains("do not make groups"));
    assert!(try_one(64, w, z, &[], Some(g)).contains("do not make groups"));
    assert!(try_one(64, w, z, c, Some(&g[4..])).contains("g_idx of 252 bytes"));
    let far: Vec<u8> = (0..64).flat_map(|_| 9i32.to_le_bytes()).collect();
    assert!(try_one(64, w, z, c, Some(&far)).contains("group 9, but has 2 groups"));
}
