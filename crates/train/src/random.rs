//! Seeded numbers that are the same on every machine: initial weights, the order of the data, samples.

/// SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators"): one addition and one mix a number.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl Random {
    /// The stream of `seed` that is called `name` and has number `index`: streams of other names or numbers share
    /// nothing with it.
    pub fn new(seed: u64, name: &str, index: u64) -> Random {
        // FNV-1a over the name, then both mixed in.
        let hash =
            name.bytes().fold(0xCBF2_9CE4_8422_2325_u64, |h, b| (h ^ b as u64).wrapping_mul(0x100_0000_01B3));
        Random(mix(mix(seed ^ hash).wrapping_add(index.wrapping_mul(0x9E37_79B9_7F4A_7C15))))
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in `0 .. n` (Lemire 2019 without the rejection: the bias is below n / 2^64).
    pub fn below(&mut self, n: u64) -> u64 {
        ((self.next() as u128 * n as u128) >> 64) as u64
    }

    /// Two independent standard normal numbers (Box & Muller 1958).
    pub fn normals(&mut self) -> [f64; 2] {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * self.uniform()).sin_cos();
        [radius * cos, radius * sin]
    }

    /// `0 .. n` in a random order (Fisher & Yates).
    pub fn permutation(&mut self, n: u32) -> Vec<u32> {
        let mut order: Vec<u32> = (0..n).collect();
        for i in (1..n as usize).rev() {
            order.swap(i, self.below(i as u64 + 1) as usize);
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_is_the_published_one() {
        // The first numbers of SplitMix64 with seed 1234567, as printed with its reference implementation.
        let mut r = Random(1234567);
        assert_eq!([r.next(), r.next()], [6457827717110365317, 3203168211198807973]);
    }

    #[test]
    fn streams_differ_and_normals_are_normal() {
        assert_ne!(Random::new(1, "a", 0).next(), Random::new(1, "b", 0).next());
        assert_ne!(Random::new(1, "a", 0).next(), Random::new(1, "a", 1).next());
        let mut r = Random::new(7, "normals", 0);
        let x: Vec<f64> = (0..50_000).flat_map(|_| r.normals()).collect();
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        let variance = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
        // Standard errors: 0.003 and 0.0045.
        assert!(mean.abs() < 0.015 && (variance - 1.0).abs() < 0.025, "{mean} {variance}");
    }

    #[test]
    fn permutations_hold_every_index_once() {
        let mut p = Random::new(3, "p", 0).permutation(1000);
        assert_ne!(p[..10], (0..10).collect::<Vec<_>>());
        p.sort_unstable();
        assert_eq!(p, (0..1000).collect::<Vec<_>>());
    }
}
