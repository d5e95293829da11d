"""Goldens of low-rank adapters by peft, into crates/train/tests/golden/lora/.

tiny/      a random Llama, an adapter of it as peft saves it, and the logits of both together

Usage: lora.py    (torch, transformers, peft, safetensors)
"""
import json
import math
import os
import shutil
import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

OUT = os.path.join(os.path.dirname(__file__), "../../crates/train/tests/golden/lora")
ALPHA = 8


def adapt(model, rank, **more):
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=ALPHA, lora_dropout=0.0, bias="none",
                                            target_modules="all-linear", task_type="CAUSAL_LM", **more))


def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                         tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    model = LlamaForCausalLM(config).eval()
    for p in model.parameters():
        p.data.normal_(0, 0.2) if p.dim() > 1 else p.data.normal_(1, 0.1)
    folder = os.path.join(OUT, "tiny")
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    os.remove(os.path.join(folder, "generation_config.json"))
    model = adapt(model, 3, use_rslora=True)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.normal_(0, 0.2)
    model.save_pretrained(os.path.join(folder, "adapter"))
    os.remove(os.path.join(folder, "adapter", "README.md"))
    ids = torch.randint(0, 320, (1, 24))
    with torch.no_grad():
        logits = model(ids).logits[0]
        with model.disable_adapter():
            base = model(ids).logits[0]
    save_file({"tokens": ids[0].to(torch.int32), "logits": logits.contiguous(), "base": base.contiguous()},
              os.path.join(folder, "logits.safetensors"))


def fill(name, shape, index):
    """A as uniform numbers from a formula, B zero."""
    n = math.prod(shape)
    if "lora_B" in name:
        return torch.zeros(shape)
    i = torch.arange(n, dtype=torch.int64)
    u = ((i * 40503 + index * 9973) % 65536).double() / 65536 - 0.5
    return (2 * u / math.sqrt(shape[1])).float().reshape(shape)


if __name__ == "__main__":
    os.makedirs(OUT, exist_ok=True)
    tiny()
