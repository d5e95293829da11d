"""Golden of the 8-bit blocks of optimiser states by bitsandbytes, into crates/dtype/tests/golden/dynamic.bin.

The numbers follow from a formula (`numbers`), so that the file need not hold them. The file: number of blocks (u32), the
tables of signed and of unsigned numbers (256 f32 each), then the blocks (f32 scale, 256 codes) of the numbers by the first
table and of their squares by the second, then 64 bits of FNV-1a over all of the former and all of the latter decoded (f32).

They are rounded by what bitsandbytes' optimiser has in plain PyTorch: its fast path for CPUs (0.50) takes some other code
for numbers below 1e-5 of the largest.

Usage: dynamic.py    (torch, bitsandbytes)
"""
import os
import struct

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # plain PyTorch, not compiled
import torch
from bitsandbytes import functional as F
from bitsandbytes.backends.triton import kernels_optim as optim
from nf4 import fnv

OUT = os.path.join(os.path.dirname(__file__), "../../crates/dtype/tests/golden/dynamic.bin")
BLOCKS = 24


def numbers():
    state, x = 1, []
    for i in range(256 * BLOCKS):
        state = (state * 1664525 + 1013904223) % 2**32
        u = state / 2**31 - 1
        x.append(u * u * u * (u * u if i % 3 == 0 else 1.0) * 2.0 ** -(i // 256))
    return torch.tensor(x, dtype=torch.float64).to(torch.float32)


def blocks(x, table):
    codes, absmax = optim._quantize_blockwise_pytorch(x, table, 256)
    decoded = optim._dequantize_blockwise_pytorch(codes, absmax, table, 256, torch.float32)
    pairs = zip(absmax.numpy().astype("<f4"), codes.numpy().reshape(-1, 256))
    return b"".join(a.tobytes() + c.tobytes() for a, c in pairs), decoded.numpy().astype("<f4").tobytes()


if __name__ == "__main__":
    x = numbers()
    tables = [F.create_dynamic_map(signed=True), F.create_dynamic_map(signed=False)]
    made = [blocks(x, tables[0]), blocks(x * x, tables[1])]
    with open(OUT, "wb") as f:
        f.write(struct.pack("<I", BLOCKS))
        for t in tables:
            f.write(t.to(torch.float32).numpy().astype("<f4").tobytes())
        for bytes_, _ in made:
            f.write(bytes_)
        for _, decoded in made:
            f.write(struct.pack("<Q", fnv(decoded)))
