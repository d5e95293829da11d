#!/usr/bin/env python3
"""Tiny models trained by PyTorch: losses and gradient norms of 200 AdamW steps, for the tests of crates/train.

Run:    python scripts/goldens/train.py        (needs torch, transformers, safetensors; half a minute)
Writes: crates/train/tests/golden/CASE/config.json, model.safetensors    the model before the first step, F32
        crates/train/tests/golden/CASE/training.safetensors
            tokens       I32 (steps, rows, ctx + 1)   each step's rows
            lr           F32 (steps)                  constant behind a warm-up
            loss         F32 (steps)                  mean cross-entropy before each step
            grad_norm    F32 (steps)                  before clipping
            f32_error    F32 (steps)                  how far the same training in f32 has been from it at most, up to each step
            bf16_error   F32 (steps)                  the same under torch.autocast in bf16

Losses and norms are those of a run in f64 and stored as F32. One thread. Betas 0.9 and 0.95, eps 1e-8, decay 0.1 on
matrices only, gradients clipped at 0.5, which bites in the first steps.
"""

import json
import pathlib

import torch
import transformers
from safetensors.torch import save_file

OUT = pathlib.Path(__file__).resolve().parents[2] / "crates/train/tests/golden"
STEPS, ROWS, CTX, VOCAB = 200, 3, 16, 40
CASES = {
    "llama": dict(
        model_type="llama", vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=CTX,
        hidden_act="silu", rope_theta=10000.0, tie_word_embeddings=True,
    ),
    "gpt2": dict(
        model_type="gpt2", vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=3, n_positions=CTX, n_inner=None,
        activation_function="gelu_new", layer_norm_epsilon=1e-5, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
}


def tokens(generator):
    """Rows of a Markov chain: each token has three followers, so that there is something to learn."""
    followers = torch.randint(0, VOCAB, (VOCAB, 3), generator=generator)
    rows = torch.zeros(STEPS, ROWS, CTX + 1, dtype=torch.int64)
    rows[:, :, 0] = torch.randint(0, VOCAB, (STEPS, ROWS), generator=generator)
    for i in range(1, CTX + 1):
        choice = torch.randint(0, 3, (STEPS, ROWS), generator=generator)
        rows[:, :, i] = followers[rows[:, :, i - 1], choice]
    return rows


def train(model, rows, lrs, bf16=False):
    groups = [
        dict(params=[p for p in model.parameters() if p.dim() > 1], weight_decay=0.1),
        dict(params=[p for p in model.parameters() if p.dim() < 2], weight_decay=0.0),
    ]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for step in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = float(lrs[step])
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(input_ids=rows[step, :, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), rows[step, :, 1:].reshape(-1))
        optimiser.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimiser.step()
        losses.append(float(loss.detach()))
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(norms, dtype=torch.float64)


def main():
    torch.set_num_threads(1)
    for case, fields in CASES.items():
        folder = OUT / case
        folder.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(1)
        torch.manual_seed(2)
        rows = tokens(generator)
        lrs = torch.tensor([3e-3 * min(1.0, (i + 1) / 5) for i in range(STEPS)], dtype=torch.float32)
        config = transformers.AutoConfig.for_model(**fields)
        config._attn_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for p in model.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.15, generator=generator)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        stored = {k: v.contiguous() for k, v in state.items() if k != "lm_head.weight"}
        (folder / "config.json").write_text(json.dumps(fields, indent=1) + "\n")
        save_file(stored, str(folder / "model.safetensors"), metadata={"format": "pt"})
        loss32, norm32 = train(model, rows, lrs)
        model.load_state_dict(state)
        loss16, norm16 = train(model, rows, lrs, bf16=True)
        model.load_state_dict(state)
        model.double()
        loss, norm = train(model, rows, lrs)
        error, error16 = (torch.cummax((x - loss).abs(), 0).values for x in (loss32, loss16))
        save_file(
            dict(tokens=rows.to(torch.int32), lr=lrs, loss=loss.float(), grad_norm=norm.float(),
                 f32_error=error.float(), bf16_error=error16.float()),
            str(folder / "training.safetensors"),
        )
        print(case, [round(float(x), 4) for x in loss[[0, 1, 9, 49, 199]]], "f32 off by", float(error[9]), float(error[199]),
              "bf16 off by", float(error16[0]), float(error16[9]), float(error16[199]))


if __name__ == "__main__":
    main()
