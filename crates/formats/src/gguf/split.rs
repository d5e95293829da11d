//! Models cut into several files by llama.cpp's `gguf-split`: `NAME-00001-of-00003.gguf` and so on.
//!
//! Each part is a GGUF file of its own with the keys `split.no` (from 0), `split.count` and `split.tensors.count` (of
//! the whole model). The first part holds the model's metadata.

use std::path::{Path, PathBuf};

use super::metadata::Metadata;
use super::parse::{self, Header};
use super::{FORMAT, File};
use crate::Error;
use crate::error::Place;
use crate::mmap::Map;
use crate::tensors::Tensors;

/// Where a file stands among its kin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// From 0.
    no: usize,
    count: usize,
    /// Tensors in all parts together.
    tensors: usize,
}

/// What the metadata say about a split; `None` for a whole model.
pub(super) fn part(metadata: &Metadata) -> Result<Option<Part>, Error> {
    match metadata.opt_usize("split.count")? {
        None | Some(0 | 1) => Ok(None),
        Some(count) => {
            let no = metadata.usize("split.no")?;
            if no >= count {
                return Err(
                    metadata.key_error("split.no", format!("is {no}, but there are only {count} parts"))
                );
            }
            Ok(Some(Part { no, count, tensors: metadata.usize("split.tensors.count")? }))
        }
    }
}

/// The file name of part `no` of `count`.
fn part_name(prefix: &str, no: usize, count: usize) -> String {
    format!("{prefix}-{:05}-of-{count:05}.gguf", no + 1)
}

/// Opens all parts of the model of which `path` (with its `header` and `map`) is one.
pub(super) fn open(path: &Path, part: Part, header: Header, map: Map) -> Result<File, Error> {
    let place = Place { format: FORMAT, path };
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let ending = part_name("", part.no, part.count);
    let Some(prefix) = name.strip_suffix(&ending) else {
        let problem = format!(
            "it is part {} of {} of a split model, so its name should end in {ending}; give all parts the names that gguf-split gave them",
            part.no + 1,
            part.count
        );
        return Err(place.malformed("the file's name", problem));
    };
    let mut tensors = Tensors::new(FORMAT, path);
    let mut metadata = None;
    let mut given = Some((header, map));
    for no in 0..part.count {
        let file: PathBuf = path.with_file_name(part_name(prefix, no, part.count));
        let (header, map) = match given.take_if(|_| no == part.no) {
            Some(given) => given,
            None => {
                if !file.exists() {
                    let problem = format!(
                        "it is missing; all {} parts of the model must lie in one folder",
                        part.count
                    );
                    return Err(Place { format: FORMAT, path: &file }.malformed("the file", problem));
                }
                let map = Map::open(&file)?;
                (parse::parse(map.bytes(), &file)?, map)
            }
        };
        let here = self::part(&header.metadata)?;
        if here != Some(Part { no, ..part }) {
            let problem = format!(
                "it says of itself {}, where part {} of {} with {} tensors in all is expected; the parts do not belong together, fetch all of one model",
                match here {
                    Some(p) => format!("part {} of {} with {} tensors in all", p.no + 1, p.count, p.tensors),
                    None => "nothing of parts".to_string(),
                },
                no + 1,
                part.count,
                part.tensors
            );
            return Err(Place { format: FORMAT, path: &file }.malformed("keys split.*", problem));
        }
        tensors.add(&file, map, header.tensors, Vec::new())?;
        if no == 0 {
            metadata = Some(header.metadata);
        }
    }
    if tensors.infos().len() != part.tensors {
        let problem = format!(
            "it is {}, but the {} parts hold {} tensors; fetch all parts of one model anew",
            part.tensors,
            part.count,
            tensors.infos().len()
        );
        return Err(place.malformed("key split.tensors.count", problem));
    }
    Ok(File { metadata: metadata.expect("a split has at least two parts"), tensors })
}
