//! Which files of a repository make a model.

use super::hub::Remote;
use anyhow::{Context, bail};
use sparsam_plan::nearest;
use std::path::{Path, PathBuf};

/// Types of GGUF in the order in which they are taken where none is asked for: about 5 bits first, a good middle.
const ORDER: [&str; 12] =
    ["Q4_K_M", "Q4_0", "Q4_1", "Q5_K_M", "Q8_0", "Q6_K", "Q4_K_S", "Q5_0", "Q5_1", "Q3_K_M", "BF16", "F16"];

/// Names of small files that a safetensors model needs or may use.
const BESIDE: [&str; 9] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
];

/// The files to fetch: those named, the GGUF file (all its parts) of type `kind`, or a whole safetensors model.
///
/// # Errors
/// If nothing fits; the message lists what there is.
pub fn choose<'a>(
    files: &'a [Remote],
    kind: Option<&str>,
    named: &[String],
) -> anyhow::Result<Vec<&'a Remote>> {
    if !named.is_empty() {
        return named.iter().map(|name| by_path(files, name)).collect();
    }
    let top = |f: &&Remote| !f.path.contains('/');
    // Adapters and consolidated copies beside the model would be fetched for nothing.
    let tensors: Vec<&Remote> = files.iter().filter(top).filter(|f| is_model(&f.path)).collect();
    if kind.is_none() && !tensors.is_empty() {
        let small =
            |f: &&Remote| BESIDE.contains(&f.path.as_str()) || f.path.ends_with(".safetensors.index.json");
        let mut chosen: Vec<&Remote> = files.iter().filter(top).filter(small).collect();
        chosen.extend(tensors);
        return Ok(chosen);
    }
    let models = gguf_models(files.iter().map(|f| f.path.as_str()));
    if models.is_empty() {
        let has: Vec<&str> = files.iter().map(|f| f.path.as_str()).take(8).collect();
        bail!("holds no GGUF and no safetensors model; it has {}", has.join(", "))
    }
    let model = of_type(&models, kind, "--type ")?;
    model.parts.iter().map(|path| by_path(files, path)).collect()
}

/// The GGUF model of type `kind`, or the one that is taken where none is asked for; `how` comes before a type in the hint.
fn of_type<'m, 'a>(
    models: &'m [GgufModel<'a>],
    kind: Option<&str>,
    how: &str,
) -> anyhow::Result<&'m GgufModel<'a>> {
    let types: Vec<&str> = models.iter().map(|m| m.kind.as_str()).collect();
    if let Some(kind) = kind {
        let found = models.iter().find(|m| m.kind.eq_ignore_ascii_case(kind));
        return found.with_context(|| {
            let near = nearest(kind, types.iter().copied());
            let hint = near.map(|n| format!(" (did you mean `{n}`?)")).unwrap_or_default();
            format!("holds no GGUF file of type `{kind}`{hint}; it has {}", types.join(", "))
        });
    }
    match models {
        [one] => Ok(one),
        _ => ORDER.iter().find_map(|want| models.iter().find(|m| m.kind == *want)).with_context(|| {
            let list: Vec<String> = types.iter().map(|t| format!("{how}{t}")).collect();
            format!("holds several GGUF files; choose one: {}", list.join(", "))
        }),
    }
}

/// What of a fetched snapshot is the model: a GGUF file (of type `kind`), or the folder itself.
///
/// # Errors
/// If it holds no file of that type, or several GGUF files among which nothing chooses.
pub fn local(snapshot: &Path, kind: Option<&str>) -> anyhow::Result<PathBuf> {
    let names = |folder: &Path| -> Vec<String> {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        entries.filter_map(|e| e.file_name().into_string().ok()).collect()
    };
    let mut paths = names(snapshot);
    let within: Vec<String> = paths
        .iter()
        .filter(|p| snapshot.join(p).is_dir())
        .flat_map(|p| names(&snapshot.join(p)).into_iter().map(move |n| format!("{p}/{n}")))
        .collect();
    paths.extend(within);
    let models = gguf_models(paths.iter().map(String::as_str));
    let plain = paths.iter().any(|p| p.ends_with(".safetensors") && !p.contains('/'));
    if models.is_empty() || (plain && kind.is_none()) {
        return Ok(snapshot.to_path_buf());
    }
    Ok(snapshot.join(of_type(&models, kind, "NAME:")?.parts[0]))
}

