//! llama.cpp's importance matrices: for each matrix of a model, the mean square of each input over some text.
//!
//! Two formats: GGUF (`general.type` is `imatrix`; tensors `NAME.in_sum2`, sums of squares, and `NAME.counts`), and the
//! older `.dat`: a number of entries; for each the length of its name, the name, the number of chunks, the number of values,
//! and f32 values, which are mean squares times the number of chunks. All integers are i32, little endian. Source:
//! llama.cpp's `tools/imatrix/imatrix.cpp`.

use crate::error::Place;
use crate::mmap::Map;
use crate::{Error, gguf};
use std::collections::HashMap;
use std::path::Path;

/// The word before each message.
const FORMAT: &str = "importance matrix";

/// Mean squares of the inputs, by GGUF's name of the matrix.
pub type Importance = HashMap<String, Vec<f32>>;

/// Reads an importance matrix of either format.
///
/// # Errors
/// If the file cannot be read, is neither, contradicts itself, or holds a number that is negative or none.
pub fn read(path: impl AsRef<Path>) -> Result<Importance, Error> {
    let path = path.as_ref();
    let map = Map::open(path)?;
    let place = Place { format: FORMAT, path };
    let found = if map.bytes().starts_with(&gguf::MAGIC) {
        from_gguf(path, place)?
    } else {
        from_dat(map.bytes(), place)?
    };
    for (name, values) in &found {
        if let Some(bad) = values.iter().find(|v| !v.is_finite() || **v < 0.0) {
            let problem = format!("it holds {bad}, which is no mean square; make it anew");
            return Err(place.malformed(format!("entry {name}"), problem));
        }
    }
    if found.is_empty() {
        return Err(place.malformed("the file", "it holds no entry; make it with more text"));
    }
    Ok(found)
}

fn from_gguf(path: &Path, place: Place) -> Result<Importance, Error> {
    let file = gguf::File::open(path)?;
    if file.metadata().opt_str("general.type")? != Some("imatrix") {
        return Err(place.malformed("general.type", "it is not imatrix: this is another kind of GGUF file"));
    }
    let floats = |bytes: &[u8]| -> Vec<f32> {
        bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    };
    let mut found = Importance::new();
    for info in file.tensors() {
        let Some(name) = info.name.strip_suffix(".in_sum2") else { continue };
        let refuse = |problem: &str| place.malformed(format!("entry {name}"), problem);
        let counts = file.require(&format!("{name}.counts"))?;
        let sums = file.require(&info.name)?;
        if info.dtype != sparsam_dtype::DType::F32 || counts.info.dtype != sparsam_dtype::DType::F32 {
            return Err(refuse("it is not F32; make it anew"));
        }
        let (sums, counts) = (floats(sums.bytes), floats(counts.bytes));
        // Matrices of experts have a row for each expert; what is rounded here has one.
        let [count] = counts[..] else {
            return Err(refuse("it is of a model with experts, which is not supported"));
        };
        if count > 0.0 {
            found.insert(name.to_string(), sums.iter().map(|s| s / count).collect());
        }
    }
    Ok(found)
}

/// What is left of a `.dat` file.
struct Rest<'a> {
    bytes: &'a [u8],
    place: Place<'a>,
}

impl<'a> Rest<'a> {
    fn take(&mut self, n: usize, what: &str) -> Result<&'a [u8], Error> {
        if n > self.bytes.len() {
            let problem = format!(
                "it takes {n} bytes, {} are left; the file is cut off or no importance matrix",
                self.bytes.len()
            );
            return Err(self.place.malformed(what, problem));
        }
        let (front, rest) = self.bytes.split_at(n);
        self.bytes = rest;
        Ok(front)
    }

    /// A count: an i32 that is not negative.
    fn count(&mut self, what: &str) -> Result<usize, Error> {
        let bytes = self.take(4, what)?;
        let n = i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        usize::try_from(n).map_err(|_| {
            self.place.malformed(what, format!("it is {n}; the file is damaged or no importance matrix"))
        })
    }
}

fn from_dat(bytes: &[u8], place: Place) -> Result<Importance, Error> {
    let mut rest = Rest { bytes, place };
    let entries = rest.count("the number of entries")?;
    let mut found = Importance::new();
    for i in 0..entries {
        let length = rest.count(&format!("the length of name {i}"))?;
        let name = rest.take(length, &format!("name {i}"))?;
        let name = String::from_utf8_lossy(name).into_owned();
        let chunks = rest.count(&format!("the number of chunks of {name}"))?;
        let n = rest.count(&format!("the number of values of {name}"))?;
        let values = rest.take(n.saturating_mul(4), &format!("the values of {name}"))?;
        let scale = 1.0 / chunks.max(1) as f32;
        let values = values.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b) * scale).collect();
        found.insert(name, values);
    }
    // Behind them newer files name their chunks and text.
    Ok(found)
}
