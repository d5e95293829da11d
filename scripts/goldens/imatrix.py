#!/usr/bin/env python3
"""llama.cpp's importance matrices in both formats, written with the gguf package and with struct: for crates/formats.

    scripts/goldens/imatrix.py

Writes crates/formats/tests/golden/imatrix.gguf and imatrix.dat: the same two matrices, of 3 and 4 inputs; entry i of a
matrix has the mean square (i + 1) / 2, resp. (i + 1) * 3. As llama.cpp's tools/imatrix writes them: sums of squares and
counts in GGUF; mean squares times the number of chunks in .dat, with chunks and the text's name behind.
"""

import struct
from pathlib import Path

import gguf
import numpy as np

OUT = Path(__file__).resolve().parents[2] / "crates/formats/tests/golden"
MATRICES = {"blk.0.attn_q.weight": (3, 0.5), "blk.0.ffn_down.weight": (4, 3.0)}
TOKENS, CHUNKS = 1024, 2


def main():
    w = gguf.GGUFWriter(OUT / "imatrix.gguf", arch="none")
    w.add_string("general.type", "imatrix")
    w.add_array("imatrix.datasets", ["text.txt"])
    w.add_uint32("imatrix.chunk_count", CHUNKS)
    w.add_uint32("imatrix.chunk_size", 512)
    dat = struct.pack("<i", len(MATRICES))
    for name, (n, scale) in MATRICES.items():
        mean = (np.arange(n, dtype=np.float32) + 1) * np.float32(scale)
        w.add_tensor(f"{name}.in_sum2", (mean * TOKENS).reshape(1, n))
        w.add_tensor(f"{name}.counts", np.full((1, 1), TOKENS, np.float32))
        dat += struct.pack("<i", len(name)) + name.encode()
        dat += struct.pack("<ii", CHUNKS, n) + (mean * CHUNKS).astype("<f4").tobytes()
    dat += struct.pack("<ii", CHUNKS, 8) + b"text.txt"
    (OUT / "imatrix.dat").write_bytes(dat)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


if __name__ == "__main__":
    main()
