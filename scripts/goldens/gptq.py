#!/usr/bin/env python3
"""GPTQ as the paper writes it (Frantar et al. 2023, algorithm 1), in plain NumPy and f64: the golden for crates/quantize.

    scripts/goldens/gptq.py

Writes crates/quantize/tests/golden/gptq.bin: u32 tokens, n, rows, cases; f32 inputs (tokens, n); f32 weights (rows, n);
then for each case u32 bits, group, act-order; f32 scale and u32 zero for each row and group; u8 codes (rows, n).
Groups are static: their scales come from the weights as they are before. A seed is taken for which no weight comes
closer than 1e-3 of a step to the middle between two codes, so that rounding in f32 cannot matter.
"""

from pathlib import Path

import numpy as np

OUT = Path(__file__).resolve().parents[2] / "crates/quantize/tests/golden/gptq.bin"
TOKENS, N, ROWS = 96, 160, 6
CASES = [(4, 32, True), (4, 32, False), (3, 160, True), (2, 32, True)]  # bits, group, act-order


def gptq(x, w, bits, group, act_order):
    """Scales and zeros (rows, groups), codes (rows, n), and the least distance from a tie."""
    top = 2**bits - 1
    parts = w.reshape(len(w), -1, group)
    lo, hi = np.minimum(parts.min(2), 0), np.maximum(parts.max(2), 0)
    scale = ((hi - lo) / top).astype(np.float16).astype(np.float64)
    zero = np.round(-lo / scale)
    h = x.T @ x / len(x)
    h += 0.01 * np.mean(np.diag(h)) * np.eye(len(h))
    perm = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(len(h))
    h, w = h[perm][:, perm], w[:, perm].copy()
    inverse = np.linalg.cholesky(np.linalg.inv(h)).T
    codes = np.zeros(w.shape, np.uint8)
    margin = 1.0
    for i in range(len(h)):
        s, z = scale[:, perm[i] // group], zero[:, perm[i] // group]
        v = w[:, i] / s + z
        q = np.clip(np.floor(v + 0.5), 0, top)
        inside = (v > 0) & (v < top)
        margin = min(margin, np.abs(v - np.floor(v) - 0.5)[inside].min(initial=1.0))
        codes[:, perm[i]] = q
        error = (w[:, i] - s * (q - z)) / inverse[i, i]
        w[:, i:] -= np.outer(error, inverse[i, i:])
    return scale, zero, codes, margin


def main():
    for seed in range(580, 10000):  # 0 to 579 were tried
        rng = np.random.default_rng(seed)
        mix = rng.standard_normal((N, N)) / np.sqrt(N) * np.exp(rng.standard_normal(N))
        x = (rng.standard_normal((TOKENS, N)) @ mix).astype(np.float32)
        w = (rng.standard_normal((ROWS, N)) * 0.05).astype(np.float32)
        results = [gptq(x.astype(np.float64), w.astype(np.float64), *case) for case in CASES]
        if min(r[3] for r in results) > 1e-3:
            break
    else:
        raise SystemExit("no seed keeps clear of ties")
    out = np.array([TOKENS, N, ROWS, len(CASES)], "<u4").tobytes() + x.tobytes() + w.tobytes()
    for case, (scale, zero, codes, _) in zip(CASES, results):
        out += np.array(case, "<u4").tobytes()
        out += scale.astype("<f4").tobytes() + zero.astype("<u4").tobytes() + codes.tobytes()
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_bytes(out)
    print(f"seed {seed}, {len(out)} bytes")


if __name__ == "__main__":
    main()
