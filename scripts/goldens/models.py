#!/usr/bin/env python3
"""Tiny random models with the logits that transformers computes for them, for the tests of crates/models.

Run:    python scripts/goldens/models.py        (needs torch, transformers, safetensors, gguf; a few seconds)
Writes: crates/models/tests/golden/CASE/config.json            as published configurations are written
        crates/models/tests/golden/CASE/config.resaved.json    the same, as transformers 5 writes it
        crates/models/tests/golden/CASE/model.safetensors      weights in bf16 (drawn so that bf16 holds them exactly)
        crates/models/tests/golden/CASE/expected.safetensors   tokens and f32 logits of two sequences; how far these
                                                               are from the same computation in f64
        crates/models/tests/golden/CASE.gguf                   the same model, by the gguf package's names and keys
        crates/models/tests/golden/rope.json                   rotary frequencies of real models

Everything is computed on one thread.
"""

import json
import pathlib
import re
import sys

import gguf
import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

OUT = pathlib.Path(__file__).resolve().parents[2] / "crates/models/tests/golden"
VOCAB, LENGTHS = 48, (17, 9)

# Odd head counts, groups, windows shorter than the sequences, stretched wavelengths inside of them.
COMMON = dict(
    vocab_size=VOCAB, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3,
    num_key_value_heads=1, rms_norm_eps=1e-5, max_position_embeddings=128, hidden_act="silu",
)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32,
)
CASES = {
    "llama": dict(COMMON, model_type="llama", rope_theta=500.0, rope_scaling=LLAMA3, tie_word_embeddings=False),
    "llama_bias": dict(
        COMMON, model_type="llama", rope_scaling=dict(type="linear", factor=2.5), tie_word_embeddings=True,
        attention_bias=True, mlp_bias=True,
    ),
    "mistral": dict(
        COMMON, model_type="mistral", num_attention_heads=4, num_key_value_heads=2, head_dim=6, rope_theta=10000.0,
        sliding_window=5, tie_word_embeddings=False,
    ),
    "qwen2": dict(
        COMMON, model_type="qwen2", rope_theta=1000.0, use_sliding_window=True, sliding_window=4,
        max_window_layers=1, tie_word_embeddings=True,
        rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
    ),
    "qwen3": dict(
        COMMON, model_type="qwen3", head_dim=16, rope_theta=1000000.0, attention_bias=False, use_sliding_window=False,
        sliding_window=None, max_window_layers=2, rope_scaling=None, tie_word_embeddings=False,
    ),
    "gemma3": dict(
        model_type="gemma3_text", vocab_size=VOCAB, hidden_size=24, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=3, num_key_value_heads=1, head_dim=8, rms_norm_eps=1e-6, max_position_embeddings=128,
        rope_theta=1000000.0, rope_local_base_freq=10000.0, rope_scaling=dict(rope_type="linear", factor=8.0),
        sliding_window=5, sliding_window_pattern=3, query_pre_attn_scalar=12, attn_logit_softcapping=None,
        final_logit_softcapping=3.0, hidden_activation="gelu_pytorch_tanh", attention_bias=False,
    ),
    "gpt2": dict(
        model_type="gpt2", vocab_size=VOCAB, n_embd=18, n_layer=2, n_head=3, n_positions=20, n_inner=None,
        activation_function="gelu_new", layer_norm_epsilon=1e-5,
    ),
}
# Rotary embeddings as published: head_dim, context and the fields of config.json.
ROPES = {
    "SmolLM2-135M": (64, 8192, dict(rope_type="default", rope_theta=100000.0)),
    "Llama-3.2-1B": (64, 131072, dict(
        rope_type="llama3", rope_theta=500000.0, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )),
    "Qwen2.5-7B at 128k": (128, 32768, dict(
        rope_type="yarn", rope_theta=1000000.0, factor=4.0, original_max_position_embeddings=32768,
    )),
    "gemma-3-4b global": (256, 131072, dict(rope_type="linear", rope_theta=1000000.0, factor=8.0)),
}
NOISE = ("transformers_version", "id2label", "label2id", "_name_or_path")


def draw(model, generator):
    """Weights large enough that every part of the model shows in the logits, all of them bf16 numbers."""
    for name, p in model.named_parameters():
        x = torch.randn(p.shape, generator=generator)
        if p.ndim == 1:
            centre = 1.0 if name.endswith("weight") and "gemma3" not in model.config.model_type else 0.0
            x = centre + 0.3 * x
        elif "embed" in name or "wte" in name or "wpe" in name:
            x = 0.7 * x
        else:
            fan_in = p.shape[0] if "gpt2" in model.config.model_type else p.shape[1]
            x = 1.3 * x / fan_in**0.5
        p.data = x.bfloat16().float()


def logits(model, sequences):
    with torch.no_grad():
        return torch.cat([model(torch.tensor([s])).logits[0] for s in sequences])


