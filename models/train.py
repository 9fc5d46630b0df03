"""Make the default model: `train.py prepare`, then `train.py train`.

Knows: the order of the steps and the optimization. Does not know the texts (`recipe.data`) or the
files of a checkpoint (`recipe.checkpoint`).

`prepare` runs anywhere with apt-get; it downloads three Debian packages, trains the tokenizer and
stores the packages' text as tokens. `train` wants one CUDA GPU and some cores, which generate the
other documents while it runs; on a CPU it works for a smoke test.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from recipe import packages
from recipe.checkpoint import MAX_POSITIONS, new_model, write_tokenizer, write_weights
from recipe.data import (
    IGNORED,
    SHARES,
    PackedBatches,
    generate,
    save_documents,
    split_document,
)
from recipe.tokenizer import build
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.data import DataLoader
from transformers import AttentionInterface

HERE = Path(__file__).resolve().parent
CACHE = HERE / ".cache"
TOKENIZER = CACHE / "tokenizer"
CHECKPOINT = HERE / "minisrv-default"
TOKENIZER_CHARACTERS = 24_000_000


def prepare(args: argparse.Namespace) -> None:
    """Build the tokenizer, the config files and the tokens of the packages' text."""
    rng = random.Random(args.seed)
    root = packages.unpack(CACHE / "packages")
    documents = {
        "definitions": packages.definitions(root),
        "manuals": [p for page in packages.manuals(root) for p in split_document(page)],
    }
    sample: list[str] = []
    for source, share in SHARES.items():
        budget = int(share * TOKENIZER_CHARACTERS)
        while budget > 0:
            stored = documents.get(source)
            text = rng.choice(stored) if stored else generate(rng, source)
            sample.append(text)
            budget -= len(text)
    tokenizer = build(sample)
    write_tokenizer(TOKENIZER, tokenizer)
    tokens = save_documents(CACHE / "packages.npz", documents, tokenizer)
    print(f"vocabulary {tokenizer.get_vocab_size()}, {tokens:,} tokens from packages")


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: BlockMask | torch.Tensor,
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention under a document mask, in the form transformers asks for."""
    query, key = query.to(value.dtype), key.to(value.dtype)
    if isinstance(attention_mask, BlockMask):
        out = flex_attention(
            query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=True
        )
    else:
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
        )
    return out.transpose(1, 2).contiguous(), None


def document_mask(numbers: torch.Tensor) -> BlockMask | torch.Tensor:
    """Causal attention within each document of a row; dense on a CPU, where flex cannot train."""
    rows, length = numbers.shape
    if numbers.device.type == "cpu":
        same = numbers[:, None, :, None] == numbers[:, None, None, :]
        return same & torch.ones(length, length, dtype=torch.bool).tril()

    def visible(
        row: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        return (q >= k) & (numbers[row, q] == numbers[row, k])

    return create_block_mask(visible, rows, None, length, length, device=numbers.device)


def learning_rate(progress: float, peak: float, warmup: float = 0.03) -> float:
    """Linear warm-up, then linear decay to zero."""
    return peak * min(progress / warmup, (1.0 - progress) / (1.0 - warmup))


def train(args: argparse.Namespace) -> None:
    """Train from scratch and write the checkpoint."""
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    output: Path = args.output
    AttentionInterface.register("packed", packed_attention)
    model = new_model().to(device)
    model.set_attn_implementation("packed")
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}", flush=True)

    def loss_of(
        inputs: torch.Tensor, labels: torch.Tensor, mask: BlockMask | torch.Tensor
    ) -> torch.Tensor:
        hidden = model.model(
            input_ids=inputs, attention_mask={"full_attention": mask}, use_cache=False
        ).last_hidden_state
        logits = nn.functional.linear(hidden, model.model.embed_tokens.weight)
        return nn.functional.cross_entropy(
            logits.view(-1, logits.shape[-1]).float(), labels.view(-1), ignore_index=IGNORED
        )

    compiled = torch.compile if device.type == "cuda" else (lambda function: function)
    step_loss, step_mask = compiled(loss_of), compiled(document_mask)
    batches = DataLoader(
        PackedBatches(CACHE, TOKENIZER / "tokenizer.json", args.rows, args.length, args.seed),
        batch_size=None, num_workers=args.workers, pin_memory=device.type == "cuda",
        prefetch_factor=4 if args.workers else None,
    )  # fmt: skip
    begin = last = time.perf_counter()  # set again after the first step, which compiles
    waited, progress, step = 0.0, 0.0, 0
    stream = iter(batches)
    while progress < 1.0:
        before = time.perf_counter()
        inputs, labels, numbers = (t.to(device, non_blocking=True) for t in next(stream))
        waited += time.perf_counter() - before
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, args.lr)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = step_loss(inputs, labels, step_mask(numbers))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step == 1:
            loss.item()
            begin = last = time.perf_counter()
        if step % args.log_every == 0:
            value, now = loss.item(), time.perf_counter()
            speed = args.log_every * inputs.numel() / (now - last)
            print(
                f"step {step} loss {value:.4f} {speed:,.0f} tokens/s, "
                f"waited {waited / (now - last):.0%} for data, {now - begin:.0f} s",
                flush=True,
            )
            last, waited = now, 0.0
        progress = max(step / args.steps, (time.perf_counter() - begin) / args.seconds)
    seconds = time.perf_counter() - begin
    shutil.copytree(TOKENIZER, output, dirs_exist_ok=True)
    write_weights(output, model)
    tokens = step * args.rows * args.length
    print(f"{step} steps, {tokens:,} tokens in {seconds:.0f} s; written to {output.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the default model.")
    parser.add_argument("--seed", type=int, default=1)
    commands = parser.add_subparsers(required=True)
    commands.add_parser("prepare", help="tokenizer and tokens").set_defaults(run=prepare)
    training = commands.add_parser("train", help="train and write the checkpoint")
    training.set_defaults(run=train)
    training.add_argument("--steps", type=int, default=14_000)
    training.add_argument("--seconds", type=float, default=480.0, help="end by then at the latest")
    training.add_argument("--rows", type=int, default=32, help="rows of a batch")
    training.add_argument("--length", type=int, default=MAX_POSITIONS, help="tokens of a row")
    training.add_argument("--lr", type=float, default=3e-3)
    training.add_argument("--workers", type=int, default=8)
    training.add_argument("--log-every", type=int, default=100)
    training.add_argument("--output", type=Path, default=CHECKPOINT)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