fn by_path<'a>(files: &'a [Remote], name: &str) -> anyhow::Result<&'a Remote> {
    match files.iter().find(|f| f.path == name) {
        Some(file) => Ok(file),
        None => {
            let hint = nearest(name, files.iter().map(|f| f.path.as_str()))
                .map(|n| format!(" (did you mean `{n}`?)"))
                .unwrap_or_default();
            bail!("holds no file `{name}`{hint}")
        }
    }
}

/// `model.safetensors`, or a part of it.
fn is_model(path: &str) -> bool {
    path == "model.safetensors"
        || (path.starts_with("model-") && path.contains("-of-") && path.ends_with(".safetensors"))
}

/// A GGUF model: one file, or its parts in order.
struct GgufModel<'a> {
    kind: String,
    /// Their paths, at least one.
    parts: Vec<&'a str>,
}

/// The GGUF models among `paths`; projectors of models that see are none.
fn gguf_models<'a>(paths: impl Iterator<Item = &'a str>) -> Vec<GgufModel<'a>> {
    let mut models: Vec<(String, GgufModel)> = Vec::new();
    let mut sorted: Vec<&str> =
        paths.filter(|p| p.ends_with(".gguf") && !p.to_lowercase().contains("mmproj")).collect();
    sorted.sort_unstable();
    for path in sorted {
        let stem = whole_name(path);
        match models.iter_mut().find(|(name, _)| *name == stem) {
            Some((_, model)) => model.parts.push(path),
            None => models.push((stem.clone(), GgufModel { kind: kind_of(&stem), parts: vec![path] })),
        }
    }
    models.into_iter().map(|(_, m)| m).collect()
}

/// A path without `.gguf` and without `-00001-of-00003`.
fn whole_name(path: &str) -> String {
    let stem = path.strip_suffix(".gguf").unwrap_or(path);
    let part = stem.len().checked_sub(15).and_then(|at| stem.split_at_checked(at));
    match part {
        Some((name, tail))
            if tail.starts_with('-')
                && &tail[6..10] == "-of-"
                && [&tail[1..6], &tail[10..]].iter().all(|d| d.bytes().all(|b| b.is_ascii_digit())) =>
        {
            name.to_string()
        }
        _ => stem.to_string(),
    }
}

/// The type that a file's name tells: the last part that looks like one, `Q4_K_M` of `Smol-135M.Q4_K_M`; the whole
/// name if none does.
fn kind_of(stem: &str) -> String {
    let name = stem.rsplit('/').next().unwrap_or(stem);
    let looks = |part: &str| {
        let upper = part.to_uppercase();
        ["Q", "IQ", "TQ"]
            .iter()
            .any(|p| upper.strip_prefix(p).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit())))
            || ["F16", "F32", "BF16", "FP16", "FP32", "MXFP4", "MXFP4_MOE"].contains(&upper.as_str())
    };
    let found = name.split(['-', '.']).rfind(|p| looks(p));
    found.map_or_else(
        || name.to_string(),
        |kind| kind.to_uppercase().replace("FP", "F").replace("MXF4", "MXFP4"),
    )
}

#[cfg(test)]
mod tests {
    use super::super::hub::Checksum;
    use super::*;

    fn files(names: &[&str]) -> Vec<Remote> {
        let remote =
            |n: &&str| Remote { path: n.to_string(), size: 1, checksum: Checksum::GitSha1("a".repeat(40)) };
        names.iter().map(remote).collect()
    }

