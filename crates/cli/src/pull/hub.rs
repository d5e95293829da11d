//! The hub's interface: what a repository holds, and its files.

use anyhow::{Context, bail};
use serde::Deserialize;
use sparsam_distill::teacher::http::tls;
use std::time::Duration;
use ureq::Agent;
use ureq::config::RedirectAuthHeaders;
use ureq::http::Response;

/// A connection to the hub.
pub struct Hub {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
}

/// What the hub says of a revision.
pub struct Listing {
    /// The commit that it is.
    pub commit: String,
    /// Its files.
    pub files: Vec<Remote>,
}

/// A file in a repository.
#[derive(Clone, Debug, PartialEq)]
pub struct Remote {
    /// Its path in the repository.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// What its bytes must hash to.
    pub checksum: Checksum,
}

/// Two kinds: large files are named by their SHA-256, small ones as git names its blobs.
#[derive(Clone, Debug, PartialEq)]
pub enum Checksum {
    /// Of the bytes.
    Sha256(String),
    /// Of `blob SIZE\0` and the bytes.
    GitSha1(String),
}

impl Checksum {
    /// In hexadecimal: the name of the file in the cache, as the hub's own tools have it.
    pub fn hex(&self) -> &str {
        match self {
            Checksum::Sha256(hex) | Checksum::GitSha1(hex) => hex,
        }
    }
}

#[derive(Deserialize)]
struct Info {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
}

/// The largest listing that is believed; repositories of thousands of files have a few megabytes.
const MAX_LISTING_BYTES: u64 = 64 << 20;

impl Hub {
    /// The hub that `HF_ENDPOINT` names, with the token of `HF_TOKEN` or of the hub's own login.
    ///
    /// # Errors
    /// An endpoint that is no address.
    pub fn from_env() -> anyhow::Result<Hub> {
        let var =
            |name: &str| std::env::var(name).ok().map(|v| v.trim().to_string()).filter(|v| !v.is_empty());
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
            bail!("HF_ENDPOINT is `{endpoint}`; it must begin with https:// or http://");
        }
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .user_agent(concat!("sparsam/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(Duration::from_secs(20)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            // A renamed repository is another place on the same host; a file's store is another host, and gets no token.
            .redirect_auth_headers(RedirectAuthHeaders::SameHost);
        match tls() {
            Ok(tls) => config = config.tls_config(tls),
            Err(e) if endpoint.starts_with("https://") => bail!("{endpoint}: {e}"),
            Err(_) => {}
        }
        let token = var("HF_TOKEN").or_else(stored_token);
        Ok(Hub { agent: config.build().into(), endpoint: endpoint.trim_end_matches('/').to_string(), token })
    }

    /// The files of a revision.
    ///
    /// # Errors
    /// If there is no such repository or revision, it may not be read, or the answer is not as the hub answers.
    pub fn list(&self, name: &str, revision: &str) -> anyhow::Result<Listing> {
        // A slash within a revision (`refs/pr/1`) is part of its name.
        let revision_part = revision.replace('/', "%2F");
        let url = format!("{}/api/models/{name}/revision/{revision_part}?blobs=true", self.endpoint);
        let mut response = self.get(&url, 0)?;
        self.check(&response, &format!("{name}@{revision}"))?;
        let text = response
            .body_mut()
            .with_config()
            .limit(MAX_LISTING_BYTES)
            .read_to_string()
            .with_context(|| format!("{url}: the list of files broke off"))?;
        let info: Info =
            serde_json::from_str(&text).with_context(|| format!("{url}: not the hub's answer"))?;
        if !is_hex(&info.sha) {
            bail!("{url}: `{}` is no commit", info.sha);
        }
        let files = info.siblings.into_iter().map(Sibling::checked).collect::<anyhow::Result<_>>()?;
        Ok(Listing { commit: info.sha, files })
    }

    /// The bytes of a file from byte `from` on; whether the server begins there (or at 0).
    ///
    /// # Errors
    /// If the server says no.
    pub fn open(
        &self,
        name: &str,
        commit: &str,
        file: &Remote,
        from: u64,
    ) -> anyhow::Result<(Response<ureq::Body>, bool)> {
        let url = format!("{}/{name}/resolve/{commit}/{}", self.endpoint, escaped(&file.path));
        let response = self.get(&url, from)?;
        self.check(&response, &file.path)?;
        let continued = response.status().as_u16() == 206;
        Ok((response, continued))
    }

    fn get(&self, url: &str, from: u64) -> anyhow::Result<Response<ureq::Body>> {
        let mut request = self.agent.get(url);
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header("Range", format!("bytes={from}-"));
        }
        request.call().with_context(|| format!("{url}: no answer"))
    }

