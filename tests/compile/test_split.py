"""A forward is traced once and split into pieces, of which those alike are one, and products."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from minisrv.compile import artifacts
from minisrv.compile.artifacts import compiler_settings
from minisrv.compile.values import AddNormCall, AttentionCall, PieceCall, ProductCall
from minisrv.kernels.linear import onednn_takes
from tests.architectures import make_transformers_checkpoint
from tests.checkpoints import make_checkpoint
from tests.compile.compiled import SHAPE, job_of, schedule_of


@pytest.mark.parametrize("implementation", ["transformers", "minisrv"])
def test_there_are_two_pieces_whatever_the_number_of_layers(implementation: str, tmp_path: Path):
    contents = []
    for layers in (2, 4):
        directory = make_checkpoint(tmp_path / str(layers), num_hidden_layers=layers)
        schedule = schedule_of(job_of(directory, implementation))
        assert not counters["graph_break"]
        kinds = [type(call) for call in schedule.calls]
        layer = [AttentionCall, *[ProductCall] * 4]
        assert kinds == [PieceCall, *layer * (layers - 1), AttentionCall, PieceCall]
        numbers = [call.piece for call in schedule.calls if isinstance(call, PieceCall)]
        assert numbers == [0, 1], "nothing in the other layers is for a compiler"
        contents.append([piece.content() for piece in schedule.pieces])
    assert contents[0] == contents[1]


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_nothing_of_a_layer_that_norms_behind_products_is_for_a_compiler(name: str, tmp_path: Path):
    make_transformers_checkpoint(tmp_path, name, num_hidden_layers=4)
    schedule = schedule_of(job_of(tmp_path, "transformers", dtype="bfloat16"))
    kinds = [type(call) for call in schedule.calls]
    mlp = [AddNormCall, ProductCall, ProductCall, AddNormCall]
    layer = [AttentionCall, ProductCall, *mlp, ProductCall]
    assert kinds == [PieceCall, *layer * 3, AttentionCall, PieceCall]
    assert len(schedule.pieces) == 2


@pytest.mark.parametrize(
    ("implementation", "dtype", "quantization"),
    [("transformers", "bfloat16", "int8"), ("minisrv", "bfloat16", None)],
)
def test_other_formats_of_weights(
    implementation: str, dtype: str, quantization: str | None, tmp_path: Path
):
    directory = make_checkpoint(tmp_path)
    job = job_of(directory, implementation, dtype=dtype, quantization=quantization)
    assert len(schedule_of(job).pieces) == 2


def test_another_constant_is_another_piece(tmp_path: Path):
    contents = []
    for eps in (1e-5, 1e-6):
        directory = make_checkpoint(tmp_path / str(eps), rms_norm_eps=eps)
        schedule = schedule_of(job_of(directory, "minisrv"))
        contents.append({piece.content() for piece in schedule.pieces})
    assert not contents[0] & contents[1]


KEYS = """
import sys, resource
from pathlib import Path
from tests.compile.compiled import job_of, schedule_of
job = job_of(Path(sys.argv[1]), "transformers")
print(job.key(), *[piece.digest(*job.environment()) for piece in schedule_of(job).pieces])
"""


def test_keys_are_the_same_in_every_process_and_depend_on_what_is_compiled(tmp_path: Path):
    directory = make_checkpoint(tmp_path, "qwen3", **SHAPE)
    job = job_of(directory, "transformers")
    digests = [piece.digest(*job.environment()) for piece in schedule_of(job).pieces]
    program = [sys.executable, "-c", KEYS, str(directory)]
    root = Path(__file__).parents[2]
    told = subprocess.run(program, check=True, capture_output=True, text=True, cwd=root).stdout
    assert told.split() == [job.key(), *digests]
    other = job_of(directory, "transformers", threads=2)
    assert other.key() != job.key()
    assert other.environment() != job.environment()
    # 9,000 tokens need pieces for more rows than those of 64 tokens.
    assert job_of(directory, "transformers", max_num_tokens=9000).key() != job.key()
    assert job_of(directory, "transformers", max_num_tokens=65).key() == job.key()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ATEN_CPU_CAPABILITY", True),
        ("TORCHINDUCTOR_USE_FAST_MATH", True),
        ("AOT_INDUCTOR_DEBUG_INTERMEDIATE_VALUE_PRINTER", True),
        ("TORCHINDUCTOR_CACHE_DIR", False),
        ("TORCHINDUCTOR_COMPILE_THREADS", False),
        ("TORCH_LOGS", False),
    ],
)
def test_keys_depend_on_the_variables_by_which_the_compiler_is_set(
    name: str, changes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A package that was made for a debugger, or for a smaller processor, was served by every later
    start without the variable."""
    job = job_of(make_checkpoint(tmp_path), "minisrv")
    before = job.key(), job.environment()
    monkeypatch.setenv(name, "1")
    assert (job.key() != before[0], job.environment() != before[1]) == (changes, changes)
    monkeypatch.setenv(name, "2")
    assert len({before[0], job.key()}) == 1 + changes


def test_triton_is_set_for_a_gpu_only(monkeypatch: pytest.MonkeyPatch):
    before = compiler_settings("cpu"), compiler_settings("cuda")
    monkeypatch.setenv("TRITON_F32_DEFAULT", "ieee")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    assert compiler_settings("cpu") == before[0]
    assert {*compiler_settings("cuda")} - {*before[1]} == {"TRITON_F32_DEFAULT=ieee"}


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 128,
}


@pytest.mark.parametrize(
    ("name", "settings", "depends"),
    [
        ("llama", {}, False),
        ("gemma3_text", {}, False),
        ("gpt2", {}, False),
        ("llama", {"rope_parameters": LONGROPE}, True),
    ],
)
def test_keys_depend_on_the_context_where_the_code_does(
    name: str, settings: dict[str, Any], depends: bool, tmp_path: Path
):
    """Without --max-model-len the context may follow the memory that is free. A model with a long
    one was compiled anew at each start."""
    make_transformers_checkpoint(tmp_path, name, num_hidden_layers=2, **settings)
    job = job_of(tmp_path, "transformers")
    jobs = [replace(job, model=job.model.for_context(context)) for context in (100, 300)]
    made = [schedule_of(one) for one in jobs]
    contents = {(repr(one.calls), *(piece.content() for piece in one.pieces)) for one in made}
    assert len({one.key() for one in jobs}) == 1 + depends
    assert len(contents) <= 1 + depends


ENVIRONMENT = "from minisrv.compile import artifacts; print(artifacts.environment('cpu'))"


@pytest.mark.skipif(not onednn_takes(torch.bfloat16), reason="oneDNN has no bfloat16 here")
def test_keys_depend_on_the_layouts_of_weights():
    """A program reads weights in the layout of the process that compiled it. It was loaded by one
    whose weights had another, because a variable hides instructions from oneDNN."""
    settings = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    told = subprocess.run(
        [sys.executable, "-c", ENVIRONMENT],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=settings,
    )
    assert told.stdout.strip() != str(artifacts.environment("cpu"))
