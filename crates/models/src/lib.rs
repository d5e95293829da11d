//! Model code that reads like the papers: Llama, Qwen, Gemma, GPT-2; and the names of their weights.
