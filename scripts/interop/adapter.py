#!/usr/bin/env python3
"""peft loads an adapter that sparsam wrote, with the same logits as the model that sparsam merged it into.

Run:    python scripts/interop/adapter.py SPARSAM MODEL.gguf      (needs torch, transformers, peft; a few minutes)
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def main():
    sparsam, model = sys.argv[1:]
    with tempfile.TemporaryDirectory() as name:
        dir = pathlib.Path(name)
        lines = [{"prompt": f"What is {i} + {i % 5}?", "completion": f"{i + i % 5}"} for i in range(40)]
        (dir / "data.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        run = lambda *args: subprocess.run([sparsam, *map(str, args)], check=True, stdout=subprocess.DEVNULL)
        run("finetune", model, "--data", dir / "data.jsonl", "-o", dir / "run", "--steps", 4, "--rank", 4, "--rslora")
        run("convert", model, dir / "base", "--dtype", "F32")
        run("merge", model, "--adapter", dir / "run/adapter", "-o", dir / "merged", "--type", "F32")
        load = lambda at: AutoModelForCausalLM.from_pretrained(at, dtype=torch.float32).eval()
        ids = AutoTokenizer.from_pretrained(dir / "base")("What is 7 + 2? Four and", return_tensors="pt").input_ids
        with torch.no_grad():
            base = load(dir / "base")(ids).logits
            merged = load(dir / "merged")(ids).logits
            adapted = PeftModel.from_pretrained(load(dir / "base"), dir / "run/adapter")(ids).logits
    changed, differs = (adapted - base).abs().max().item(), (adapted - merged).abs().max().item()
    print(f"adapter changes logits by up to {changed:.3g}; peft's differ from the merged model's by up to {differs:.3g}")
    # Logits are up to 30; f32 keeps 7 digits of them over a few hundred sums.
    assert changed > 0.1 and differs < 2e-3, "peft reads the adapter differently"


if __name__ == "__main__":
    main()
