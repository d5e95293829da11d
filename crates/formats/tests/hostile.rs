//! Damaged and hostile files: one clear error each, no panic, nothing allocated by a length that was not checked.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use sparsam_dtype::DType;
use sparsam_formats::{Kind, Source};

/// A GGUF file made by hand.
struct Gguf(Vec<u8>);

impl Gguf {
    fn new(version: u32, n_tensors: u64, n_keys: u64) -> Gguf {
        Gguf(b"GGUF".to_vec()).u32(version).u64(n_tensors).u64(n_keys)
    }
    fn u32(mut self, x: u32) -> Gguf {
        self.0.extend(x.to_le_bytes());
        self
    }
    fn u64(mut self, x: u64) -> Gguf {
        self.0.extend(x.to_le_bytes());
        self
    }
    fn raw(mut self, bytes: &[u8]) -> Gguf {
        self.0.extend(bytes);
        self
    }
    fn string(self, s: impl AsRef<[u8]>) -> Gguf {
        self.u64(s.as_ref().len() as u64).raw(s.as_ref())
    }
    fn key_u32(self, key: &str, x: u32) -> Gguf {
        self.string(key).u32(4).u32(x)
    }
    /// An entry of the table; dimensions innermost first.
    fn tensor(self, name: &str, dims: &[u64], dtype: u32, offset: u64) -> Gguf {
        let mut g = self.string(name).u32(dims.len() as u32);
        for &d in dims {
            g = g.u64(d);
        }
        g.u32(dtype).u64(offset)
    }
    /// Padding, and `n` bytes of tensors.
    fn data(mut self, n: usize) -> Gguf {
        self.0.resize(self.0.len().next_multiple_of(32) + n, 0);
        self
    }
}

/// A safetensors file with this header and `n` bytes of tensors.
fn safe(header: &str, n: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + n, 0);
    bytes
}

/// That opening `bytes` as a file called `name` fails and says all of `parts`, the path included.
#[track_caller]
fn refused(name: &str, bytes: &[u8], parts: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    let Err(e) = Source::open(&path) else { panic!("opened, though it should say {parts:?}") };
    let said = e.to_string();
    for part in parts.iter().chain(&[name]) {
        assert!(said.contains(part), "{said:?} lacks {part:?}");
    }
}

#[track_caller]
fn bad_gguf(gguf: Gguf, parts: &[&str]) {
    refused("m.gguf", &gguf.0, parts);
}

#[test]
fn what_is_no_gguf() {
    refused("m.gguf", b"", &["it is empty", "fetch it again"]);
    refused("m.gguf", b"GG", &["not `GGUF`"]);
    refused("m.gguf", b"GGUF", &["the version reaches to byte 8", "4 bytes", "download may be incomplete"]);
    refused("m.gguf", b"lmgg....", &["before GGUF", "convert the original model"]);
    refused("m.gguf", b"version https://git-lfs.github.com/spec/v1\n", &["Git LFS pointer", "git lfs pull"]);
    refused("m.gguf", b"<!DOCTYPE html>", &["web page", "download the file itself"]);
    refused("model.bin", b"PK\x03\x04whatever", &["pickle", "convert it to safetensors"]);
    refused("model.bin", b"hello", &["neither GGUF nor safetensors", "name a .gguf file"]);
    bad_gguf(Gguf::new(1, 0, 0), &["version 1 is not supported", "convert"]);
    bad_gguf(Gguf::new(3u32.swap_bytes(), 0, 0), &["big endian", "convert it to little endian"]);
    bad_gguf(Gguf::new(77, 0, 0), &["version 77 is unknown"]);
    let said = Source::open("/nowhere/m.gguf").err().unwrap().to_string();
    assert!(said.contains("cannot open /nowhere/m.gguf"), "{said}");
}