    #[track_caller]
    fn check(names: &[&str], kind: Option<&str>, want: &[&str]) {
        let files = files(names);
        let got = choose(&files, kind, &[]).unwrap();
        assert_eq!(got.iter().map(|f| f.path.as_str()).collect::<Vec<_>>(), want);
    }

    #[test]
    fn gguf_by_type() {
        let many =
            ["README.md", "m-F16.gguf", "m-Q2_K.gguf", "m-Q4_0.gguf", "m-Q8_0.gguf", "mmproj-F16.gguf"];
        check(&many, None, &["m-Q4_0.gguf"]);
        check(&many, Some("q8_0"), &["m-Q8_0.gguf"]);
        check(&many, Some("f16"), &["m-F16.gguf"]);
        check(&["m.gguf", "x.txt"], None, &["m.gguf"]);
        let parts = ["m-Q4_0-00002-of-00002.gguf", "m-Q4_0-00001-of-00002.gguf", "m-Q8_0.gguf"];
        check(&parts, None, &["m-Q4_0-00001-of-00002.gguf", "m-Q4_0-00002-of-00002.gguf"]);
        check(&["sub/m.IQ4_XS.gguf", "sub/m.i1-Q2_K.gguf"], Some("IQ4_XS"), &["sub/m.IQ4_XS.gguf"]);
    }

    #[test]
    fn safetensors_whole_and_nothing_beside() {
        let all = [
            ".gitattributes",
            "README.md",
            "config.json",
            "model.safetensors",
            "onnx/model.onnx",
            "tokenizer.json",
            "pytorch_model.bin",
            "original/model.safetensors",
            "adapter_model.safetensors",
        ];
        check(&all, None, &["config.json", "tokenizer.json", "model.safetensors"]);
        let shards = [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
        ];
        check(&shards, None, &[shards[2], shards[0], shards[1]]);
    }

    #[test]
    fn a_snapshot_is_a_file_or_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let add = |name: &str| std::fs::write(at(name), "").unwrap();
        assert_eq!(local(folder.path(), None).unwrap(), folder.path());
        add("m-Q8_0.gguf");
        assert_eq!(local(folder.path(), None).unwrap(), at("m-Q8_0.gguf"));
        std::fs::create_dir(at("sub")).unwrap();
        add("sub/m-Q4_0-00001-of-00002.gguf");
        add("sub/m-Q4_0-00002-of-00002.gguf");
        assert_eq!(local(folder.path(), None).unwrap(), at("sub/m-Q4_0-00001-of-00002.gguf"));
        assert_eq!(local(folder.path(), Some("q8_0")).unwrap(), at("m-Q8_0.gguf"));
        assert!(local(folder.path(), Some("Q4_1")).unwrap_err().to_string().contains("did you mean `Q4_0`?"));
        add("model.safetensors");
        assert_eq!(local(folder.path(), None).unwrap(), folder.path());
    }

    #[test]
    fn what_does_not_fit_is_listed() {
        let fails = |names: &[&str], kind: Option<&str>, named: &[&str], part: &str| {
            let named: Vec<String> = named.iter().map(|n| n.to_string()).collect();
            let message = choose(&files(names), kind, &named).unwrap_err().to_string();
            assert!(message.contains(part), "`{message}` does not say `{part}`");
        };
        fails(
            &["a-Q4_0.gguf", "a-Q8_0.gguf"],
            Some("Q4_1"),
            &[],
            "(did you mean `Q4_0`?); it has Q4_0, Q8_0",
        );
        fails(&["a-x.gguf", "a-y.gguf"], None, &[], "choose one: --type a-x, --type a-y");
        fails(&["model.bin"], None, &[], "no GGUF and no safetensors model; it has model.bin");
        fails(&["model.gguf"], None, &["modl.gguf"], "did you mean `model.gguf`?");
    }
}
