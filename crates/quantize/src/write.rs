//! The finished model: a GGUF file, or a folder in GPTQ's layout.

use crate::Error;
use crate::partial::values;
use crate::stream::Job;
use serde_json::{Value, json};
use sparsam_dtype::{DType, f16};
use sparsam_engine::{Folder, Saver, sidecars};
use sparsam_formats::{Kind, TensorSpec, Transform, gguf, gptq};
use sparsam_tokenizer::Tokenizer;
use std::path::Path;

enum Entry {
    /// A tensor of the plan.
    Planned(usize),
    /// A tensor of the source that is no parameter.
    Copied(String),
}

impl Job<'_> {
    /// Writes the model as a GGUF file. A GGUF source's own metadata are `metadata` in full, and its tensors keep their
    /// order; of a safetensors source `metadata` are the keys to be added to what its configuration and `tokenizer` say.
    ///
    /// # Errors
    /// If the disk is full, a partial result is missing, or GGUF cannot hold the configuration.
    pub fn write_gguf(
        &self,
        out: &Path,
        metadata: &gguf::Metadata,
        tokenizer: Option<&Tokenizer>,
    ) -> Result<(), Error> {
        if self.source.gguf_metadata().is_none() {
            return self.save_gguf(out, metadata, tokenizer);
        }
        let mut order: Vec<Entry> = Vec::new();
        for info in self.source.tensors() {
            // Others are rotary frequencies and the like, which only GGUF's readers know.
            order.push(match self.plan.iter().position(|p| p.spec.source_name == info.name) {
                Some(i) => Entry::Planned(i),
                None => Entry::Copied(info.name.clone()),
            });
        }
        let mut specs = Vec::new();
        for entry in &order {
            specs.push(match entry {
                Entry::Planned(i) => self.gguf_spec(*i),
                Entry::Copied(name) => TensorSpec::from(self.source.require(name)?.info),
            });
        }
        let mut writer = gguf::Writer::create(out, metadata, &specs)?;
        for (entry, spec) in order.iter().zip(&specs) {
            match entry {
                Entry::Planned(i) => {
                    let s = self.result(*i)?;
                    let back = self.gguf_transform(*i).inverse();
                    let turned = back.apply(&s.bytes, s.dtype, &s.shape)?;
                    writer.append(&spec.name, &turned.bytes)?;
                }
                Entry::Copied(name) => writer.append(name, self.source.require(name)?.bytes)?,
            }
        }
        Ok(writer.finish()?)
    }

    fn save_gguf(
        &self,
        out: &Path,
        about: &gguf::Metadata,
        tokenizer: Option<&Tokenizer>,
    ) -> Result<(), Error> {
        let of = |name: &str| self.plan.iter().find(|p| p.spec.name == name).map_or(DType::F32, |p| p.to);
        let mut plan = sparsam_engine::Plan::new(self.model, |p| of(&p.name))?;
        plan.about = about.clone();
        let mut saver = Saver::create(out, Kind::Gguf, self.model, tokenizer, &plan)?;
        while let Some(name) = saver.next().map(|t| t.name.clone()) {
            let i = self.plan.iter().position(|p| p.spec.name == name);
            let s = self.result(i.unwrap_or_else(|| unreachable!("{name} is a parameter, so planned")))?;
            saver.append(&name, &s.shape, s.dtype, &s.bytes)?;
        }
        Ok(saver.finish()?)
    }

    pub(crate) fn gguf_transform(&self, i: usize) -> Transform {
        let name = &self.plan[i].spec.name;
        let stored = self.model.stored_as(Kind::Gguf, name);
        stored.unwrap_or_else(|| unreachable!("{name} is a parameter of the model")).1
    }

    fn gguf_spec(&self, i: usize) -> TensorSpec {
        let plan = &self.plan[i];
        let shape = self.gguf_transform(i).inverse().shape(&plan.spec.shape);
        TensorSpec { name: plan.gguf_name.clone(), shape, dtype: plan.to }
    }

    /// Writes a folder in GPTQ's layout, of a plan by [`crate::recipe::plan_gptq`]; `about` goes into
    /// `quantize_config.json`, under `meta`.
    ///
    /// # Errors
    /// If there is a folder at `out` that is not empty, the disk is full, or a partial result is missing.
    pub fn write_gptq(&self, out: &Path, tokenizer: Option<&Tokenizer>, about: &Value) -> Result<(), Error> {
        let Some(plain) = self.plan.iter().find_map(|p| p.plain) else {
            return Err(Error::Layout("nothing of this plan is in GPTQ's layout".into()));
        };
        let whole = self.plan.iter().filter_map(|p| Some((p.plain?, p.spec.shape[1])));
        let whole_rows = whole.clone().all(|(p, cols)| p.group == cols);
        let group = if whole_rows { -1 } else { plain.group as i64 };
        let settings = gptq::Settings {
            bits: plain.bits,
            group: (group > 0).then_some(plain.group),
            whole_zeros: false,
        };
        let config = json!({
            "bits": plain.bits,
            "group_size": group,
            "desc_act": false,
            "static_groups": true,
            "sym": plain.symmetric,
            "lm_head": false,
            "true_sequential": true,
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            "meta": about,
        });
        let mut specs = Vec::new();
        for p in self.plan {
            let spec = |part: &str, shape: Vec<usize>, dtype: DType| TensorSpec {
                name: format!("{}.{part}", p.spec.name.trim_end_matches(".weight")),
                shape,
                dtype,
            };
            match (p.plain, &p.spec.shape[..]) {
                (Some(plain), &[rows, cols]) => {
                    let (bits, groups) = (plain.bits as usize, plain.groups(cols));
                    specs.push(spec("qweight", vec![cols * bits / 32, rows], DType::I32));
                    specs.push(spec("qzeros", vec![groups, rows * bits / 32], DType::I32));
                    specs.push(spec("scales", vec![groups, rows], DType::F16));
                    specs.push(spec("g_idx", vec![cols], DType::I32));
                }
                _ => {
                    let (name, transform) = self.hf(&p.spec.name);
                    specs.push(TensorSpec {
                        name,
                        shape: transform.inverse().shape(&p.spec.shape),
                        dtype: DType::F16,
                    });
                }
            }
        }
        let plan = sparsam_engine::Plan::uniform(self.model, Kind::Safetensors, DType::F16)?;
        let mut files = sidecars(out, self.model, tokenizer, &plan)?;
        for (name, bytes) in &mut files {
            if *name == "config.json" {
                let read = serde_json::from_slice::<Value>(bytes);
                let mut value = read.unwrap_or_else(|e| unreachable!("config.json was written here: {e}"));
                value["quantization_config"] = config.clone();
                *bytes = format!("{value:#}\n").into_bytes();
            }
        }
        files.push(("quantize_config.json", format!("{config:#}\n").into_bytes()));
        let mut folder = Folder::create(out, specs.clone(), plan.shard_bytes, files)?;
        let mut names = specs.iter().map(|s| s.name.as_str());
        let mut append = |bytes: &[u8]| folder.append(names.next().unwrap_or_default(), bytes);
        for (i, p) in self.plan.iter().enumerate() {
            if let Some(plain) = p.plain {
                let rounded = self.rounded(i, plain)?;
                let (scales, zeros) = rounded.scales_and_zeros();
                let settings = gptq::Settings { group: Some(plain.group), ..settings };
                let packed = gptq::pack(&settings, rounded.cols, &rounded.codes, &scales, &zeros);
                for bytes in [&packed.qweight, &packed.qzeros, &packed.scales, &packed.g_idx] {
                    append(bytes)?;
                }
            } else {
                let s = self.result(i)?;
                let half: Vec<u8> =
                    values(&s)?.into_iter().flat_map(|v| f16::from_f32(v).to_le_bytes()).collect();
                let turned = self.hf(&p.spec.name).1.inverse().apply(&half, DType::F16, &s.shape)?;
                append(&turned.bytes)?;
            }
        }
        Ok(folder.finish()?)
    }

    fn hf(&self, name: &str) -> (String, Transform) {
        let stored = self.model.stored_as(Kind::Safetensors, name);
        stored.unwrap_or_else(|| unreachable!("{name} is a parameter of the model"))
    }
}