#[test]
fn gguf_lengths_are_checked_before_they_are_used() {
    const INCOMPLETE: &str = "the download may be incomplete";
    bad_gguf(Gguf::new(3, 0, u64::MAX), &["the number of keys (18446744073709551615)", INCOMPLETE]);
    bad_gguf(Gguf::new(3, u64::MAX, 0), &["the table of 18446744073709551615 tensors", INCOMPLETE]);
    bad_gguf(Gguf::new(3, 1 << 40, 0).data(999), &["the table of 1099511627776 tensors", INCOMPLETE]);
    let key = || Gguf::new(3, 0, 1);
    bad_gguf(key().u64(u64::MAX).data(64), &["the name of key 0 (of 1)", INCOMPLETE]);
    bad_gguf(key().string("k").u32(8).u64(1 << 40).data(64), &["key k (1099511627776) reaches", INCOMPLETE]);
    for (element, n) in [(0, u64::MAX), (4, 1 << 62), (8, 1 << 61), (9, 1 << 33), (12, 1 << 40)] {
        bad_gguf(
            key().string("k").u32(9).u32(element).u64(n).data(640),
            &["key k", &n.to_string(), INCOMPLETE],
        );
    }
    bad_gguf(key().string("k").u32(13).data(9), &["key k: value type 13 is unknown", "damaged or newer"]);
    bad_gguf(key().string("k").u32(9).u32(44).u64(0), &["key k: value type 44 is unknown"]);
    bad_gguf(
        key().string("k").u32(7).raw(&[2]).data(9),
        &["key k: byte 2", "neither true (1) nor false (0)"],
    );
    let mut nested = key().string("k").u32(9);
    for _ in 0..40 {
        nested = nested.u32(9).u64(1);
    }
    bad_gguf(nested.data(999), &["key k: arrays are nested deeper than 4"]);
    bad_gguf(key().string([b'k', 0xFF]).u32(0).data(9), &["name of key 0", "not UTF-8 at byte 33"]);
    bad_gguf(
        key().string("k").u32(8).string([0xC3]).data(9),
        &["key k: the string is not UTF-8", "fetch it again"],
    );
    let twice = Gguf::new(3, 0, 2).key_u32("k", 1).key_u32("k", 1);
    bad_gguf(twice, &["key k: it appears twice"]);
}

#[test]
fn gguf_tensors_lie_in_the_file_and_apart() {
    let one = |dims: &[u64], dtype, offset| Gguf::new(3, 1, 0).tensor("t", dims, dtype, offset).data(4096);
    bad_gguf(
        one(&[64], 0, 1 << 40),
        &["tensor t reaches to byte 1099511628", "the download may be incomplete"],
    );
    bad_gguf(one(&[64], 0, u64::MAX - 31), &["tensor t reaches to byte 18446744073709551615"]);
    bad_gguf(one(&[1025], 0, 0), &["tensor t reaches to byte 4164, past the end of the file (4160 bytes)"]);
    bad_gguf(
        one(&[1 << 40, 1 << 40], 0, 0),
        &["tensor t: the shape [1099511627776, 1099511627776] has more elements"],
    );
    bad_gguf(one(&[1 << 40, 1 << 40, 0], 0, 0), &["more elements than this machine can count"]);
    bad_gguf(one(&[u64::MAX / 4], 0, 0), &["more elements"]);
    bad_gguf(one(&[33], 2, 0), &["tensor t: rows of 33 elements are no whole number of Q4_0 blocks of 32"]);
    bad_gguf(one(&[32], 12, 0), &["rows of 32 elements are no whole number of Q4_K blocks of 256"]);
    bad_gguf(one(&[1; 5], 0, 0), &["tensor t: it has 5 dimensions, more than 4"]);
    bad_gguf(Gguf::new(3, 1, 0).string("t").u32(u32::MAX).data(99), &["it has 4294967295 dimensions"]);
    bad_gguf(one(&[64], 0, 16), &["tensor t: its offset 16 is no multiple of the alignment 32"]);
    let two = |a: &str, b: &str, offset| {
        Gguf::new(3, 2, 0).tensor(a, &[64], 0, 0).tensor(b, &[64], 0, offset).data(4096)
    };
    bad_gguf(
        two("a", "b", 224),
        &["tensor b: it starts at byte 3", "inside tensor a", "fetch or convert it anew"],
    );
    bad_gguf(two("a", "a", 256), &["tensor a: two tensors have this name"]);
    for (alignment, said) in [(0, "0 is no power of two"), (48, "48 is no power of two")] {
        let g = Gguf::new(3, 1, 1).key_u32("general.alignment", alignment).tensor("t", &[8], 0, 0).data(64);
        bad_gguf(g, &["key general.alignment", said]);
    }
    let g = Gguf::new(3, 0, 1).string("general.alignment").u32(8).string("x");
    bad_gguf(g, &["key general.alignment", "is string \"x\", where a whole number below 2^32 is expected"]);
}

