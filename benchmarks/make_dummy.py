"""Make a directory with a config.json and a tokenizer, for servers that draw random weights.

    python benchmarks/make_dummy.py benchmarks/configs/qwen3-0.6b DIR

minisrv itself needs no tokenizer for this: `--load-format dummy` serves a config.json alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from minisrv.checkpoint.stand_in import stand_in_tokenizer


def make(config: Path, directory: Path) -> int:
    """Make `directory`, write config.json and tokenizer.json to it, and return the size of the
    vocabulary."""
    size: int = json.loads((config / "config.json").read_text())["vocab_size"]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(stand_in_tokenizer(size).backend)
    shutil.copy(config / "config.json", directory)
    return size


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("directory", type=Path, metavar="DIR")
    options = parser.parse_args()
    print(f"{options.directory}: {make(options.config, options.directory)} tokens")
