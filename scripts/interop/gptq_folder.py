#!/usr/bin/env python3
"""A folder in GPTQ's layout that sparsam wrote, read as AutoGPTQ and transformers read it, in plain NumPy and PyTorch.

    scripts/interop/gptq_folder.py BINARY FOLDER TEXT

Unpacks qweight, qzeros, scales and g_idx by AutoGPTQ's formula, puts the weights into transformers' own model of
config.json, and compares the perplexity of TEXT (two windows of 512, second half scored) with that of
`BINARY eval FOLDER --perplexity TEXT --exact`: they must agree to one part in a thousand. Needs torch, transformers,
safetensors; neither GPTQModel nor a GPU.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

CHUNKS, CTX = 2, 512


def unpack(words, bits, axis):
    """Codes along `axis` of 32-bit words: a bit string, lowest bits first (AutoGPTQ's layout at 2, 3, 4 and 8 bits)."""
    words = np.moveaxis(words.astype(np.uint32), axis, -1)
    shifts = np.arange(32, dtype=np.uint32)
    stream = (words[..., None] >> shifts & 1).reshape(*words.shape[:-1], -1, bits)
    codes = (stream << np.arange(bits, dtype=np.uint32)).sum(-1).astype(np.int64)
    return np.moveaxis(codes, -1, axis)


def dequantise(get, name, bits):
    qweight, qzeros, scales, g_idx = (get(f"{name}.{p}") for p in ("qweight", "qzeros", "scales", "g_idx"))
    codes = unpack(qweight, bits, 0)  # (in, out)
    zeros = (unpack(qzeros, bits, 1) + 1) & (2**bits - 1)  # (groups, out); stored less one
    return (scales[g_idx].astype(np.float32) * (codes - zeros[g_idx])).T


def main():
    binary, folder, text = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    settings = json.loads((folder / "quantize_config.json").read_text())
    config = AutoConfig.from_pretrained(folder)
    assert config.quantization_config["quant_method"] == "gptq"
    del config.quantization_config
    state = {}
    with safe_open(folder / "model.safetensors", "np") as f:
        names = list(f.keys())
        for name in names:
            if name.endswith(".qweight"):
                layer = name.removesuffix(".qweight")
                state[f"{layer}.weight"] = torch.from_numpy(dequantise(f.get_tensor, layer, settings["bits"]))
            elif not name.endswith((".qzeros", ".scales", ".g_idx")):
                state[name] = torch.from_numpy(f.get_tensor(name)).float()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all("lm_head" in m for m in missing), (missing, unexpected)
    model.tie_weights()
    ids = AutoTokenizer.from_pretrained(folder)(Path(text).read_text()[:40000], add_special_tokens=False).input_ids
    nll = n = 0
    with torch.no_grad():
        for c in range(CHUNKS):
            chunk = torch.tensor([ids[c * CTX : (c + 1) * CTX]])
            logits = model(chunk).logits[0, CTX // 2 : -1].double()
            nll += torch.nn.functional.cross_entropy(logits, chunk[0, CTX // 2 + 1 :], reduction="sum").item()
            n += CTX - 1 - CTX // 2
    theirs = math.exp(nll / n)
    args = [binary, "eval", str(folder), "--perplexity", text, "--chunks", str(CHUNKS), "--exact", "--json"]
    ours = json.loads(subprocess.run(args, check=True, capture_output=True).stdout)["perplexity"]
    print(f"{settings['bits']} bits, groups of {settings['group_size']}: transformers {theirs:.4f}, sparsam {ours:.4f}")
    assert abs(theirs / ours - 1) < 1e-3, "not the same model"


if __name__ == "__main__":
    main()
