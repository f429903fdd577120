"""Runs artifacts (layer L1): needs numpy, apache-tvm-ffi, safetensors and tokenizers."""
