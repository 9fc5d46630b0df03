"""A start on a GPU finds all of its kernels compiled, and so do the steps of requests."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.gpu

START = """
import json, sys
import triton
from minisrv import LLM, SamplingParams
compiled = []

def listen(*, src, cache_hit, **_):
    if not cache_hit:
        compiled.append(src.name)

if __name__ == "__main__":
    triton.knobs.compilation.listener = listen
    llm = LLM(device="cuda", max_num_seqs=24, max_num_batched_tokens=256, **json.loads(sys.argv[1]))
    at_start = list(compiled)
    params = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=12, ignore_eos=True)
    prompts = [{"prompt_token_ids": [1 + n] * (1 + 5 * n)} for n in range(40)]
    llm.generate(prompts, params, use_tqdm=False)
    print(json.dumps([at_start, compiled[len(at_start):]]))
"""


def _paths() -> list[str]:
    """Return where this process finds packages besides."""
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "cudagraph_mode": "full-and-piecewise"},
        {"dtype": "bfloat16", "model_impl": "transformers", "compilation_mode": 0},
        {"dtype": "float32"},
        {
            "model": str(ROOT / "benchmarks/configs/qwen3-0.6b"),
            "load_format": "dummy",
            "model_impl": "transformers",
            "compilation_mode": 3,
            "compile_wait": True,
            "max_model_len": 1024,
            "kv_cache_memory": 2 << 30,
        },
    ],
)
def test_this_process_compiles_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    """Whatever Triton compiles in the engine's own process was not rehearsed."""
    caches = {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "XDG_CACHE_HOME": str(tmp_path / "xdg")}
    script = tmp_path / "start.py"
    script.write_text(START)
    done = subprocess.run(
        [sys.executable, script, json.dumps(settings)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *_paths()]), **caches},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=400,
    )
    at_start, while_serving = json.loads(done.stdout.splitlines()[-1])
    assert at_start == []
    assert while_serving == []
    assert list((tmp_path / "triton").rglob("*.cubin"))


def test_kernels_are_compiled_before_a_model_is_served(tmp_path: Path) -> None:
    """`minisrv compile` fills the cache, and the first start then starts no process that
    compiles."""
    caches = {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "XDG_CACHE_HOME": str(tmp_path / "xdg")}
    command = [sys.executable, "-P", "-m", "minisrv.cli", "compile", "--device", "cuda"]
    command += ["--dtype", "bfloat16", "--max-num-seqs", "4", "--max-num-batched-tokens", "32"]
    outputs = []
    for _ in range(2):
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *_paths()]), **caches},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
            timeout=400,
        )
        outputs.append(done.stdout)
    assert [bool(re.search(r"compiled \d+ kernels in", said)) for said in outputs] == [True, False]
    assert all("the model's own code is served uncompiled" in said for said in outputs)
