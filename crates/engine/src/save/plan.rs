//! Which tensors are to be written, and in what types.

use crate::Error;
use sparsam_dtype::DType;
use sparsam_formats::{Kind, Source, TensorSpec, gguf};
use sparsam_models::{Model, Parameter};
use std::collections::HashMap;
use std::path::Path;

/// What is to be written.
#[derive(Clone, Debug)]
pub struct Plan {
    /// All parameters of the model, in the order in which they will be given: the graph's names and shapes, the types
    /// that the file shall hold.
    pub tensors: Vec<TensorSpec>,
    /// `general.*` keys of a GGUF file: name, author, licence. The saver adds architecture and type.
    pub about: gguf::Metadata,
    /// A safetensors folder has a second file once the first would grow beyond this.
    pub shard_bytes: u64,
    /// Probe dialogues are kept with the model: what was trained with a template depends on it.
    pub probes: bool,
}

/// Hugging Face's own limit.
const SHARD_BYTES: u64 = 5_000_000_000;

impl Plan {
    /// All parameters of `model`, each in what [`storable`] makes of `wanted`.
    ///
    /// # Errors
    /// If the configuration's shapes do not fit together.
    pub fn uniform(model: &Model, kind: Kind, wanted: DType) -> Result<Plan, Error> {
        Plan::new(model, |p| storable(kind, p, wanted))
    }

    /// All parameters of `model` in the types that `dtype` gives.
    ///
    /// # Errors
    /// If the configuration's shapes do not fit together.
    pub fn new(model: &Model, dtype: impl Fn(&Parameter) -> DType) -> Result<Plan, Error> {
        let spec = |p: Parameter| {
            let dtype = dtype(&p);
            TensorSpec { name: p.name, shape: p.shape, dtype }
        };
        let tensors = model.parameters()?.into_iter().map(spec).collect();
        Ok(Plan { tensors, about: gguf::Metadata::default(), shard_bytes: SHARD_BYTES, probes: false })
    }

    /// The same plan with what `source` says about itself: the `general.*` keys of a GGUF file.
    pub fn about(mut self, source: &Source) -> Plan {
        /// What the saver says itself, because it may change.
        const OWN: [&str; 4] = [
            "general.architecture",
            "general.file_type",
            "general.quantization_version",
            "general.alignment",
        ];
        let keys = source.gguf_metadata().into_iter().flat_map(|m| m.iter());
        for (key, value) in keys.filter(|(key, _)| key.starts_with("general.") && !OWN.contains(key)) {
            self.about.insert(key, value.clone());
        }
        self
    }

    /// The same plan with probe dialogues ([`crate::Probes`]).
    pub fn with_probes(self) -> Plan {
        Plan { probes: true, ..self }
    }

    /// That the plan is the list of the model's parameters, in any order.
    pub(super) fn check(&self, path: &Path, model: &Model) -> Result<(), Error> {
        let fail = |what: String| Err(Error::Save { path: path.to_path_buf(), what });
        let mut wanted: HashMap<String, Vec<usize>> =
            model.parameters()?.into_iter().map(|p| (p.name, p.shape)).collect();
        for t in &self.tensors {
            match wanted.remove(&t.name) {
                None => {
                    return fail(format!(
                        "tensor {} is planned twice, or the model has none of that name",
                        t.name
                    ));
                }
                Some(shape) if shape != t.shape => {
                    return fail(format!(
                        "tensor {} is planned as {:?}, the model's is {shape:?}",
                        t.name, t.shape
                    ));
                }
                Some(_) => {}
            }
        }
        match wanted.keys().min() {
            Some(name) => fail(format!("the model's tensor {name} is not planned")),
            None => Ok(()),
        }
    }

    /// The type that most of the weights have.
    pub(super) fn main_dtype(&self) -> DType {
        let mut numbers: HashMap<DType, usize> = HashMap::new();
        for t in &self.tensors {
            *numbers.entry(t.dtype).or_default() += t.shape.iter().product::<usize>();
        }
        numbers.into_iter().max_by_key(|&(dtype, n)| (n, dtype)).map_or(DType::F32, |(dtype, _)| dtype)
    }
}

/// The type in which a file of `kind` holds a parameter of which `wanted` is asked.
///
/// A GGUF file holds vectors (norms, biases) in F32 and never rounds a table of positions; where rows are no whole
/// number of blocks, the next type with smaller blocks serves, as in llama.cpp's `llama-quantize`. A safetensors file
/// holds plain numbers: where blocks are asked, F32, which is exact.
pub fn storable(kind: Kind, parameter: &Parameter, wanted: DType) -> DType {
    use DType::*;
    if kind == Kind::Safetensors {
        return if wanted.is_block() { F32 } else { wanted };
    }
    if parameter.shape.len() < 2 {
        return F32;
    }
    if wanted.is_block() && parameter.name.ends_with("wpe.weight") {
        return F32;
    }
    let row = parameter.shape.last().copied().unwrap_or(0);
    let mut dtype = wanted;
    while !row.is_multiple_of(dtype.block_len()) {
        dtype = match dtype {
            Q2_K | Q3_K | IQ4_XS => IQ4_NL,
            Q4_K => Q5_0,
            Q5_K => Q5_1,
            Q6_K | Q8_K => Q8_0,
            _ => F16,
        };
    }
    dtype
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_fit_their_rows() {
        let of = |kind, name: &str, shape: &[usize], wanted| {
            storable(kind, &Parameter { name: name.into(), shape: shape.to_vec() }, wanted)
        };
        use DType::*;
        for (name, shape, wanted, gguf, hf) in [
            ("w", &[2, 256][..], Q4_K, Q4_K, F32),
            ("w", &[2, 576], Q4_K, Q5_0, F32),
            ("w", &[2, 576], Q6_K, Q8_0, F32),
            ("w", &[2, 576], Q2_K, IQ4_NL, F32),
            ("w", &[2, 24], Q4_K, F16, F32),
            ("w", &[2, 24], BF16, BF16, BF16),
            ("norm", &[576], Q8_0, F32, F32),
            ("norm", &[576], BF16, F32, BF16),
            ("transformer.wpe.weight", &[8, 64], Q8_0, F32, F32),
        ] {
            assert_eq!(of(Kind::Gguf, name, shape, wanted), gguf, "{name} {shape:?} {wanted}");
            assert_eq!(of(Kind::Safetensors, name, shape, wanted), hf, "{name} {shape:?} {wanted}");
        }
    }
}
