//! Which tensor becomes what: the types that llama.cpp's names stand for.
//!
//! `Q4_K_M` and the like are mixtures: a rule chooses a type for each tensor, by its place in the model. The rules here are
//! llama.cpp's (`llama_tensor_get_type` of llama-quant.cpp), so that the same name gives the same types and bytes.

use crate::{Error, Grid, Plain};
use sparsam_dtype::DType;
use sparsam_formats::{Kind, Source};
use sparsam_models::{Model, WeightSpec};

/// What happens to one tensor.
#[derive(Clone, Debug)]
pub struct TensorPlan {
    /// Where it comes from, and its shape.
    pub spec: WeightSpec,
    /// Its name in GGUF.
    pub gguf_name: String,
    /// As it is stored now.
    pub from: DType,
    /// As it will be stored.
    pub to: DType,
    /// The type that the rule chose, where its blocks do not divide the rows.
    pub wanted: Option<DType>,
    /// Rounded to plain groups, GPTQ's layout; `to` is then what products read.
    pub plain: Option<Plain>,
}

impl TensorPlan {
    /// The grid to round to; `None` if the tensor keeps its numbers.
    pub fn grid(&self) -> Option<Grid> {
        if let Some(plain) = self.plain {
            return Some(Grid::Plain(plain));
        }
        (self.to != self.from && self.to.is_block()).then_some(Grid::Block(self.to))
    }

    /// Number of weights.
    pub fn numel(&self) -> usize {
        self.spec.shape.iter().product()
    }

    /// How it will be stored, in words.
    pub fn stored_as(&self) -> String {
        match self.plain {
            None => self.to.to_string(),
            Some(Plain { bits, group, .. }) => format!("{bits} bits in groups of {group}"),
        }
    }

    /// Bytes in the file to be written.
    pub fn bytes(&self) -> usize {
        if let (Some(plain), [rows, cols]) = (self.plain, &self.spec.shape[..]) {
            // Codes, f16 scales, zeros as wide as codes, and the group of each input.
            let (bits, groups) = (plain.bits as usize, plain.groups(*cols));
            return rows * cols * bits / 8 + groups * rows * 2 + groups * rows * bits / 8 + 4 * cols;
        }
        self.to.bytes_for(self.numel()).unwrap_or(0)
    }
}

/// The names that `--type` takes, with llama.cpp's number for `general.file_type`.
pub const TYPES: [(&str, u32); 21] = [
    ("Q4_0", 2),
    ("Q4_1", 3),
    ("Q8_0", 7),
    ("Q5_0", 8),
    ("Q5_1", 9),
    ("Q2_K", 10),
    ("Q3_K_S", 11),
    ("Q3_K_M", 12),
    ("Q3_K_L", 13),
    ("Q4_K_S", 14),
    ("Q4_K_M", 15),
    ("Q5_K_S", 16),
    ("Q5_K_M", 17),
    ("Q6_K", 18),
    ("IQ4_NL", 25),
    ("IQ4_XS", 30),
    ("Q3_K", 12),
    ("Q4_K", 15),
    ("Q5_K", 17),
    ("F16", 1),
    ("BF16", 32),
];

/// The names of this project's own types, which have no number there.
pub const OWN_TYPES: [&str; 3] = ["S2_64", "S3_64", "S4_64"];

/// The number of `name` in `general.file_type`, and its spelling; `None` if there is no such type.
pub fn file_type(name: &str) -> Option<(&'static str, u32)> {
    TYPES.into_iter().find(|(n, _)| n.eq_ignore_ascii_case(name))
}

/// What the type `name` makes of each tensor of the model.
///
/// # Errors
/// If there is no such type, or the model's weights do not fit its configuration.
pub fn plan(model: &Model, source: &Source, name: &str) -> Result<Vec<TensorPlan>, Error> {
    let all = || TYPES.into_iter().map(|(n, _)| n).chain(OWN_TYPES);
    let known = || all().collect::<Vec<_>>().join(", ");
    let name = all()
        .find(|n| n.eq_ignore_ascii_case(name))
        .ok_or_else(|| Error::Type { name: name.to_string(), known: known() })?;
    let facts = model.facts();
    let place = Place {
        n_layers: facts.n_layers(),
        n_gqa: facts.heads.n_heads / facts.heads.n_kv_heads.max(1),
        tied: facts.tied_head,
    };
    plan_with(model, source, |tensor| place.choose(name, tensor))
}

