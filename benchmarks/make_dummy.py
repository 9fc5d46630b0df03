"""Make a directory that `minisrv serve DIR --load-format dummy` serves, of a config alone.

    python benchmarks/make_dummy.py benchmarks/configs/qwen3-0.6b DIR

Random weights have no tokenizer, and a server needs one. This one has a token for each id of the
config's vocabulary: the 256 bytes, by which text is encoded, and words of letters, so that whatever
is sampled is text and a client sees every token when it comes. Say nothing about what it answers.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def make(config: Path, directory: Path) -> int:
    """Write config.json and tokenizer.json to `directory`, which is made; returns the size of the
    vocabulary."""
    size: int = json.loads((config / "config.json").read_text())["vocab_size"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = (f"Ġ{_word(number)}" for number in range(size - len(alphabet)))
    vocab = {token: index for index, token in enumerate((*alphabet, *words))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    shutil.copy(config / "config.json", directory)
    return size


def _word(number: int) -> str:
    """As a number to the base of 26, in letters; no two are the same."""
    letters = ""
    while number or not letters:
        number, digit = divmod(number, 26)
        letters += chr(ord("a") + digit)
    return letters


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("directory", type=Path, metavar="DIR")
    options = parser.parse_args()
    print(f"{options.directory}: {make(options.config, options.directory)} tokens")
