#!/usr/bin/env python3
"""Three steps of Muon in NumPy, f64, for the tests of crates/train.

Run:    python scripts/goldens/muon.py        (needs numpy, safetensors; a second)
Writes: crates/train/tests/golden/muon.safetensors, of a tall, a wide and a square matrix
            CASE.before, CASE.gradient.I, CASE.after, CASE.momentum     F32

Written from Jordan et al. 2024 (momentum 0.95 by lerp, Nesterov, five iterations of the quintic with 3.4445, -4.7750,
2.0315, wide matrices), with Liu et al. 2025's factor 0.2 sqrt(max(rows, cols)) and decoupled decay 0.1; lr 0.02.
"""

import pathlib

import numpy as np
from safetensors.numpy import save_file

OUT = pathlib.Path(__file__).resolve().parents[2] / "crates/train/tests/golden/muon.safetensors"
SHAPES = {"tall": (24, 10), "wide": (8, 20), "square": (16, 16)}
LR, MOMENTUM, DECAY = 0.02, 0.95, 0.1


def newton_schulz(g):
    transposed = g.shape[0] > g.shape[1]
    x = g.T if transposed else g
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        a = x @ x.T
        b = -4.7750 * a + 2.0315 * (a @ a)
        x = 3.4445 * x + b @ x
    return x.T if transposed else x


def main():
    rng = np.random.default_rng(1)
    out = {}
    for name, shape in SHAPES.items():
        w = rng.normal(size=shape).astype(np.float32)
        out[f"{name}.before"] = w
        w, m = w.astype(np.float64), np.zeros(shape)
        for i in range(3):
            g = rng.normal(size=shape).astype(np.float32)
            out[f"{name}.gradient.{i}"] = g
            m = m + (g - m) * (1 - MOMENTUM)
            update = newton_schulz(g + (m - g) * MOMENTUM)
            w = w * (1 - LR * DECAY) - LR * 0.2 * max(shape) ** 0.5 * update
            values = np.linalg.svd(update, compute_uv=False)
            print(name, i, "singular values", values.min().round(3), "to", values.max().round(3))
        out[f"{name}.after"], out[f"{name}.momentum"] = w.astype(np.float32), m.astype(np.float32)
    save_file({k: np.ascontiguousarray(v) for k, v in out.items()}, OUT)


if __name__ == "__main__":
    main()
