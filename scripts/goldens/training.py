#!/usr/bin/env python3
"""Losses, gradients and ten steps of AdamW that PyTorch computes for the tiny models of models.py.

Run:    python scripts/goldens/training.py      (after models.py; needs torch, transformers, safetensors; a few seconds)
Writes: crates/models/tests/golden/CASE/training.safetensors
            loss        mean cross-entropy of the next token over both sequences of expected.safetensors, each by itself
            grad.NAME   its gradient towards every parameter, in f64, rounded to f32; linear layers are (out, in)
            error.NAME  the largest difference of f32's gradient from it
            losses      of ten steps of AdamW in f64 (lr 1e-2, betas 0.9 and 0.95, eps 1e-8, weight decay 0.1 of matrices)
            error       of the same losses in f32

Everything is computed on one thread.
"""

import copy
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file

from models import LENGTHS, OUT

CASES = ("gpt2", "llama", "qwen3", "gemma3")
STEPS, LR, BETAS, EPS, DECAY = 10, 1e-2, (0.9, 0.95), 1e-8, 0.1


def load(case):
    config = transformers.AutoConfig.from_pretrained(OUT / case)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    weights = load_file(OUT / case / "model.safetensors")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name].float())
    # Gemma's configuration names token 0 as padding, whose row PyTorch would leave without a gradient from the input.
    model.get_input_embeddings().padding_idx = None
    # Under training the table is f32, so Gemma's factor of embeddings is not rounded to bf16 as it is in models.py.
    return model


def loss_of(model, sequences):
    rows, targets = [], []
    for s in sequences:
        rows.append(model(torch.tensor([s])).logits[0, :-1])
        targets += s[1:]
    return torch.nn.functional.cross_entropy(torch.cat(rows), torch.tensor(targets))


def gradients(model, sequences):
    model.zero_grad()
    loss = loss_of(model, sequences)
    loss.backward()
    found = {}
    for name, p in model.named_parameters():
        conv1d = "gpt2" in model.config.model_type and name.split(".")[-2] in ("c_attn", "c_proj", "c_fc")
        found[name] = (p.grad.T if conv1d and p.ndim == 2 else p.grad).detach().clone()
    return loss.detach(), found


def train(model, sequences):
    model = copy.deepcopy(model)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [dict(params=matrices, weight_decay=DECAY), dict(params=vectors, weight_decay=0.0)]
    adamw = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
    losses = []
    for _ in range(STEPS):
        adamw.zero_grad()
        loss = loss_of(model, sequences)
        loss.backward()
        adamw.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def main():
    torch.set_num_threads(1)
    for case in CASES:
        tokens = load_file(OUT / case / "expected.safetensors")["tokens"].tolist()
        sequences = [tokens[: LENGTHS[0]], tokens[LENGTHS[0]:]]
        single, double = load(case), load(case).double()
        (_, g32), (loss, g64) = gradients(single, sequences), gradients(double, sequences)
        l32, l64 = train(single, sequences), train(double, sequences)
        results = {"loss": loss.float().reshape(1), "losses": l64.float(), "error": (l32 - l64).abs().max().float().reshape(1)}
        for name, g in g64.items():
            results[f"grad.{name}"] = g.float().contiguous()
            results[f"error.{name}"] = (g32[name] - g).abs().max().float().reshape(1)
        save_file(results, OUT / case / "training.safetensors")
        worst = max((results[f"error.{n}"] / g.abs().max()).item() for n, g in g64.items())
        text = ", ".join(f"{x:.4f}" for x in l64.tolist())
        print(f"{case}: losses {text}; f32 against f64: gradients {worst:.1e}, losses {results['error'].item():.1e}",
              file=sys.stderr)


if __name__ == "__main__":
    main()