/// The type of each tensor by a rule on the GGUF names of matrices; everything else is F32.
///
/// # Errors
/// If the model's weights do not fit its configuration.
pub fn plan_with(
    model: &Model,
    source: &Source,
    choose: impl Fn(&str) -> DType,
) -> Result<Vec<TensorPlan>, Error> {
    let mut plans = Vec::new();
    for spec in model.weights(source)? {
        let (gguf_name, _) = model
            .stored_as(Kind::Gguf, &spec.name)
            .unwrap_or_else(|| unreachable!("{} is a parameter of the model", spec.name));
        let from = source.require(&spec.source_name)?.info.dtype;
        let matrix = is_rounded(&spec);
        let wanted = if matrix { choose(&gguf_name) } else { DType::F32 };
        let to = match matrix {
            true => fitting(wanted, spec.shape[1]),
            // Norms and biases are few and matter: as exact as they are.
            false => DType::F32,
        };
        plans.push(TensorPlan {
            spec,
            gguf_name,
            from,
            to,
            wanted: (to != wanted).then_some(wanted),
            plain: None,
        });
    }
    Ok(plans)
}

/// GPTQ's layout for the linear layers of all blocks: codes of `bits` bits in groups of `group` inputs (`None`: whole
/// rows). Tables and head are F16, everything else F32. The layout has one size for all layers: where the group does not
/// divide all of their rows, the next smaller multiple of 32 that does.
///
/// # Errors
/// If bits or group are none that the layout has, a layer's sizes are no multiples of 32, or the model keeps its layers
/// transposed.
pub fn plan_gptq(
    model: &Model,
    source: &Source,
    bits: u32,
    group: Option<usize>,
    symmetric: bool,
) -> Result<Vec<TensorPlan>, Error> {
    if ![2, 3, 4, 8].contains(&bits) {
        return Err(Error::Layout(format!("GPTQ's layout has 2, 3, 4 or 8 bits, not {bits}")));
    }
    if group.is_some_and(|g| g == 0 || !g.is_multiple_of(32)) {
        let g = group.unwrap_or_default();
        return Err(Error::Layout(format!(
            "groups of {g}: GPTQ's layout wants a multiple of 32, or whole rows"
        )));
    }
    let layers = model.linear_layers()?;
    let fits = |g: &usize| layers.iter().all(|l| l.n_in.is_multiple_of(*g));
    let common = group.and_then(|g| (1..=g / 32).rev().map(|k| 32 * k).find(fits));
    let mut plans = plan_with(model, source, |_| DType::F16)?;
    for layer in &layers {
        let name = format!("{}.weight", layer.module);
        let Some(p) = plans.iter_mut().find(|p| p.spec.name == name) else { continue };
        let transposed = model
            .stored_as(Kind::Safetensors, &name)
            .is_some_and(|(_, t)| t != sparsam_formats::Transform::None);
        if transposed {
            return Err(Error::Layout(format!(
                "{name} is stored transposed, which GPTQ's layout has no place for; choose a type of GGUF"
            )));
        }
        if !layer.n_in.is_multiple_of(32) || !layer.n_out.is_multiple_of(32) {
            return Err(Error::Layout(format!(
                "{name} is {} by {}: GPTQ's layout packs multiples of 32; choose a type of GGUF",
                layer.n_out, layer.n_in
            )));
        }
        let group = if group.is_none() { layer.n_in } else { common.unwrap_or(32) };
        p.plain = Some(Plain { bits, group, symmetric });
    }
    Ok(plans)
}

/// Whether a tensor is a matrix that may be rounded: not norms and biases, and not the few rows of a table of positions, which
/// llama.cpp adds in F32.
pub(crate) fn is_rounded(spec: &WeightSpec) -> bool {
    spec.shape.len() == 2 && !spec.name.ends_with("wpe.weight")
}

/// The type itself where its blocks divide rows of `cols`; otherwise llama.cpp's substitute, the nearest one from above.
fn fitting(wanted: DType, cols: usize) -> DType {
    let mut dtype = wanted;
    if !cols.is_multiple_of(dtype.block_len()) {
        dtype = match dtype {
            DType::Q2_K | DType::Q3_K | DType::S2_64 | DType::S3_64 | DType::S4_64 => DType::Q4_0,
            DType::IQ4_XS => DType::IQ4_NL,
            DType::Q4_K => DType::Q5_0,
            DType::Q5_K => DType::Q5_1,
            DType::Q6_K => DType::Q8_0,
            other => other,
        };
    }
    if cols.is_multiple_of(dtype.block_len()) { dtype } else { DType::F16 }
}

