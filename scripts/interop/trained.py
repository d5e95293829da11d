#!/usr/bin/env python3
"""What `sparsam train` leaves, and the built-in model, as transformers and llama.cpp see them.

Run:    python scripts/interop/trained.py BINARY      (needs torch, transformers, llama-cpp-python)

A tiny Llama and a tiny GPT-2 are trained on this repository's documents, each with a vocabulary learnt from them; the
built-in model is converted. For each, model/ in transformers and model.gguf in llama.cpp give the same ids, the same
logits, and the perplexity that `sparsam eval --exact` gives of either. Each line says what was compared and how far
apart it is; the first that is too far ends the run with exit code 1.
"""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import torch
import transformers
from transformers import AutoTokenizer

from written import check, distance, llama_cpp_logits, llama_cpp_open, load, transformers_logits

ROOT = pathlib.Path(__file__).resolve().parents[2]
CTX, WINDOWS = 128, 12
TRAIN = ["--ctx", str(CTX), "--batch", "4", "--steps", "60", "--lr", "3e-3", "--sample-every", "0", "--layers", "2",
         "--hidden", "64", "--heads", "4", "--tokenizer", "bpe:600"]
TEXTS = ["Hello, world! It's 12345.67 o'clock.", "  two\tspaces \n\n and\r\n ends  ", "größer, 漢字, 👩‍👩‍👧‍👦 ☃"]


def windows(ids):
    return [ids[i * CTX:(i + 1) * CTX] for i in range(WINDOWS)]


def perplexity(logits, ids):
    """llama.cpp's: windows side by side, targets from the middle on."""
    total, n = 0.0, 0
    for row, targets in zip(logits, windows(ids)):
        row = row.astype(np.float64)
        for at in range(CTX // 2 + 1, CTX):
            x = row[at - 1]
            total += np.log(np.exp(x - x.max()).sum()) + x.max() - x[targets[at]]
            n += 1
    return float(np.exp(total / n))


def main():
    binary = str(pathlib.Path(sys.argv[1]).resolve())
    torch.set_num_threads(2)
    transformers.utils.logging.disable_progress_bar()
    work = pathlib.Path(tempfile.mkdtemp(prefix="sparsam-interop-"))

    def sparsam(*args):
        run = subprocess.run([binary, *map(str, args)], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        return run.stdout

    try:
        text = work / "text.txt"
        documents = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
        text.write_text("\n\n".join(d.read_text(encoding="utf-8") for d in documents), encoding="utf-8")
        cases = {}
        for arch in ("llama", "gpt2"):
            run = work / arch
            more = ["--kv-heads", "2"] if arch == "llama" else []
            sparsam("train", "--data", text, "--arch", arch, "--out", run, *TRAIN, *more)
            cases[f"trained {arch}"] = (run / "model", run / "model.gguf")
        folder, gguf = work / "builtin", work / "builtin.gguf"
        sparsam("convert", "builtin", folder)
        sparsam("convert", folder, gguf)
        cases["builtin"] = (folder, gguf)
        for case, (folder, gguf) in cases.items():
            tok, llama = AutoTokenizer.from_pretrained(folder), llama_cpp_open(gguf, vocab_only=True)
            for t in TEXTS:
                ours = tok(t, add_special_tokens=False)["input_ids"]
                theirs = llama.tokenize(t.encode(), add_bos=False, special=True)
                if ours != theirs or tok.decode(ours) != t:
                    sys.exit(f"{case}: ids of {t!r}: {ours} ({tok.decode(ours)!r}), llama.cpp {theirs}")
            llama.close()
            ids = tok(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
            model = load(folder)
            theirs = [transformers_logits(model, w) for w in windows(ids)]
            cpp = [llama_cpp_logits(gguf, w) for w in windows(ids)]
            # llama.cpp looks GELU up in a table of f16, and multiplies weights in f16 by activations in f16.
            allowed = 1e-3 if case == "trained llama" else 5e-3
            check(f"{case}: logits, llama.cpp and transformers", max(map(distance, cpp, theirs)), allowed)
            want = perplexity(theirs, ids)
            check(f"{case}: perplexity {want:.4f}, llama.cpp", abs(perplexity(cpp, ids) / want - 1), allowed / 5)
            for path in (folder, gguf):
                said = sparsam("eval", path, "--perplexity", text, "--ctx", CTX, "--chunks", WINDOWS, "--exact", "--json")
                off = abs(json.loads(said)["perplexity"] / want - 1)
                check(f"{case}: perplexity {want:.4f}, sparsam on {path.name}", off, 1e-5)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
