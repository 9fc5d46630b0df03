"""What an engine imports and computes before it is ready, and the state of its process after it."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from minisrv.checkpoint import describe_model, open_checkpoint, transformers_decoder
from minisrv.config import EngineConfig
from minisrv.engine.builder import build_engine
from minisrv.engine.heartbeat import Heartbeat
from minisrv.engine.messages import Ready
from minisrv.engine.process import _EngineServer
from minisrv.errors import ModelError
from minisrv.nn.loader import load_model
from minisrv.progress import StartupClock
from tests.checkpoints import make_checkpoint

SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "enforce_eager": True,
    "num_kv_blocks": 8,
    "max_model_len": 64,
}

IMPORTED = """
import json, sys
from minisrv.config import EngineConfig
from minisrv.engine.builder import build_engine
build_engine(EngineConfig(**json.loads(sys.argv[1])))
print(json.dumps([*sys.modules]))
"""

OTHERS = {"jax", "pandas", "scipy", "sklearn", "tensorflow", "torchaudio", "torchvision"}
"""Libraries that transformers uses for other models and tasks, where they are installed."""


LATER = {
    *("torch._dynamo", "torch._inductor", "sympy", "triton", "matplotlib"),
    *("fastapi", "pydantic", "uvicorn", "openai"),
}
"""Modules that an engine on a CPU does not need before it is ready, and other processes never."""


@pytest.mark.parametrize(
    ("model_impl", "models"),
    [("minisrv", set()), ("transformers", {"auto", "encoder_decoder", "llama"})],
)
def test_modules_that_an_engine_imports(model_impl: str, models: set[str], tmp_path: Path) -> None:
    """An engine imports transformers only where its code computes the model, and then the code of
    that model only (`encoder_decoder` comes with the table of all configurations). Of torch's
    compiler it imports nothing, which would take longer than all the rest."""
    settings = {"model": str(make_checkpoint(tmp_path, "llama")), "model_impl": model_impl}
    command = [sys.executable, "-c", IMPORTED, json.dumps(settings | SETTINGS)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = [name.split(".") for name in json.loads(done.stdout)]
    assert ("transformers" in {name[0] for name in found}) == bool(models)
    assert {name[2] for name in found if name[:2] == ["transformers", "models"] and name[2:]} == (
        models
    )
    assert not OTHERS & {name[0] for name in found}
    if model_impl == "minisrv":
        assert not LATER & {".".join(name[:2]) for name in found}


def test_an_engine_runs_one_step_on_the_meta_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of a model with many layers and experts takes longer than making it. The steps in
    which a model is tried out are those of its description, which is cached."""
    directory = make_checkpoint(tmp_path, "llama")
    steps = []
    recorded = transformers_decoder._recorded

    def counted(*args: Any, **kwargs: Any) -> Any:
        steps.append(kwargs)
        return recorded(*args, **kwargs)

    config = describe_model(directory, "transformers").model
    monkeypatch.setattr(transformers_decoder, "_recorded", counted)
    load_model(config, directory, dtype=torch.float32)
    assert len(steps) == 1


@pytest.mark.usefixtures("collections")
def test_a_capture_leaves_nothing_frozen(tmp_path: Path) -> None:
    """An engine in a process that has frozen nothing leaves its objects to the collector."""
    graphs = SETTINGS | {"enforce_eager": False, "max_num_seqs": 1, "max_num_batched_tokens": 8}
    config = EngineConfig(model=str(make_checkpoint(tmp_path, "llama")), **graphs)
    assert build_engine(config).runner.graphs
    assert gc.get_freeze_count() < 10_000  # from Python 3.12 on, what is never freed counts


@pytest.mark.usefixtures("collections")
def test_garbage_is_collected_while_an_engine_serves(tmp_path: Path) -> None:
    """Collections are off only while the engine loads."""
    config = EngineConfig(model=str(make_checkpoint(tmp_path, "llama")), **SETTINGS)
    server = _EngineServer(f"ipc://{tmp_path}/engine", Heartbeat(tmp_path / "heartbeat"))
    try:
        server.load(config, lambda: open_checkpoint(config), StartupClock())
        assert isinstance(server.state, Ready)
        assert gc.isenabled()
        assert gc.get_freeze_count() > 10_000
    finally:
        server.close()


@pytest.mark.usefixtures("collections")
def test_garbage_is_collected_after_an_engine_could_not_be_loaded(tmp_path: Path) -> None:
    config = EngineConfig(model=str(make_checkpoint(tmp_path, "llama")), **SETTINGS)
    checkpoint = open_checkpoint(config)
    (tmp_path / "model.safetensors").unlink()
    server = _EngineServer(f"ipc://{tmp_path}/engine", Heartbeat(tmp_path / "heartbeat"))
    try:
        with pytest.raises(ModelError):
            server.load(config, lambda: checkpoint, StartupClock())
        assert gc.isenabled()
    finally:
        server.close()
