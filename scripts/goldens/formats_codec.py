#!/usr/bin/env python3
"""Goldens of the codec: random blocks, and what llama.cpp's `gguf` package (0.19, numpy) makes of them.

    pip install gguf==0.19.0 && scripts/goldens/formats_codec.py

Writes crates/dtype/tests/golden/decode_TYPE.bin (blocks, then their f32 values) and encode_TYPE.bin (f32 values, then
the blocks that `quantize` gives); all little endian. Each starts with the number of blocks as a u32.
"""

from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as Q
from gguf.quants import dequantize, quantize

OUT = Path(__file__).resolve().parents[2] / "crates/dtype/tests/golden"
# Where the f16 scales lie in a block: random bits there would mostly be NaN or huge.
F16_AT = {
    Q.Q4_0: [0], Q.Q4_1: [0, 2], Q.Q5_0: [0], Q.Q5_1: [0, 2], Q.Q8_0: [0], Q.IQ4_NL: [0], Q.IQ4_XS: [0],
    Q.Q2_K: [80, 82], Q.Q3_K: [108], Q.Q4_K: [0, 2], Q.Q5_K: [0, 2], Q.Q6_K: [208],
}
ENCODE = [Q.F16, Q.BF16, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0]


def write(name: str, n: int, *parts: np.ndarray) -> None:
    (OUT / name).write_bytes(b"".join([np.uint32(n).tobytes(), *(np.ascontiguousarray(p).tobytes() for p in parts)]))


def main() -> None:
    rng = np.random.default_rng(20260101)
    OUT.mkdir(parents=True, exist_ok=True)
    for q, places in F16_AT.items():
        block_len, block_bytes = GGML_QUANT_SIZES[q]
        n = 24 if block_len == 32 else 6
        blocks = rng.integers(0, 256, (n, block_bytes), dtype=np.uint8)
        for at in places:
            scales = (rng.standard_normal(n) * 10.0 ** rng.integers(-7, 4, n)).astype(np.float16)  # subnormals too
            blocks[:, at : at + 2] = scales.view(np.uint8).reshape(n, 2)
        write(f"decode_{q.name}.bin", n, blocks, dequantize(blocks, q).astype("<f4"))
    # Every f16 and bf16 that is a number, in steps that keep the file small.
    bits = np.arange(0, 65536, 13, dtype=np.uint16)
    for q, largest in [(Q.F16, 0x7C00), (Q.BF16, 0x7F80)]:
        b = bits[(bits & 0x7FFF) <= largest]
        b = b[: len(b) // 32 * 32]
        write(f"decode_{q.name}.bin", len(b), b, dequantize(b.view(np.uint8), q).astype("<f4"))
    for q in ENCODE:
        rows = [rng.standard_normal(32) * 10.0 ** e for e in (-6, -3, -1, 0, 0, 1, 3)]
        rows += [np.zeros(32), np.full(32, 0.3), -np.abs(rng.standard_normal(32)), np.round(rng.standard_normal(32) * 8) / 4]
        rows += [np.r_[np.zeros(31), -1.0], np.r_[1.0, -1.0, np.zeros(30)], np.linspace(-1, 1, 32)]
        x = np.array(rows, dtype=np.float32)
        n = x.size // GGML_QUANT_SIZES[q][0]
        write(f"encode_{q.name}.bin", n, x.astype("<f4"), quantize(x, q))


if __name__ == "__main__":
    main()
