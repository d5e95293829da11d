//! How fast a mixture of types would write, from a short measurement of this machine.
//!
//! A generated token multiplies one row of activations with every matrix once, so its time is a sum: the bytes of each
//! matrix over the rate at which products with its type run here ([`Device::product_rate`], the real kernels at the
//! model's own shapes), and what lies beside the products (attention, norms), which no choice of types changes.

use crate::Error;
use crate::budget::CANDIDATES;
use crate::recipe::{TensorPlan, is_rounded};
use sparsam_dtype::DType;
use sparsam_models::Model;
use sparsam_runtime::Device;
use std::collections::BTreeMap;

/// What a token takes on this machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Speed {
    /// Bytes of weights per second, by type.
    rates: BTreeMap<DType, f64>,
    /// Seconds of a token beside its products.
    beside: f64,
    /// The table of an embedding that no product reads.
    table: Option<String>,
}

impl Speed {
    /// Measures products with each type that a budget may choose, at the shapes of `plan`; `beside` are the seconds of a
    /// token that are no products. Takes a tenth of a second a type, and memory for 100 MB of weights.
    ///
    /// # Errors
    /// If the model's weights do not fit its configuration.
    pub fn measure(device: &Device, model: &Model, plan: &[TensorPlan], beside: f64) -> Result<Speed, Error> {
        let table = match model.facts().tied_head {
            true => None,
            false => model.parameters()?.into_iter().next().map(|p| p.name),
        };
        let mut speed = Speed { rates: BTreeMap::new(), beside, table };
        // Blocks first: of a large vocabulary there is more than is measured.
        let mut shapes: Vec<(bool, [usize; 2])> = plan
            .iter()
            .filter(|p| speed.multiplies(p))
            .map(|p| (!p.gguf_name.starts_with("blk."), [p.spec.shape[0], p.spec.shape[1]]))
            .collect();
        shapes.sort_by_key(|(head, _)| *head);
        for dtype in CANDIDATES.into_iter().chain([DType::F16]) {
            let fits = |[_, cols]: &[usize; 2]| cols.is_multiple_of(dtype.block_len());
            let fitting: Vec<[usize; 2]> = shapes.iter().map(|(_, s)| *s).filter(fits).collect();
            // What fits no block stays F16.
            let wanted = dtype.is_block() || shapes.iter().any(|(_, [_, cols])| !cols.is_multiple_of(32));
            if wanted && !fitting.is_empty() {
                speed.rates.insert(dtype, device.product_rate(dtype, &fitting)?);
            }
        }
        Ok(speed)
    }

    /// Whether every token reads all of the tensor.
    fn multiplies(&self, p: &TensorPlan) -> bool {
        is_rounded(&p.spec) && self.table.as_ref() != Some(&p.spec.name)
    }

    /// Seconds that a token's product with the tensor takes if it is stored as `dtype`; 0 for what no product reads.
    pub fn seconds(&self, p: &TensorPlan, dtype: DType) -> f64 {
        match self.rates.get(&dtype) {
            Some(rate) if self.multiplies(p) => dtype.bytes_for(p.numel()).unwrap_or(0) as f64 / rate,
            _ => 0.0,
        }
    }

    /// Tokens per second where products take `seconds` a token.
    pub fn tokens_per_second(&self, seconds: f64) -> f64 {
        1.0 / (seconds + self.beside)
    }

    /// Seconds a token that are left for products at `tokens_per_second`; below 0 where there is no time for any.
    pub fn for_products(&self, tokens_per_second: f64) -> f64 {
        1.0 / tokens_per_second - self.beside
    }

    /// Rates (bytes per second) and seconds beside products that are known; `table` is the embedding that no product reads.
    pub fn known(rates: &[(DType, f64)], beside: f64, table: Option<&str>) -> Speed {
        Speed { rates: rates.iter().copied().collect(), beside, table: table.map(Into::into) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sparsam_formats::Transform;
    use sparsam_models::WeightSpec;

    fn tensor(name: &str, shape: &[usize]) -> TensorPlan {
        let spec = WeightSpec {
            name: name.into(),
            shape: shape.to_vec(),
            source_name: name.into(),
            transform: Transform::None,
        };
        TensorPlan {
            spec,
            gguf_name: name.into(),
            from: DType::F32,
            to: DType::Q8_0,
            wanted: None,
            plain: None,
        }
    }

    /// 64 x 32 weights in Q8_0 are 2176 bytes: 1 ms at 2.176 MB/s, half of it in Q4_0 at 2.304 MB/s; 3 ms beside.
    #[test]
    fn a_token_takes_the_sum_of_its_parts() {
        let rates = [(DType::Q8_0, 2.176e6), (DType::Q4_0, 2.304e6)];
        let speed = Speed::known(&rates, 3e-3, Some("table"));
        let matrix = tensor("blk.0.w", &[64, 32]);
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-9 * b.abs().max(1.0), "{a} not {b}");
        near(speed.seconds(&matrix, DType::Q8_0), 1e-3);
        near(speed.seconds(&matrix, DType::Q4_0), 0.5e-3);
        near(speed.tokens_per_second(1e-3), 250.0);
        near(speed.for_products(250.0), 1e-3);
        assert!(speed.for_products(400.0) < 0.0);
        assert_eq!(speed.seconds(&tensor("table", &[64, 32]), DType::Q8_0), 0.0, "rows are looked up");
        assert_eq!(speed.seconds(&tensor("norm", &[64]), DType::Q8_0), 0.0);
    }
}
