"""What the result of a model is (L0): logits of tokens, or states."""

CAUSAL = "causal-lm"
MASKED = "masked-lm"
SEQ2SEQ = "seq2seq-lm"
ENCODER = "encoder"
TASKS = (CAUSAL, MASKED, SEQ2SEQ, ENCODER)
"""Logits of the next token, of the token at the same place, of a second text; hidden states."""