    fn check(&self, response: &Response<ureq::Body>, what: &str) -> anyhow::Result<()> {
        let status = response.status();
        match status.as_u16() {
            200 | 206 => Ok(()),
            401 | 403 if self.token.is_none() => bail!(Refused(format!(
                "{what}: there is no such repository, or it wants a token; check the name, or set HF_TOKEN"
            ))),
            401 | 403 => bail!(Refused(format!(
                "{what}: the token may not read it; ask for access on the model's page, or set another HF_TOKEN"
            ))),
            404 => bail!(Refused(format!("{what}: not found at {}; check name and revision", self.endpoint))),
            _ => bail!("{what}: {} answers {status}", self.endpoint),
        }
    }
}

/// An answer that asking again will not change.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

impl Sibling {
    /// The file, if its name stays within a folder and its checksum is one.
    fn checked(self) -> anyhow::Result<Remote> {
        let path = self.rfilename;
        let plain =
            |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains(['\\', ':', '\0']);
        if !path.split('/').all(plain) {
            bail!(
                "the hub lists `{path}`, which would lie outside the model's folder; this repository is not fetched"
            );
        }
        let checksum = match (self.lfs, self.blob_id) {
            (Some(lfs), _) => Checksum::Sha256(lfs.sha256.to_lowercase()),
            (None, Some(sha1)) => Checksum::GitSha1(sha1.to_lowercase()),
            (None, None) => bail!("the hub gives no checksum of `{path}`"),
        };
        let length = if matches!(checksum, Checksum::Sha256(_)) { 64 } else { 40 };
        if checksum.hex().len() != length || !is_hex(checksum.hex()) {
            bail!("the hub's checksum of `{path}` is none: `{}`", checksum.hex());
        }
        let size = self.size.with_context(|| format!("the hub gives no size of `{path}`"))?;
        Ok(Remote { path, size, checksum })
    }
}

fn is_hex(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Whether `name` is `ORG/NAME` in the hub's letters.
pub fn is_name(name: &str) -> bool {
    let plain = |p: &str| {
        !p.is_empty()
            && !p.starts_with('.')
            && p.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    };
    name.split('/').count() == 2 && name.split('/').all(plain)
}

/// Whether `revision` may name a branch, tag or commit, and a file below `refs/`.
pub fn is_revision(revision: &str) -> bool {
    let plain = |p: &str| {
        !p.is_empty()
            && !p.starts_with('.')
            && p.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'+'))
    };
    revision.split('/').all(plain)
}

/// Whether `HF_HUB_OFFLINE` forbids the network: `1`, `true`, `yes`, `on`, as the hub's own tools read it.
pub fn offline() -> bool {
    let value = std::env::var("HF_HUB_OFFLINE").unwrap_or_default().to_lowercase();
    matches!(value.as_str(), "1" | "true" | "yes" | "on")
}

/// The token that the hub's own login has stored.
fn stored_token() -> Option<String> {
    let path = match std::env::var_os("HF_TOKEN_PATH").filter(|v| !v.is_empty()) {
        Some(path) => path.into(),
        None => crate::model::hub_cache()?.parent()?.join("token"),
    };
    let token = std::fs::read_to_string(path).ok()?;
    Some(token.trim().to_string()).filter(|t| !t.is_empty())
}

/// A path in an address: everything but letters, digits and a few signs in hexadecimal.
fn escaped(path: &str) -> String {
    let mut out = String::new();
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'/' | b'-' | b'_' | b'.' | b'~') {
            out.push(char::from(byte));
        } else {
            out += &format!("%{byte:02X}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_paths_stay_where_they_belong() {
        assert!(is_name("HuggingFaceTB/SmolLM2-135M") && is_name("a/b.c_d"));
        for bad in ["a", "a/b/c", "../b", "a/..", "a/", "a/b c", "a\\b/c", "a/b?x"] {
            assert!(!is_name(bad), "{bad}");
        }
        assert!(is_revision("main") && is_revision("refs/pr/1") && is_revision("v1.0"));
        for bad in ["", "../x", "a//b", "a/../b", "a b"] {
            assert!(!is_revision(bad), "{bad}");
        }
        let sibling = |name: &str| Sibling {
            rfilename: name.into(),
            size: Some(1),
            blob_id: Some("a".repeat(40)),
            lfs: None,
        };
        assert!(sibling("sub/model.gguf").checked().is_ok());
        for bad in ["../x", "/etc/passwd", "a/../../b", "a\\b", "c:x", ""] {
            assert!(sibling(bad).checked().is_err(), "{bad}");
        }
        assert!(Sibling { blob_id: Some("../../x".into()), ..sibling("a") }.checked().is_err());
        assert_eq!(escaped("sub/a b#.gguf"), "sub/a%20b%23.gguf");
    }
}
