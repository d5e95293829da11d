//! The header of a safetensors file and the index of a folder, every range checked before it is used.

use std::fmt;
use std::path::{Component, Path};

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use sparsam_dtype::DType;

use crate::Error;
use crate::error::Place;
use crate::tensors::TensorInfo;

/// What stands before the tensors' bytes.
pub(super) struct Header {
    pub metadata: Vec<(String, String)>,
    /// In the order of their bytes, each within the file.
    pub tensors: Vec<TensorInfo>,
    /// Name and type of the tensors without a `DType`.
    pub unsupported: Vec<(String, String)>,
}

/// The specification's limit for the header.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// A JSON object with its keys in order, twins included.
struct Pairs(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Pairs, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Pairs;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

/// Bits of one element of each type of the specification, and the `DType` where there is one.
fn element(name: &str) -> Option<(usize, Option<DType>)> {
    Some(match name {
        "F64" => (64, Some(DType::F64)),
        "F32" => (32, Some(DType::F32)),
        "F16" => (16, Some(DType::F16)),
        "BF16" => (16, Some(DType::BF16)),
        "I64" => (64, Some(DType::I64)),
        "I32" => (32, Some(DType::I32)),
        "I16" => (16, Some(DType::I16)),
        "I8" => (8, Some(DType::I8)),
        "U8" => (8, Some(DType::U8)),
        "BOOL" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => (8, None),
        "U16" => (16, None),
        "U32" => (32, None),
        "U64" | "C64" => (64, None),
        "F4" => (4, None),
        "F6_E2M3" | "F6_E3M2" => (6, None),
        _ => return None,
    })
}

/// The name of `dtype` in a safetensors header; `None` for block formats.
pub(super) fn type_name(dtype: DType) -> Option<&'static str> {
    // Both worlds use the same names for plain numbers.
    element(dtype.name()).map(|_| dtype.name())
}

/// Parses the header of the file `bytes`.
pub(super) fn header(bytes: &[u8], place: Place<'_>) -> Result<Header, Error> {
    let len = bytes.len() as u64;
    let Some(first) = bytes.first_chunk::<8>() else {
        return Err(place.truncated("the header's length", 8, len));
    };
    if bytes.starts_with(b"version https://git-lfs") {
        return Err(place.malformed("the file", "it is a Git LFS pointer, not the model; run `git lfs pull`"));
    }
    let n = u64::from_le_bytes(*first);
    if n > MAX_HEADER_BYTES {
        let problem = format!(
            "it says {n} bytes, more than {MAX_HEADER_BYTES}; this is no safetensors file, or it is damaged"
        );
        return Err(place.malformed("the header's length", problem));
    }
    let Some(json) = bytes[8..].get(..n as usize) else {
        return Err(place.truncated("the header", 8 + n, len));
    };
    let data = len as usize - 8 - n as usize;
    let Pairs(pairs) = serde_json::from_slice(json).map_err(|e| {
        place.malformed("the header", format!("it is not the JSON it should be ({e}); fetch the file again"))
    })?;

    let mut metadata = Vec::new();
    let mut entries = Vec::with_capacity(pairs.len());
    for (name, value) in pairs {
        if name == "__metadata__" {
            metadata = strings(value, place)?;
        } else {
            entries.push(entry(name, &value, place)?);
        }
    }
    entries.sort_by_key(|e| (e.begin, e.end));

    // The specification: the tensors' bytes follow each other without gaps up to the end of the file.
    let mut at = 0;
    for e in &entries {
        let what = || format!("tensor {}", e.name);
        if e.end > data {
            return Err(place.truncated(what(), (len - data as u64).saturating_add(e.end as u64), len));
        }
        if e.begin != at {
            let how = if e.begin < at { "overlaps the tensor before it" } else { "leaves a gap before it" };
            let problem = format!(
                "it starts at byte {} of the data, which {how} (that ends at {at}); the file is damaged, fetch it again",
                e.begin
            );
            return Err(place.malformed(what(), problem));
        }
        at = e.end;
    }
    if at != data {
        let problem = format!("they end at byte {at} of {data}; the file is damaged, fetch it again");
        return Err(place.malformed("the tensors", problem));
    }

    let start = len as usize - data;
    let mut header = Header { metadata, tensors: Vec::with_capacity(entries.len()), unsupported: Vec::new() };
    for e in entries {
        match e.dtype {
            Some(dtype) => header.tensors.push(TensorInfo {
                name: e.name,
                shape: e.shape,
                dtype,
                shard: 0,
                range: start + e.begin..start + e.end,
            }),
            None => header.unsupported.push((e.name, e.type_name)),
        }
    }
    duplicates(&header, place)?;
    Ok(header)
}

