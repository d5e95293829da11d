"""Golden of NF4 with double quantisation by bitsandbytes, into crates/dtype/tests/golden/nf4.bin.

The weights follow from a formula (`weights`), so that the file need not hold them; they lie on a grid of 2^-12, so that
the mean of the scales does not depend on the order of sums. The file: number of weights (u32), codes, codes of scales,
scales of the second level (f32), mean (f32), the table of 256 numbers (f32), the first 64 weights decoded (f32), and 64
bits of FNV-1a over all of them decoded.

Usage: nf4.py    (torch, bitsandbytes)
"""
import os
import struct

import numpy as np
import torch
from bitsandbytes import functional as F

OUT = os.path.join(os.path.dirname(__file__), "../../crates/dtype/tests/golden/nf4.bin")
BLOCKS = 300


def weights():
    state, x = 1, []
    for i in range(64 * BLOCKS):
        state = (state * 1664525 + 1013904223) % 2**32
        u = state / 2**31 - 1
        scale = (i // 64 * 37 % 64 + 1) / 64
        x.append(np.floor(u * u * u * scale * 4096) / 4096)
    return torch.tensor(x, dtype=torch.float32)


def fnv(data):
    h = 0xCBF29CE484222325
    for b in data:
        h = (h ^ b) * 0x100000001B3 % 2**64
    return h


if __name__ == "__main__":
    x = weights()
    codes, state = F.quantize_4bit(x, blocksize=64, compress_statistics=True, quant_type="nf4")
    decoded = F.dequantize_4bit(codes, state).reshape(-1)
    numbers = lambda t: t.to(torch.float32).numpy().astype("<f4").tobytes()
    with open(OUT, "wb") as f:
        f.write(struct.pack("<I", len(x)))
        f.write(codes.numpy().tobytes() + state.absmax.numpy().tobytes() + numbers(state.state2.absmax))
        f.write(numbers(state.offset.reshape(1)) + numbers(state.state2.code) + numbers(decoded[:64]))
        f.write(struct.pack("<Q", fnv(numbers(decoded))))
