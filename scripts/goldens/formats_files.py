#!/usr/bin/env python3
"""Goldens of the file formats: small files as the `gguf` and `safetensors` packages write them, and what is in them.

    pip install gguf==0.19.0 safetensors==0.8.0 && scripts/goldens/formats_files.py

Writes into crates/formats/tests/golden: all.gguf (every value type, several tensor types), split-0000N-of-00003.gguf
(llama.cpp's split), single.safetensors, shards/ (with index and config.json), and expected.json: name, shape (as
Hugging Face has it), type and hexadecimal bytes of every tensor, and the metadata.
"""

import json
import shutil
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFValueType as T, GGUFWriter
from gguf import GGMLQuantizationType as Q
from gguf.quants import quantize
from safetensors import safe_open
from safetensors.numpy import save_file

OUT = Path(__file__).resolve().parents[2] / "crates/formats/tests/golden"


def tensors(rng):
    """Name, array as Hugging Face has it, GGUF type."""
    f = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return [
        ("token_embd.weight", f(3, 64), Q.Q4_0),
        ("blk.0.norm.weight", f(5), Q.F32),
        ("blk.0.ffn.weight", f(4, 32), Q.Q8_0),
        ("blk.0.cube", f(2, 3, 4), Q.F16),
        ("blk.0.four", f(1, 2, 1, 3), Q.BF16),
        ("position_ids", np.arange(7, dtype=np.int32), Q.I32),
    ]


def add_tensors(w, items):
    for name, x, q in items:
        if q in (Q.F32, Q.I32):
            w.add_tensor(name, x)
        elif q == Q.F16:
            w.add_tensor(name, x.astype(np.float16))
        else:
            w.add_tensor(name, quantize(x, q), raw_dtype=q)


def close(w):
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def seen_by_gguf(path):
    return [
        {
            "name": t.name,
            "shape": [int(n) for n in reversed(t.shape)],
            "dtype": t.tensor_type.name,
            "hex": np.ascontiguousarray(t.data).tobytes().hex(),
        }
        for t in GGUFReader(path).tensors
    ]


def main():
    rng = np.random.default_rng(7)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    expected = {}

    w = GGUFWriter(OUT / "all.gguf", "llama")
    w.add_uint8("t.u8", 200)
    w.add_int8("t.i8", -100)
    w.add_uint16("t.u16", 60000)
    w.add_int16("t.i16", -30000)
    w.add_uint32("t.u32", 4000000000)
    w.add_int32("t.i32", -2000000000)
    w.add_float32("t.f32", 0.1)
    w.add_bool("t.true", True)
    w.add_bool("t.false", False)
    w.add_string("t.string", "Grüße, 世界 🦀")
    w.add_uint64("t.u64", 2**63 + 1)
    w.add_int64("t.i64", -(2**62))
    w.add_float64("t.f64", 0.1)
    w.add_array("t.strings", ["a", "", "ß", "<|im_start|>"])
    w.add_array("t.ints", [-1, 2, 3])
    w.add_array("t.floats", [0.5, -1.25])
    w.add_array("t.bools", [True, False, True])
    w.add_key_value("t.bytes", [1, 2, 255], T.ARRAY, sub_type=T.UINT8)
    w.add_key_value("t.doubles", [0.1, 1e300], T.ARRAY, sub_type=T.FLOAT64)
    add_tensors(w, tensors(rng))
    close(w)
    expected["all.gguf"] = seen_by_gguf(OUT / "all.gguf")

    w = GGUFWriter(OUT / "split", "llama", split_max_tensors=2)
    w.add_string("general.name", "in three parts")
    add_tensors(w, tensors(rng))
    close(w)
    parts = sorted(OUT.glob("split-*.gguf"))
    expected["split"] = [t for p in parts for t in seen_by_gguf(p)]

    def save(name, arrays, metadata):
        save_file(arrays, OUT / name, metadata=metadata)
        with safe_open(OUT / name, framework="np") as f:
            return [
                {
                    "name": k,
                    "shape": list(f.get_slice(k).get_shape()),
                    "dtype": f.get_slice(k).get_dtype(),
                    "hex": f.get_tensor(k).tobytes().hex(),
                }
                for k in f.keys()
            ]

    arrays = {name: x for name, x, _ in tensors(rng)}
    arrays["half"] = arrays["blk.0.cube"].astype(np.float16)
    arrays["double"] = arrays["blk.0.norm.weight"].astype(np.float64)
    arrays["bytes"] = np.arange(5, dtype=np.uint8)
    arrays["scalar"] = np.array(2.5, dtype=np.float32)
    arrays["nothing"] = np.zeros((0, 4), dtype=np.float32)
    mask = {"mask": np.array([True, False, True])}
    expected["single"] = save("single.safetensors", arrays | mask, {"format": "pt"})

    (OUT / "shards").mkdir()
    names = sorted(arrays)
    weight_map = {}
    expected["shards"] = []
    for i, part in enumerate([names[:4], names[4:]]):
        shard = f"model-{i + 1:05}-of-00002.safetensors"
        expected["shards"] += save(f"shards/{shard}", {n: arrays[n] for n in part}, {"format": "pt"})
        weight_map |= {n: shard for n in part}
    index = {"metadata": {"total_size": sum(a.nbytes for a in arrays.values())}, "weight_map": weight_map}
    (OUT / "shards/model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (OUT / "shards/config.json").write_text('{"model_type": "llama", "hidden_size": 64}\n')
    (OUT / "expected.json").write_text(json.dumps(expected, indent=0) + "\n")


if __name__ == "__main__":
    main()
