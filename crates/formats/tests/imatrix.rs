//! Importance matrices in both of llama.cpp's formats (`scripts/goldens/imatrix.py`).

use sparsam_formats::imatrix::read;
use std::path::PathBuf;

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

#[test]
fn both_formats_say_the_same() {
    for name in ["imatrix.gguf", "imatrix.dat"] {
        let found = read(golden(name)).unwrap();
        assert_eq!(found.len(), 2, "{name}");
        assert_eq!(found["blk.0.attn_q.weight"], [0.5, 1.0, 1.5], "{name}");
        assert_eq!(found["blk.0.ffn_down.weight"], [3.0, 6.0, 9.0, 12.0], "{name}");
    }
}

#[test]
fn damaged_files_are_said() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("x.dat");
    let check = |bytes: &[u8], says: &str| {
        std::fs::write(&file, bytes).unwrap();
        let said = read(&file).unwrap_err().to_string();
        assert!(said.contains("x.dat") && said.contains(says), "{said}");
    };
    let good = std::fs::read(golden("imatrix.dat")).unwrap();
    // Cut anywhere within an entry; behind the entries nothing is read.
    for n in [0, 3, 7, 20, 29, 33, 40, 60, 80] {
        check(&good[..n], "bytes");
    }
    check(b"First Citizen: Before we proceed any further", "importance matrix");
    check(&0i32.to_le_bytes(), "holds no entry");
    check(&[&good[..4], &(-5i32).to_le_bytes()[..]].concat(), "it is -5");
    let mut poisoned = good.clone();
    let at = 4 + 4 + 19 + 8;
    poisoned[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    check(&poisoned, "holds NaN");
    let said = read(golden("all.gguf")).unwrap_err().to_string();
    assert!(said.contains("another kind of GGUF file"), "{said}");
}