struct Place {
    n_layers: usize,
    n_gqa: usize,
    tied: bool,
}

impl Place {
    fn choose(&self, name: &str, tensor: &str) -> DType {
        use DType::*;
        let base = match name {
            "Q3_K_S" | "Q3_K_M" | "Q3_K_L" | "Q3_K" => Q3_K,
            "Q4_K_S" | "Q4_K_M" | "Q4_K" => Q4_K,
            "Q5_K_S" | "Q5_K_M" | "Q5_K" => Q5_K,
            other => DType::from_name(other).unwrap_or_else(|| unreachable!("{other} is in the table")),
        };
        if !base.is_block() {
            return base;
        }
        let is_head = tensor == "output.weight" || (self.tied && tensor == "token_embd.weight");
        if is_head {
            return if base == Q8_0 { Q8_0 } else { Q6_K };
        }
        let layer = tensor.strip_prefix("blk.").and_then(|t| t.split('.').next()?.parse::<usize>().ok());
        let Some(i) = layer else { return base };
        let n = self.n_layers;
        let more = i < n / 8 || i >= 7 * n / 8 || (i - n / 8) % 3 == 2;
        let is = |part: &str| tensor.ends_with(&format!("{part}.weight"));
        let name = match name {
            "Q3_K" => "Q3_K_M",
            "Q4_K" => "Q4_K_M",
            "Q5_K" => "Q5_K_M",
            other => other,
        };
        if is("attn_v") {
            return match name {
                "Q2_K" => {
                    if self.n_gqa >= 4 {
                        Q4_K
                    } else {
                        Q3_K
                    }
                }
                "Q3_K_M" => {
                    if i < 2 {
                        Q5_K
                    } else {
                        Q4_K
                    }
                }
                "Q3_K_L" => Q5_K,
                "IQ4_NL" | "IQ4_XS" if self.n_gqa >= 4 => Q5_K,
                "Q4_K_M" | "Q5_K_M" if more => Q6_K,
                "Q4_K_S" if i < 4 => Q5_K,
                _ => base,
            };
        }
        if is("ffn_down") {
            return match name {
                "Q2_K" => Q3_K,
                "Q3_K_M" if i < n / 16 => Q5_K,
                "Q3_K_M" => Q4_K,
                "Q3_K_L" => Q5_K,
                "Q4_K_M" | "Q5_K_M" if more => Q6_K,
                "Q4_K_S" if i < n / 8 => Q5_K,
                "IQ4_NL" | "IQ4_XS" if i < n / 8 => Q5_K,
                _ => base,
            };
        }
        if is("attn_output") {
            return match name {
                "Q2_K" => Q3_K,
                "Q3_K_M" => Q4_K,
                "Q3_K_L" => Q5_K,
                _ => base,
            };
        }
        base
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// The types of SmolLM2-135M's 211 matrices (30 layers, rows of 576 and 1536) in files that llama-quantize wrote,
    /// counted by the gguf package.
    #[test]
    fn mixtures_have_the_types_of_llama_quantize() {
        use DType::*;
        let place = Place { n_layers: 30, n_gqa: 3, tied: true };
        for (name, want) in [
            ("Q4_0", &[(Q4_0, 210), (Q8_0, 1)][..]),
            ("Q4_K_M", &[(Q5_0, 166), (Q4_K, 16), (Q6_K, 14), (Q8_0, 15)]),
            ("Q3_K_M", &[(Q4_0, 120), (Q5_0, 58), (Q4_K, 29), (Q5_1, 2), (Q5_K, 1), (Q8_0, 1)]),
            ("Q2_K", &[(Q4_0, 180), (Q3_K, 30), (Q8_0, 1)]),
            ("IQ4_XS", &[(IQ4_NL, 180), (IQ4_XS, 27), (Q5_K, 3), (Q8_0, 1)]),
            // Not llama-quantize's: our own.
            ("S3_64", &[(S3_64, 210), (Q8_0, 1)]),
        ] {
            let mut counts: BTreeMap<DType, usize> = BTreeMap::new();
            let mut count = |tensor: &str, cols: usize| {
                *counts.entry(fitting(place.choose(name, tensor), cols)).or_default() += 1;
            };
            count("token_embd.weight", 576);
            for i in 0..30 {
                for part in ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up"] {
                    count(&format!("blk.{i}.{part}.weight"), 576);
                }
                count(&format!("blk.{i}.ffn_down.weight"), 1536);
            }
            assert_eq!(counts, want.iter().copied().collect(), "{name}");
        }
    }
}