def interleave_rows(w, n_heads):
    """Rows of each head from halves (j, j + d/2) to neighbours, as llama GGUF files have them."""
    half = w.shape[0] // n_heads // 2
    order = [2 * h * half + j + part * half for h in range(n_heads) for j in range(half) for part in (0, 1)]
    return w[order]


def write_gguf(path, model, config):
    arch = {"llama": "llama", "gemma3_text": "gemma3", "gpt2": "gpt2"}[config.model_type]
    w = gguf.GGUFWriter(path, arch)
    w.add_context_length(config.max_position_embeddings)
    w.add_embedding_length(config.hidden_size)
    w.add_block_count(config.num_hidden_layers)
    w.add_head_count(config.num_attention_heads)
    extra = {}
    if arch == "gpt2":
        w.add_feed_forward_length(4 * config.n_embd)
        w.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        w.add_feed_forward_length(config.intermediate_size)
        w.add_head_count_kv(config.num_key_value_heads)
        w.add_layer_norm_rms_eps(config.rms_norm_eps)
        w.add_key_length(config.head_dim)
        w.add_value_length(config.head_dim)
    if arch == "llama":
        w.add_vocab_size(config.vocab_size)
        w.add_rope_dimension_count(config.head_dim)
        w.add_rope_freq_base(config.rope_parameters["rope_theta"])
        stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device=None)
        exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        plain = 1.0 / config.rope_parameters["rope_theta"] ** exponents
        extra["rope_freqs.weight"] = (plain / stretched).numpy()
    if arch == "gemma3":
        w.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(config.rope_parameters["full_attention"]["factor"])
        w.add_sliding_window(config.sliding_window)
        w.add_sliding_window_pattern([t == "sliding_attention" for t in config.layer_types])
        w.add_final_logit_softcapping(config.final_logit_softcapping)
    names = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == arch),
                                     config.num_hidden_layers)
    for name, p in model.named_parameters():
        x = p.detach().numpy()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            x = interleave_rows(x, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        if arch == "gemma3" and name.endswith("norm.weight"):
            x = x + 1
        if arch == "gpt2" and ("c_attn.weight" in name or "c_proj.weight" in name or "c_fc.weight" in name):
            x = x.T
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored, name
        extra[stored] = np.ascontiguousarray(x)
    for stored, x in extra.items():
        if x.ndim == 1:
            w.add_tensor(stored, x.astype(np.float32))
        else:
            kind = gguf.GGMLQuantizationType.BF16
            w.add_tensor(stored, gguf.quants.quantize(x.astype(np.float32), kind), raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def ropes():
    found = {}
    for name, (head_dim, context, fields) in ROPES.items():
        config = transformers.LlamaConfig(
            hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim, max_position_embeddings=context,
            rope_parameters=dict(fields),
        )
        rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
        found[name] = dict(head_dim=head_dim, **fields, attention_factor=rotary.attention_scaling,
                           inv_freq=[float(f"{x:.9g}") for x in rotary.inv_freq.tolist()])
    text = json.dumps(found, indent=1)
    (OUT / "rope.json").write_text(re.sub(r"\s*\n\s{3,}", " ", text) + "\n")


def main():
    torch.set_num_threads(1)
    ropes()
    for number, (case, fields) in enumerate(CASES.items()):
        folder = OUT / case
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(fields, indent=1) + "\n")
        config = transformers.AutoConfig.from_pretrained(folder)
        resaved = {k: v for k, v in config.to_dict().items() if k not in NOISE}
        (folder / "config.resaved.json").write_text(json.dumps(resaved, indent=1) + "\n")
        config._attn_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        generator = torch.Generator().manual_seed(number)
        draw(model, generator)
        if config.model_type == "gemma3_text":
            # What transformers does beside a table in bf16, which this one is as soon as it is saved.
            scale = model.model.embed_tokens.embed_scale
            model.model.embed_tokens.embed_scale = scale.bfloat16().float()
        sequences = [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]
        expected = logits(model, sequences)
        results = {}
        if config.model_type == "gemma3_text":
            # A GGUF file cannot say query_pre_attn_scalar; its readers take head_dim, so these logits are its own.
            for layer in model.model.layers:
                layer.self_attn.scaling = config.head_dim**-0.5
            results["gguf_logits"] = logits(model, sequences)
            for layer in model.model.layers:
                layer.self_attn.scaling = config.query_pre_attn_scalar**-0.5
        tensors = {n: p.detach().bfloat16().contiguous() for n, p in model.named_parameters()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        tokens = torch.tensor([t for s in sequences for t in s], dtype=torch.int32)
        if case in ("llama", "gemma3", "gpt2"):
            write_gguf(OUT / f"{case}.gguf", model, config)
        off = (logits(model.double(), sequences) - expected).abs().max().float()
        results |= {"tokens": tokens, "logits": expected, "f32_error": off.reshape(1)}
        save_file(results, folder / "expected.safetensors")
        print(f"{case}: largest logit {expected.abs().max():.3f}, float32 against float64 {off:.1e}", file=sys.stderr)


if __name__ == "__main__":
    main()
