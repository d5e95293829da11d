"""Goldens of the engine: greedy continuations and a perplexity of SmolLM2-135M-Instruct by transformers in float32.

Run: python scripts/goldens/engine.py MODEL.gguf TEXT OUT_FOLDER
(the model that scripts/fetch-model prints; tinyshakespeare, public domain). Needs torch, transformers, gguf.
Writes shakespeare-head.txt, the first 9000 characters of TEXT, and smollm2.json.
"""
import json
import math
import os
import sys

import torch
import transformers

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at 100 degrees because",
    [{"role": "user", "content": "What is 12 + 30? Answer in one sentence."}],
]


def main():
    model_file, text_file, out = sys.argv[1:]
    where, name = os.path.split(os.path.abspath(model_file))
    tokenizer = transformers.AutoTokenizer.from_pretrained(where, gguf_file=name)
    model = transformers.AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32).eval()
    continuations = []
    for prompt in PROMPTS:
        if isinstance(prompt, str):
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        else:
            text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        new, margin, cache, step = [], math.inf, None, torch.tensor([ids])
        with torch.no_grad():
            for _ in range(64):
                result = model(step, past_key_values=cache, use_cache=True)
                cache, logits = result.past_key_values, result.logits[0, -1]
                top = logits.topk(2).values.tolist()
                margin = min(margin, top[0] - top[1])
                new.append(logits.argmax().item())
                step = torch.tensor([[new[-1]]])
        continuations.append({
            "prompt": prompt if isinstance(prompt, str) else None,
            "messages": None if isinstance(prompt, str) else prompt,
            "prompt_ids": ids,
            "next_ids": new,
            "smallest_margin": margin,
        })
    text = open(text_file, encoding="utf-8", newline="").read()[:9000]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    nll, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(ids) // 512 * 512, 512):
            window = torch.tensor(ids[start:start + 512])
            log_p = torch.log_softmax(model(window[None]).logits[0, 256:-1].double(), dim=-1)
            nll -= log_p.gather(1, window[257:, None]).sum().item()
            count += 255
        sliding_nll, sliding_count, scored = 0.0, 0, 1
        for start in range(0, len(ids), 256):
            window = torch.tensor(ids[start:start + 512])
            end = start + len(window)
            log_p = torch.log_softmax(model(window[None]).logits[0, :-1].double(), dim=-1)
            first = max(scored, start + 1) - start
            sliding_nll -= log_p[first - 1:].gather(1, window[first:, None]).sum().item()
            sliding_count += len(window) - first
            scored = end
            if end == len(ids):
                break
    open(os.path.join(out, "shakespeare-head.txt"), "w", encoding="utf-8", newline="").write(text)
    with open(os.path.join(out, "smollm2.json"), "w") as f:
        json.dump({
            "made_by": f"scripts/goldens/engine.py, torch {torch.__version__}, transformers {transformers.__version__}",
            "continuations": continuations,
            "text_tokens": len(ids),
            "perplexity_512": math.exp(nll / count),
            "scored_512": count,
            "perplexity_512_stride_256": math.exp(sliding_nll / sliding_count),
            "scored_512_stride_256": sliding_count,
        }, f)
        f.write("\n")


if __name__ == "__main__":
    main()
