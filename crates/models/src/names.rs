//! The names of weights in Hugging Face's checkpoints and in GGUF files, and what differs in how they are stored.
//!
//! Inside, a weight has the name and the layout that transformers gives it (a linear layer is (out, in) everywhere). A
//! model file lists its weights once, as [`Rule`]s; which of them exist, and in what shape, is not listed a second time
//! but read off the traced model.

use sparsam_formats::Transform;

/// One line of a model's map of names; `{}` stands for the layer.
#[derive(Clone, Debug)]
pub struct Rule {
    /// As transformers names it.
    pub name: &'static str,
    /// As llama.cpp's converter names it.
    pub gguf: &'static str,
    /// From the GGUF file's layout to ours.
    pub from_gguf: Transform,
    /// From the safetensors file's layout to ours.
    pub from_hf: Transform,
}

impl Rule {
    /// Stored alike in both worlds.
    pub const fn new(name: &'static str, gguf: &'static str) -> Rule {
        Rule { name, gguf, from_gguf: Transform::None, from_hf: Transform::None }
    }

    /// The GGUF file holds it in another layout.
    pub const fn from_gguf(self, transform: Transform) -> Rule {
        Rule { from_gguf: transform, ..self }
    }

    /// The safetensors file holds it in another layout.
    pub const fn from_hf(self, transform: Transform) -> Rule {
        Rule { from_hf: transform, ..self }
    }
}

/// The rule for `name`, and the name that it has in a GGUF file.
pub(crate) fn find<'r>(rules: &'r [Rule], name: &str) -> Option<(&'r Rule, String)> {
    let (pattern, layer) = split_layer(name);
    let rule = rules.iter().find(|r| r.name == pattern)?;
    let gguf = match layer {
        Some(layer) => rule.gguf.replace("{}", layer),
        None => rule.gguf.to_string(),
    };
    Some((rule, gguf))
}

/// `model.layers.7.mlp.up_proj.weight` as `model.layers.{}.mlp.up_proj.weight` and `7`.
fn split_layer(name: &str) -> (String, Option<&str>) {
    let layer = name.split('.').find(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()));
    let parts: Vec<&str> = name.split('.').map(|p| if Some(p) == layer { "{}" } else { p }).collect();
    (parts.join("."), layer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_carried_over() {
        let rules = [
            Rule::new("model.norm.weight", "output_norm.weight"),
            Rule::new("model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight"),
        ];
        let gguf = |name| find(&rules, name).map(|(_, gguf)| gguf);
        assert_eq!(gguf("model.layers.12.mlp.up_proj.weight").unwrap(), "blk.12.ffn_up.weight");
        assert_eq!(gguf("model.norm.weight").unwrap(), "output_norm.weight");
        assert_eq!(gguf("model.layers.mlp.up_proj.weight"), None);
        assert_eq!(gguf("model.layers.1.mlp.up_proj.bias"), None);
    }
}
