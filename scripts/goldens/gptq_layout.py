#!/usr/bin/env python3
"""GPTQ's packed layout, written as AutoGPTQ writes it (auto_gptq/nn_modules/qlinear: `pack`), in plain NumPy.

    scripts/goldens/gptq_layout.py

Writes crates/formats/tests/golden/gptq_layout.bin: u32 cases; each case u32 bits, group, n_in, n_out; u8 codes (out, in);
f32 scales (out, groups); u8 zeros (out, groups); then the packed qweight, qzeros, scales (F16), g_idx, each after its
length in bytes (u32); then the weights as transformers dequantises them, F16 (out, in).
"""

from pathlib import Path

import numpy as np

OUT = Path(__file__).resolve().parents[2] / "crates/formats/tests/golden/gptq_layout.bin"
CASES = [(2, 32, 64, 32), (3, 64, 128, 32), (4, 32, 64, 64), (8, 64, 64, 32), (4, 96, 96, 32)]


def pack_rows(x, bits):
    """(n, columns) of codes to (n * bits / 32, columns) of u32: AutoGPTQ's own loops, its odd one for 3 bits too."""
    x = x.astype(np.uint32)
    rows = []
    i = 0
    if bits in (2, 4, 8):
        per = 32 // bits
        for i in range(0, len(x), per):
            word = np.zeros(x.shape[1], np.uint32)
            for j in range(per):
                word |= x[i + j] << np.uint32(bits * j)
            rows.append(word)
        return np.array(rows)
    while i < len(x):
        word = np.zeros(x.shape[1], np.uint32)
        for j in range(i, i + 10):
            word |= x[j] << np.uint32(3 * (j - i))
        i += 10
        rows.append(word | x[i] << np.uint32(30))
        word = (x[i] >> np.uint32(2)) & np.uint32(1)
        i += 1
        for j in range(i, i + 10):
            word |= x[j] << np.uint32(3 * (j - i) + 1)
        i += 10
        rows.append(word | x[i] << np.uint32(31))
        word = (x[i] >> np.uint32(1)) & np.uint32(3)
        i += 1
        for j in range(i, i + 10):
            word |= x[j] << np.uint32(3 * (j - i) + 2)
        i += 10
        rows.append(word)
    return np.array(rows)


def main():
    rng = np.random.default_rng(5)
    out = np.uint32(len(CASES)).tobytes()
    for bits, group, n_in, n_out in CASES:
        groups = n_in // group
        codes = rng.integers(0, 2**bits, (n_out, n_in)).astype(np.uint8)
        zeros = rng.integers(0, 2**bits, (n_out, groups)).astype(np.uint8)
        scales = rng.uniform(0.001, 0.1, (n_out, groups)).astype(np.float16)
        qweight = pack_rows(codes.T, bits)
        qzeros = pack_rows(((zeros.astype(np.int32) - 1) & (2**bits - 1)).astype(np.uint8), bits).T
        g_idx = (np.arange(n_in) // group).astype("<i4")
        each = [qweight.astype("<u4"), np.ascontiguousarray(qzeros.astype("<u4")), np.ascontiguousarray(scales.T), g_idx]
        difference = codes.astype(np.int32) - zeros.astype(np.int32)[:, g_idx]
        weights = (scales[:, g_idx].astype(np.float32) * difference).astype(np.float16)
        out += np.array([bits, group, n_in, n_out], "<u4").tobytes() + codes.tobytes()
        out += scales.astype("<f4").tobytes() + zeros.tobytes()
        for part in each:
            out += np.uint32(part.nbytes).tobytes() + part.tobytes()
        out += weights.tobytes()
    OUT.write_bytes(out)
    print(len(out), "bytes")


if __name__ == "__main__":
    main()
