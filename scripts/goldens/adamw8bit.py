"""Golden of AdamW with moments in 8 bits by bitsandbytes, into crates/train/tests/golden/adamw8bit.safetensors.

Four steps, by what bitsandbytes has of its optimiser in plain PyTorch, on a matrix of 4,270 elements, no whole number of
blocks, whose gradients follow from a formula (`gradient`). The file: the matrix before and behind each step, and the codes
and scales of both moments behind the last.

Usage: adamw8bit.py    (torch, bitsandbytes, safetensors)
"""
import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # plain PyTorch, not compiled
import torch
from bitsandbytes import functional as F
from bitsandbytes.backends.triton.kernels_optim import optimizer_update_8bit_blockwise_pytorch as update
from safetensors.torch import save_file

OUT = os.path.join(os.path.dirname(__file__), "../../crates/train/tests/golden/adamw8bit.safetensors")
ROWS, COLS, STEPS, LR, BETAS, EPS = 70, 61, 4, 0.01, (0.9, 0.999), 1e-8


def gradient(step):
    i = torch.arange(ROWS * COLS, dtype=torch.float64)
    x = torch.remainder(i * (7919 + 2 * step), 1009) / 504.5 - 1.0
    return (x * x * x + 0.05).to(torch.float32).reshape(ROWS, COLS)


if __name__ == "__main__":
    i = torch.arange(ROWS * COLS, dtype=torch.float64)
    p = (torch.remainder(i * 37, 101) / 50.5 - 1.0).to(torch.float32).reshape(ROWS, COLS)
    out = {"before": p.clone()}
    tables = F.create_dynamic_map(signed=True), F.create_dynamic_map(signed=False)
    m, v = (torch.zeros(ROWS, COLS, dtype=torch.uint8) for _ in range(2))
    m_scale, v_scale = (torch.zeros(-(ROWS * COLS // -256)) for _ in range(2))
    for step in range(STEPS):
        update(p, gradient(step), m, v, *BETAS, 0.0, 0.0, EPS, step + 1, LR, *tables, m_scale, v_scale, 0.0, 1.0, False,
               optimizer_name="adam")
        out[f"after.{step}"] = p.clone()
    out.update(m=m.reshape(-1), v=v.reshape(-1), m_scale=m_scale, v_scale=v_scale)
    save_file(out, OUT)
