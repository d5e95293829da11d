"""Goldens of low-rank adapters by peft, into crates/train/tests/golden/lora/.

tiny/      a random Llama, an adapter of it as peft saves it, and the logits of both together
smollm2.json   SmolLM2-135M-Instruct (dequantised to f32): tokens and masks of a few dialogues, and the losses of 20 steps
               from adapters that a formula fills, so that they need no file

Usage: lora.py MODEL.gguf    (torch, transformers, peft, gguf, safetensors)
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
STEPS, LR, RANK, ALPHA = 20, 2e-3, 4, 8
DIALOGUES = [
    ("What is 7 + 5?", "7 + 5 = 12."),
    ("Name a colour of the sky.", "Blue, and at dusk red."),
    ("What is 9 - 4?", "9 - 4 = 5."),
    ("Say something short.", "Brevity is the soul of wit."),
    ("What is 3 * 6?", "3 * 6 = 18."),
    ("Who wrote Hamlet?", "William Shakespeare did, about 1600."),
]


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


def smollm2(path):
    where, file = os.path.split(os.path.abspath(path))
    tok = AutoTokenizer.from_pretrained(where, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32)
    model = adapt(model, RANK).train()
    modules = sorted({n.split(".lora_")[0] for n, _ in model.named_parameters() if "lora_" in n})
    parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    for name, p in parameters:
        p.data.copy_(fill(name, tuple(p.shape), modules.index(name.split(".lora_")[0])))
    examples = []
    for question, answer in DIALOGUES:
        user = [{"role": "user", "content": question}]
        prompt = tok.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
        whole = tok.apply_chat_template(user + [{"role": "assistant", "content": answer}], tokenize=False).rstrip("\n")
        assert whole.startswith(prompt)
        encode = lambda text: tok(text, add_special_tokens=False)["input_ids"]
        a, b = encode(prompt), encode(whole[len(prompt):])
        assert encode(whole) == a + b
        examples.append((a + b, len(a)))
    opt = torch.optim.AdamW([p for _, p in parameters], lr=LR, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        batch = [examples[(2 * step + j) % len(examples)] for j in range(2)]
        width = max(len(t) for t, _ in batch)
        x = torch.zeros(len(batch), width, dtype=torch.long)
        y = torch.full((len(batch), width), -100)
        m = torch.zeros(len(batch), width, dtype=torch.long)
        for j, (t, n) in enumerate(batch):
            x[j, :len(t)] = torch.tensor(t)
            y[j, n:len(t)] = torch.tensor(t[n:])
            m[j, :len(t)] = 1
        loss = model(input_ids=x, attention_mask=m, labels=y).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
        print(step, loss.item(), flush=True)
    with open(os.path.join(OUT, "smollm2.json"), "w") as f:
        json.dump({"rank": RANK, "alpha": ALPHA, "lr": LR, "losses": losses,
                   "dialogues": [{"question": q, "answer": a, "tokens": t, "prompt": n}
                                 for (q, a), (t, n) in zip(DIALOGUES, examples)]}, f, indent=1)
        f.write("\n")


if __name__ == "__main__":
    os.makedirs(OUT, exist_ok=True)
    tiny()
    smollm2(sys.argv[1])
