//! A training run's curves while they grow: a page over the run's folder.
//!
//! The page asks for the lines of `metrics.jsonl` behind those that it has. Nothing is written, and nothing of the folder
//! but that file, `config.toml` and whether there is a `receipt.json` is read.

use crate::Error;
use crate::routes::harden;
use axum::extract::State;
use axum::http::{HeaderValue, Uri, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router, middleware};
use serde_json::{Value, json};
use std::fs::File;
use std::future::Future;
use std::io::{Read, Seek, SeekFrom};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

/// Bytes of metrics in one answer; the page asks again for the rest.
const CHUNK: u64 = 1 << 20;

/// Shows the run in `folder` at `address` until `stop` is ready. `on_ready` gets the address that it listens on.
///
/// # Errors
/// If the address cannot be had.
pub fn dashboard(
    folder: &Path,
    address: SocketAddr,
    stop: impl Future<Output = ()> + Send + 'static,
    on_ready: impl FnOnce(SocketAddr),
) -> Result<(), Error> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Runtime)?;
    let app = Router::new()
        .route("/", get(page))
        .route("/run", get(run))
        .route("/metrics.jsonl", get(metrics))
        .layer(middleware::from_fn(harden))
        .with_state(Arc::new(folder.to_path_buf()));
    runtime.block_on(async move {
        let listener = tokio::net::TcpListener::bind(address)
            .await
            .map_err(|source| Error::Listen { address, source })?;
        on_ready(listener.local_addr().map_err(Error::Runtime)?);
        axum::serve(listener, app).with_graceful_shutdown(stop).await.map_err(Error::Runtime)
    })
}

async fn page() -> Response {
    let policy = HeaderValue::from_static(crate::routes::PAGE_POLICY);
    ([(header::CONTENT_SECURITY_POLICY, policy)], Html(include_str!("dashboard.html"))).into_response()
}

/// What the run is: its name, its settings as TOML, and whether it has ended.
async fn run(State(folder): State<Arc<PathBuf>>) -> Json<Value> {
    // A run that goes on keeps the receipt of its first part, and writes metrics behind it.
    let changed = |name: &str| folder.join(name).metadata().and_then(|m| m.modified()).ok();
    let (receipt, metrics) = (changed("receipt.json"), changed("metrics.jsonl"));
    let whole = folder.canonicalize().unwrap_or_else(|_| folder.to_path_buf());
    Json(json!({
        "name": whole.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default(),
        "config": std::fs::read_to_string(folder.join("config.toml")).unwrap_or_default(),
        "ended": receipt.is_some() && receipt >= metrics,
    }))
}

/// Whole lines of the file from byte `from` on (`?from=`): `lines`, where the `next` ones begin, and which `file` they are
/// of: a run that goes on from a checkpoint writes its metrics anew.
async fn metrics(State(folder): State<Arc<PathBuf>>, uri: Uri) -> Json<Value> {
    let from = uri.query().and_then(|q| q.strip_prefix("from=")?.parse().ok()).unwrap_or(0);
    let (file, lines) = lines_from(&folder.join("metrics.jsonl"), from).unwrap_or_default();
    Json(json!({ "file": file, "next": from + lines.len() as u64, "lines": lines }))
}

/// When the file was made, in milliseconds, and its whole lines from byte `from` on, a chunk of them at most.
fn lines_from(path: &Path, from: u64) -> std::io::Result<(u64, String)> {
    let mut file = File::open(path)?;
    let meta = file.metadata()?;
    let made = meta.created().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
    let made = made.map_or(0, |t| t.as_millis() as u64);
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.take(CHUNK).read_to_end(&mut bytes)?;
    // The last line may be in the making.
    let whole = bytes.iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1);
    bytes.truncate(whole);
    Ok((made, String::from_utf8_lossy(&bytes).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::TcpStream;

    /// The body of what is at `path`, and the head.
    fn ask(address: SocketAddr, path: &str) -> (String, String) {
        let mut stream = TcpStream::connect(address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head.to_string(), body.to_string())
    }

    #[test]
    fn lines_are_given_as_they_come() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        std::fs::write(folder.path().join("config.toml"), "[run]\nsteps = 3\n").unwrap();
        let (stop, stopped) = crate::stopper();
        let (sender, receiver) = std::sync::mpsc::channel();
        let run = folder.path().to_path_buf();
        let server = std::thread::spawn(move || {
            dashboard(&run, ([127, 0, 0, 1], 0).into(), stopped, |a| sender.send(a).unwrap())
        });
        let address = receiver.recv().unwrap();
        let get = |from: u64| -> Value {
            serde_json::from_str(&ask(address, &format!("/metrics.jsonl?from={from}")).1).unwrap()
        };
        assert_eq!((&get(0)["lines"], &get(0)["next"]), (&json!(""), &json!(0)), "no file yet");
        std::fs::write(&path, "{\"step\":1}\n{\"st").unwrap();
        let first = get(0);
        assert_eq!((&first["lines"], &first["next"]), (&json!("{\"step\":1}\n"), &json!(11)));
        std::fs::write(&path, "{\"step\":1}\n{\"step\":2}\n").unwrap();
        assert_eq!(get(11)["lines"], "{\"step\":2}\n");
        assert_eq!(get(22)["lines"], "");
        // Past the end, and nonsense.
        assert_eq!(get(1000)["lines"], "");
        assert_eq!(ask(address, "/metrics.jsonl?from=x").1, ask(address, "/metrics.jsonl").1);
        let (head, page) = ask(address, "/");
        assert!(head.starts_with("HTTP/1.1 200") && head.to_lowercase().contains("default-src 'none'"));
        assert!(page.contains("</html>") && !page.contains("src=\"http"), "the page is one file");
        let run: Value = serde_json::from_str(&ask(address, "/run").1).unwrap();
        assert_eq!((&run["config"], &run["ended"]), (&json!("[run]\nsteps = 3\n"), &json!(false)));
        std::fs::write(folder.path().join("receipt.json"), "{}").unwrap();
        let run: Value = serde_json::from_str(&ask(address, "/run").1).unwrap();
        assert_eq!(run["ended"], true);
        // Nothing else of the disk is given.
        for path in ["/config.toml", "/../secret", "/%2e%2e/secret"] {
            assert!(ask(address, path).0.starts_with("HTTP/1.1 404"), "{path}");
        }
        stop.stop();
        server.join().unwrap().unwrap();
    }

    #[test]
    fn a_long_file_comes_in_chunks_of_whole_lines() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let line = format!("{{\"step\":1,\"note\":\"{}\"}}\n", "x".repeat(1000));
        std::fs::write(file.path(), line.repeat(2000)).unwrap();
        let (mut from, mut n) = (0, 0);
        loop {
            let (_, lines) = lines_from(file.path(), from).unwrap();
            if lines.is_empty() {
                break;
            }
            assert!(lines.len() as u64 <= CHUNK && lines.ends_with('\n'));
            from += lines.len() as u64;
            n += lines.lines().count();
        }
        assert_eq!((n, from), (2000, 2000 * line.len() as u64));
    }
}
