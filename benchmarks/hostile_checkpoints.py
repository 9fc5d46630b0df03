"""Tests that any checkpoint, whatever its files hold, is opened or refused with a clear error.

    python benchmarks/hostile_checkpoints.py --count 4000 --json F

Each case damages a tiny checkpoint as its seed decides (`hostile_cases.py`): values in its JSON
files, their bytes, the headers of its weights, the index of its shards, the sizes in its config,
the work of its tokenizer, its chat template, and links. Then the checkpoint is opened as a server
does it: its small files are read, its tokenizer is made and used, a chat is rendered, and an engine
is built from it.

That must succeed or raise an error of `minisrv.errors`, within SECONDS of processor time and MEMORY
bytes, and no file outside of the checkpoint may be read, which is seen by the times of last access.
Each case has a process of its own, forked from one that has imported the libraries. A case that
fails there, or is slow, is opened once more as the launcher does it, from a new process, which runs
transformers in a child with its own limits; the outcome of that process counts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.clients.needs import needs
from benchmarks.hostile_cases import WAYS, Case
from minisrv.checkpoint import open_checkpoint
from minisrv.config import EngineConfig
from minisrv.errors import MinisrvError, RequestError
from minisrv.processes import bound_resource
from minisrv.tools.environment import environment

SECONDS = 45
"""Maximum processor time of a case in seconds. The process that reads the small files may use 30 of
them, and few cases take more than one."""
MEMORY = 5 << 30
"""Maximum private memory, in bytes, of a case's process. The process that reads the small files may
have 4 GiB."""
WALL_SECONDS = 4 * SECONDS
MAX_MESSAGE = 4000
"""Number of characters from which the message of an error is too long."""
SLOW_SECONDS = 5.0
"""Processor time in seconds above which a case is listed as slow."""

CHAT = [{"role": "user", "content": "a" * 30 + " naïve 你好 {% raise %}"}]


def open_and_use(directory: Path) -> str:
    """Do what a server does with a checkpoint until it is ready, and for a first chat. Returns
    "opened" or the name of an error of minisrv; any exception that is raised is a fault."""
    try:
        config = EngineConfig(
            model=str(directory), device="cpu", enforce_eager=True, kv_cache_memory=1 << 24
        )
        checkpoint = open_checkpoint(config)
        checkpoint.save(directory / "saved")
        # Imported only here, after the checkpoint was opened, as in the launcher.
        from minisrv.engine.builder import build_engine
        from minisrv.text.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_description(checkpoint.tokenizer)
        with suppress(RequestError):  # such an error would be the answer to that request
            tokenizer.decode(tokenizer.encode(CHAT[0]["content"]))
            tokenizer.apply_chat_template(CHAT)
        build_engine(config, checkpoint=checkpoint)
    except MinisrvError as error:
        return type(error).__name__ if len(error.message) < MAX_MESSAGE else "RAISED a long message"
    return "opened"


def tried(directory: Path) -> dict[str, Any]:
    """Open the checkpoint, and return the outcome (`opened`, the name of an error, or `RAISED` and
    the exception), the processor time and the peak memory."""
    began = _processor_seconds()
    try:
        outcome = open_and_use(directory)
    except BaseException as error:
        where = ""
        at = error.__traceback__
        while at is not None:
            where, at = f"{at.tb_frame.f_code.co_filename}:{at.tb_lineno}", at.tb_next
        outcome = f"RAISED {type(error).__name__}: {str(error)[:200]} at {where[-60:]}"
    peak = max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    seconds = round(_processor_seconds() - began, 2)
    return {"outcome": outcome, "processor_seconds": seconds, "peak_mb": peak >> 10}


def _processor_seconds() -> float:
    told = os.times()
    return told.user + told.system + told.children_user + told.children_system


def bound() -> None:
    """Let the kernel end this process if it uses too much processor time or memory."""
    bound_resource(resource.RLIMIT_CPU, SECONDS)
    bound_resource(resource.RLIMIT_DATA, MEMORY)


def forked(directory: Path, log: Path) -> dict[str, Any]:
    """Return the outcome of a forked process that opens the checkpoint."""
    line, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        # Libraries, and child processes, print to these descriptors.
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        bound()
        signal.alarm(WALL_SECONDS)
        os.write(theirs, json.dumps(tried(directory)).encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(line, "rb") as answers:
        body = answers.read()
    _, status = os.waitpid(child, 0)
    return json.loads(body) if body else {"outcome": f"RAISED status {status}"}


def launched(directory: Path) -> dict[str, Any]:
    """Return the outcome of a new process, which has imported neither transformers nor torch."""
    command = [sys.executable, __file__, "--open", str(directory)]
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=WALL_SECONDS,
            check=False,
            preexec_fn=bound,
        )
        return json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
        return {"outcome": f"RAISED {type(error).__name__}: {error}"[:200]}


def read_since(secrets: Path) -> list[str]:
    """Return the names of the files in `secrets` that were read since `forget_reading`."""
    return sorted(path.name for path in secrets.iterdir() if path.stat().st_atime_ns != 0)


def forget_reading(secrets: Path) -> None:
    """Set the times of last access so that the next access to each file in `secrets` is noticed. A
    file system that updates these times seldom (relatime) does so if the last access was before the
    last change."""
    for path in secrets.iterdir():
        os.utime(path, ns=(0, 1))


def run(root: Path, seeds: range, ways: list[str]) -> dict[str, Any]:
    """Damage and open a checkpoint for each seed, until none is left or the user interrupts.

    ways: names in `WAYS` of the kinds of damage, which are used in turn.
    """
    with needs("pip install -e '.[test]'"):
        from tests.checkpoints import make_checkpoint
    # These are imported before processes are forked, but not at the top, because this file also
    # runs as the process of `launched`, which must not have imported them.
    import minisrv.checkpoint.by_transformers
    import minisrv.engine.builder
    import minisrv.text.tokenizer  # noqa: F401

    good = make_checkpoint(root / "good", num_hidden_layers=1)
    sharded = make_checkpoint(root / "sharded", num_hidden_layers=1, max_shard_size="50KB")
    for path in sharded.iterdir():
        if "safetensors" not in path.name:
            path.unlink()
    secrets = root / "secrets"
    shutil.copytree(good, secrets)
    (secrets / "model.safetensors").rename(secrets / "model.bin")
    for name in ("tokenizer.4.0.json", "passwd", "tokenizer.model", "vocab.json", "vocab.txt"):
        shutil.copy(good / "tokenizer.json", secrets / name)
    (secrets / "chat_template.jinja").write_text("a secret")
    forget_reading(secrets)
    (secrets / "passwd").read_bytes()
    assert read_since(secrets) == ["passwd"], "this file system does not note the times of reading"
    outcomes: Counter[str] = Counter()
    faults, slow, again, peak = [], [], 0, 0
    log = root / "log"
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    done = 0
    with suppress(KeyboardInterrupt):
        for seed in tqdm(seeds):
            rng = random.Random(seed)
            way = ways[seed % len(ways)]
            case = Case(root / "checkpoint", sharded, secrets)
            shutil.rmtree(case.directory, ignore_errors=True)
            shutil.copytree(good, case.directory)
            what = WAYS[way](rng, case)
            forget_reading(secrets)
            found = forked(case.directory, log)
            if found["outcome"].startswith("RAISED") or found["processor_seconds"] > SLOW_SECONDS:
                again += 1
                before, found = found, launched(case.directory)
                if "processor_seconds" in found and found["processor_seconds"] > SLOW_SECONDS:
                    slow.append({"seed": seed, "what": what, **found})
                found["in_process"] = before["outcome"]
            log.unlink()
            read = read_since(secrets)
            peak = max(peak, found.get("peak_mb", 0))
            fault = found["outcome"].startswith("RAISED") or read
            outcomes[f"{way}: {'FAULT' if fault else found['outcome']}"] += 1
            if fault:
                faults.append({"seed": seed, "what": what, "read": read, **found})
                tqdm.write(json.dumps(faults[-1]))
            done += 1
    return {
        "cases": done,
        "outcomes": dict(sorted(outcomes.items())),
        "opened_by_a_launcher": again,
        "peak_mb": peak,
        "of_which_libraries_mb": base,
        "slow": slow,
        "faults": faults,
    }


def main(argv: list[str] | None = None) -> None:
    """Run, print, and write the JSON. Exits with 1 if a checkpoint was neither opened nor
    refused, or a file outside of it was read."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=len(WAYS) * 10, help="of cases")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS], metavar="WAY")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.open is not None:
        print(json.dumps(tried(options.open)))
        return
    began = time.monotonic()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with TemporaryDirectory() as place:
        root = Path(place)
        os.environ["XDG_CACHE_HOME"] = str(root / "cache")
        found = run(root, range(options.seed, options.seed + options.count), options.ways)
    found = {"seconds": round(time.monotonic() - began), **found}
    print(json.dumps(found, indent=1))
    if options.json is not None:
        where = msgspec.to_builtins(environment())
        told = {"environment": where, "count": options.count, "seed": options.seed, **found}
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    sys.exit(1 if found["faults"] else 0)


if __name__ == "__main__":
    main()