#[test]
fn gguf_types_that_are_not_supported_are_named() {
    for (number, name) in
        [(19, "IQ1_S"), (16, "IQ2_XXS"), (34, "TQ1_0"), (39, "MXFP4"), (31, "Q4_0_4_4, removed")]
    {
        let g = Gguf::new(3, 1, 0).tensor("blk.0.attn_q.weight", &[256], number, 0).data(4096);
        let said = format!("tensor blk.0.attn_q.weight has type {number} ({name}");
        bad_gguf(g, &[&said, "use a file in F32, F16, BF16, Q4_0 to Q8_0"]);
    }
    let g = Gguf::new(3, 1, 0).tensor("t", &[256], 1000, 0).data(4096);
    bad_gguf(g, &["type 1000 (unknown: the file is damaged or newer than this program)"]);
}

#[test]
fn gguf_edges_that_are_fine() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let open = |g: Gguf| {
        std::fs::write(&path, g.0).unwrap();
        Source::open(&path).unwrap()
    };
    let vocabulary_only = open(Gguf::new(3, 0, 1).key_u32("k", 7));
    assert_eq!(vocabulary_only.gguf_metadata().unwrap().u32("k").unwrap(), 7);
    let s =
        open(Gguf::new(2, 2, 0).tensor("scalar", &[], 0, 32).tensor("empty", &[32, 0], 2, 1 << 50).data(36));
    let scalar = s.tensor("scalar").unwrap();
    assert_eq!((&scalar.info.shape[..], scalar.bytes, scalar.info.numel()), (&[][..], &[0; 4][..], 1));
    let empty = s.tensor("empty").unwrap();
    assert_eq!((&empty.info.shape[..], empty.info.dtype, empty.bytes), (&[0, 32][..], DType::Q4_0, &[][..]));
    // Tensors may stand in any order, with gaps.
    let s = open(Gguf::new(3, 2, 0).tensor("b", &[8], 0, 128).tensor("a", &[8], 0, 0).data(160));
    assert_eq!(s.tensors().iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["b", "a"]);
}

