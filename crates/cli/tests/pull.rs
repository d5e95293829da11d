//! `sparsam pull` against a small server that answers as the Hugging Face hub does.

use serde_json::{Value, json};
use sha1::Digest;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

/// A commit as git names it.
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server does.
#[derive(Default)]
struct Plan {
    /// (path, bytes, large: named by SHA-256).
    files: Vec<(&'static str, Vec<u8>, bool)>,
    /// The token without which it says 401.
    token: Option<&'static str>,
    /// Cut each transfer of a file after so many bytes, so many times.
    cut: Mutex<(usize, usize)>,
    /// Send other bytes than listed.
    corrupt: bool,
    /// Whether it knows ranges.
    ranges: bool,
    /// Paths asked for, with their ranges.
    asked: Mutex<Vec<String>>,
}

impl Plan {
    fn listing(&self) -> Value {
        let sibling = |(path, bytes, large): &(&str, Vec<u8>, bool)| {
            let mut git = sha1::Sha1::new();
            git.update(format!("blob {}\0", bytes.len()));
            git.update(bytes);
            let mut entry = json!({"rfilename": path, "size": bytes.len(), "blobId": hex(&git.finalize())});
            if *large {
                entry["lfs"] = json!({"sha256": hex(&sha2::Sha256::digest(bytes)), "size": bytes.len()});
            }
            entry
        };
        json!({"id": "org/model", "sha": COMMIT, "siblings": self.files.iter().map(sibling).collect::<Vec<_>>()})
    }

    fn answer(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut request = String::new();
        reader.read_line(&mut request)?;
        let (mut range, mut authorized) = (0, self.token.is_none());
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? <= 2 {
                break;
            }
            let lower = line.to_lowercase();
            if let Some(from) = lower.strip_prefix("range: bytes=") {
                range = from.trim().trim_end_matches('-').parse().unwrap();
            }
            if let Some(token) = self.token {
                authorized |= line.trim_end().ends_with(&format!("Bearer {token}"));
            }
        }
        let path = request.split(' ').nth(1).unwrap_or("").to_string();
        self.asked.lock().unwrap().push(format!("{path} {range}"));
        let mut send = |status: &str, length: usize, body: &[u8]| {
            write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n")?;
            stream.write_all(body)
        };
        if !authorized {
            return send("401 Unauthorized", 0, b"");
        }
        if path.starts_with("/api/models/org/model/revision/main") {
            let body = self.listing().to_string();
            return send("200 OK", body.len(), body.as_bytes());
        }
        let prefix = format!("/org/model/resolve/{COMMIT}/");
        let file = path.strip_prefix(&prefix).and_then(|p| self.files.iter().find(|f| f.0 == p));
        let Some((_, bytes, _)) = file else { return send("404 Not Found", 0, b"") };
        let mut bytes = bytes.clone();
        if self.corrupt {
            bytes[0] ^= 1;
        }
        let (status, from) =
            if range > 0 && self.ranges { ("206 Partial Content", range) } else { ("200 OK", 0) };
        let rest = &bytes[from..];
        let mut cut = self.cut.lock().unwrap();
        if cut.1 > 0 && rest.len() > cut.0 {
            cut.1 -= 1;
            return send(status, rest.len(), &rest[..cut.0]);
        }
        send(status, rest.len(), rest)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// A server until the end of the test's process, and its address.
fn serve(plan: Plan) -> (Arc<Plan>, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let plan = Arc::new(plan);
    let here = plan.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A client that goes away is part of the tests.
            let _ = here.answer(stream);
        }
    });
    (plan, address)
}

fn gguf_files() -> Vec<(&'static str, Vec<u8>, bool)> {
    let bytes = |n: usize, seed: usize| (0..n).map(|i| (i * 31 + seed) as u8).collect::<Vec<u8>>();
    vec![
        ("README.md", b"hello".to_vec(), false),
        ("model-Q4_0.gguf", bytes(300_000, 1), true),
        ("model-Q8_0.gguf", bytes(600_000, 2), true),
    ]
}

fn pull(endpoint: &str, home: &Path, args: &[&str], env: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sparsam"))
        .arg("pull")
        .args(args)
        .env("HF_ENDPOINT", endpoint)
        .env("HF_HOME", home)
        .env_remove("HF_HUB_CACHE")
        .env_remove("HF_TOKEN")
        .env_remove("HF_HUB_OFFLINE")
        .envs(env.iter().copied())
        .output()
        .unwrap()
}

