#!/usr/bin/env python3
"""llama.cpp loads what `sparsam quantize` writes, with the perplexity that sparsam measures.

    scripts/interop/quantized.py BINARY MODEL.gguf TEXT LLAMA_PERPLEXITY [TYPE ..]

Rounds MODEL to each type by nearest codes (half a minute each; what is tested is the file, not the method) and scores it
with both programs on the first CHUNKS windows of 512. llama.cpp rounds activations to 8 bits, so its figure is compared
with ours without --exact; both round differently, and agree to one part in a hundred.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

CHUNKS = 2
TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS"]


def main():
    binary, model, text, llama, *types = sys.argv[1:]
    worst = 0.0
    with tempfile.TemporaryDirectory() as name:
        for kind in types or TYPES:
            out = Path(name) / f"{kind}.gguf"
            run = lambda *args: subprocess.run([binary, *map(str, args)], check=True, capture_output=True).stdout
            report = json.loads(run("quantize", model, "-o", out, "--type", kind, "--method", "nearest", "--json"))
            ours = json.loads(run("eval", out, "--perplexity", text, "--chunks", CHUNKS, "--json"))["perplexity"]
            args = [llama, "-m", out, "-f", text, "-c", "512", "--chunks", str(CHUNKS)]
            done = subprocess.run(list(map(str, args)), check=True, capture_output=True, text=True)
            theirs = float(re.search(r"Final estimate: PPL = ([0-9.]+)", done.stdout + done.stderr)[1])
            worst = max(worst, abs(ours / theirs - 1))
            print(f"{kind:8} {report['bytes']:>12,} bytes: sparsam {ours:.4f}, llama.cpp {theirs:.4f}", flush=True)
            out.unlink()
    assert worst < 0.01, f"the worst differs by {100 * worst:.2f}%"


if __name__ == "__main__":
    main()
