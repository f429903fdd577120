"""Runs artifacts (layer L1): needs numpy, safetensors and tokenizers."""