#[test]
fn bad_safetensors() {
    let bad = |bytes: &[u8], parts: &[&str]| refused("m.safetensors", bytes, parts);
    let t = r#""t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;
    bad(b"", &["the header's length reaches to byte 8", "download may be incomplete"]);
    bad(
        b"\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF{}",
        &["header's length: it says 18446744073709551615 bytes, more than 100000000"],
    );
    bad(
        b"\x00\x10\x00\x00\x00\x00\x00\x00{}",
        &["the header reaches to byte 4104, past the end of the file (10 bytes)"],
    );
    bad(b"version https://git-lfs.github.com/spec/v1\n", &["git lfs pull"]);
    bad(&safe("{", 0), &["the header: it is not the JSON it should be", "fetch the file again"]);
    bad(&safe("[]", 0), &["expected an object"]);
    bad(&safe(&"[".repeat(5000), 0), &["the header: it is not the JSON"]);
    bad(&safe(&format!("{{\"a\":{}", "[".repeat(5000)), 0), &["recursion limit"]);
    bad(&safe(&format!("{{{t}}}"), 7), &["tensor t reaches to byte", "download may be incomplete"]);
    bad(&safe(&format!("{{{t}}}"), 9), &["the tensors: they end at byte 8 of 9"]);
    bad(
        &safe(&format!("{{{t},{t}}}"), 8),
        &["tensor t: it starts at byte 0", "overlaps the tensor before it"],
    );
    let twin = r#""t":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}"#;
    bad(&safe(&format!("{{{t},{twin}}}"), 16), &["tensor t: two tensors have this name"]);
    let gap = r#""u":{"dtype":"F32","shape":[2],"data_offsets":[9,17]}"#;
    bad(&safe(&format!("{{{t},{gap}}}"), 17), &["tensor u: it starts at byte 9", "leaves a gap before it"]);
    for (entry, said) in [
        (
            r#"{"dtype":"F32","shape":[3],"data_offsets":[0,8]}"#,
            "shape [3] of F32 takes 12 bytes, but the file gives it 8",
        ),
        (r#"{"dtype":"F32","shape":[2],"data_offsets":[8,0]}"#, "data_offsets are not a begin and an end"),
        (r#"{"dtype":"F32","shape":[2],"data_offsets":[0,4,8]}"#, "data_offsets are not a begin and an end"),
        (
            r#"{"dtype":"F32","shape":[2],"data_offsets":[0,-8]}"#,
            "data_offsets is not a list of whole numbers",
        ),
        (r#"{"dtype":"F32","shape":[2.5],"data_offsets":[0,8]}"#, "shape is not a list of whole numbers"),
        (r#"{"dtype":"F32","shape":2,"data_offsets":[0,8]}"#, "shape is not a list of whole numbers"),
        (r#"{"dtype":"F33","shape":[2],"data_offsets":[0,8]}"#, "its type F33 is unknown"),
        (r#"{"dtype":"F4","shape":[3],"data_offsets":[0,8]}"#, "shape [3] of F4 takes 2 bytes"),
        (r#"{"shape":[2],"data_offsets":[0,8]}"#, "it has no dtype"),
        ("7", "it has no dtype"),
        (
            r#"{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}"#,
            "has more elements than this machine can count",
        ),
        (
            r#"{"dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,8]}"#,
            "not a list of whole numbers",
        ),
    ] {
        bad(&safe(&format!("{{\"t\":{entry}}}"), 8), &["tensor t: ", said, "the file is damaged"]);
    }
    bad(&safe(r#"{"__metadata__":{"a":1}}"#, 0), &["__metadata__: it is not a map of strings"]);
}

#[test]
fn bad_index() {
    let bad = |index: &str, parts: &[&str]| refused("model.safetensors.index.json", index.as_bytes(), parts);
    bad("", &["the index: it is not the JSON it should be", "fetch it again"]);
    bad(r#"{"metadata":{}}"#, &["missing field `weight_map`"]);
    bad(r#"{"weight_map":{}}"#, &["its weight_map is empty"]);
    bad(r#"{"weight_map":{"t":7}}"#, &["weight_map, tensor t: its shard is not a file name"]);
    for shard in ["/etc/passwd", "../m.safetensors", "a/b", "a\\\\b", "..", ".", "", "a/", "x\\u0000"] {
        let index = format!(r#"{{"weight_map":{{"t":"{shard}"}}}}"#);
        bad(&index, &["tensor t: the shard", "is not a plain file name"]);
    }
    bad(r#"{"weight_map":{"t":"a","t":"b"}}"#, &["tensor t: it appears twice"]);
    bad(r#"{"weight_map":{"t":"a"}}"#, &["names the shard a, which is not beside it", "fetch all 1 shards"]);

    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
    let said = || Source::open(dir.path()).err().unwrap().to_string();
    write("a", &safe(r#"{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#, 1));
    write("b", &safe(r#"{"u":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#, 1));
    write("model.safetensors.index.json", br#"{"weight_map":{"t":"b","u":"b"}}"#);
    assert!(said().contains("tensor t: the index says that it is in b, but it is not"), "{}", said());
    write("model.safetensors.index.json", br#"{"weight_map":{"t":"b","u":"a"}}"#);
    assert!(said().contains("the index says that it is in"), "{}", said());
    write("b", &safe(r#"{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#, 1));
    assert!(said().contains("tensor t: the name is already taken"), "{}", said());
}

/// One change of a file's bytes.
#[derive(Clone, Debug)]
enum Mutation {
    Flip(usize, u8),
    Byte(usize, u8),
    U32(usize, u32),
    U64(usize, u64),
    Truncate(usize),
    Remove(usize, usize),
    Insert(usize, Vec<u8>),
    Move(usize, usize, usize),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    use Mutation::*;
    let at = || any::<proptest::sample::Index>().prop_map(|i| i.index(1 << 24));
    let large = prop_oneof![
        Just(u64::MAX),
        Just(0),
        Just(1 << 63),
        Just(1 << 40),
        Just(1 << 32),
        (0u32..64).prop_map(|s| 1 << s),
        0u64..300,
        any::<u64>(),
    ];
    prop_oneof![
        (at(), 0u8..8).prop_map(|(a, b)| Flip(a, b)),
        (at(), prop_oneof![any::<u8>(), proptest::sample::select(b"{}[]\",:0123456789-.eE\\/".to_vec())])
            .prop_map(|(a, b)| Byte(a, b)),
        (at(), prop_oneof![0u32..64, any::<u32>()]).prop_map(|(a, x)| U32(a, x)),
        (at(), large).prop_map(|(a, x)| U64(a, x)),
        at().prop_map(Truncate),
        (at(), 1usize..40).prop_map(|(a, n)| Remove(a, n)),
        (at(), proptest::collection::vec(any::<u8>(), 1..40)).prop_map(|(a, b)| Insert(a, b)),
        (at(), at(), 1usize..80).prop_map(|(a, b, n)| Move(a, b, n)),
    ]
}

impl Mutation {
    fn apply(&self, bytes: &mut Vec<u8>) {
        let len = bytes.len().max(1);
        fn put(bytes: &mut [u8], at: usize, new: &[u8]) {
            let at = at % bytes.len().max(1);
            for (b, n) in bytes.iter_mut().skip(at).zip(new) {
                *b = *n;
            }
        }
        match self {
            Mutation::Flip(at, bit) => {
                if let Some(b) = bytes.get_mut(at % len) {
                    *b ^= 1 << bit;
                }
            }
            Mutation::Byte(at, b) => put(bytes, *at, &[*b]),
            Mutation::U32(at, x) => put(bytes, *at, &x.to_le_bytes()),
            Mutation::U64(at, x) => put(bytes, *at, &x.to_le_bytes()),
            Mutation::Truncate(at) => bytes.truncate(at % len),
            Mutation::Remove(at, n) => {
                let at = (at % len).min(bytes.len());
                let end = (at + n).min(bytes.len());
                bytes.drain(at..end);
            }
            Mutation::Insert(at, new) => {
                let at = (at % len).min(bytes.len());
                bytes.splice(at..at, new.iter().copied());
            }
            Mutation::Move(from, to, n) => {
                let from = from % len;
                let piece: Vec<u8> = bytes.iter().skip(from).take(*n).copied().collect();
                put(bytes, *to, &piece);
            }
        }
    }
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// Opens a file that may be anything. What opens must be sound: each tensor has the bytes that its shape takes, all of
/// them together fit into the file, and every getter answers.
fn survive(path: &Path, file_bytes: u64) {
    match Source::open(path) {
        Err(e) => assert!(e.to_string().len() > 20, "{e}"),
        Ok(source) => {
            let mut total = 0;
            for info in source.tensors() {
                let t = source.tensor(&info.name).expect("listed");
                assert_eq!(Some(t.bytes.len()), info.dtype.bytes_for(info.numel()), "{}", info.name);
                total += t.bytes.len() as u64;
                std::hint::black_box(t.bytes.iter().fold(0u8, |a, b| a ^ b));
            }
            assert!(total <= file_bytes, "{total} bytes of tensors in a file of {file_bytes}");
            if let Some(m) = source.gguf_metadata() {
                for (key, value) in m.iter() {
                    std::hint::black_box((value.to_string(), m.u32(key).is_ok(), m.strings(key).is_ok()));
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_gguf(which in 0usize..2, mutations in proptest::collection::vec(mutation(), 1..4)) {
        let name = ["all.gguf", "split-00002-of-00003.gguf"][which];
        let mut bytes = std::fs::read(golden(name)).unwrap();
        mutations.iter().for_each(|m| m.apply(&mut bytes));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        std::fs::write(&path, &bytes).unwrap();
        survive(&path, bytes.len() as u64);
    }

    #[test]
    fn mutated_safetensors(mutations in proptest::collection::vec(mutation(), 1..4)) {
        let mut bytes = std::fs::read(golden("single.safetensors")).unwrap();
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        // Changes of the tensors' bytes teach nothing: only length and header are touched.
        let mut head = bytes[..header].to_vec();
        mutations.iter().for_each(|m| m.apply(&mut head));
        bytes.splice(..header, head);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.safetensors");
        std::fs::write(&path, &bytes).unwrap();
        survive(&path, bytes.len() as u64);
    }

    #[test]
    fn mutated_index(mutations in proptest::collection::vec(mutation(), 1..4)) {
        let mut bytes = std::fs::read(golden("shards/model.safetensors.index.json")).unwrap();
        mutations.iter().for_each(|m| m.apply(&mut bytes));
        let dir = tempfile::tempdir().unwrap();
        let mut total = 0;
        for shard in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
            total += std::fs::copy(golden("shards").join(shard), dir.path().join(shard)).unwrap();
        }
        std::fs::write(dir.path().join("model.safetensors.index.json"), &bytes).unwrap();
        survive(dir.path(), total);
    }
}

proptest! {
    // Each case parses a vocabulary of 49152 tokens: 64 of them take about a second.
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// The header of the real model, its tensors a hole in the file.
    #[test]
    fn mutated_real_header(mutations in proptest::collection::vec(mutation(), 1..4)) {
        let Some(model) = sparsam_testkit::smollm2() else { return Ok(()) };
        let len = std::fs::metadata(&model).unwrap().len();
        let mut head = vec![0; 1_800_000];
        std::io::Read::read_exact(&mut std::fs::File::open(&model).unwrap(), &mut head).unwrap();
        mutations.iter().for_each(|m| m.apply(&mut head));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        std::fs::write(&path, &head).unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().set_len(len).unwrap();
        match Source::open(&path) {
            Ok(source) => prop_assert_eq!(source.kind(), Kind::Gguf),
            Err(e) => prop_assert!(e.to_string().contains("m.gguf")),
        }
    }
}
