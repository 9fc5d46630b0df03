"""Write a Llama with 15.7 million random weights: a checkpoint to measure engines with.

    python benchmarks/make_llama_15m.py DIR

It has 8 layers, hidden size 384, intermediate size 1024, 6 heads of 64, tied embeddings, float32
weights, and the tokenizer of the default model with its 4096 tokens. The weights depend on the seed
alone.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minisrv.checkpoint import describe_model, resolve_checkpoint
from minisrv.checkpoint.location import GENERATION_CONFIG

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def make(directory: Path, seed: int = 0) -> LlamaForCausalLM:
    """Make `directory`, write the checkpoint to it, and return the model."""
    default = resolve_checkpoint(None)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=list(describe_model(default).generation.eos_token_ids),
        dtype="float32",
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            # Norms stay 1. With this deviation each product has outputs as large as its inputs.
            if weight.dim() == 2:
                weight.normal_(0.0, weight.shape[1] ** -0.5, generator=generator)
    model.save_pretrained(directory)
    for name in (*TOKENIZER_FILES, GENERATION_CONFIG):
        shutil.copy(default / name, directory)
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    weights = sum(weight.numel() for weight in make(options.directory, options.seed).parameters())
    print(f"{options.directory}: {weights / 1e6:.1f} million weights")
