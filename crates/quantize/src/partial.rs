//! The folder for partial results (`OUT.partial`): a file a tensor, each written atomically.
//!
//! `N.tensor` holds the bytes of tensor N of the plan, and `N.json` what was done to it: its presence says that the other is
//! complete. `N.healed` are its bytes after healing, which count once `heal-B.json` of its block B is there.

use crate::budget::layer_of;
use crate::calibrate::Stored;
use crate::grid::Rounded;
use crate::heal::Healed;
use crate::recipe::TensorPlan;
use crate::stream::{Job, Layer};
use crate::{Error, Plain};
use sparsam_dtype::{codec, f16};
use sparsam_formats::{AtomicFile, Source};
use std::io::Write;
use std::path::{Path, PathBuf};

/// The ends of the names of the files in the folder.
const OURS: [&str; 5] = ["tensor", "json", "txt", "tmp", "healed"];

impl Job<'_> {
    /// Makes the folder, empty if it holds results of other settings.
    pub(crate) fn prepare(&self) -> Result<(), Error> {
        let mark = self.partial.join("identity.txt");
        let identity = format!("{}\n{:?} {:?}\n", self.identity, self.method, self.heal);
        if std::fs::read_to_string(&mark).is_ok_and(|found| found == identity) {
            return Ok(());
        }
        let io = |e| Error::Io { what: format!("cannot use {}", self.partial.display()), source: e };
        if self.partial.exists() {
            self.clear().map_err(io)?;
        }
        std::fs::create_dir_all(&self.partial).map_err(io)?;
        save(&mark, identity.as_bytes())
    }

    /// Deletes what this module writes: never what somebody else put there.
    fn clear(&self) -> std::io::Result<()> {
        for entry in std::fs::read_dir(&self.partial)? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| OURS.iter().any(|k| e == *k)) {
                std::fs::remove_file(&path)?;
            }
        }
        Ok(())
    }

    /// Deletes the folder for partial results.
    pub fn clean(&self) {
        // Best effort: the result is in its place. The folder stays if it holds anything else, as it should.
        let _ = self.clear();
        let _ = std::fs::remove_dir(&self.partial);
    }

    /// Takes over what an earlier run has written to `file`, all but the tensors that `anew` names (by GGUF's or Hugging
    /// Face's name): the next [`Job::run`] does these alone.
    ///
    /// # Errors
    /// If the file holds other types than the plan, nothing of those names, or the disk fails.
    pub fn adopt(&self, file: &Source, layers: &[Layer], anew: &[String]) -> Result<(), Error> {
        self.prepare()?;
        for name in anew {
            let known = |p: &&TensorPlan| p.gguf_name == *name || p.spec.name == *name;
            if self.plan.iter().find(known).is_none_or(|p| p.grid().is_none()) {
                return Err(Error::Layout(format!(
                    "no tensor {name} is rounded; names are those of the report"
                )));
            }
        }
        for (i, p) in self.plan.iter().enumerate() {
            let again = anew.iter().any(|n| *n == p.gguf_name || *n == p.spec.name);
            let tensor = file.require(&p.gguf_name)?;
            if tensor.info.dtype != p.to {
                let what = format!(
                    "{}: {} is {} there, {} is asked; give the same type as for that file",
                    file.path().display(),
                    p.gguf_name,
                    tensor.info.dtype,
                    p.to
                );
                return Err(Error::Layout(what));
            }
            let stored = self.gguf_transform(i).apply(tensor.bytes, p.to, &tensor.info.shape)?;
            if p.grid().is_some() && !again && !self.is_done(i) {
                let earlier = layers.iter().find(|l| l.name == p.spec.name);
                let layer = earlier.cloned().unwrap_or_else(|| describe(p));
                self.finish(i, &stored.bytes, &layer)?;
            }
            // Norms that were healed.
            if p.grid().is_none() && self.result(i)?.bytes != *stored.bytes {
                save(&self.path(i, "healed"), &stored.bytes)?;
            }
        }
        for layer in 0..self.model.facts().n_layers() {
            self.mark_healed(&Healed { layer, before: 0.0, after: 0.0, kept: true })?;
        }
        Ok(())
    }

    pub(crate) fn path(&self, i: usize, kind: &str) -> PathBuf {
        self.partial.join(format!("{i:05}.{kind}"))
    }

    pub(crate) fn is_done(&self, i: usize) -> bool {
        self.plan[i].grid().is_none() || self.path(i, "json").exists()
    }

    pub(crate) fn share_done(&self) -> f64 {
        let all: usize = self.plan.iter().filter(|p| p.grid().is_some()).map(TensorPlan::numel).sum();
        let done = (0..self.plan.len()).filter(|&i| self.plan[i].grid().is_some() && self.is_done(i));
        done.map(|i| self.plan[i].numel()).sum::<usize>() as f64 / all.max(1) as f64
    }

    pub(crate) fn layer(&self, i: usize, plan: &TensorPlan) -> Result<Layer, Error> {
        if plan.grid().is_none() {
            return Ok(describe(plan));
        }
        self.read_json(&self.path(i, "json"))
    }

    fn read_json<T: serde::de::DeserializeOwned>(&self, path: &Path) -> Result<T, Error> {
        let damaged = |what: String| Error::Partial { path: path.to_path_buf(), what };
        let bytes = std::fs::read(path).map_err(|e| damaged(e.to_string()))?;
        serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))
    }

    fn heal_mark(&self, layer: usize) -> PathBuf {
        self.partial.join(format!("heal-{layer:05}.json"))
    }

    /// What healing did to a block, if it is done.
    pub(crate) fn healed(&self, layer: usize) -> Result<Option<Healed>, Error> {
        let path = self.heal_mark(layer);
        if path.exists() { self.read_json(&path).map(Some) } else { Ok(None) }
    }

    /// The healed tensors of a block count from now on.
    pub(crate) fn mark_healed(&self, healed: &Healed) -> Result<(), Error> {
        save(&self.heal_mark(healed.layer), &serde_json::to_vec(healed).expect("plain data"))
    }

    /// A tensor as the original has it, in the model's layout.
    pub(crate) fn original(&self, i: usize) -> Result<Stored, Error> {
        let spec = &self.plan[i].spec;
        let tensor = self.source.require(&spec.source_name)?;
        let turned = spec.transform.apply(tensor.bytes, tensor.info.dtype, &tensor.info.shape)?;
        let (dtype, bytes) = (turned.dtype, turned.bytes.into_owned());
        self.source.release(&spec.source_name);
        Ok(Stored { name: spec.name.clone(), shape: spec.shape.clone(), dtype, bytes })
    }

    /// The bytes of a tensor as they are to be written, in the model's layout; of plain groups as [`Plain::read`] takes them.
    pub(crate) fn written(&self, i: usize) -> Result<Vec<u8>, Error> {
        let plan = &self.plan[i];
        let healed = self.path(i, "healed");
        let counts = layer_of(&plan.gguf_name).is_some_and(|l| self.heal_mark(l).exists());
        if plan.grid().is_none() && !(counts && healed.exists()) {
            let original = self.original(i)?;
            if original.dtype == plan.to {
                return Ok(original.bytes);
            }
            let values = values(&original)?;
            let mut bytes = vec![0; plan.bytes()];
            codec::encode(plan.to, &values, &mut bytes)?;
            return Ok(bytes);
        }
        let path = if counts && healed.exists() { healed } else { self.path(i, "tensor") };
        let bytes =
            std::fs::read(&path).map_err(|e| Error::Partial { path: path.clone(), what: e.to_string() })?;
        let want = match plan.plain {
            Some(p) => plan.numel() + 5 * plan.spec.shape[0] * p.groups(plan.spec.shape[1]),
            None => plan.bytes(),
        };
        if bytes.len() != want {
            let what = format!("it has {} bytes instead of {want}", bytes.len());
            return Err(Error::Partial { path, what });
        }
        Ok(bytes)
    }

    /// A tensor of plain groups as it will be.
    pub(crate) fn rounded(&self, i: usize, plain: Plain) -> Result<Rounded, Error> {
        let shape = &self.plan[i].spec.shape;
        let damaged =
            || Error::Partial { path: self.path(i, "tensor"), what: "its length is another".into() };
        plain.read(&self.written(i)?, shape[0], shape[1]).ok_or_else(damaged)
    }

    /// A tensor as it will be, in the model's layout and a type that products read.
    pub(crate) fn result(&self, i: usize) -> Result<Stored, Error> {
        let plan = &self.plan[i];
        let (name, shape, dtype) = (plan.spec.name.clone(), plan.spec.shape.clone(), plan.to);
        let bytes = match plan.plain {
            None => self.written(i)?,
            Some(plain) => {
                let values = self.rounded(i, plain)?.values();
                values.into_iter().flat_map(|v| f16::from_f32(v).to_le_bytes()).collect()
            }
        };
        Ok(Stored { name, shape, dtype, bytes })
    }

    pub(crate) fn finish(&self, i: usize, bytes: &[u8], layer: &Layer) -> Result<(), Error> {
        save(&self.path(i, "tensor"), bytes)?;
        // Its presence says that the tensor is complete.
        save(&self.path(i, "json"), &serde_json::to_vec(layer).expect("plain data"))
    }
}

pub(crate) fn describe(plan: &TensorPlan) -> Layer {
    Layer {
        name: plan.spec.name.clone(),
        from: plan.from.to_string(),
        to: plan.stored_as(),
        shape: plan.spec.shape.clone(),
        ..Layer::default()
    }
}

/// A tensor's numbers, all of them finite.
pub(crate) fn values(s: &Stored) -> Result<Vec<f32>, Error> {
    let mut w = vec![0.0; s.shape.iter().product()];
    codec::decode(s.dtype, &s.bytes, &mut w)?;
    match w.iter().position(|v| !v.is_finite()) {
        None => Ok(w),
        Some(at) => Err(Error::NotFinite { name: s.name.clone(), at, value: w[at] }),
    }
}

pub(crate) fn save(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let mut file = AtomicFile::create(path)?;
    file.write_all(bytes)
        .map_err(|e| Error::Io { what: format!("cannot write {}", path.display()), source: e })?;
    Ok(file.commit()?)
}
