"""Train the small dense models of benchmarks/results/quality.md, except the bundled one.

    python benchmarks/train_small.py --model qwen3-0.9m --out models/dense-qwen3-0.9m \\
        --text train.txt --device cuda

Dense: tens of tokens per parameter, so that 2 and 3 bits hurt. The tokenizer is the bundled
model's (1024 entries). A minute or two of a GPU, an hour or more of one core; the weights differ in
the last bits from machine to machine, the tables name the models by their perplexity.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from scalebits_compiler.frontend.calibration import load_tokenizer

LENGTH = 256
TOKENIZER = Path("models/wikitext2-llama-1m")
COMMON: dict[str, Any] = {
    "vocab_size": 1024,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def qwen3() -> PreTrainedModel:
    """0.9 million parameters, norms of query and key, tied embedding."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            **COMMON,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
        )
    )


def llama() -> PreTrainedModel:
    """2.0 million parameters, twice the width of the bundled model, tied embedding."""
    return LlamaForCausalLM(
        LlamaConfig(
            **COMMON,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
        )
    )


def gpt2() -> PreTrainedModel:
    """0.95 million parameters, biases, LayerNorm, learned positions."""
    return GPT2LMHeadModel(
        GPT2Config(
            **COMMON,
            n_embd=128,
            n_layer=4,
            n_head=4,
            n_positions=LENGTH,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


@dataclass(frozen=True)
class Recipe:
    """How one model is trained; rate: the largest learning rate, batch: windows a step."""

    build: Any
    tokens: int
    rate: float
    batch: int = 32


RECIPES = {
    "qwen3-0.9m": Recipe(qwen3, 42_000_000, 3e-3),
    "llama-2m": Recipe(llama, 64_000_000, 2e-3),
    "gpt2-0.95m": Recipe(gpt2, 44_000_000, 2e-3),
}


def windows(text: Path) -> torch.Tensor:
    """Token ids [windows, 257] of a text: each window's inputs and the token after them."""
    ids = torch.tensor(load_tokenizer(TOKENIZER).encode(text.read_text()).ids)
    return ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)


def train(recipe: Recipe, text: torch.Tensor, device: str, steps: int) -> PreTrainedModel:
    """AdamW with warm-up and cosine decay to 1 %, bfloat16 products, float32 weights."""
    torch.manual_seed(1234)
    model = recipe.build().to(device).train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98), fused=True)
    text, began = text.to(device), time.monotonic()
    order = torch.empty(0, dtype=torch.long, device=device)
    for step in range(steps):
        warm, progress = min(1.0, (step + 1) / 200), step / steps
        scale = warm * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * scale
        if len(order) < recipe.batch:
            order = torch.cat([order, torch.randperm(len(text), device=device)])
        rows, order = text[order[: recipe.batch]], order[recipe.batch :]
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), rows[:, 1:].flatten()
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 500 == 0:
            print(
                f"step {step} of {steps}, {time.monotonic() - began:.0f} s, loss {loss:.3f}",
                flush=True,
            )
    return model.eval()


@torch.no_grad()
def perplexity(model: PreTrainedModel, text: torch.Tensor, device: str) -> float:
    """Per token, windows of 256 without overlap."""
    losses = []
    for rows in text[:512].to(device).split(32):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
        losses.append(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        )
    return float(torch.stack(losses).mean().exp())


def main() -> None:
    """Train one model and save it with the tokenizer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=RECIPES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--text", type=Path, required=True, help="training text")
    parser.add_argument("--test", type=Path, default=Path("data/wikitext2/test.txt"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, help="instead of the recipe's, for a trial")
    options = parser.parse_args()
    recipe = RECIPES[options.model]
    steps = options.steps or recipe.tokens // (recipe.batch * LENGTH)
    model = train(recipe, windows(options.text), options.device, steps).bfloat16()
    model.save_pretrained(options.out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, options.out / name)
    size = sum(p.numel() for p in model.parameters())
    tokens = steps * recipe.batch * LENGTH
    found = perplexity(model.float(), windows(options.test), options.device)
    print(f"{options.out}: {size} parameters, {tokens} tokens, perplexity {found:.2f}")


if __name__ == "__main__":
    main()