/// One tensor of the header; its range has the right length but may lie anywhere.
struct Entry {
    name: String,
    type_name: String,
    dtype: Option<DType>,
    shape: Vec<usize>,
    begin: usize,
    end: usize,
}

fn entry(name: String, value: &Value, place: Place<'_>) -> Result<Entry, Error> {
    let bad = |problem: String| {
        place.malformed(
            format!("tensor {name}"),
            format!("{problem}; the file is damaged or was written wrongly"),
        )
    };
    let numbers = |key: &str| {
        let list = value.get(key).and_then(Value::as_array);
        let list = list
            .and_then(|l| l.iter().map(|v| usize::try_from(v.as_u64()?).ok()).collect::<Option<Vec<_>>>());
        list.ok_or_else(|| bad(format!("its {key} is not a list of whole numbers")))
    };
    let type_name =
        value.get("dtype").and_then(Value::as_str).ok_or_else(|| bad("it has no dtype".into()))?;
    let (bits, dtype) = element(type_name).ok_or_else(|| bad(format!("its type {type_name} is unknown")))?;
    let shape = numbers("shape")?;
    let (begin, end) = match numbers("data_offsets")?[..] {
        [begin, end] if begin <= end => (begin, end),
        _ => return Err(bad("its data_offsets are not a begin and an end".into())),
    };
    let nonzero = shape.iter().filter(|&&n| n > 0);
    let bits = nonzero.copied().try_fold(bits, usize::checked_mul);
    let bits = bits
        .ok_or_else(|| bad(format!("its shape {shape:?} has more elements than this machine can count")))?;
    let bits = if shape.contains(&0) { 0 } else { bits };
    if !bits.is_multiple_of(8) || bits / 8 != end - begin {
        let problem = format!(
            "shape {shape:?} of {type_name} takes {} bytes, but the file gives it {}",
            bits.div_ceil(8),
            end - begin
        );
        return Err(bad(problem));
    }
    Ok(Entry { type_name: type_name.to_string(), dtype, shape, begin, end, name })
}

/// `__metadata__`: strings only.
fn strings(value: Value, place: Place<'_>) -> Result<Vec<(String, String)>, Error> {
    let bad = || {
        place.malformed("__metadata__", "it is not a map of strings to strings; the file was written wrongly")
    };
    let Value::Object(map) = value else { return Err(bad()) };
    map.into_iter().map(|(k, v)| if let Value::String(s) = v { Ok((k, s)) } else { Err(bad()) }).collect()
}

/// That no name appears twice.
fn duplicates(header: &Header, place: Place<'_>) -> Result<(), Error> {
    let mut names: Vec<&String> =
        header.tensors.iter().map(|t| &t.name).chain(header.unsupported.iter().map(|u| &u.0)).collect();
    names.sort();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(place.malformed(
            format!("tensor {}", pair[0]),
            "two tensors have this name; the file was written wrongly, convert it anew",
        )),
        None => Ok(()),
    }
}

/// Parses an index: which shard holds which tensor. Shards are plain file names, so that an index cannot lead
/// outside its folder.
pub(super) fn index(json: &[u8], place: Place<'_>) -> Result<Vec<(String, String)>, Error> {
    if json.len() as u64 > MAX_HEADER_BYTES {
        let problem = format!("it has {} bytes, more than {MAX_HEADER_BYTES}; this is no index", json.len());
        return Err(place.malformed("the index", problem));
    }
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: Pairs,
    }
    let index: Index = serde_json::from_slice(json).map_err(|e| {
        place.malformed("the index", format!("it is not the JSON it should be ({e}); fetch it again"))
    })?;
    let mut map = Vec::with_capacity(index.weight_map.0.len());
    for (name, shard) in index.weight_map.0 {
        let what = format!("weight_map, tensor {name}");
        let Value::String(shard) = shard else {
            return Err(place.malformed(what, "its shard is not a file name; fetch the index again"));
        };
        let mut parts = Path::new(&shard).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
            || shard.contains(['/', '\\', '\0'])
        {
            let problem =
                format!("the shard {shard:?} is not a plain file name; shards must lie beside the index");
            return Err(place.malformed(what, problem));
        }
        map.push((name, shard));
    }
    if map.is_empty() {
        return Err(place.malformed("the index", "its weight_map is empty; fetch it again"));
    }
    let mut names: Vec<&String> = map.iter().map(|(n, _)| n).collect();
    names.sort();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(place.malformed(
            format!("weight_map, tensor {}", pair[0]),
            "it appears twice; fetch the index again",
        ));
    }
    Ok(map)
}
