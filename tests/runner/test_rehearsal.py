"""What is wrong with the machine is told apart from what a model cannot do without memory."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from minisrv.certification.rehearsal import rehearse
from minisrv.config import EngineConfig
from minisrv.engine.builder import build_engine
from minisrv.runner.model_runner import ModelRunner
from tests.checkpoints import make_checkpoint


@pytest.mark.parametrize(
    ("error", "problems"),
    [
        (RuntimeError("no values here\nat all"), ["RuntimeError: no values here"]),
        (OSError(errno.ENOSPC, "No space left on device"), None),
        (MemoryError(), None),
    ],
)
def test_only_errors_of_the_launches_are_problems(
    error: Exception,
    problems: list[str] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = str(make_checkpoint(tmp_path, "llama"))
    engine = build_engine(
        EngineConfig(
            checkpoint,
            device="cpu",
            dtype="float32",
            max_num_seqs=2,
            max_num_batched_tokens=8,
            max_model_len=64,
            num_kv_blocks=33,
            enforce_eager=True,
        )
    )

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(ModelRunner, "launch", fails)
    if problems is None:
        with pytest.raises(type(error)):
            rehearse(engine.runner, engine.scheduler.block_pool)
    else:
        assert rehearse(engine.runner, engine.scheduler.block_pool) == problems
