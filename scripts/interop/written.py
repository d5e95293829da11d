#!/usr/bin/env python3
"""What `sparsam convert` writes, as transformers and llama.cpp see it.

Run:    python scripts/interop/written.py BINARY MODEL.gguf      (needs torch, transformers, llama-cpp-python, gguf)

MODEL is SmolLM2-135M-Instruct (Q4_1). Each line says what was compared and how far apart it is; the first that is too far
ends the run with exit code 1.

- The real model as a folder: transformers gives the logits that it gives on the GGUF file itself, bit for bit, the same
  ids as llama.cpp on texts of many scripts, and the same chat. As a GGUF file in F32 again: llama.cpp's logits are
  transformers'.
- A tiny random model of each architecture, saved by transformers: as a GGUF file llama.cpp computes its logits, and
  as a folder again transformers computes them.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile

import llama_cpp
import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

TEXTS = [
    "Hello, world! It's 12345.67 o'clock; we'll SEE you'RE there.",
    "  two  spaces\tand\t\ttabs \n\n\n and breaks\r\n\r\n  end   ",
    "fn main() {\n    let x: Vec<u8> = vec![0x1F; 42];\n}\n",
    "Falsches Üben von Xylophonmusik quält jeden größeren Zwerg.",
    "Съешь ещё этих мягких французских булок, да выпей чаю.",
    "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر",
    "我能吞下玻璃而不伤身体。いろはにほへと 키스의 고유조건은",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण เป็นมนุษย์สุดประเสริฐ",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ☃ camelCaseHTTPServer snake_case 3.14e-10",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
]
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
COMMON = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              head_dim=16, max_position_embeddings=256, tie_word_embeddings=True)
ARCHITECTURES = {
    "llama": dict(COMMON, model_type="llama", rope_theta=500.0, rope_scaling=LLAMA3, tie_word_embeddings=False),
    "llama_linear": dict(COMMON, model_type="llama", rope_scaling=dict(rope_type="linear", factor=2.5)),
    "llama_bias": dict(COMMON, model_type="llama", attention_bias=True),
    "mistral": dict(COMMON, model_type="mistral", sliding_window=128, rope_theta=10000.0),
    "qwen2": dict(COMMON, model_type="qwen2", rope_theta=1000.0, rope_scaling=dict(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=64)),
    "qwen3": dict(COMMON, model_type="qwen3", head_dim=32, rope_theta=1000000.0),
    "gemma3": dict(COMMON, model_type="gemma3_text", num_hidden_layers=6, sliding_window=16, query_pre_attn_scalar=16,
                   rope_theta=1000000.0, rope_local_base_freq=10000.0, final_logit_softcapping=30.0,
                   rope_scaling=dict(rope_type="linear", factor=8.0)),
    "gpt2": dict(model_type="gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=256),
}


def check(what, off, allowed):
    print(f"{what}: {off:.2e} (allowed {allowed:.0e})", flush=True)
    if not off <= allowed:
        sys.exit(f"{what} is too far")


def transformers_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


def load(folder, **more):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()


def llama_cpp_open(path, **more):
    f32 = llama_cpp.GGML_TYPE_F32
    return llama_cpp.Llama(str(path), n_ctx=256, n_threads=2, logits_all=True, verbose=False, type_k=f32, type_v=f32, **more)


def llama_cpp_logits(path, ids):
    model = llama_cpp_open(path)
    model.eval(ids)
    out = np.array(model.scores[: len(ids)])
    model.close()
    return out


def distance(a, b):
    """The largest difference as a share of the logits' spread."""
    return float(np.abs(a - b).max() / b.std())


def draw(model, generator):
    """Weights large enough that every part of the model shows in the logits."""
    for name, p in model.named_parameters():
        x = torch.randn(p.shape, generator=generator)
        if p.ndim == 1:
            centre = 1.0 if name.endswith("weight") and "gemma3" not in model.config.model_type else 0.0
            p.data = centre + 0.3 * x
        elif "embed" in name or "wte" in name or "wpe" in name:
            p.data = 0.7 * x
        else:
            p.data = 1.3 * x / (p.shape[0] if "gpt2" in model.config.model_type else p.shape[1]) ** 0.5


def main():
    binary, model = sys.argv[1:3]
    model = pathlib.Path(model).resolve()
    torch.set_num_threads(2)
    transformers.utils.logging.disable_progress_bar()
    work = pathlib.Path(tempfile.mkdtemp(prefix="sparsam-interop-"))

    def convert(a, b, *more):
        subprocess.run([binary, "convert", str(a), str(b), *more], check=True)

    try:
        folder, again = work / "real", work / "again.gguf"
        convert(model, folder)
        convert(folder, again, "--dtype", "F32")
        tok = AutoTokenizer.from_pretrained(folder)
        llama = llama_cpp_open(model, vocab_only=True)
        for text in TEXTS:
            ours = tok(text, add_special_tokens=False)["input_ids"]
            theirs = llama.tokenize(text.encode(), add_bos=False, special=True)
            if ours != theirs:
                sys.exit(f"ids of {text!r}: {ours}, llama.cpp {theirs}")
            if tok.decode(ours) != text:
                sys.exit(f"{text!r} decodes to {tok.decode(ours)!r}")
        llama.close()
        print(f"ids of {len(TEXTS)} texts: equal")
        own = AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)
        chat = [dict(role="user", content="Hi"), dict(role="assistant", content="Hello"), dict(role="user", content="?")]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
            if getattr(tok, name) != getattr(own, name):
                sys.exit(f"{name} is {getattr(tok, name)}, from the GGUF file {getattr(own, name)}")
        render = lambda t: t.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        if render(tok) != render(own):
            sys.exit("chats differ")
        print("special ids and chat: equal")
        ids = tok("The quick brown fox jumps over the lazy dog. " * 4)["input_ids"]
        ours = transformers_logits(load(folder), ids)
        theirs = transformers_logits(load(model.parent, gguf_file=model.name), ids)
        check("transformers, folder and GGUF file", float(np.abs(ours - theirs).max()), 0.0)
        # llama.cpp multiplies in another order, over 30 layers.
        check("llama.cpp on F32 and transformers", distance(llama_cpp_logits(again, ids), ours), 1e-3)

        for case, fields in ARCHITECTURES.items():
            fields = dict(fields)
            config = AutoConfig.for_model(fields.pop("model_type"), vocab_size=len(tok), pad_token_id=None,
                                          bos_token_id=1, eos_token_id=2, **fields)
            tiny = AutoModelForCausalLM.from_config(config).eval()
            draw(tiny, torch.Generator().manual_seed(1))
            first, gguf, second = work / f"{case}-1", work / f"{case}.gguf", work / f"{case}-2"
            tiny.save_pretrained(first)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(folder / name, first / name)
            tiny = load(first)
            want = transformers_logits(tiny, ids)
            convert(first, gguf)
            convert(gguf, second)
            # GGUF holds Gemma's norms as 1 + w and Llama 3's wavelengths as factors, each rounded to f32.
            allowed = 1e-4 if case in ("gemma3", "llama") else 0.0
            check(f"{case}: transformers, through GGUF", distance(transformers_logits(load(second), ids), want), allowed)
            # llama.cpp looks GELU up in a table of f16.
            allowed = 5e-3 if case in ("gemma3", "gpt2") else 1e-3
            check(f"{case}: llama.cpp and transformers", distance(llama_cpp_logits(gguf, ids), want), allowed)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