#[track_caller]
fn path_of(out: &Output) -> PathBuf {
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    PathBuf::from(String::from_utf8_lossy(&out.stdout).trim())
}

#[track_caller]
fn fails(out: &Output, part: &str) {
    let message = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{message}");
    assert!(message.contains(part), "`{message}` does not say `{part}`");
}

#[test]
fn a_gguf_file_by_type_into_the_hubs_layout() {
    let (plan, endpoint) = serve(Plan { files: gguf_files(), ranges: true, ..Plan::default() });
    let home = tempfile::tempdir().unwrap();
    let path = path_of(&pull(&endpoint, home.path(), &["org/model", "--type", "q8_0"], &[]));
    let repository = home.path().join("hub/models--org--model");
    assert_eq!(path, repository.join("snapshots").join(COMMIT).join("model-Q8_0.gguf"));
    assert_eq!(std::fs::read(&path).unwrap(), plan.files[2].1);
    assert_eq!(std::fs::read_to_string(repository.join("refs/main")).unwrap(), COMMIT);
    // The layout of the hub's own tools: a relative link to the blob, which is named by its checksum.
    let sha = hex(&sha2::Sha256::digest(&plan.files[2].1));
    assert_eq!(std::fs::read_link(&path).unwrap(), Path::new("../../blobs").join(&sha));
    assert!(repository.join("blobs").join(&sha).is_file());
    // A second time, nothing but the list is asked for.
    let before = plan.asked.lock().unwrap().len();
    let again = pull(&endpoint, home.path(), &["org/model", "--type", "Q8_0", "--json"], &[]);
    let said: Value = serde_json::from_slice(&again.stdout).unwrap();
    assert_eq!((&said["fetched_bytes"], &said["files"][0]["bytes"]), (&json!(0.0), &json!(600_000)));
    assert_eq!(plan.asked.lock().unwrap().len(), before + 1);
    // Without a type: the first of the usual order that is there.
    let path = path_of(&pull(&endpoint, home.path(), &["org/model"], &[]));
    assert!(path.ends_with("model-Q4_0.gguf"));
    fails(&pull(&endpoint, home.path(), &["org/model", "--type", "Q4_1"], &[]), "did you mean `Q4_0`?");
}

#[test]
fn a_broken_transfer_goes_on_where_it_stopped() {
    for ranges in [true, false] {
        let cut = Mutex::new((100_000, 2));
        let (plan, endpoint) = serve(Plan { files: gguf_files(), cut, ranges, ..Plan::default() });
        let home = tempfile::tempdir().unwrap();
        let path = path_of(&pull(&endpoint, home.path(), &["org/model", "--type", "Q4_0"], &[]));
        assert_eq!(std::fs::read(&path).unwrap(), plan.files[1].1);
        let asked = plan.asked.lock().unwrap();
        let starts: Vec<&str> = asked[1..].iter().map(|a| a.rsplit(' ').next().unwrap()).collect();
        assert_eq!(starts, ["0", "100000", if ranges { "200000" } else { "100000" }]);
    }
}

#[test]
fn what_was_begun_by_an_earlier_process_is_kept() {
    let (plan, endpoint) = serve(Plan { files: gguf_files(), ranges: true, ..Plan::default() });
    let home = tempfile::tempdir().unwrap();
    let bytes = &plan.files[1].1;
    let blobs = home.path().join("hub/models--org--model/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    let name = hex(&sha2::Sha256::digest(bytes));
    std::fs::write(blobs.join(format!("{name}.incomplete")), &bytes[..250_000]).unwrap();
    let path = path_of(&pull(&endpoint, home.path(), &["org/model", "--type", "Q4_0"], &[]));
    assert_eq!(&std::fs::read(&path).unwrap(), bytes);
    assert!(plan.asked.lock().unwrap()[1].ends_with(" 250000"));
    assert!(!blobs.join(format!("{name}.incomplete")).exists());
}

#[test]
fn a_wrong_checksum_is_never_accepted() {
    for large in [true, false] {
        let files = vec![("model.gguf", vec![7; 1000], large)];
        let (_, endpoint) = serve(Plan { files, corrupt: true, ..Plan::default() });
        let home = tempfile::tempdir().unwrap();
        fails(&pull(&endpoint, home.path(), &["org/model"], &[]), "its checksum is");
        let repository = home.path().join("hub/models--org--model");
        assert_eq!(std::fs::read_dir(repository.join("blobs")).unwrap().count(), 0);
        assert!(!repository.join("refs/main").exists());
    }
}

#[test]
fn a_safetensors_model_with_its_small_files() {
    let files = vec![
        ("config.json", b"{}".to_vec(), false),
        ("model.safetensors", vec![1; 5000], true),
        ("pytorch_model.bin", vec![2; 5000], true),
        ("tokenizer.json", b"{\"a\": 1}".to_vec(), false),
    ];
    let (_, endpoint) = serve(Plan { files, ranges: true, ..Plan::default() });
    let home = tempfile::tempdir().unwrap();
    let path = path_of(&pull(&endpoint, home.path(), &["org/model"], &[]));
    let mut names: Vec<String> =
        std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["config.json", "model.safetensors", "tokenizer.json"]);
}

