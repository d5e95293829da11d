//! `sparsam pull`: a model from the Hugging Face hub into the cache that the hub's own tools use.

mod choose;
mod fetch;
mod hub;

pub use choose::local;

use crate::{model, probe, text};
use anyhow::{Context, bail};
use hub::{Hub, Remote};
use serde_json::json;
use sparsam_plan::units::show_bytes;
use std::path::{Path, PathBuf};

/// Fetch a model from the Hugging Face hub into its cache
///
/// Files are checked against the hub's checksums, a broken download goes on where it stopped, and what is there already
/// is not fetched again. The cache is that of the hub's own tools, so both use each other's files. HF_HOME,
/// HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean there.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sparsam pull HuggingFaceTB/SmolLM2-135M-Instruct
  sparsam pull bartowski/SmolLM2-135M-Instruct-GGUF:Q4_0
  sparsam pull ORG/NAME@v1.0
  sparsam run ORG/NAME \"Once upon a time\"")]
pub struct Args {
    /// ORG/NAME, with @REVISION for another branch, tag or commit than main
    #[arg(value_name = "ORG/NAME")]
    repository: String,
    /// Branch, tag or commit
    #[arg(long, value_name = "NAME")]
    revision: Option<String>,
    /// Which GGUF file, where the repository has many: Q4_0, Q8_0
    #[arg(long = "type", value_name = "TYPE", conflicts_with = "file")]
    kind: Option<String>,
    /// Fetch just this file; may be given several times
    #[arg(long, value_name = "PATH")]
    file: Vec<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Fetches the model and prints where it is.
///
/// # Errors
/// Names that are no repository, answers of the hub that say no, checksums that differ, full disks; with
/// `HF_HUB_OFFLINE`, if the model is not in the cache.
pub fn run(args: Args) -> anyhow::Result<()> {
    let (repository, kind) = match (args.repository.split_once(':'), &args.kind) {
        (Some(_), Some(_)) => bail!("{}: the type is given twice; leave out one", args.repository),
        (Some((repository, kind)), None) => (repository.to_string(), Some(kind)),
        (None, kind) => (args.repository.clone(), kind.as_deref()),
    };
    let (name, revision) = match (repository.split_once('@'), &args.revision) {
        (Some(_), Some(_)) => bail!("{repository}: the revision is given twice; leave out one"),
        (Some((name, revision)), None) => (name.to_string(), revision.to_string()),
        (None, revision) => (repository.clone(), revision.clone().unwrap_or_else(|| "main".into())),
    };
    if !hub::is_name(&name) {
        bail!("{name}: no name of a repository; give ORG/NAME as on the hub");
    }
    if !hub::is_revision(&revision) {
        bail!("{revision}: no name of a revision");
    }
    if hub::offline() {
        let kind = kind.map(|kind| format!(":{kind}")).unwrap_or_default();
        let there = model::resolve(&format!("{name}@{revision}{kind}"));
        let path = there.context("HF_HUB_OFFLINE is set, so nothing is fetched")?;
        return report(&args, &name, &revision, &path, &[], 0.0);
    }
    let cache = model::hub_cache().context("HOME is not set, so there is no cache; set HF_HOME")?;
    let hub = Hub::from_env()?;
    let listing = hub.list(&name, &revision)?;
    let chosen =
        choose::choose(&listing.files, kind, &args.file).with_context(|| format!("{name}@{revision}"))?;
    let place = fetch::Place::new(&cache, &name, &listing.commit)?;
    let missing: Vec<&Remote> = chosen.iter().copied().filter(|f| !place.has(f)).collect();
    let bytes: f64 = missing.iter().map(|f| f.size as f64 - place.begun(f) as f64).sum();
    if let Some(free) = probe::disk_free(&cache)
        && bytes > free
    {
        bail!(
            "{} are to be fetched, {} has {} free; make room, or set HF_HOME to another disk",
            show_bytes(bytes),
            cache.display(),
            show_bytes(free)
        );
    }
    for file in &missing {
        fetch::fetch(&hub, &name, &listing.commit, &place, file)?;
    }
    for file in &chosen {
        place.link(file)?;
    }
    // Last, so that a revision names only what is whole.
    place.set_revision(&revision)?;
    // One GGUF file is the model; a folder of shards or of several files is given whole.
    let path: PathBuf = match chosen[..] {
        [one] => place.snapshot().join(&one.path),
        _ => place.snapshot(),
    };
    report(&args, &name, &revision, &path, &chosen, bytes)
}

fn report(
    args: &Args,
    name: &str,
    revision: &str,
    path: &Path,
    files: &[&Remote],
    fetched: f64,
) -> anyhow::Result<()> {
    if args.json {
        let files: Vec<_> = files.iter().map(|f| json!({"path": f.path, "bytes": f.size})).collect();
        return text::say_json(&json!({
            "repository": name,
            "revision": revision,
            "path": path,
            "files": files,
            "fetched_bytes": fetched,
        }));
    }
    text::say(path.display())
}
