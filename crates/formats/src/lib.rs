//! Model files: GGUF and safetensors, read by memory map, written atomically, every length checked.
