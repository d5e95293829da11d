//! Files into the hub's cache: `blobs/` by checksum, `snapshots/COMMIT/` links to them, `refs/` names commits.
//!
//! A file is written as `HASH.incomplete`, as the hub's own tools do, and gets its name once its checksum holds; what is
//! there of it is kept when a download breaks, and the next one goes on behind it.

use super::hub::{Checksum, Hub, Refused, Remote};
use crate::{plan, text};
use anyhow::{Context, bail};
use sha1::Digest;
use std::fs::{File, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Attempts without a new byte before a download is given up.
const ATTEMPTS: u32 = 5;

/// A revision's place in the cache.
pub struct Place {
    repository: PathBuf,
    commit: String,
}

impl Place {
    /// The place of `commit` of the repository `name`, its folders made.
    ///
    /// # Errors
    /// If they cannot be made.
    pub fn new(cache: &Path, name: &str, commit: &str) -> anyhow::Result<Place> {
        let repository = cache.join(format!("models--{}", name.replace('/', "--")));
        let place = Place { repository, commit: commit.to_string() };
        for folder in [place.repository.join("blobs"), place.repository.join("refs"), place.snapshot()] {
            make_folder(&folder)?;
        }
        Ok(place)
    }

    /// The folder of the revision's files.
    pub fn snapshot(&self) -> PathBuf {
        self.repository.join("snapshots").join(&self.commit)
    }

    fn blob(&self, file: &Remote) -> PathBuf {
        self.repository.join("blobs").join(file.checksum.hex())
    }

    fn incomplete(&self, file: &Remote) -> PathBuf {
        self.repository.join("blobs").join(format!("{}.incomplete", file.checksum.hex()))
    }

    /// Whether the file is there, whole: it got its name after its checksum held.
    pub fn has(&self, file: &Remote) -> bool {
        std::fs::metadata(self.blob(file)).is_ok_and(|m| m.len() == file.size)
    }

    /// Bytes of the file that are there already.
    pub fn begun(&self, file: &Remote) -> u64 {
        std::fs::metadata(self.incomplete(file)).map_or(0, |m| m.len().min(file.size))
    }

    /// Makes the file appear in the snapshot.
    ///
    /// # Errors
    /// If the link cannot be made.
    pub fn link(&self, file: &Remote) -> anyhow::Result<()> {
        let link = self.snapshot().join(&file.path);
        if link.exists() {
            return Ok(());
        }
        let folder = link.parent().context("a file lies in a folder")?;
        make_folder(folder)?;
        // A link that leads nowhere is left from a cache that was cleaned by hand.
        let _ = std::fs::remove_file(&link);
        let up = "../".repeat(file.path.matches('/').count() + 2);
        link_to(&PathBuf::from(format!("{up}blobs/{}", file.checksum.hex())), &self.blob(file), &link)
            .with_context(|| format!("{}: cannot be made", link.display()))
    }

    /// Makes `revision` mean this commit.
    ///
    /// # Errors
    /// If that cannot be written.
    pub fn set_revision(&self, revision: &str) -> anyhow::Result<()> {
        if revision == self.commit {
            return Ok(());
        }
        let path = self.repository.join("refs").join(revision);
        make_folder(path.parent().context("a reference lies in a folder")?)?;
        plan::write(&path, &self.commit)
    }
}

#[cfg(unix)]
fn link_to(relative: &Path, _: &Path, link: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(relative, link)
}

/// Links need a privilege on Windows: the file itself, as the hub's own tools do there.
#[cfg(not(unix))]
fn link_to(_: &Path, blob: &Path, link: &Path) -> std::io::Result<()> {
    std::fs::hard_link(blob, link).or_else(|_| std::fs::copy(blob, link).map(|_| ()))
}

fn make_folder(path: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(path).with_context(|| format!("{}: cannot be made", path.display()))
}

/// Fetches `file` into the cache and checks it.
///
/// # Errors
/// If the hub refuses, the connection breaks several times without progress, the checksum differs, the disk is full, or
/// another process is fetching the same file.
pub fn fetch(hub: &Hub, name: &str, commit: &str, place: &Place, file: &Remote) -> anyhow::Result<()> {
    let path = place.incomplete(file);
    let at = || path.display().to_string();
    let mut out = File::options()
        .read(true)
        .append(true)
        .create(true)
        .open(&path)
        .with_context(|| format!("{}: cannot be written", at()))?;
    match out.try_lock() {
        Err(TryLockError::WouldBlock) => bail!("{}: another process is fetching it", file.path),
        // Where a file system knows no locks, both write the same bytes and the checksum decides.
        Err(TryLockError::Error(_)) | Ok(()) => {}
    }
    let bar = text::bar(file.size, &file.path);
    let mut failed = 0;
    loop {
        let begun = out.metadata()?.len();
        bar.set_position(begun.min(file.size));
        if begun >= file.size {
            break;
        }
        match fetch_rest(hub, name, commit, file, &mut out, begun, &bar) {
            Ok(()) => {}
            Err(e) if e.downcast_ref::<Refused>().is_some() => return Err(e),
            Err(e) => {
                failed = if out.metadata()?.len() > begun { 1 } else { failed + 1 };
                if failed >= ATTEMPTS {
                    return Err(e.context(format!("{}: given up; start again to go on behind it", file.path)));
                }
                std::thread::sleep(Duration::from_millis(200 << failed));
            }
        }
    }
    bar.finish_and_clear();
    out.sync_all().with_context(|| format!("{}: cannot be written", at()))?;
    let found = hash(&mut out, file)?;
    if found != file.checksum.hex() {
        std::fs::remove_file(&path)?;
        bail!(
            "{}: its checksum is {found}, the hub says {}; it was thrown away, fetch it again",
            file.path,
            file.checksum.hex()
        );
    }
    std::fs::rename(&path, place.blob(file)).with_context(|| format!("{}: cannot be renamed", at()))
}

/// Appends what is missing of the file behind byte `begun`.
fn fetch_rest(
    hub: &Hub,
    name: &str,
    commit: &str,
    file: &Remote,
    out: &mut File,
    begun: u64,
    bar: &indicatif::ProgressBar,
) -> anyhow::Result<()> {
    let (response, continued) = hub.open(name, commit, file, begun)?;
    let mut there = begun;
    if begun > 0 && !continued {
        // The server knows no ranges: from the start.
        out.set_len(0)?;
        there = 0;
    }
    let mut body = response.into_body().into_reader();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let n = body.read(&mut buffer).with_context(|| format!("{}: the connection broke", file.path))?;
        if n == 0 {
            break;
        }
        there += n as u64;
        if there > file.size {
            out.set_len(0)?;
            bail!(Refused(format!(
                "{}: the server sends more than the {} bytes of the file",
                file.path, file.size
            )));
        }
        out.write_all(&buffer[..n]).with_context(|| format!("{}: is the disk full?", file.path))?;
        bar.set_position(there);
    }
    if there < file.size {
        bail!("{}: the connection ended {} bytes early", file.path, file.size - there);
    }
    Ok(())
}

/// The checksum of the whole file, in the way that its kind is named.
fn hash(file: &mut File, remote: &Remote) -> anyhow::Result<String> {
    file.seek(SeekFrom::Start(0))?;
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    Ok(match remote.checksum {
        Checksum::Sha256(_) => {
            let mut hasher = sha2::Sha256::new();
            std::io::copy(file, &mut hasher)?;
            hex(&hasher.finalize())
        }
        Checksum::GitSha1(_) => {
            let mut hasher = sha1::Sha1::new();
            hasher.update(format!("blob {}\0", remote.size));
            std::io::copy(file, &mut hasher)?;
            hex(&hasher.finalize())
        }
    })
}