#[test]
fn tokens_revisions_and_offline() {
    let plan = Plan { files: gguf_files(), token: Some("secret"), ranges: true, ..Plan::default() };
    let (plan, endpoint) = serve(plan);
    let home = tempfile::tempdir().unwrap();
    fails(&pull(&endpoint, home.path(), &["org/model"], &[]), "set HF_TOKEN");
    fails(
        &pull(&endpoint, home.path(), &["org/model"], &[("HF_TOKEN", "wrong")]),
        "the token may not read it",
    );
    let path = path_of(&pull(&endpoint, home.path(), &["org/model"], &[("HF_TOKEN", "secret")]));
    // The token that the hub's own login stored.
    std::fs::write(home.path().join("token"), "secret\n").unwrap();
    assert_eq!(path_of(&pull(&endpoint, home.path(), &["org/model"], &[])), path);
    fails(&pull(&endpoint, home.path(), &["org/model@nope"], &[]), "not found");
    fails(&pull(&endpoint, home.path(), &["org/model@../x"], &[]), "no name of a revision");
    fails(&pull(&endpoint, home.path(), &["model"], &[]), "give ORG/NAME");
    fails(&pull("ftp://x", home.path(), &["org/model"], &[]), "must begin with https://");
    // Offline: from the cache, without a question to the server.
    let before = plan.asked.lock().unwrap().len();
    let offline = [("HF_HUB_OFFLINE", "1")];
    assert_eq!(path_of(&pull(&endpoint, home.path(), &["org/model:Q4_0"], &offline)), path);
    fails(&pull(&endpoint, home.path(), &["org/model:Q8_0"], &offline), "no GGUF file of type `Q8_0`");
    fails(&pull(&endpoint, home.path(), &["org/other"], &offline), "HF_HUB_OFFLINE is set");
    assert_eq!(plan.asked.lock().unwrap().len(), before);
}

#[test]
fn what_was_pulled_is_a_model_by_its_name() {
    let Some(model) = sparsam_testkit::smollm2() else { return };
    let (whole, broken) = (std::fs::read(model).unwrap(), vec![0; 64]);
    let files = vec![("m-Q4_1.gguf", whole, true), ("m-Q8_0.gguf", broken, true)];
    let (_, endpoint) = serve(Plan { files, ranges: true, ..Plan::default() });
    let home = tempfile::tempdir().unwrap();
    path_of(&pull(&endpoint, home.path(), &["org/model:Q4_1"], &[]));
    let info = |name: &str| {
        Command::new(env!("CARGO_BIN_EXE_sparsam"))
            .args(["info", name, "--json"])
            .env("HF_HOME", home.path())
            .env_remove("HF_HUB_CACHE")
            .output()
            .unwrap()
    };
    for name in ["org/model", "org/model:q4_1", "org/model@main", &format!("org/model@{COMMIT}:Q4_1")] {
        let out = info(name);
        assert!(out.status.success(), "{name}: {}", String::from_utf8_lossy(&out.stderr));
        assert!(String::from_utf8_lossy(&out.stdout).contains("134515008"), "{name}");
    }
    fails(&info("org/model:Q8_0"), "no GGUF file of type `Q8_0`");
    fails(&info("org/other"), "sparsam pull org/other");
}
