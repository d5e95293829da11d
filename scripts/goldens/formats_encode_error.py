#!/usr/bin/env python3
"""How much llama.cpp's own encoders err: the bound for ours.

    pip install gguf==0.19.0 && scripts/goldens/formats_encode_error.py .../libggml-base.so

Writes crates/dtype/tests/golden/weights.bin (number of blocks of 256 as a u32, then f32) and encode_error.txt: kind of
weights, first block, number of blocks, type, root mean square of the error over that of the weights. The encoders are
the library's `quantize_row_TYPE_ref`, without an importance matrix; decoding is the `gguf` package's.
"""

import ctypes
import sys
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as Q
from gguf.quants import dequantize

OUT = Path(__file__).resolve().parents[2] / "crates/dtype/tests/golden"
TYPES = [Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0, Q.IQ4_NL, Q.IQ4_XS, Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K]


def main() -> None:
    ggml = ctypes.CDLL(sys.argv[1])
    rng = np.random.default_rng(3)
    kinds = {
        "normal": rng.standard_normal((12, 256)) * 0.02,
        "heavy-tailed": rng.standard_t(3, (8, 256)) * 0.02,
        "positive": rng.uniform(0.0, 1.0, (4, 256)),
        "shifted": rng.standard_normal((4, 256)) * 0.1 + rng.standard_normal((4, 1)),
    }
    x = np.concatenate(list(kinds.values())).astype(np.float32)
    (OUT / "weights.bin").write_bytes(np.uint32(len(x)).tobytes() + x.astype("<f4").tobytes())
    lines = ["# kind, first block, blocks, type, error (llama.cpp's reference encoders)"]
    first = 0
    for kind, rows in kinds.items():
        part = np.ascontiguousarray(x[first : first + len(rows)])
        for q in TYPES:
            n, size = GGML_QUANT_SIZES[q]
            out = np.zeros(part.size // n * size, dtype=np.uint8)
            encode = getattr(ggml, f"quantize_row_{q.name.replace('IQ4', 'iq4').replace('Q', 'q').replace('NL', 'nl').replace('XS', 'xs')}_ref")
            encode(part.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(part.size))
            y = dequantize(out, q).reshape(part.shape).astype(np.float64)
            error = np.sqrt(np.mean((y - part) ** 2) / np.mean(part.astype(np.float64) ** 2))
            lines.append(f"{kind} {first} {len(rows)} {q.name} {error:.9f}")
        first += len(rows)
    (OUT / "encode_error.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
